"""The front door: every verb does its job on a small model, and every mistake has its message and exit code."""

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import models
import nf4
import qlora
from tests import tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.records(tmp_path_factory.mktemp("data") / "colours.jsonl")


@pytest.fixture(scope="module")
def run(model, data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "run"
    assert qlora.main(training(model, data, directory)) == 0
    return directory


def training(model, data, out, *more):
    flags = "--dtype float32 --max-steps 6 --batch-size 4 --accumulation 2 --lora.rank 4 --quiet --json"
    rate = "--optimizer.learning-rate 0.02 --data.eval-size 4 --eval-steps 3"
    return [
        "train",
        "--model",
        str(model),
        "--data.path",
        str(data),
        "--out",
        str(out),
        *flags.split(),
        *rate.split(),
        *more,
    ]


def told(capsys, *arguments, code=0) -> Any:
    """The verb's JSON, and what it said to stderr."""
    assert qlora.main([str(a) for a in arguments]) == code
    out, err = capsys.readouterr()
    return (json.loads(out) if code == 0 else None), err


def test_a_run_leaves_a_complete_directory_and_a_lower_loss(run):
    names = {str(p.relative_to(run)) for p in run.rglob("*") if p.is_file()}
    assert names >= {
        "config.toml",
        "env.json",
        "log.txt",
        "metrics.jsonl",
        "timing.jsonl",
        "STATUS",
        "data/manifest.json",
        "data/preview.txt",
        "adapter/adapter_model.safetensors",
        "adapter/adapter_config.json",
        "plots/loss.png",
        "plots/loss.svg",
    }
    assert (run / "STATUS").read_text() == "done\n"
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    held_out = [line["loss"] for line in lines if line["split"] == "eval"]
    assert [line["step"] for line in lines if line["split"] == "eval"] == [0, 3, 6]
    assert held_out[-1] < held_out[0] - 0.5
    assert json.loads((run / "data" / "manifest.json").read_text())["format"] == "alpaca"


def test_two_runs_of_one_seed_are_equal_bit_for_bit(model, data, run, tmp_path):
    assert qlora.main(training(model, data, tmp_path / "again")) == 0
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (run / name).read_bytes()
    assert qlora.main(training(model, data, tmp_path / "other", "--seed", "1")) == 0
    assert (tmp_path / "other" / "metrics.jsonl").read_bytes() != (run / "metrics.jsonl").read_bytes()


def test_a_config_file_says_the_same_as_flags(model, data, run, tmp_path):
    config = (run / "config.toml").read_text().replace(str(run), str(tmp_path / "again"))
    (tmp_path / "run.toml").write_text(config)
    assert qlora.main(["train", "--config", str(tmp_path / "run.toml"), "--quiet", "--json"]) == 0
    assert (tmp_path / "again" / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()


def test_a_run_is_evaluated_with_its_base_its_format_and_its_adapter(run, model, data, capsys):
    arguments = (
        "eval",
        run,
        "--task",
        "perplexity",
        "--data",
        data,
        "--window",
        64,
        "--load.dtype",
        "float32",
        "--json",
    )
    found, _ = told(capsys, *arguments)
    loaded = models.load(model, nf4.QuantConfig(), dtype=torch.float32)
    models.load_adapter(loaded, run / "adapter")
    ids = models.load_tokenizer(model).encode(data.read_text())
    expected = eval_perplexity(loaded, ids)
    assert found["results"]["perplexity"]["token_perplexity,none"] == pytest.approx(expected, rel=1e-6)
    assert found["configs"]["perplexity"]["protocol"] == "windows"
    assert found["limited"] is False
    assert Path(found["files"][0]).parent == run / "eval"


def eval_perplexity(model, ids):
    from eval import perplexity

    return perplexity(model, ids, 64).perplexity


def test_a_quantized_checkpoint_stands_on_its_own(model, tmp_path, capsys):
    found, _ = told(capsys, "quantize", model, tmp_path / "q", "--dtype", "float32", "--json")
    assert len(found["layers"]) == 14
    assert found["layers"][0]["bits_per_weight"] == pytest.approx(4.13, abs=0.1)
    assert 0.05 < found["layers"][0]["relative_error"] < 0.15
    ids = torch.arange(30)[None]
    direct = models.load(model, nf4.QuantConfig(), dtype=torch.float32)
    assert torch.equal(models.load(tmp_path / "q", dtype=torch.float32)(ids), direct(ids))
    text = "It is red."
    assert models.load_tokenizer(tmp_path / "q").encode(text) == models.load_tokenizer(model).encode(text)

    _, err = told(capsys, "quantize", model, tmp_path / "q", code=2)
    assert "already holds a checkpoint" in err


def test_generation_goes_on_from_a_prompt(run, capsys):
    arguments = ("generate", run, "--prompt", "It is", "--max-new-tokens", 8, "--load.dtype", "float32")
    found, _ = told(capsys, *arguments, "--json")
    assert qlora.main([str(a) for a in arguments]) == 0
    assert capsys.readouterr().out.rstrip("\n") == found["text"].rstrip("\n")
    sampled = [told(capsys, *arguments, "--json", "--sampling.temperature", 1, "--seed", s)[0] for s in (1, 1, 2)]
    assert sampled[0] == sampled[1] != sampled[2]


def test_a_chat_remembers_what_was_said(run, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\nAnd again\n\n"))
    found, _ = told(capsys, "chat", run, "--max-new-tokens", 4, "--seed", 1, "--json")
    assert [m["role"] for m in found["messages"]] == ["user", "assistant", "user", "assistant"]
    assert found["messages"][2]["content"] == "And again"


def test_text_waits_for_whole_characters_and_skips_ids_without_a_token(model):
    from models.writing import pieces

    tokenizer = models.load_tokenizer(model)
    ids = [*tokenizer.encode("é is ñ"), tokenizer.vocab_size + 3]
    shown = list(pieces(tokenizer, [torch.tensor([i]) for i in ids]))
    assert "".join(shown) == "é is ñ"
    assert not any("\ufffd" in piece for piece in shown)


def test_an_interrupted_run_keeps_its_adapter_and_says_where_it_stopped(model, data, tmp_path):
    command = [sys.executable, "-m", "qlora", *training(model, data, tmp_path / "r"), "--max-steps", "100000"]
    process = subprocess.Popen(command, cwd=Path(qlora.__file__).parent, stdout=subprocess.DEVNULL)
    metrics = tmp_path / "r" / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and '"train"' in metrics.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert (tmp_path / "r" / "STATUS").read_text() == f"interrupted@{steps[-1]}\n"
    loaded = models.load(model, nf4.QuantConfig())
    models.load_adapter(loaded, tmp_path / "r" / "adapter")


def test_runs_are_plotted_together(run, tmp_path, capsys):
    found, _ = told(capsys, "plot", run, run, "--out", tmp_path / "both.png", "--json")
    assert [f[-4:] for f in found["files"]] == [".png", ".svg"]
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


def test_the_doctor_tests_itself(capsys):
    found, _ = told(capsys, "doctor", "--json")
    assert found["self_test"].startswith("passed on")
    assert found["torch"] == torch.__version__
    assert found["cuda runtime"][0].startswith("loaded in this process: ")
    assert found["managed memory"]


# Mistakes


def test_help_and_usage(capsys):
    assert qlora.main([]) == qlora.main(["--help"]) == 0
    assert "quantize" in capsys.readouterr().out
    assert qlora.main(["trian"]) == 2
    assert "did you mean train?" in capsys.readouterr().err


def test_an_unknown_flag_is_bad_usage(model, capsys):
    with pytest.raises(SystemExit) as stop:
        qlora.main(["quantize", str(model), "out", "--quant.blocksize", "32"])
    assert stop.value.code == 2
    assert "--quant.block-size" in capsys.readouterr().err


def test_a_config_files_problems_are_listed_together(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text('model = "m"\nmax_stps = 3\n[lora]\nrank = "many"\n[data]\npath = "d"\n')
    _, err = told(capsys, "train", "--config", path, code=2)
    assert "max_stps" in err
    assert "max_steps" in err
    assert "lora.rank" in err


def test_bad_data_has_exit_code_3_and_leaves_no_run(model, tmp_path, capsys):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    _, err = told(capsys, *training(model, empty, tmp_path / "r"), code=3)
    assert "empty" in err
    lacking = tmp_path / "lacking.jsonl"
    lacking.write_text('{"instruction": "Say it.", "input": "", "output": ""}\n')
    _, err = told(capsys, *training(model, lacking, tmp_path / "r"), code=3)
    assert "lacking.jsonl:1" in err
    assert not (tmp_path / "r").exists()
    _, err = told(capsys, "eval", model, "--data", empty, code=3)
    assert "is empty; a perplexity needs text" in err


def test_a_checkpoint_that_does_not_fit_has_exit_code_4(model, data, tmp_path, capsys):
    _, err = told(capsys, "eval", tmp_path, "--data", data, code=4)
    assert "not a checkpoint" in err
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    _, err = told(capsys, "eval", tmp_path, "--data", data, code=4)
    assert "architecture 'mamba' is not known" in err
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    _, err = told(capsys, "quantize", tmp_path, tmp_path / "q", code=4)
    assert "not a whole safetensors file" in err
    assert not (tmp_path / "q").exists()


def test_a_target_layer_that_is_not_there_is_a_bad_setting(model, data, tmp_path, capsys):
    _, err = told(capsys, *training(model, data, tmp_path / "r", "--lora.target-modules", "query"), code=2)
    assert "no layer is called query" in err
    assert (tmp_path / "r" / "STATUS").read_text().startswith("failed: lora: no layer")


def test_a_run_is_not_overwritten_unless_told(model, data, run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    _, err = told(capsys, *training(model, data, run), code=2)
    assert "is not empty" in err
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_loss_that_is_not_finite_has_exit_code_6(model, data, tmp_path, capsys):
    _, err = told(capsys, *training(model, data, tmp_path / "r", "--optimizer.learning-rate", "1e30"), code=6)
    assert "step" in err
    assert (tmp_path / "r" / "STATUS").read_text().startswith("failed")
