"""Memory of a training step beside others': `python -m benchmarks.memory --help`.

The step is a forward and backward from logits, float32, on tensors. Its memory is the peak beyond
the inputs (features, logits, grad_output) and the results (output, grad_features, grad_logits).
Each candidate is measured in a process of its own. mmcv's CARAFE needs a GPU: its buffers are
counted from its source.
"""

import math
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor

import torch

import carafepp

from . import peers, report, timing
from .passes import Pass, shape
from .problems import PROBLEMS, Arrays

WARM = "tiny"  # a problem that is computed first: it loads code and starts threads
MMCV = "mmcv's CARAFE"
# A step with mmcv 2 (mmcv/ops/carafe.py) holds these buffers at its peak, each with the shape of a
# tensor of the problem. The peak is in CARAFEFunction.backward, before its scratch is freed.
BUFFERS_OF_MMCV = {
    "masks, saved by softmax": "masks",
    "rfeatures, saved by the forward": "features",
    "rgrad_output": "output",
    "rgrad_input_hs": "output",
    "rgrad_input": "features",
    "rgrad_masks": "masks",
    "grad_masks": "masks",
}


def counted(case) -> dict[str, int]:
    """Return the bytes of each buffer of mmcv's."""
    return {name: 4 * math.prod(shape(case, like)) for name, like in BUFFERS_OF_MMCV.items()}


def step(name: str, case) -> int | None:
    """Return the bytes that a step takes beyond its inputs and results."""
    arrays, pass_ = Arrays(case, "float32", constant=True), Pass(case, "logits", "forward+backward")
    inputs = [peers.tensor(arrays(key, "NCHW"), "NCHW") for key in ("features", "logits")]
    leaves = [tensor.requires_grad_() for tensor in inputs]
    grad_output = peers.tensor(arrays("grad_output", "NCHW"), "NCHW")

    def function(features, logits):
        if name == "carafepp":
            factors = {"up": case.up, "down": case.down, "kernel_size": case.kernel_size}
            return carafepp.reassemble_with_logits(features, logits, **factors)
        return peers.composed(name.removeprefix("PyTorch: "), case, "logits", features, logits)

    _, peak = timing.peak(lambda: peers.forward_backward(function, leaves, grad_output))
    results = sum(4 * math.prod(shape(case, result)) for result in pass_.results)
    return None if peak is None else max(0, peak - results)


def measured(name: str, case, threads: int) -> int | None:
    """Return the memory of the second step of a fresh process, after one of a tiny problem."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
        pool.submit(torch.set_num_threads, threads).result()
        pool.submit(carafepp.set_num_threads, threads).result()
        pool.submit(step, name, PROBLEMS[WARM]).result()
        return pool.submit(step, name, case).result()


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write and draw."""
    parser = report.parser("benchmarks.memory", __doc__, None)
    known = [name for name, case in PROBLEMS.items() if case.up > 1]
    parser.add_argument("--case", default="fpn2", choices=known)
    parser.add_argument("--threads", default=1, type=report.count)
    text = "draw a bar for each row, a PNG"
    parser.add_argument("--plot", metavar="FILE", type=report.file_to_write, help=text)
    asked = parser.parse_args(arguments)
    if asked.plot:
        report.need("matplotlib")
    pages, case = report.Report(), PROBLEMS[asked.case]
    factor = f"up x{case.up}, K={case.kernel_size}"
    title = f"A training step from logits, {case.features_shape}, {factor}, float32"
    names = ["carafepp", *(f"PyTorch: {name}" for name in peers.compositions(case))]
    rows = [
        {"name": name, "how": "measured", "memory": measured(name, case, asked.threads)}
        for name in pages.track(names, str)
    ]
    if None in [row["memory"] for row in rows]:
        sys.exit("[benchmarks.memory] the system must tell the peak of a process, as Linux does.")
    buffers = counted(case)
    rows.append({"name": MMCV, "how": "counted in its source", "memory": sum(buffers.values())})
    rows.sort(key=lambda row: row["memory"])
    rows = [{"case": asked.case, "title": title, **row} for row in rows]
    columns = {
        "implementation": lambda row: row["name"],
        "MB": report.number("memory", 1e6, ".1f"),
        "": lambda row: row["how"],
    }
    pages.table(title, rows, columns)
    listed = [{"name": name, "memory": size} for name, size in buffers.items()]
    columns = {"buffer": lambda row: row["name"], "MB": report.number("memory", 1e6, ".1f")}
    pages.table("Buffers of mmcv's CARAFE, at its peak in the backward", listed, columns)
    pages.write(asked, rows)
    if asked.plot:
        from . import plot

        plot.draw_memory(rows, asked.plot)
    return 0


if __name__ == "__main__":
    sys.exit(main())
