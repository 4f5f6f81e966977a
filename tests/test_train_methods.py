"""Runs of IA3, BitFit and prefixes from the command line: resumed, used, merged and exported like those of LoRA."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import models
from models import merge
from models.device import DTYPES
from models.export import ExportOptions
from models.export import command as export
from models.inspection import InspectOptions
from models.inspection import command as inspect
from models.merge import MergeOptions
from models.target import LoadOptions, load_target, resolve
from qlora import main
from tests import tiny, tiny_roberta, tiny_t5
from tests.training import commands
from train.config import read_config
from train.data import DataConfig
from train.planner.command import EstimateOptions
from train.planner.jobs import job_of
from train.planner.plan import plan
from train.recipe import RunConfig

SETTINGS = (
    "--batch-size 2 --accumulation 1 --max-steps 2 --save-steps 0 --no-dry-step --dtype float32 --device cpu "
    "--data.eval-size 2 --optimizer.learning-rate 1e-2 --optimizer.warmup-steps 0 --quiet"
)
METHODS = {"ia3": (), "bitfit": (), "prefix": ("--prefix.num-virtual-tokens", "4", "--prefix.init-text", "It is red.")}
EACH = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("methods")
    tiny.checkpoint(folder / "llama")
    tiny.records(folder / "colours.jsonl", 12)
    return folder


def flags(folder, name, *more, model="llama", data="colours.jsonl"):
    where = ["--model", str(folder / model), "--data.path", str(folder / data), "--out", str(folder / name)]
    return [*where, *SETTINGS.split(), *more]


@pytest.fixture(scope="module")
def runs(folder):
    """A run of each method, and one that stopped half-way and went on."""
    jobs: list[tuple[Any, ...]] = []
    for method, more in METHODS.items():
        jobs.append(("train", flags(folder, method, "--method", method, *more)))
        jobs.append(("train", flags(folder, f"{method}-stopped", "--method", method, *more), ("sigterm", 1)))
        jobs.append(("resume", [str(folder / f"{method}-stopped"), "--quiet"]))
    made = commands(jobs)
    assert [each["error"] for each in made] == [None] * len(made)
    return {method: made[3 * i] for i, method in enumerate(METHODS)}


@EACH
def test_a_run_learns_and_one_that_was_stopped_ends_bit_for_bit_alike(runs, folder, method):
    before, after = runs[method]["result"]["evaluations"]
    assert after["loss"] < before["loss"]
    one, other = folder / method, folder / f"{method}-stopped"
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    for file in ("adapter_model.safetensors", "adapter_config.json"):
        assert (one / "adapter" / file).read_bytes() == (other / "adapter" / file).read_bytes()


@EACH
def test_a_run_is_evaluated_generated_with_and_inspected_by_its_name(runs, folder, method, capsys):
    model, tokenizer = load_target(folder / method, LoadOptions(dtype="float32", device="cpu"))
    tensors = load_file(folder / method / "adapter" / "adapter_model.safetensors")
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == sum(t.numel() for t in tensors.values())
    assert main(["generate", str(folder / method), "--prompt", "Name", "--max-new-tokens", "2", "--json"]) == 0
    found = inspect(InspectOptions(path=str(folder / method)), Console(quiet=True))["adapter"]
    assert found["parameters"] == sum(row["numbers"] for row in found["vectors"])
    if method == "ia3":
        sizes = {row["name"]: row["root_mean_square"] for row in found["vectors"]}
        assert sizes["model.layers.1.mlp.down_proj"] == pytest.approx(
            float((tensors["base_model.model.model.layers.1.mlp.down_proj.ia3_l"] - 1).square().mean().sqrt())
        )
    if method == "prefix":
        saved = read_config(RunConfig, folder / method / "config.toml")
        assert saved.prefix.init_ids == tuple(tokenizer.encode("It is red."))


@EACH
def test_a_run_is_merged_and_exported_where_that_can_be(runs, folder, method, tmp_path):
    console = Console(quiet=True)
    run, load = str(folder / method), LoadOptions(device="cpu")
    model, _ = load_target(run, LoadOptions(dtype="float32", device="cpu"))
    ids = torch.arange(10, 34).view(2, 12)
    expected = model(ids).softmax(-1)

    def merged():
        return merge.command(MergeOptions(target=run, out=str(tmp_path / "merged"), load=load), console)

    def exported(form, out, **how):
        return export(ExportOptions(target=run, out=str(tmp_path / out), format=form, load=load, **how), console)

    if method == "prefix":
        for attempt in (merged, lambda: exported("nf4", "n", merge=True), lambda: exported("gguf", "g.gguf")):
            with pytest.raises(models.ConfigError, match="a prefix cannot be merged"):
                attempt()
        assert not any(tmp_path.iterdir())
    else:
        form = {"ia3": "nf4", "bitfit": "gguf"}[method]
        assert merged()["within"]
        exported(form, f"m.{form}", merge=form == "nf4", gguf_type="f32")
        for out, far in (("merged", 5e-3), (f"m.{form}", 0.2 if form == "nf4" else 1e-5)):
            again = models.load(tmp_path / out, dtype=torch.float32)
            assert float((again(ids).softmax(-1) - expected).abs().sum(-1).mean().detach()) < far
    if method == "bitfit":
        with pytest.raises(models.ConfigError, match="PEFT has no adapter of biases alone"):
            exported("adapter", "adapter")
    else:
        exported("adapter", "adapter")
        again = models.load(folder / "llama", resolve(run).quant, torch.float32)
        models.load_adapter(again, tmp_path / "adapter")
        torch.testing.assert_close(again(ids).softmax(-1), expected)


def test_ia3_and_biases_train_a_t5_and_a_roberta_with_its_new_classifier(folder):
    tiny_t5.checkpoint(folder / "t5")
    tiny_roberta.checkpoint(folder / "roberta")
    tiny_roberta.classes(folder / "classes.jsonl", count=12)
    short = ("--max-steps", "1", "--accumulation", "1", "--method")
    roberta = {"model": "roberta", "data": "classes.jsonl"}
    jobs = [
        ("train", flags(folder, "t5-ia3", *short, "ia3", model="t5")),
        ("train", flags(folder, "roberta-bitfit", *short, "bitfit", **roberta)),
        ("train", flags(folder, "roberta-prefix", *short, "prefix", **roberta)),
    ]
    *made, refused = commands(jobs)
    assert [each["error"] for each in made] == [None, None]
    assert "method is prefix, but" in refused["error"]
    assert "is a RoBERTa" in refused["error"]
    names = load_file(folder / "roberta-bitfit" / "adapter" / "adapter_model.safetensors")
    assert "base_model.model.classifier.out_proj.weight" in names
    model, _ = load_target(folder / "roberta-bitfit", LoadOptions(device="cpu"))
    assert model.config.labels == ("few", "many")


def test_a_method_without_adapters_is_refused():
    with pytest.raises(ValueError, match="method is bitfit, but adapters is false"):
        RunConfig(model="m", data=DataConfig(path="d"), max_steps=1, method="bitfit", adapters=False, quantize=False)


def test_a_plan_counts_what_the_run_has_trained(runs, folder):
    method = "prefix"
    options = EstimateOptions(model=str(folder / "llama"), method=method, max_len=32)
    options = replace(options, prefix=models.PrefixConfig(num_virtual_tokens=4, init_text="It is red."))
    planned = plan(job_of(options, DTYPES["float32"], 32), "cpu")
    tensors = load_file(folder / method / "adapter" / "adapter_model.safetensors")
    assert planned.trained == sum(t.numel() for t in tensors.values())
    assert json.loads((folder / method / "adapter" / "adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
