"""`qlora bench codes`: what was measured is kept, and compared in pairs."""

import json
from dataclasses import replace

import pytest
import torch

import models
from benchmarks import bases, codes
from benchmarks.kept import Kept
from models.errors import DataError
from qlora import main
from tests import tiny

WORDS = ["a", "small", "stone", "lies", "beneath", "the", "green", "hill", "and", "nobody", "asks"]


def test_what_was_measured_is_not_measured_again_nor_mixed_with_other_settings(tmp_path):
    kept, calls = Kept(tmp_path / "work", {"model": "a", "limit": 3}), []
    for _ in range(2):
        assert kept.made("row", lambda: calls.append(1) or {"loss": 0.1}) == {"loss": 0.1}
    assert calls == [1]
    with pytest.raises(ZeroDivisionError):
        kept.made("broken", lambda: {"loss": 1 / 0})
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"settings.json", "row.json"}
    Kept(tmp_path / "work", {"model": "a", "limit": 3})
    with pytest.raises(
        models.ConfigError, match="holds results with the limit 3, but this run's is 4; name another directory"
    ):
        Kept(tmp_path / "work", {"model": "a", "limit": 4})


def test_bases_are_compared_in_pairs_of_the_same_seed():
    runs = [
        {"base": base, "seed": seed, "steps": 1, "held_out": loss + seed}
        for base, losses in {"NF4": (1.0, 2.0, 3.0), "other": (0.5, 1.5, 2.5)}.items()
        for seed, loss in enumerate(losses)
    ]
    reference, other = bases.compared(runs)
    assert other["held_out"]["mean"] == pytest.approx(2.5)
    assert other["held_out"]["half"] > 1
    assert other["held_out_less_NF4"]["mean"] == pytest.approx(-0.5)
    assert other["held_out_less_NF4"]["half"] == pytest.approx(0, abs=1e-9)
    assert reference["held_out_less_NF4"]["mean"] == 0


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    """A tiny model that takes windows of 512 tokens, and a text."""
    directory = tmp_path_factory.mktemp("codes")
    source = tiny.checkpoint(directory / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 1024}))
    (directory / "text.txt").write_text("\n".join(" ".join([*WORDS[i % 7 :], str(i)]) for i in range(300)))
    return source, directory / "text.txt"


def test_conversations_that_are_held_out_are_not_calibrated_on(longer):
    source, _ = longer
    tokenizer = models.load_tokenizer(source)
    data = bases.load_data(bases.TRAINING, tokenizer)
    whole = bases.load_data(replace(bases.TRAINING, max_len=4 * bases.MAX_LEN, eval_size=0), tokenizer).train
    held_out = {example.opening for example in data.held_out}
    ends = [(example.opening in held_out, example.input_ids[bases.MAX_LEN :]) for example in whole]
    trained = sum(len(example.input_ids) for example in data.train) // 512
    most = trained + sum(len(end) for held, end in ends if not held) // 512  # all that training cuts off as well
    text = bases.training_text(source, most, 512)
    assert text.shape == (most, 512)
    assert most > trained + 8
    assert torch.equal(text[:trained], bases.training_text(source, trained, 512))
    rows = {tuple(row[i : i + 40]) for row in text.tolist() for i in range(473)}
    hidden = [example.input_ids for example in data.held_out] + [end for held, end in ends if held]
    middles = [tuple(ids[len(ids) // 2 :][:40]) for ids in hidden if len(ids) >= 80]
    assert len(middles) > len(data.held_out)
    assert not rows & set(middles)
    with pytest.raises(DataError, match=f"{most + 1} windows of 512 tokens are wanted"):
        bases.training_text(source, most + 1, 512)


def test_the_command_measures_a_ladder_and_bases_once(longer, tmp_path, monkeypatch, capsys):
    source, text = longer
    names = (codes.DENSE, codes.REFERENCE, codes.OURS, "PiSSA, rank 16")
    ways = {name: replace(codes.LADDER[name], windows=1) for name in names}
    monkeypatch.setattr(codes, "LADDER", ways)
    monkeypatch.setattr(bases, "STEPS", 1)
    chosen = {name: base for name, base in bases.all_bases().items() if name in ("NF4", codes.OURS)}
    monkeypatch.setattr(bases, "all_bases", lambda: chosen)
    arguments = ["bench", "codes", "--model", str(source), "--data", f"text={text}", "--limit", "2", "--seeds", "1"]
    arguments += ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "codes.json"), "--json"]
    results = []
    for _ in range(2):
        assert main(arguments) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["rows"] == results[1]["rows"]
    assert results[0]["runs"] == results[1]["runs"]
    rows = {row["name"]: row for row in results[0]["rows"]}
    assert list(rows) == list(names)
    assert rows[codes.DENSE]["bits_per_weight"] == 16
    assert rows[codes.DENSE]["relative_error"] == 0
    assert rows[codes.OURS]["bits_per_weight"] == rows[codes.REFERENCE]["bits_per_weight"]
    assert rows[codes.REFERENCE]["text"]["share_added"]["value"] == 1
    assert 0 < rows["PiSSA, rank 16"]["relative_error"] < rows[codes.REFERENCE]["relative_error"]
    assert [run["base"] for run in results[0]["runs"]] == ["NF4", codes.OURS]
    assert (tmp_path / "codes.png").stat().st_size > 1000
    assert str(tmp_path) not in (tmp_path / "codes.json").read_text()


def test_it_asks_for_texts(tmp_path, capsys):
    alone = tmp_path / "talk.txt"
    alone.write_text("a small stone")
    for data, told in (
        ([], "name the texts that perplexity is measured on, as NAME=PATH"),
        (["--data", f"calibration={alone}"], "name the texts that perplexity is measured on, as NAME=PATH"),
        (["--data", "x"], "data is given as NAME=PATH"),
        (["--data", "a=nothing.txt"], "nothing.txt does not exist"),
    ):
        assert main(["bench", "codes", "--model", "m", *data]) == 2
        assert told in capsys.readouterr().err
