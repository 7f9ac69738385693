"""Enlarge a feature map by 3/2, on NumPy arrays: python with_numpy.py."""

import numpy as np

import carafepp

rng = np.random.default_rng(0)
features = rng.standard_normal((2, 32, 40, 60), np.float32)
height, width = carafepp.output_size(features.shape[2:], up=3, down=2)

# A content encoder of stride 2 would predict these: 3*3 taps for each of the 3*3 outputs of a cell.
logits = rng.standard_normal((2, 3 * 3 * 3 * 3, 20, 30), np.float32)
output = np.empty((2, 32, height, width), np.float32)  # recycled by each call
for _ in range(3):
    carafepp.reassemble_with_logits(features, logits, up=3, down=2, kernel_size=3, out=output)

masks = carafepp.normalize_masks(logits, up=3, kernel_size=3, size=(height, width))
assert np.allclose(masks.sum(1), 1, atol=1e-5)
assert np.allclose(output, carafepp.reassemble(features, masks, up=3, down=2), atol=1e-5)
print(features.shape, "->", output.shape)
