"""`qlora bench`: what its results carry, and what it refuses. Nothing here asserts a time."""

import json
import pkgutil
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import qlora
from benchmarks import correctness, device_run, kernels, load, memory, timing, training
from benchmarks.command import parse_sizes
from kernels.launch import Launch
from models.device import multiplies_bfloat16

DEVICE_RUN = (
    "correctness", "kernels", "updates", "training", "load", "generate", "memory", "planner", "sharing",
)  # fmt: skip
PROVENANCE = {"benchmark", "device", "machine", "threads", "versions", "commit", "date"}


@pytest.fixture
def quick_limits(monkeypatch):
    """A machine of which little is asked before it is measured."""
    monkeypatch.setitem(timing.COPIED, "cpu", 2**20)
    monkeypatch.setitem(timing.SIDE, "cpu", 64)


@pytest.fixture
def small(monkeypatch, quick_limits):
    """Sizes of no interest in place of those that take minutes."""
    monkeypatch.setattr(correctness, "SMALL", ((3, 64, 128),))
    monkeypatch.setattr(kernels, "CPU_TOKENS", (1, 3))
    monkeypatch.setattr(kernels, "CPU_LORA_TOKENS", 5)
    monkeypatch.setattr(training, "peak_of", lambda name, setting: (100, 300))
    monkeypatch.setattr(training.Setting, "__init__", tiny_setting(training.Setting.__init__))


def tiny_setting(init):
    def smaller(self, **given):
        init(self, **{"config": training.TINY, "batch": 2, "tokens": 16, **given})

    return smaller


def bench(capsys, *arguments, code=0) -> Any:
    assert qlora.main(["bench", *arguments]) == code
    out, err = capsys.readouterr()
    return (json.loads(out) if code == 0 else None), err


