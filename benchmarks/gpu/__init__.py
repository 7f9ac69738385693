"""Everything that only a machine with a GPU can show, in nine minutes and without a network.

    python -m benchmarks.gpu bundle               # on any machine with nvcc: build/bundle
    python -m benchmarks.gpu --out FOLDER         # on the machine with the GPU
    python -m benchmarks.gpu --rehearse           # the same run on a machine without one

The flow: __main__ reads the command line, run.py goes through the steps of steps.py, and each step
starts processes. A process computes items (worker.py) and appends one line of JSON for each to
FOLDER/results.jsonl (results.py). report.py makes FOLDER/table.txt of the lines. So an illegal
access costs one item, a killed run keeps all lines, and the next run goes on behind them.

| file | step |
|---|---|
| bundle.py | the bundle, and its installation |
| smoke.py | every implementation by name and dtype against the CPU |
| pytest_results.py | the tests of CUDA arrays: a plugin that writes the lines |
| sanitize.py, launches.py | memcheck and racecheck |
| timing.py, check.py, mmcv.py | times beside PyTorch's compositions and mmcv's CARAFE |
| counters.py, launches.py | Nsight Compute's counters |
| devices.py | where arrays lie: a GPU, or the host in a rehearsal |
| stand_ins/ | the commands that a rehearsal finds in the place of NVIDIA's |
"""
