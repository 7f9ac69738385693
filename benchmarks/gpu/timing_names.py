"""Names in the items of the step `time`, for its process and for the table."""

FIRST = ("fpn2", "fpn1", "s2", "rois")  # cases, the most important first
DTYPES = ("float32", "bfloat16", "float16")
LAYOUTS = ("NCHW", "NHWC")
PASSES = ("forward", "grad_features", "grad_logits", "forward+backward")
OURS, MMCV = "carafepp", "mmcv"
FLOORS = ("floor copy_1_to_1", "floor copy_1_to_3")