def test_kernels_tells_what_was_measured_on_what(small, capsys, tmp_path):
    out = tmp_path / "new" / "kernels.json"
    found, err = bench(
        capsys, "kernels", "--device", "cpu", "--sizes", "64x128,32x64", "--repeats", "1", "--json", "--out", str(out)
    )
    assert found.keys() >= PROVENANCE
    assert found["versions"]["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert json.loads(out.read_text()) == found
    cases = [
        "quantize", "dequantize", "matmul M=1", "matmul M=3", "LoRA forward and backward M=5",
        "LoRA forward and backward M=5, dropout 0.1", "quantize by search",
    ]  # fmt: skip
    assert [row["case"] for row in found["rows"]] == cases * 2
    contestants = ("ours", "bitsandbytes", "bitsandbytes_repacked", "dense")
    assert out.with_suffix(".png").stat().st_size > 1000
    for row in found["rows"]:
        assert row["seconds"] == pytest.approx(row["ours_ms"] / 1000)
        assert row["shape"] in ([64, 128], [32, 64])
        assert row["dtype"] == "bfloat16"
        assert row["targets"] == {}  # targets are for the weight they were set for
        assert ("dense_ms" in row) == (row["case"][:4] in ("matm", "LoRA"))
        assert row["roofline"].keys() == {name for name in contestants if f"{name}_ms" in row}
        ours = row["roofline"]["ours"]
        assert ours["bytes_s"] == pytest.approx(ours["bytes"] / row["seconds"])
        assert row["bandwidth_share"] == pytest.approx(ours["bytes_s"] / found["limits"]["bandwidth"])
    assert found["correctness"]
    assert all(row["right"] for row in found["correctness"])
    told = " ".join(err.split())
    assert "64×128 matmul M=1" in told  # with one size only, it is told once
    assert "ours ms" in told
    assert "ours of roof" in told


def test_with_bitsandbytes_every_case_but_the_search_has_a_ratio(small):
    pytest.importorskip("bitsandbytes")
    for row in kernels.measure("cpu", [(64, 128)], 1):
        assert ("vs_bitsandbytes" in row) == (row["case"] != "quantize by search")
        if "vs_bitsandbytes" in row:
            assert row["vs_bitsandbytes"] == pytest.approx(row["ours_ms"] / row["bitsandbytes_ms"])
        repacks = torch.backends.cpu.get_cpu_capability() == "AVX512" and multiplies_bfloat16(torch.device("cpu"))
        assert ("vs_bitsandbytes_repacked" in row) == (repacks and row["case"].startswith("matmul"))


def test_contestants_give_the_same_numbers():
    pytest.importorskip("bitsandbytes")
    operands = kernels.Operands(64, 128, "cpu")
    for case in kernels.cases(operands, (3,), 5):
        results: dict[str, Any] = {name: call(0) for name, call in case.contestants.items()}
        if case.name == "dequantize":
            assert torch.equal(results["ours"], results["bitsandbytes"])
        elif case.name == "quantize":
            assert torch.equal(results["ours"].packed, results["bitsandbytes"][0].view(-1))
        elif not case.name.endswith(("search", "dropout 0.1")):
            stored = [n for n in results if n != "dense"]  # what dense weights give is off by what 4 bits lose
            for name in stored[1:]:
                for a, b in zip(as_tuple(results["ours"]), as_tuple(results[name]), strict=True):
                    assert (a - b).float().norm() < 0.02 * b.float().norm(), (case.name, name)
            for a, b in zip(as_tuple(results["ours"]), as_tuple(results["dense"]), strict=True):
                assert (a - b).float().norm() < 0.2 * b.float().norm(), case.name


def as_tuple(result):
    return result if isinstance(result, tuple) else (result,)


def test_targets_hold_for_the_weight_they_were_set_for(monkeypatch):
    made = kernels.Operands(32, 64, "cpu")
    monkeypatch.setattr(kernels, "Operands", lambda N, K, device: made)
    rows = {row["case"]: row["targets"] for row in kernels.measure("cpu", [(4096, 4096)], 1, (1, 2), 1024)}
    assert rows["matmul M=1"]["vs_dense"]["target"] == 0.9
    assert rows["matmul M=2"] == {}
    assert rows["quantize by search"] == {"seconds": {"target": 3.0, "met": True}}
    if "vs_bitsandbytes" in rows["dequantize"]:
        plain, dropped = (rows[f"LoRA forward and backward M=1024{suffix}"] for suffix in ("", ", dropout 0.1"))
        assert plain["vs_bitsandbytes"]["target"] == dropped["vs_bitsandbytes"]["target"] == 0.6


def test_training_tells_its_setting(small, capsys):
    found, err = bench(capsys, "training", "--device", "cpu", "--repeats", "1", "--json")
    assert found.keys() >= PROVENANCE
    assert [row["dropout"] for row in found["rows"]] == [0.0, 0.1]
    assert found["setting"]["config"]["hidden_size"] == training.TINY.hidden_size
    assert found["setting"]["dtype"] == "bfloat16"
    told = " ".join(err.split())
    assert "ours tokens s" in told
    for row in found["rows"]:
        assert f"dropout {row['dropout']}" in told
        if row["targets"]:
            assert "speed_ratio" in told
            assert "≥ 2" in told
            assert f"{row['ours_peak'] / 2**20:.4g}" in told


def test_generation_and_loading_stand_beside_their_peers(small, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.load.peak_apart", lambda path: {"peak_mib": 3.0})
    model = load.random_checkpoint(tmp_path / "model", training.TINY)
    for name, cases in (
        ("generate", ["read 1 x 32", "write, batch 1", "read 8 x 32", "write, batch 8"]),
        ("load", ["load", "quantize"]),
    ):
        found, err = bench(
            capsys, name, "--device", "cpu", "--repeats", "1", "--json", "--model", str(model),
            *(("--out", str(tmp_path / "r" / "generate.json")) if name == "generate" else ()),
        )  # fmt: skip
        assert found.keys() >= PROVENANCE | {"limits"}
        assert [row["case"] for row in found["rows"]] == cases
        assert all(row["roofline"]["ours"]["bytes"] > 0 for row in found["rows"] if row["case"] != "load")
        assert f"{name} with" not in err
    assert found["model"] == "model"
    assert str(tmp_path) not in json.dumps(found)
    assert (found["memory"], found["rows"][0]["weights"]) == ({"peak_mib": 3.0}, 93248)
    assert (tmp_path / "r" / "generate.png").exists()


def test_a_profile_is_asked_for_by_a_flag(small, capsys):
    found, err = bench(capsys, "training", "--device", "cpu", "--profile", "--json")
    assert "aten::mm" in found["profile"]
    assert "aten::mm" in err


def test_an_operator_that_is_wrong_fails_the_run(small, capsys, monkeypatch):
    import kernels as operators

    right = operators.dequantize
    monkeypatch.setattr(operators, "dequantize", lambda q, dtype=None: right(q, dtype) + 1)
    with pytest.raises(SystemExit) as stop:
        qlora.main(["bench", "kernels", "--device", "cpu", "--sizes", "32x64", "--repeats", "1", "--json"])
    assert stop.value.code == 1
    out, err = capsys.readouterr()
    assert "dequantize to torch.bfloat16" in json.loads(out)["failures"][0]
    assert "wrong: dequantize to torch.bfloat16" in err


def test_a_product_that_errs_too_much_is_told():
    expected = torch.ones(4, dtype=torch.float64)
    row = correctness.close("product", expected + 3e-3, expected + 1e-3, expected)
    assert not row["right"]
    assert correctness.close("product", expected + 1e-3, expected + 1e-3, expected)["right"]
    told = correctness.failures([row | {"shape": [1, 2, 3], "dtype": "float16", "codebook": "nf4"}])
    assert told == ["product [1, 2, 3] float16 nf4 errs by 0.003, allowed 0.002; at worst by 0.003, allowed 0.003"]
    expected, torchs = torch.ones(1000).double(), torch.ones(1000).double() + 1e-3
    one_wrong = torchs.clone()
    one_wrong[3] += 4e-3
    assert not correctness.close("product", one_wrong, torchs, expected)["right"]  # though not by much in all
    assert not correctness.close("product", expected * torch.nan, expected, expected)["right"]


@dataclass
class Compiled:
    """A report of the gate."""

    name: str
    spills: int

    def failures(self):
        return [f"{self.name} spills"] if self.spills else []


def standing_in(monkeypatch, name, **functions):
    """A module of `benchmarks` replaced by these functions."""
    module = types.ModuleType(f"benchmarks.{name}")
    module.__dict__.update(functions)
    monkeypatch.setitem(sys.modules, f"benchmarks.{name}", module)
    monkeypatch.setattr(f"benchmarks.{name}", module, raising=False)


def test_the_gate_compiles_for_the_chips_that_are_named(capsys, monkeypatch):
    asked = []
    reports = [Compiled("dequantize", 0)]
    standing_in(monkeypatch, "aot", gate=lambda chips: asked.append(chips) or reports, table=lambda reports: "a table")
    found, err = bench(capsys, "kernels", "--aot", "sm_80,sm_90", "--json")
    assert asked == [["sm_80", "sm_90"]]
    assert found["rows"] == [{"name": "dequantize", "spills": 0}]
    assert "a table" in err

    reports.append(Compiled("matmul", 3))
    with pytest.raises(SystemExit) as stop:
        qlora.main(["bench", "kernels", "--aot", "sm_80"])
    assert stop.value.code == 1
    assert "wrong: matmul spills" in capsys.readouterr().out


def test_the_search_tries_what_has_candidates(capsys, monkeypatch):
    import kernels as operators

    @dataclass
    class Timed:
        row: str
        launch: Launch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("benchmarks.command.provenance", lambda device: {})
    for found in pkgutil.iter_modules(operators.__path__):
        monkeypatch.delattr(f"kernels.{found.name}.candidates", raising=False)
    monkeypatch.setattr("kernels.dispatch.candidates", None, raising=False)
    standing_in(monkeypatch, "tune", tune=lambda module: [Timed(module.__name__, Launch({"N": 3}))], table=lambda t: "")
    found, _ = bench(capsys, "kernels", "--tune", "--json")
    assert [row["row"] for row in found["rows"]] == ["kernels.dispatch"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_search_needs_a_gpu(capsys):
    _, err = bench(capsys, "kernels", "--tune", code=2)
    assert "torch sees no CUDA GPU here" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernel"], "not 'kernel'; did you mean kernels?"),
        (["kernels", "--repeats", "0"], "repeats is 0; a median needs at least 1"),
        (["kernels", "--sizes", "64"], "sizes are outputs x inputs such as 4096x4096,11008x4096, not '64'"),
        (["training", "--aot", "sm_80"], "aot belongs to the benchmark kernels, not to training"),
        (["kernels", "--model", "x"], "model belongs to the benchmarks load, generate, "),
        (["load", "--model", "nowhere"], "model: nowhere: no such file or directory; give a checkpoint, or none"),
        (["generate", "--model", "t5-small"], "model: t5-small is a t5; what is measured here is a LLaMA's decoding"),
        (["kernels", "--profile"], "profile belongs to the benchmark training, not to kernels"),
    ],
)
def test_what_cannot_be_measured_is_bad_usage(arguments, message, capsys):
    _, err = bench(capsys, *arguments, code=2)
    assert message in " ".join(err.split())


def test_sizes_are_outputs_by_inputs():
    assert parse_sizes("4096x4096,11008x4096") == [(4096, 4096), (11008, 4096)]


def test_the_script_for_a_lent_gpu_writes_a_file_for_each_part(tmp_path, monkeypatch, capsys, quick_limits):
    monkeypatch.setattr("benchmarks.load.peak_apart", lambda path: {})
    monkeypatch.setattr(training, "peak_of", lambda name, setting: (100, 300))
    monkeypatch.setattr(memory, "measured_apart", lambda setting: {"optimizer": setting.optimizer})
    assert device_run.main(["--out", str(tmp_path / "r"), "--device", "cpu", "--quick", "--commit", "abc"]) == 0
    for name in DEVICE_RUN:
        found = json.loads((tmp_path / "r" / f"{name}.json").read_text())
        assert found.keys() >= PROVENANCE
        assert (found["benchmark"], found["commit"], found["failures"]) == (name, "abc", [])
        assert found["rows"]
    assert capsys.readouterr().out.count("wrong: nothing") == len(DEVICE_RUN)


def test_a_part_that_fails_stops_no_other(tmp_path, monkeypatch, capsys, quick_limits):
    def broken(*_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(kernels, "measure", broken)
    parts = ["--only", "kernels", "updates"]
    assert device_run.main(["--out", str(tmp_path), "--device", "cpu", "--quick", *parts]) == 1
    assert "no such kernel" in json.loads((tmp_path / "kernels.json").read_text())["failures"][0]
    assert json.loads((tmp_path / "updates.json").read_text())["rows"]


def test_some_parts_can_be_asked_for_by_name(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "some"), "--device", "cpu", "--quick", "--only"]
    assert device_run.main([*arguments, "updates", "correctness"]) == 0
    assert sorted(path.name for path in (tmp_path / "some").iterdir()) == ["correctness.json", "updates.json"]
    with pytest.raises(SystemExit):
        device_run.main([*arguments, "update"])
    assert "and 'update' is none of them" in capsys.readouterr().err


def test_a_contestant_that_fails_is_told_of_and_the_others_are_timed():
    def broken(i):
        raise RuntimeError("no kernel image\nis available")

    case = kernels.Case("matmul M=1", {"ours": lambda i: torch.ones(1), "bitsandbytes": broken})
    row = kernels.timed(case, 2, 1, gpu=False) | {"shape": [4, 8]}
    assert row["ours_ms"] > 0
    assert "vs_bitsandbytes" not in row
    assert kernels.failures([row]) == ["matmul M=1 [4, 8]: bitsandbytes: RuntimeError: no kernel image"]
    without_us = kernels.timed(kernels.Case("matmul M=1", {"ours": broken, "dense": lambda i: None}), 1, 1, gpu=False)
    assert "seconds" not in without_us
    assert without_us["dense_ms"] > 0


def test_a_commit_is_of_this_tree():
    from benchmarks.provenance import provenance

    assert provenance("cpu", "given")["commit"] == "given"


def test_a_torch_that_cannot_tell_the_cpu_still_tells_the_machine(monkeypatch):
    from train.doctor import devices

    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert devices()["cpu instructions"] == "none of note"
