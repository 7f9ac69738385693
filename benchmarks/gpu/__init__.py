"""The GPU run: all that needs a machine with a GPU, in nine minutes and without a network.

    python -m benchmarks.gpu bundle               # on any machine with nvcc: build/bundle
    python -m benchmarks.gpu --out FOLDER         # on the machine with the GPU
    python -m benchmarks.gpu --rehearse           # the same run on a machine without one

__main__ reads the command line, and run.py goes through the steps. A step starts processes
(processes.py) that compute items (worker.py). An item is one line of JSON in FOLDER/results.jsonl
(results.py), written at once. report.py turns the lines into FOLDER/table.txt.

An illegal access costs one item. A killed run keeps all lines, and the next run continues it.

| file | holds |
|---|---|
| bundle.py | the bundle, and its installation |
| smoke.py | every implementation by name and dtype against the CPU |
| pytest_results.py | a plugin of pytest that writes the lines of tests |
| sanitize.py, launches.py | memcheck and racecheck |
| timing.py, items.py, timing_names.py, mmcv.py | times beside PyTorch's and mmcv's |
| counters.py, launches.py | Nsight Compute's counters |
| devices.py, dlpack.py | arrays on a GPU, or on the host in a rehearsal |
| stand_ins/ | commands that replace NVIDIA's in a rehearsal |
"""
