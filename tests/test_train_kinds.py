"""`qlora train` of every kind of model by every method: what it learns, what it leaves, and how that is used again."""

import json
import re
import shutil
import tomllib
from functools import lru_cache

import pytest
import torch
from safetensors.torch import load_file

import models
import nf4
import qlora
from models.labelled import load_labelled
from models.target import LoadOptions, load_target
from tests import tiny, tiny_roberta, tiny_t5
from train.data.batches import collate
from train.data.config import DataConfig
from train.data.dataset import load_data

SETTINGS = (
    "--max-steps 20 --batch-size 8 --accumulation 1 --lora.rank 4 --lora.dropout 0 --data.eval-size 8 "
    "--optimizer.max-grad-norm 1"
)
METHODS = {"qlora": [], "16-bit lora": ["--no-quantize"], "full": ["--no-quantize", "--no-adapters"]}
RATES = {"qlora": "2e-2", "16-bit lora": "2e-2", "full": "5e-3"}
WAYS = [("qlora", "float32"), ("16-bit lora", "bfloat16"), ("full", "bfloat16"), ("full", "float32")]
TASKS = ("causal", "seq2seq", "classification", "regression")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint for each task, and data for it."""
    folder = tmp_path_factory.mktemp("kinds")
    tiny.checkpoint(folder / "causal")
    tiny_t5.checkpoint(folder / "seq2seq", **tiny_t5.V1_1)
    tiny_roberta.checkpoint(folder / "classification")
    tiny_roberta.checkpoint(folder / "regression")
    tiny.records(folder / "causal.jsonl", 40)
    tiny.records(folder / "seq2seq.jsonl", 40)
    tiny_roberta.classes(folder / "classification.jsonl")
    tiny_roberta.numbers(folder / "regression.jsonl")
    return folder


@pytest.fixture(scope="module")
def run(folder):
    """Make a run, once: its directory."""

    @lru_cache
    def made(task, method, dtype):
        out = folder / f"{task} {method} {dtype}"
        flags = ("--dtype", dtype, *METHODS[method])
        assert qlora.main(arguments(folder, task, out, *flags, rate=RATES[method])) == 0
        return out

    return made


def arguments(folder, task, out, *more, rate="2e-2"):
    data = ["--data.path", str(folder / f"{task}.jsonl"), "--optimizer.learning-rate", rate]
    given = ["--model", str(folder / task), "--out", str(out), *data, *SETTINGS.split(), "--quiet", *more]
    return ["train", *given]


def told(capsys, *given, code=0):
    """What a verb said: its JSON, or where it fails its sentence."""
    capsys.readouterr()
    assert qlora.main([str(argument) for argument in given]) == code
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else err


def evaluations(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["split"] == "eval"]


def manifest(out):
    return json.loads((out / "data" / "manifest.json").read_text())


def used(out, dtype="float32"):
    return load_target(out, LoadOptions(dtype=dtype, device="cpu"))


def batch(tokenizer, path, task):
    """All of a data file at once."""
    return collate(list(load_data(DataConfig(path=str(path), eval_size=0), tokenizer, task).train), 1)


@pytest.mark.parametrize(("method", "dtype"), WAYS)
@pytest.mark.parametrize("task", TASKS)
def test_a_run_learns_and_what_it_leaves_gives_the_same_held_out_loss(folder, run, task, method, dtype):
    out = run(task, method, dtype)
    first, last = evaluations(out)
    assert last["loss"] < first["loss"] - 0.02
    assert manifest(out)["task"] == tomllib.loads((out / "config.toml").read_text())["task"] == task

    left, other = ("model", "adapter") if method == "full" else ("adapter", "model")
    assert (out / left).is_dir()
    assert not (out / other).exists()
    model, tokenizer = used(out, dtype)
    data = load_data(DataConfig(path=str(folder / f"{task}.jsonl"), eval_size=8), tokenizer, task)
    with torch.no_grad():
        again = model.loss(**collate(list(data.held_out), 1)).item()
    assert again == pytest.approx(last["loss"], abs=1e-5 if dtype == "float32" else 2e-2)


@pytest.mark.parametrize(("method", "dtype"), WAYS)
def test_accuracy_rises_where_classes_can_be_told_apart(folder, run, method, dtype):
    out = run("classification", method, dtype)
    first, last = evaluations(out)
    assert first["accuracy"] < 0.9
    assert last["accuracy"] == 1.0
    assert last["labels"] == 8
    assert manifest(out)["labels"] == ["few", "many"]
    model, tokenizer = used(out, dtype)
    texts = batch(tokenizer, folder / "classification.jsonl", "classification")
    logits = model(texts["input_ids"], texts["attention_mask"])
    assert (logits.argmax(1) == texts["labels"]).double().mean() > 0.95
    assert model.config.labels == ("few", "many")


def test_numbers_are_learned_and_correlate(folder, run):
    _, last = evaluations(run("regression", "qlora", "float32"))
    assert last["pearson"] > 0.9
    model, tokenizer = used(run("regression", "qlora", "float32"))
    texts = batch(tokenizer, folder / "regression.jsonl", "regression")
    values = model(texts["input_ids"], texts["attention_mask"])[:, 0]
    assert (values - texts["labels"]).abs().mean() < 0.4


def test_a_whole_model_is_a_checkpoint_with_its_tokenizer_and_the_names_of_its_labels(folder, run):
    left = run("classification", "full", "bfloat16") / "model"
    assert {tensor.dtype for tensor in load_file(left / "model.safetensors").values()} == {torch.bfloat16}
    config = json.loads((left / "config.json").read_text())
    assert config["id2label"] == {"0": "few", "1": "many"}
    assert config["problem_type"] == "single_label_classification"
    original = models.load_tokenizer(folder / "classification")
    assert models.load_tokenizer(left).encode("A C W") == original.encode("A C W")
    assert models.load(left, dtype=torch.float32).config.labels == ("few", "many")


@pytest.mark.parametrize(("method", "dtype"), WAYS)
def test_a_trained_t5_writes(run, capsys, method, dtype):
    out = run("seq2seq", method, dtype)
    found = told(capsys, "generate", out, "--prompt", "Name colour 3.", "--max-new-tokens", 4, "--json")
    assert isinstance(found["text"], str)


def test_a_t5_writes_labels_as_text(folder, tmp_path, capsys):
    given = arguments(folder, "seq2seq", tmp_path / "run", "--data.path", str(folder / "classification.jsonl"))
    result = told(capsys, *given, "--json")
    assert result["data"]["task"] == "seq2seq"
    assert "labels" not in result["data"]
    first, last = evaluations(tmp_path / "run")
    assert last["loss"] < first["loss"]


def test_two_runs_of_one_seed_are_equal_also_where_the_head_is_new(folder, run, tmp_path):
    for name, seed in (("same", "42"), ("other", "1")):
        flags = ("--dtype", "float32", "--seed", seed)
        assert qlora.main(arguments(folder, "classification", tmp_path / name, *flags)) == 0
    metrics = [
        (out / "metrics.jsonl").read_bytes() for out in (tmp_path / "same", run("classification", "qlora", "float32"))
    ]
    assert metrics[0] == metrics[1] != (tmp_path / "other" / "metrics.jsonl").read_bytes()


# Heads


def test_a_head_of_as_many_labels_is_kept_and_trained_whole(folder, tmp_path, capsys):
    base = tiny_roberta.checkpoint(tmp_path / "base", ("few", "many"))
    given = arguments(
        folder, "classification", tmp_path / "run", "--model", str(base), "--dtype", "float32", rate="1e-30"
    )
    assert qlora.main(given) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "the checkpoint's classifier is trained whole beside the adapters (added to lora.modules_to_save)" in said
    kept = load_file(base / "model.safetensors")["classifier.out_proj.weight"]
    trained = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(trained["base_model.model.classifier.out_proj.weight"], kept)


def test_a_head_with_the_same_labels_in_another_order_is_put_into_the_datas(folder, tmp_path):
    base = tiny_roberta.checkpoint(tmp_path / "base", ("many", "few", "none"))
    ids = torch.tensor([[0, 5, 6, 2]])
    given = models.load(base, dtype=torch.float32)(ids)
    same = load_labelled(base, "classification", ("few", "many", "none"), dtype=torch.float32)
    torch.testing.assert_close(same(ids), given[:, [1, 0, 2]])
    assert same.config.labels == ("few", "many", "none")
    other = load_labelled(base, "classification", ("red", "green", "blue"), dtype=torch.float32)
    assert torch.equal(other(ids), given)


@pytest.mark.parametrize("labels", [("a", "b", "c"), ("number",)])
def test_a_head_of_another_number_of_labels_is_replaced(folder, tmp_path, capsys, labels):
    base = tiny_roberta.checkpoint(tmp_path / "base", labels)
    given = arguments(folder, "classification", tmp_path / "run", "--model", str(base), "--dtype", "float32")
    assert qlora.main(given) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "a new classifier is trained whole beside the adapters" in said
    assert re.search(r"held-out loss [\d.]+, accuracy 100.0% after step 20", said)
    model, tokenizer = used(tmp_path / "run")
    texts = batch(tokenizer, folder / "classification.jsonl", "classification")
    logits = model(texts["input_ids"], texts["attention_mask"])
    assert logits.shape[1] == 2
    assert (logits.argmax(1) == texts["labels"]).double().mean() > 0.95


# What else is done with such runs


@pytest.mark.parametrize("task", TASKS)
def test_there_is_nothing_to_merge_or_take_off_where_every_weight_was_trained(run, tmp_path, capsys, task):
    out = run(task, "full", "bfloat16")
    err = told(capsys, "merge", out, tmp_path / "merged", code=4)
    assert "nothing to merge, since every weight was trained; the whole model is in" in err
    err = told(capsys, "export", out, tmp_path / "exported", "--format", "adapter", code=2)
    assert "trained every weight, so it has no adapter" in err
    found = told(capsys, "export", out, tmp_path / "nf4", "--format", "nf4", "--json")
    assert found["layers"] > 0
    found = told(capsys, "inspect", out, "--json")
    assert found["adapter"] is None
    assert found["model"]["parameters"] == sum(p.numel() for p in models.load(out / "model").parameters())
    assert qlora.main(["inspect", str(out)]) == 0
    assert "every weight was trained" in capsys.readouterr().out


@pytest.mark.parametrize("task", ["classification", "regression"])
def test_a_run_that_labels_texts_is_merged_and_its_adapter_exported(folder, run, tmp_path, capsys, task):
    out = run(task, "qlora", "float32")
    told(capsys, "merge", out, tmp_path / "merged", "--dtype", "float16", "--json")
    merged, (model, tokenizer) = models.load(tmp_path / "merged", dtype=torch.float32), used(out)
    assert merged.config.labels == model.config.labels
    texts = batch(tokenizer, folder / f"{task}.jsonl", task)
    ids, mask = texts["input_ids"], texts["attention_mask"]
    torch.testing.assert_close(merged(ids, mask), model(ids, mask), atol=0.02, rtol=0)
    told(capsys, "export", out, tmp_path / "exported", "--format", "adapter", "--json")
    exported = load_file(tmp_path / "exported" / "adapter_model.safetensors")
    assert "base_model.model.classifier.out_proj.weight" in exported
    assert json.loads((tmp_path / "exported" / "adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


def test_a_run_that_is_not_done_says_what_it_lacks(run, tmp_path, capsys):
    shutil.copytree(run("causal", "full", "bfloat16"), tmp_path / "run")
    (tmp_path / "run" / "model" / "config.json").unlink()
    err = told(capsys, "generate", tmp_path / "run", "--prompt", "It", code=4)
    assert "a run without a model; it may not have finished" in err
    assert told(capsys, "inspect", tmp_path / "run", "--json")["model"] is None


# Refusals


@pytest.mark.parametrize(
    ("model", "data", "flags", "code", "says"),
    [
        ("classification", "causal", [], 2, "has texts to write, but .* is a RoBERTa, which gives labels"),
        ("classification", "classification", ["--task", "regression"], 2, "has classes for labels, but task = 'regr"),
        ("classification", "regression", ["--task", "classification"], 2, "has numbers for labels, but task = 'class"),
        ("classification", "classification", ["--task", "seq2seq"], 2, "is a RoBERTa, which learns classification or"),
        ("causal", "causal", ["--task", "seq2seq"], 2, "is a LLaMA, which learns causal; leave task at auto"),
        ("seq2seq", "seq2seq", ["--task", "classification"], 2, "is a T5, which learns seq2seq"),
        ("seq2seq", "seq2seq", ["--data.train-on-source"], 2, "train_on_source is for causal models"),
        (
            "seq2seq",
            "seq2seq",
            ["--data.pack", "--data.max-len", "32"],
            2,
            "only a causal language model can learn pack",
        ),
        ("classification", "classification", ["--data.max-len", "60"], 2, "has 42 tokens, but the model knows 32"),
        ("causal", "causal", ["--no-adapters"], 2, r"weights in few bits cannot be; set quantize = false as well"),
        ("causal", "causal", [*METHODS["full"], "--optimizer.lora-plus-ratio", "4"], 2, "no lora_B is trained"),
        ("classification", "one", [], 3, "has one class, few; at least two are needed"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_sentence(folder, tmp_path, capsys, model, data, flags, code, says):
    tiny_roberta.classes(folder / "one.jsonl", ("few", "few"))
    given = arguments(folder, model, tmp_path / "run", "--data.path", str(folder / f"{data}.jsonl"), *flags)
    if "60" in flags:
        long = "".join(json.dumps({"text": " ".join("ACDEFGHIKL" * 4), "label": name}) + "\n" for name in "ab")
        (tmp_path / "long.jsonl").write_text(long)
        given += ["--data.path", str(tmp_path / "long.jsonl"), "--data.eval-size", "0"]
    err = told(capsys, *given, code=code)
    assert re.search(says, err)


def test_weights_that_are_stored_in_4_bits_cannot_all_be_trained(folder, tmp_path, capsys):
    models.save(models.load(folder / "causal", nf4.QuantConfig()), tmp_path / "q")
    models.save_tokenizer(models.load_tokenizer(folder / "causal"), tmp_path / "q")
    given = arguments(folder, "causal", tmp_path / "run", "--model", str(tmp_path / "q"), *METHODS["full"])
    assert "is stored in 4 bits, and those cannot be trained" in told(capsys, *given, code=2)
    assert not (tmp_path / "run").exists()


def test_a_run_says_what_its_data_set_means_to_be_passed_over(tmp_path, capsys):
    data = tmp_path / "hh.jsonl"
    talk = "\n\nHuman: Name colour {0}.\n\nAssistant: Colour {0} is blue."
    texts = [talk.format(n) for n in range(6)] + ["\n\nHuman: And nobody answers."]
    data.write_text("".join(json.dumps({"chosen": text, "rejected": text}) + "\n" for text in texts))
    arguments = ["--model", str(tiny.checkpoint(tmp_path / "model")), "--data.path", str(data), "--max-steps", "1"]
    arguments += ["--out", str(tmp_path / "run"), "--dtype", "float32", "--lora.rank", "2", "--quiet"]
    assert qlora.main(["train", *arguments, "--data.eval-size", "1"]) == 0
    assert "passed over: 1 chosen texts that do not end with an answer" in capsys.readouterr().out
