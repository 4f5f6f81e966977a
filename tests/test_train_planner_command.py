"""`qlora estimate` from the outside, and what a run is told that found too little memory."""

import json

import pytest
import torch

import qlora
from models.device import is_out_of_memory
from tests import tiny
from train import preparation
from train.planner.advice import advised, available
from train.planner.sizes import SIZES

SMALL = {
    **SIZES["smollm2-135m"], "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL))
    return path


def estimate(capsys, *arguments: object) -> dict:
    assert qlora.main(["estimate", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_config_and_its_directory_give_one_plan(capsys, config):
    one = estimate(capsys, "--model", config, "--lora.rank", 4)
    same = estimate(capsys, "--model", config.parent, "--lora.rank", 4)
    assert same["peak_bytes"] == pytest.approx(one["peak_bytes"], rel=5e-3)  # a process makes some tables only once
    assert sum(one["parts"].values()) == one["peak_bytes"]
    assert estimate(capsys, "--model", config, "--lora.rank", 8)["trained"] == 2 * one["trained"]


def test_a_checkpoint_counts_as_it_is_stored(capsys, tmp_path):
    source = tiny.checkpoint(tmp_path / "model")
    dense = estimate(capsys, "--model", source, "--no-quantize", "--max-len", 32, "--lora.rank", 4)
    assert "quantized linears" not in dense["base"]
    assert qlora.main(["quantize", str(source), str(tmp_path / "nf4"), "--json"]) == 0
    capsys.readouterr()
    stored = estimate(capsys, "--model", tmp_path / "nf4", "--max-len", 32, "--lora.rank", 4)
    again = estimate(capsys, "--model", source, "--max-len", 32, "--lora.rank", 4)
    assert stored["base"]["quantized linears"] == again["base"]["quantized linears"]


def test_what_fits_is_told_and_what_would_make_it_fit(capsys, config):
    arguments = ["--model", config, "--max-len", 256, "--lora.rank", 4]
    assert estimate(capsys, *arguments, "--gpu", "1GB")["fits"]
    tight = estimate(capsys, *arguments, "--gpu", "0.61", "--batch-size", 64, "--no-gradient-checkpointing")
    assert not tight["fits"]
    assert tight["fitting"]["takes_bytes"] <= tight["gpu_bytes"] < tight["takes_bytes"]
    assert any(switch["flags"] == "--gradient-checkpointing" for switch in tight["switches"])


def test_a_plan_for_several_gpus_says_what_each_has_and_sends(capsys, config):
    arguments = ["--model", config, "--max-len", 64, "--lora.rank", 4, "--accumulation", 4]
    alone = estimate(capsys, *arguments)
    assert (alone["nproc"], alone["distributed"], alone["traffic"]["sent"]) == (1, None, 0)
    shared = estimate(capsys, *arguments, "--nproc", 2)
    assert shared["distributed"] == "fsdp"  # nothing is said of a GPU that would hold it all
    assert shared["parts"]["codes"] == alone["parts"]["codes"] / 2
    traffic = shared["traffic"]
    assert traffic["rounds"] == 2
    assert traffic["gathered"] == 2 * (traffic["forward"] + traffic["backward"])
    assert traffic["sent"] == (traffic["gathered"] + traffic["reduced"]) // 2
    whole = estimate(capsys, *arguments, "--nproc", 2, "--gpu", "24GB")
    assert whole["distributed"] == "ddp"
    assert whole["traffic"]["sent"] == whole["traffic"]["all_reduced"] == whole["parts"]["buckets"]
    offloaded = estimate(capsys, *arguments, "--nproc", 2, "--fsdp.cpu-offload")
    assert offloaded["host_parts"]["codes"] == shared["parts"]["codes"]
    assert "codes" not in offloaded["parts"]


def test_the_table_has_the_whole_model_and_each_process_s_share(capsys, config, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    arguments = ["--model", str(config), "--max-len", "64", "--lora.rank", "4"]
    assert qlora.main(["estimate", *arguments, "--nproc", "2"]) == 0
    text = capsys.readouterr().out
    assert "on each of 2 GPUs" in text
    assert "whole, MiB" in text
    assert "weights put together from shares" in text
    assert "a step is 8 micro-batches for each process" in " ".join(text.split())


FULL = {
    **SMALL, "hidden_size": 2048, "intermediate_size": 5504, "num_attention_heads": 16,
    "num_key_value_heads": 16, "vocab_size": 32000,
    "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture
def full(tmp_path):
    """The config of a model that takes some GiB where every weight is trained, and flags for that."""
    path = tmp_path / "config.json"
    path.write_text(json.dumps(FULL))
    return ["--model", str(path), "--no-adapters", "--no-quantize", "--accumulation", "4", "--max-len", "64"]


def test_what_fits_on_more_gpus_is_told(capsys, full):
    one = estimate(capsys, *full, "--gpu", "4.6GB")
    assert not one["fits"]
    assert one["devices"]["nproc"] == 2
    assert one["devices"]["takes_bytes"] <= one["gpu_bytes"]
    two = estimate(capsys, *full, "--gpu", "3.4GB", "--nproc", 2)
    assert (two["distributed"], two["fits"]) == ("fsdp", False)
    assert "--fsdp.cpu-offload" in [switch["flags"] for switch in two["switches"] if switch["fits"]]
    whole = estimate(capsys, *full, "--gpu", "5GB", "--nproc", 2, "--distributed", "ddp")
    assert "--distributed fsdp" in [switch["flags"] for switch in whole["switches"] if switch["fits"]]


def test_full_fine_tuning_and_a_cpu_can_be_planned(capsys, config):
    full = estimate(capsys, "--model", config, "--no-quantize", "--no-adapters", "--device", "cpu")
    assert full["trained"] == full["parameters"]
    assert full["parts"]["optimizer states"] >= 8 * full["trained"]


@pytest.mark.parametrize(
    ("arguments", "message", "code"),
    [
        (["--model", "lama-7b"], "did you mean llama-7b", 4),
        (["--model", "llama-7b", "--gpu", "h10"], "did you mean h100", 2),
        (["--model", "llama-7b", "--max-len", "4000"], "max_len is 4000, but the model knows 2048", 2),
        (["--model", "llama-7b", "--no-adapters"], "add --no-quantize", 2),
        (["--model", "llama-7b", "--batch-size", "0"], "batch_size must be at least 1, not 0", 2),
        (["--model", "llama-7b", "--nproc", "0"], "nproc must be at least 1, not 0", 2),
        (["--model", "llama-7b", "--gpu", "24", "--device", "cpu"], "leave device at cuda", 2),
        (["--model", "llama-7b", "--lora.target-modules", "nothing"], "no layer is called nothing", 2),
    ],
)
def test_what_cannot_be_planned_is_refused(capsys, arguments, message, code):
    assert qlora.main(["estimate", *arguments]) == code
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_config_of_no_known_model_is_refused(capsys, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mamba"}')
    assert qlora.main(["estimate", "--model", str(tmp_path)]) == 4
    assert "architecture 'mamba' is not known" in capsys.readouterr().err


def test_a_run_without_memory_is_told_what_would_fit(capsys, monkeypatch, tmp_path):
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")

    monkeypatch.setattr(preparation, "train", full)
    monkeypatch.setattr("train.planner.advice.available", lambda device: 650 * 2**20)
    arguments = ["--model", tiny.checkpoint(tmp_path / "model"), "--data.path", tiny.records(tmp_path / "data.jsonl")]
    arguments += ["--data.eval-size", 0, "--max-steps", 1, "--out", tmp_path / "run", "--device", "cpu", "--quiet"]
    arguments += ["--lora.rank", 4]
    assert qlora.main(["train", *map(str, arguments)]) == 5
    first, second = capsys.readouterr().err.splitlines()[-2:]
    assert first == "qlora train: out of memory: CUDA out of memory. Tried to allocate 2.00 GiB."
    assert "by plan this takes 0.6 GiB of 0.6 GiB" in second


def test_advice_names_the_changes_and_other_errors_pass(monkeypatch, tmp_path):
    from models import LoraConfig
    from train.data import DataConfig
    from train.recipe import RunConfig

    config = RunConfig(
        model=str(tiny.checkpoint(tmp_path / "model")), data=DataConfig(path="none"), max_steps=1, batch_size=64,
        gradient_checkpointing=False, lora=LoraConfig(rank=4), dtype="float32", device="cpu",
    )  # fmt: skip
    monkeypatch.setattr("train.planner.advice.available", lambda device: 700 * 2**20)
    with pytest.raises(MemoryError) as caught, advised(config, 256):
        raise MemoryError
    (note,) = caught.value.__notes__
    assert "it fits with" in note or "which fits" in note
    with pytest.raises(RuntimeError) as other, advised(config, 256):
        raise RuntimeError("shapes differ")
    assert not hasattr(other.value, "__notes__")


def test_advice_for_a_gpu_knows_of_more_of_them(full):
    from train.data import DataConfig
    from train.planner.advice import suggestion
    from train.recipe import RunConfig

    config = RunConfig(
        model=full[1],
        data=DataConfig(path="none"),
        max_steps=1,
        adapters=False,
        quantize=False,
        accumulation=4,
        dtype="bfloat16",
    )
    said = suggestion(config, int(4.6 * 2**30), max_len=64)
    assert ", or on 2 such GPUs with --nproc 2 --distributed fsdp: " in said
    assert "no setting makes it fit" in suggestion(config, 2**29, max_len=64)
    assert "such GPUs" not in suggestion(config, 2**29, max_len=64, device=torch.device("cpu"))


def test_what_is_out_of_memory():
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert available(torch.device("cpu")) > 2**28
