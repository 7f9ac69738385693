"""The model of CUDA kernels in tests/cuda/traffic.py, on small examples."""

import importlib
from collections import Counter
from pathlib import Path

import pytest

from cases import Case

SASS = """
	//## File "/usr/sm_32_intrinsics.hpp", line 1 inlined at "/x/core/src/cuda/masks.h", line 7
	//## File "/x/core/src/cuda/masks.h", line 7 inlined at "/x/core/src/cuda/kernel.cu", line 3
	//## File "/x/core/src/cuda/kernel.cu", line 3
.L_x_1:
        /*0000*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0010*/                   LDG.E R8, desc[UR4][R2.64+0x10] ;
        /*0020*/                   FFMA R9, R4, R8, R9 ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
	//## File "/x/core/src/cuda/kernel.cu", line 9
        /*0040*/                   STG.E desc[UR4][R2.64], R9 ;
        /*0050*/                   EXIT ;
"""
ARRAY = {
    **{"loads": 0, "stores": 0, "lanes": 0, "loaded_bytes": 0, "stored_bytes": 0},
    **{"load_lines": 0, "store_lines": 0, "load_sectors": 0, "store_sectors": 0},
}


@pytest.fixture
def traffic(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).with_name("cuda"))
    return importlib.import_module("traffic")


@pytest.fixture
def code(traffic):
    return traffic.Code(64, *traffic.parsed(SASS))


def test_instructions_know_their_lines(traffic):
    instructions, labels = traffic.parsed(SASS)
    lines = [instruction.lines for instruction in instructions]
    assert lines == 4 * [("masks.h:7", "kernel.cu:3")] + 2 * [("kernel.cu:9",)]
    assert labels == {".L_x_1": 0}


def test_a_loop_runs_as_often_as_its_accesses_say(code):
    accesses = Counter({(("masks.h:7",), "LDG"): 20, (("kernel.cu:9",), "STG"): 1})
    assert code.executed(accesses, set()) == 4 * 20 / 2 + 2
    # If no line is the same, the innermost counts, then one beside it, then those that inline it.
    for lines in (("masks.h:7", "other.cu:3"), ("masks.h:9",), ("dtypes.h:5", "masks.h:7")):
        assert code.executed(Counter({(lines, "LDG"): 20}), set()) == 4 * 20 / 2
    assert code.executed(Counter({(("masks.h:10",), "LDG"): 20}), set()) == 0


def test_loops_without_accesses_and_branches_not_taken(traffic):
    sass = """
	//## File "/x/core/src/cuda/masks.h", line 7 inlined at "/x/core/src/cuda/kernel.cu", line 3
	//## File "/x/core/src/cuda/kernel.cu", line 3
.L_x_1:
        /*0000*/                   FMUL R9, R9, R9 ;
        /*0010*/              @!P1 BRA `(.L_x_1) ;
        /*0020*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0030*/               @P0 BRA `(.L_x_2) ;
	//## File "/x/core/src/cuda/masks.h", line 7 inlined at "/x/core/src/cuda/kernel.cu", line 5
	//## File "/x/core/src/cuda/kernel.cu", line 5
        /*0040*/                   LDG.E.U16 R8, desc[UR4][R2.64] ;
        /*0050*/                   HADD2.F32 R8, -RZ, R8.H0_H0 ;
	//## File "/x/core/src/cuda/kernel.cu", line 9
.L_x_2:
        /*0060*/                   ST.E desc[UR4][R2.64], R8 ;
        /*0070*/                   EXIT ;
"""
    code = traffic.Code(64, *traffic.parsed(sass))
    accesses = Counter({(("masks.h:7", "kernel.cu:3"), "LDG"): 6, (("kernel.cu:9",), "STG"): 2})
    assert code.executed(accesses, set()) == (2 + 2 + 2) * (6 + 2) / 2


