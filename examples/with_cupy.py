"""Upsample CuPy arrays in a stream and a CUDA graph, without PyTorch: python with_cupy.py."""

import sys

try:
    import cupy
except ImportError:
    sys.exit("CuPy is not installed: pip install cupy-cuda13x")

import carafepp

if not cupy.cuda.is_available():
    print("no GPU here: nothing was run")
    sys.exit()

features = cupy.random.standard_normal((2, 64, 50, 76), cupy.float32)
logits = cupy.random.standard_normal((2, 5 * 5 * 2 * 2, 50, 76), cupy.float32)
output = cupy.empty((2, 64, 100, 152), cupy.float32)
cupy.cuda.Device().synchronize()

with cupy.cuda.Stream(non_blocking=True) as stream:
    stream.begin_capture()
    carafepp.reassemble_with_logits(features, logits, up=2, out=output)
    graph = stream.end_capture()
    graph.launch(stream)
stream.synchronize()

expected = carafepp.reassemble_with_logits(features, logits, up=2)
assert (output == expected).all()
print(features.shape, "->", output.shape, "in a graph")
