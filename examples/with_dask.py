"""Upsample a map beyond memory, from Zarr to Zarr: python with_dask.py FOLDER [SIDE].

A map of heights is upsampled eight times to SIDE x SIDE pixels, a multiple of 8, along the edges of
a picture. The logits come from the picture, chunk by chunk, as in `python -m carafepp upsample`.
FOLDER gets the inputs and the result. Needs: pip install "carafepp[demo,dask]" "dask[distributed]".
"""

import sys
import threading
import time
from pathlib import Path

import dask
import dask.array as da
import numpy as np
import psutil
from distributed import Client, LocalCluster, progress

import carafepp
from carafepp.guided import KERNEL_SIZE, RADIUS, logits_from_guide
from carafepp.pictures import colours

UP, CHUNK = 8, 1000  # rows and columns of the picture in a chunk


def make_heights(block_info):
    """Return a block of a slope with steps."""
    (top, bottom), (left, right) = block_info[None]["array-location"]
    y, x = np.ogrid[top:bottom, left:right]
    return (0.01 * (x + y) + 50 * ((x // 70 + y // 90) % 2)).astype(np.float32)


def make_picture(block_info):
    """Return a block of grey values with the same steps, and noise."""
    (top, bottom), (left, right) = block_info[None]["array-location"]
    y, x = np.ogrid[top:bottom, left:right]
    steps = 60 + 100 * ((x // (70 * UP) + y // (90 * UP)) % 2)
    noise = np.random.default_rng((top, left)).integers(0, 20, steps.shape)
    return (steps + noise).astype(np.uint8)


def predict(picture, block_info):
    """Return the logits of a chunk. The picture has a halo, but not beyond its border."""
    here, chunks = block_info[0]["chunk-location"], block_info[0]["num-chunks"]
    halo = [(RADIUS * (k > 0), RADIUS * (k < n - 1)) for k, n in zip(here, chunks, strict=True)]
    return logits_from_guide(colours(picture), UP, halo)[0]


def upsample(heights, picture):
    """[H, W] and [UP*H, UP*W] -> [UP*H, UP*W], all of them Dask arrays."""
    cells = tuple(tuple(n // UP for n in axis) for axis in picture.chunks)
    logits = da.overlap.overlap(picture, depth=RADIUS * UP, boundary="none").map_blocks(
        predict,
        new_axis=0,
        chunks=((KERNEL_SIZE**2 * UP**2,), *cells),
        meta=np.empty((0, 0, 0), np.float32),
    )
    features = heights[None].rechunk((1, *cells))
    return carafepp.reassemble_with_logits(features, logits, up=UP, kernel_size=KERNEL_SIZE)[0]


def watch_memory(stop, most):
    """Keep in most[0] the most bytes that this process and its workers had at once."""
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    while not stop.wait(0.5):
        most[0] = max(most[0], sum(process.memory_info().rss for process in processes))


def main(folder, side):
    """Make the inputs, upsample, check a corner, and tell time and memory."""
    paths = {name: str(folder / f"{name}.zarr") for name in ("heights", "picture", "result")}
    stop, most = threading.Event(), [0]
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, memory_limit="900MB") as cluster,
        Client(cluster) as client,
    ):
        threading.Thread(target=watch_memory, args=(stop, most), daemon=True).start()
        for name, make, dtype, n, chunk in (
            ("heights", make_heights, np.float32, side // UP, CHUNK // UP),
            ("picture", make_picture, np.uint8, side, CHUNK),
        ):
            axis = (*[chunk] * (n // chunk), *([n % chunk] if n % chunk else []))
            made = da.map_blocks(
                make, chunks=(axis, axis), dtype=dtype, meta=np.empty((0, 0), dtype)
            )
            made.to_zarr(paths[name])
        heights, picture = da.from_zarr(paths["heights"]), da.from_zarr(paths["picture"])
        begin = time.perf_counter()
        stored = client.compute(upsample(heights, picture).to_zarr(paths["result"], compute=False))
        progress(stored)
        stored.result()
        seconds = time.perf_counter() - begin
        stop.set()

    dask.config.set(scheduler="threads")
    corner = carafepp.reassemble_with_logits(
        heights[None, :150, :150].compute(),
        logits_from_guide(colours(picture[: 150 * UP, : 150 * UP].compute()), UP)[0],
        up=UP,
        kernel_size=KERNEL_SIZE,
    )
    result = da.from_zarr(paths["result"])
    known = np.s_[: 145 * UP, : 145 * UP]  # beyond, the corner lacks a halo
    assert np.allclose(result[known].compute(), corner[0][known], rtol=1e-4)
    print(
        f"\n{heights.shape} -> {result.shape}, {result.npartitions} chunks: {seconds:.0f} s, "
        f"at most {most[0] / 1e9:.2f} GB in all processes"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 4_000)