def test_a_branch_does_not_run_if_most_of_its_lines_are_idle(traffic):
    sass = """
	//## File "/x/core/src/cuda/kernel.cu", line 3
        /*0000*/                   LDG.E R8, desc[UR4][R2.64] ;
        /*0010*/               @P0 BRA `(.L_x_2) ;
	//## File "/x/core/src/cuda/masks.h", line 7 inlined at "/x/core/src/cuda/kernel.cu", line 5
	//## File "/x/core/src/cuda/kernel.cu", line 5
        /*0020*/                   FMUL R9, R9, R9 ;
        /*0030*/                   FMUL R9, R9, R9 ;
	//## File "/x/core/src/cuda/kernel.cu", line 9
        /*0040*/                   FMUL R9, R9, R8 ;
.L_x_2:
        /*0050*/                   ST.E desc[UR4][R2.64], R8 ;
        /*0060*/                   EXIT ;
"""
    code = traffic.Code(64, *traffic.parsed(sass))
    accesses = Counter({(("kernel.cu:3",), "LDG"): 6, (("kernel.cu:9",), "STG"): 6})
    assert code.executed(accesses, set()) == 7 * 6
    assert code.executed(accesses, {"masks.h:7"}) == 4 * 6  # two of three
    assert code.executed(accesses, {"kernel.cu:5"}) == 4 * 6  # the line that inlines it
    assert code.executed(accesses, {"kernel.cu:3"}) == 7 * 6 - 2 * 6
    assert code.executed(accesses, {"kernel.cu:7"}) == 7 * 6


def test_the_lines_of_an_access_run(traffic):
    accesses = Counter({(("masks.h:7", "kernel.cu:3"), "LDG"): 1})
    idle = {"idle_lines": {"masks.h:7", "kernel.cu:5"}}
    row = traffic.Row(Case("one", "one element", 1, 1, 1, 1), counted() | idle, None, accesses)
    assert row.idle_lines == {"kernel.cu:5"}


def test_loads_are_in_flight_until_an_instruction_waits(code):
    assert code.in_flight == 16 + 4


def counted(**shared):
    """Return counts of one of four blocks: 4 MB are loaded once by sectors, and 1 MB is stored."""
    features = ARRAY | {"bytes": 4 << 20, "loads": 8192, "loaded_bytes": 1 << 20}
    features |= {"load_lines": 8192, "load_sectors": 32768, "lanes": 8192 * 32}
    features["l2_sectors"] = {"16": 65536, "32": 32768, "64": 32768, "128": 32768}
    outputs = ARRAY | {"bytes": 1 << 20, "stores": 2048, "lanes": 1024 * 32}
    outputs |= {"store_lines": 2048, "store_sectors": 8192, "stored_bytes": 1 << 18}
    outputs["l2_sectors"] = {"16": 0, "32": 0, "64": 0, "128": 0}
    return {
        **{"kernel": "reassemble_up2_nhwc_cuda", "blocks": 4, "blocks_run": 1, "threads": 256},
        **{"shared_bytes": 1024, "mmas": 0, "bytes_copied": 0, "groups_copied": 0, "places": []},
        "idle_lines": set(),
        "arrays": {"features": features, "outputs": outputs},
        "shared": {"loads": 0, "stores": 0, "wavefronts": 0, "fewest_wavefronts": 0} | shared,
    }


def test_the_floor_touches_each_byte_once(traffic):
    device = traffic.Device("example", 2, clock=1e9, dram=1e12, l2=2e12, l1=64 << 10, threads=1024)
    row = traffic.Row(Case("one", "one element", 1, 1, 1, 1), counted(), None, Counter())
    times = row.times(device)
    assert times["DRAM"] == pytest.approx((5 << 20) / 1e12)
    # Two blocks are resident by their registers. Each has 31 KB of L1, where 16 KB miss half.
    assert row.resident(device) == 2
    assert row.l2_reads(device, "features") == 8 << 20
    assert times["L2"] == pytest.approx((9 << 20) / 2e12)
    assert times["L1"] == pytest.approx(4 * (8192 + 2048) / 2e9)
    assert row.estimate(device) == (times["L1"], "L1")
    assert row.lanes() == 0.5


def test_the_last_round_takes_as_long_as_a_full_one(traffic):
    device = traffic.Device("example", 2, clock=1e9, dram=1e12, l2=2e12, l1=64 << 10, threads=1024)
    case = Case("one", "one element", 1, 1, 1, 1)
    row = traffic.Row(case, counted() | {"blocks": 5}, None, Counter())
    assert row.resident(device) == 2  # so four blocks run at once, and the fifth alone
    assert row.times(device)["L1"] == pytest.approx(2 * 2 * (8192 + 2048) / 1e9)


def test_conflicts_take_time(traffic):
    device = traffic.Device("example", 2, clock=1e9, dram=1e12, l2=2e12, l1=64 << 10, threads=1024)
    rows = [
        traffic.Row(Case("one", "one element", 1, 1, 1, 1), counted(wavefronts=n), None, Counter())
        for n in (0, 1000)
    ]
    first, second = (row.times(device)["L1"] for row in rows)
    assert second - first == pytest.approx(4 * 1000 / 2e9)
