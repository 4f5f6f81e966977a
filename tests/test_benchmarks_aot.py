"""The gate that compiles every shipped kernel for chips that are not here, and the reading of what comes out."""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch
from rich.console import Console

from benchmarks import aot, sass, tune
from benchmarks.aot import Report
from kernels import project, restore
from kernels.launch import Launch

LISTING = """
        .headerflags    @"EF_CUDA_TEXMODE_UNIFIED"
.text.a_kernel:
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_0:
        /*0010*/                   IADD3 R1, R1, 0x1, RZ ;
        /*0020*/                   ISETP.NE.AND P0, PT, R1, 0x9, PT ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
.L_x_1:
        /*0040*/                   LDS.128 R8, [R4] ;
        /*0050*/                   PRMT R2, R3, 0x5410, R4 ;
        /*0060*/                   HGMMA.64x16x16.F32.BF16 R24, R8, gdesc[UR4], R24 ;
        /*0070*/                   NOP ;
        /*0080*/             @UP0  BRA `(.L_x_1) ;
        /*0090*/                   STL [R1], R2 ;
        /*00a0*/               @P0 BRA `(.L_x_0) ;
.L_x_2:
        /*00b0*/                   EXIT ;
.L_x_3:
        /*00c0*/                   BRA `(.L_x_3);
        /*00d0*/                   NOP;
"""


@pytest.fixture(scope="module")
def reports():
    return aot.gate(["sm_80", "sm_90"])


def test_every_shipped_kernel_compiles_fits_and_takes_no_more_instructions_than_recorded(reports):
    assert [failure for report in reports for failure in report.failures()] == []


def test_the_gate_has_every_module_that_ships_kernels_on_every_chip(reports):
    for chip in ("sm_80", "sm_90"):
        names = [report.name for report in reports if report.chip == chip]
        assert len(names) == len(set(names))
        assert {each.name for module in (project, restore) for each in module.shipped()} <= set(names)
    limits = {report.chip: report.shared_limit for report in reports}
    assert limits == {"sm_80": 163 * 1024, "sm_90": 227 * 1024}
    assert all(0 < report.registers <= 255 for report in reports)


def test_products_of_the_projection_are_those_of_four_warps_where_the_chip_has_them(reports):
    found = {(r.name, r.chip): r.warpgroup for r in reports}
    assert found["project, dropout, rank 16", "sm_90"]
    assert not found["project, dropout, rank 16", "sm_80"]


def test_what_is_counted_has_a_figure_to_hold(reports):
    for report in reports:
        assert report.instructions is None or report.recorded is not None, report.name


def test_a_listing_is_read_to_its_instructions_and_loops():
    instructions, loops = sass.read(LISTING)
    assert [each.name for each in instructions[:4]] == ["S2R", "IADD3", "ISETP", "BRA"]
    assert instructions[4].operation == "LDS.128"
    assert loops == [(4, 8), (1, 10)]  # a jump ahead and one to itself close none
    body = sass.main_loop(instructions, loops)
    assert [each.name for each in body] == ["LDS", "PRMT", "HGMMA", "NOP", "BRA"]
    assert sass.work(body) == 3
    assert sass.spills(instructions) == 1
    assert sass.warpgroup(instructions)


def test_without_products_the_longest_loop_counts_and_without_loops_all():
    instructions, loops = sass.read(LISTING.replace("HGMMA.64x16x16.F32.BF16", "FADD"))
    assert not sass.warpgroup(instructions)
    assert sass.main_loop(instructions, loops) == instructions[1:11]
    assert sass.main_loop(instructions, []) == instructions


