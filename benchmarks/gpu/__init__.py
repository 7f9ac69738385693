"""Everything that only a machine with a GPU can show, in nine minutes and without a network.

    python -m benchmarks.gpu bundle               # on any machine with nvcc: build/bundle
    python -m benchmarks.gpu --out FOLDER         # on the machine with the GPU
    python -m benchmarks.gpu --rehearse           # the same run on a machine without one

The flow: __main__ reads the command line, and run.py goes through the steps. A step starts
processes (processes.py) that compute items (worker.py). Each item is one line of JSON in
FOLDER/results.jsonl (results.py), written as it comes. report.py makes FOLDER/table.txt of the
lines. So an illegal access costs one item, a killed run keeps all lines, and the next run goes on
behind them.

| file | holds |
|---|---|
| bundle.py | the bundle, and its installation |
| smoke.py | every implementation by name and dtype against the CPU |
| pytest_results.py | a plugin of pytest that writes the lines of tests |
| sanitize.py, launches.py | memcheck and racecheck |
| timing.py, timing_names.py, check.py, mmcv.py | times beside PyTorch's and mmcv's |
| counters.py, launches.py | Nsight Compute's counters |
| devices.py, dlpack.py | arrays on a GPU, or on the host in a rehearsal |
| stand_ins/ | the commands that a rehearsal finds in the place of NVIDIA's |
"""
