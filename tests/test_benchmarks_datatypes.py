"""The benchmark of data types on a model of no interest: its figures against the definitions, and what it keeps."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

import models
import nf4
import qlora
from benchmarks import corpora, datatypes, quality
from benchmarks.kept import Kept
from models import ConfigError
from models.checkpoint import linear_weights
from models.llama import causal
from tests import tiny, tiny_roberta

WORDS = "the small red house of an old man is on a green hill and " * 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(datatypes, "SIZES", (32, 64))
    monkeypatch.setattr(datatypes, "FOUR_BITS", ("int4", "fp4-e2m1", "fp4-e3m0", "fp4", "nf4"))
    monkeypatch.setattr(datatypes, "OTHER_BITS", ("nf3", "int8"))
    monkeypatch.setattr(quality, "DRAWS", 200)
    monkeypatch.setattr(corpora, "WINDOW", 32)


def texts(folder):
    (folder / "a.txt").write_text(WORDS)
    (folder / "b.txt").write_text(WORDS[500:] + "a dog and a cat are in it. " * 100)
    return [f"a={folder / 'a.txt'}", f"b={folder / 'b.txt'}"]


def bench(capsys, *arguments, code=0):
    assert qlora.main(["bench", "datatypes", "--device", "cpu", "--json", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return json.loads(out) if code == 0 else err


def test_every_figure_is_that_of_its_definition(few, checkpoint, tmp_path, capsys):
    work, out = tmp_path / "work", tmp_path / "found" / "datatypes.json"
    asked = ("--model", checkpoint, "--data", *texts(tmp_path), "--limit", 2, "--work", work, "--out", out)
    found = bench(capsys, *asked)
    assert json.loads(out.read_text()) == found
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert str(tmp_path) not in out.read_text()  # files go by their names
    assert found["data"]["a"]["file"] == "a.txt"
    assert found["windows"] == {"a": [2, 32], "b": [2, 32]}

    rows = {(row["datatype"], row.get("block_size"), row.get("double_quant")): row for row in found["rows"]}
    assert len(rows) == len(found["rows"]) == 1 + 2 * (5 + 2) + 5 + 1  # blocks of 64, then of 32
    model = models.load(checkpoint, dtype=getattr(torch, found["dtype"]))
    layers = [layer for layer in linear_weights(model).values() if not layer.in_head]
    ids = torch.tensor(models.load_tokenizer(checkpoint).encode(WORDS)[:64]).view(2, 32)
    dense = losses(model, ids)
    assert rows["16 bit", None, None]["corpora"]["a"]["perplexity"]["value"] == pytest.approx(np.exp(dense.mean()))

    flat = torch.cat([layer.weight.detach().float().flatten() for layer in layers])
    for layer in layers:
        layer.weight.data = nf4.dequantize(nf4.quantize(layer.weight, nf4.QuantConfig("fp4-e3m0", 64, False)))
    row = rows["fp4-e3m0", 64, False]
    assert row["bits_per_weight"] == 4.5
    back = torch.cat([layer.weight.detach().float().flatten() for layer in layers])
    assert row["relative_error"] == pytest.approx(float((flat - back).norm() / flat.norm()), rel=1e-5)
    stored = losses(model, ids)
    figures = row["corpora"]["a"]
    assert figures["perplexity"]["value"] == pytest.approx(np.exp(stored.mean()))
    assert figures["above_16_bit"]["value"] == pytest.approx(np.exp(stored.mean()) - np.exp(dense.mean()), rel=1e-4)
    assert figures["above_16_bit"]["low"] <= figures["above_16_bit"]["value"] <= figures["above_16_bit"]["high"]

    assert rows["nf3", 64, False]["bits_per_weight"] == 3.5
    assert 4.125 < rows["nf4", 64, True]["bits_per_weight"] < 4.2  # small weights share their second scales with few
    assert set(rows["nf4", 64, False]["corpora"]) == {"a", "b"}
    assert set(rows["nf4", 32, True]["corpora"]) == {"a"}
    assert "corpora" not in rows["int4", 64, True]
    assert rows["nf4", 64, False]["corpora"]["b"]["above_nf4"]["value"] == 0
    orders = [(order["text"], order["block_size"]) for order in found["orders"]]
    assert orders == [("a", 32), ("a", 64), ("b", 64)]


def losses(model, ids):
    """Mean negative log-probability of each row, written out."""
    with torch.no_grad():
        logits = model(ids).double().log_softmax(-1)[:, :-1]
    return -logits.gather(2, ids[:, 1:, None])[..., 0].mean(1).numpy()


def test_what_is_kept_is_not_measured_again_and_another_text_is_added(few, checkpoint, tmp_path, capsys, monkeypatch):
    asked = ["--model", checkpoint, "--limit", 2, "--work", tmp_path / "work", "--data", texts(tmp_path)[0]]
    first = bench(capsys, *asked)
    calls = []
    monkeypatch.setattr(datatypes, "stored", None)
    monkeypatch.setattr(datatypes, "window_losses", lambda model, text: calls.append(text.name) or np.full(2, 5.0))
    assert bench(capsys, *asked)["rows"] == first["rows"]
    assert calls == []
    both = bench(capsys, *asked, texts(tmp_path)[1])
    assert len(calls) == 9  # the types in blocks of 64, with double quantization NF4 alone, and the dense weights
    assert both["rows"][0]["corpora"]["a"] == first["rows"][0]["corpora"]["a"]
    monkeypatch.undo()
    told = bench(capsys, *asked[:2], "--limit", 3, *asked[4:], code=2)
    assert "holds results with the limit 2, but this run's is 3; name another directory" in " ".join(told.split())


def test_without_a_text_the_model_writes_its_own(checkpoint, monkeypatch):
    model = causal(models.load(checkpoint, dtype=torch.float32), "this test")
    once, again, other = (corpora.own_text(model, 3, 20, seed) for seed in (0, 0, 1))
    assert once.windows.shape == (3, 20)
    assert set(once.windows[:, 0].tolist()) == {model.config.bos_token_id}
    assert torch.equal(once.windows, again.windows)
    assert not torch.equal(once.windows, other.windows)
    monkeypatch.setattr(model, "config", replace(model.config, max_position_embeddings=24))
    (read,) = corpora.read((), 3, model, checkpoint)
    assert read.windows.shape == (3, 24)  # as many positions as the model has
    monkeypatch.setattr(model, "config", replace(model.config, bos_token_id=None))
    with pytest.raises(ConfigError, match="names no token that a text begins with, so it cannot write one: give data"):
        corpora.own_text(model, 3, 20)


def test_the_papers_types_are_put_in_order_each_with_its_distance_from_the_next(monkeypatch):
    monkeypatch.setattr(quality, "DRAWS", 200)
    spread = np.linspace(-1, 1, 20)
    means = {"int4": 2.0, "fp4-e2m1": 2.5, "fp4-e3m0": 3.0, "nf4+DQ": 2.0001}
    known = {("a", f"{name}, block 64"): mean + spread for name, mean in means.items()}
    known["a", "nf4+DQ, block 64"] = 2.0001 - spread
    found = datatypes.order("a", 64, known)
    assert found is not None
    pairs = [(step["higher"], step["lower"]) for step in found["steps"]]
    assert pairs == [("fp4-e3m0", "fp4-e2m1"), ("fp4-e2m1", "nf4+DQ"), ("nf4+DQ", "int4")]
    assert found["steps"][0]["difference"]["value"] == pytest.approx(np.exp(3.0) - np.exp(2.5))
    assert "fp4-e3m0 is above fp4-e2m1" in datatypes.told(found["steps"][0])
    assert "nf4+DQ cannot be told from int4" in datatypes.told(found["steps"][2])
    assert datatypes.order("a", 32, known) is None


def test_a_model_that_predicts_no_next_token_has_errors_only(few, tmp_path, capsys):
    roberta = tiny_roberta.checkpoint(tmp_path / "roberta")
    found = bench(capsys, "--model", roberta)
    assert found["orders"] == []
    assert all("corpora" not in row for row in found["rows"])
    every = linear_weights(models.load(roberta, dtype=getattr(torch, found["dtype"]))).values()
    blocks = [layer.weight.detach() for layer in every if not layer.in_head]
    assert len(blocks) < len(every)  # its head has a layer that stays in 16 bits
    config = nf4.QuantConfig("int4", 32, False)
    lost = sum(nf4.error(weight, nf4.quantize(weight, config)).mse * weight.numel() for weight in blocks)
    whole = sum(float(weight.double().square().sum()) for weight in blocks)
    assert found["rows"][1]["relative_error"] == pytest.approx((lost / whole) ** 0.5, rel=1e-5)
    assert found["rows"][1]["datatype"] == "int4"
    told = bench(capsys, "--model", roberta, "--data", *texts(tmp_path), code=2)
    assert "perplexity needs a causal language model, but this is Roberta" in told


def test_texts_that_cannot_be_told_apart_or_found_are_refused(tmp_path):
    file = tmp_path / "a.txt"
    file.write_text(WORDS)
    with pytest.raises(ConfigError, match=r"given as NAME=PATH, such as wikitext2=valid\.txt, not 'a\.txt'"):
        corpora.named_files(("a.txt",))
    with pytest.raises(ConfigError, match="names a twice"):
        corpora.named_files((f"a={file}", f"a={file}"))
    with pytest.raises(ConfigError, match=r"data: b: .*b\.txt does not exist"):
        corpora.named_files((f"b={tmp_path / 'b.txt'}",))


def test_results_that_are_none_are_refused(tmp_path):
    (tmp_path / "x.json").write_text('{"setting": 3')
    with pytest.raises(ConfigError, match=r"x\.json is not a result of a benchmark .* delete it"):
        Kept(tmp_path, {}).made("x", dict)


def test_without_a_folder_results_are_kept_while_the_process_lives():
    kept, calls = Kept(None, {}), []
    assert [kept.made("a", lambda: calls.append(1) or 7) for _ in range(3)] == [7, 7, 7]
    assert calls == [1]


def test_the_table_names_every_type_and_text(few, checkpoint, tmp_path, capsys):
    console = Console(width=200, record=True)
    row = {"datatype": "nf4", "block_size": 64, "double_quant": True, "bits_per_weight": 4.127, "relative_error": 0.09}
    rows = [{"datatype": "16 bit", "bits_per_weight": 16, "relative_error": 0}]
    for size in datatypes.SIZES:
        rows += [row | {"datatype": n, "block_size": size, "double_quant": False} for n in datatypes.FOUR_BITS]
        rows += [row | {"block_size": size}]
    datatypes.show(console, rows, [])
    told = console.export_text()
    assert all(name in told for name in ("16 bit", "int4", "nf4+DQ", "4.127", "0.0900"))