@pytest.mark.parametrize(
    ("change", "failure"),
    [
        ({}, None),
        ({"instructions": 5.0, "recorded": 5.0}, None),
        ({"instructions": 5.0}, None),
        ({"problem": "no"}, "k on sm_80 does not compile: no"),
        ({"spills": 3}, "k on sm_80 spills registers 3 times"),
        ({"shared": 2000}, "k takes 2000 bytes of shared memory, and sm_80 has 1000"),
        ({"instructions": 5.25, "recorded": 5.0}, "k on sm_80 takes 5.25 instructions per weight, more than the 5.0"),
    ],
)
def test_a_report_says_what_is_held_against_it(change, failure):
    report = replace(Report(name="k", chip="sm_80", shared_limit=1000), **change)
    failures = report.failures()
    assert len(failures) == (failure is not None)
    assert failure is None or failures[0].startswith(failure)
    assert Report(**json.loads(json.dumps(asdict(report)))) == report


def test_the_table_shows_figures_and_problems():
    good = Report(
        name="good", chip="sm_90", registers=77, shared=3 << 10, shared_limit=227 << 10, instructions=4.5, recorded=5
    )
    console = Console(width=150, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(aot.table([good, Report(name="bad", chip="sm_90", problem="it broke")]))
    text = console.export_text()
    console.file.close()
    for word in ("good", "77", "4.50", "227", "bad", "it broke"):
        assert word in text


BROKEN = """
import triton, triton.language as tl
@triton.jit
def adds(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, SIZE), tl.zeros((SIZE,), tl.float32) + 1)
@triton.jit
def asks_for_what_there_is_not(out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, SIZE), tl.inline_asm_elementwise("nonsense.f32 $0;", "=r", [], tl.float32, True, 1))
if __name__ == "__main__":
    import json, contextlib, io
    from dataclasses import asdict
    from benchmarks.aot import compiled
    from kernels.launch import Launch, Shipped
    for kernel, size in ((adds, 64), (adds, 63), (asks_for_what_there_is_not, 64)):
        with contextlib.redirect_stdout(io.StringIO()):
            report = compiled(Shipped("k", kernel, {"out_ptr": "*fp32"}, Launch({"SIZE": size})), "sm_90")
        print(json.dumps(asdict(report)))
"""


def test_what_does_not_compile_is_one_line(tmp_path):
    """Once the front end refuses (a range of 63), once the assembler."""
    path = tmp_path / "broken.py"
    path.write_text(BROKEN)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(aot.ROOT), "TRITON_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run([sys.executable, str(path)], env=environment, capture_output=True, text=True, check=True)
    good, odd, nonsense = (Report(**json.loads(line)) for line in done.stdout.splitlines())
    assert good.problem is None
    assert good.registers > 0
    assert odd.problem is not None
    assert "power of 2" in odd.problem
    assert nonsense.problem is not None
    assert "nonsense" in nonsense.problem
    for report in (odd, nonsense):
        assert report.problem is not None
        assert "\n" not in report.problem
        assert len(report.problem) <= 300


def test_a_chip_without_known_limits_is_refused():
    with pytest.raises(ValueError, match="must be one of sm_80, sm_90, sm_100, not 'sm_75'"):
        aot.gate(["sm_90", "sm_75"])


def test_a_worker_that_fails_says_its_last_line(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(RuntimeError, match="compiling for sm_90 ended with status 1: it said nothing"):
        aot.gate(["sm_90"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to tune on")
def test_tuning_without_a_gpu_is_refused():
    for attempt in (lambda: tune.tune(restore), lambda: tune.search("flat", [], lambda launch: lambda: None)):
        with pytest.raises(RuntimeError, match="torch sees no CUDA GPU"):
            attempt()


def test_tuning_sorts_each_row_by_time_and_goes_on_after_what_does_not_fit(monkeypatch):
    monkeypatch.setattr(tune, "require_gpu", lambda: None)
    monkeypatch.setattr(tune, "median_time", lambda run: run())

    class Module:
        @staticmethod
        def candidates():
            return {"few": [Launch({"BM": 16}), Launch({"BM": 32})], "many": [Launch({"BM": 64})]}

        @staticmethod
        def trial(row, launch):
            return lambda: 1000.0 / launch.constants["BM"] if row == "few" else float("inf")

    timings = tune.tune(Module)
    assert [(t.row, t.launch.constants["BM"]) for t in timings] == [("few", 32), ("few", 16), ("many", 64)]
    assert tune.table(timings).row_count == 3
