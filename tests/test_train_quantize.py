"""`qlora quantize --calibrate`: any text that can be trained on or evaluated on, drawn by a seed."""

import json

import pytest
import torch

import models
from qlora import main
from tests import tiny
from train.calibration import STRETCH, calibration_windows

WORDS = ["a", "small", "stone", "lies", "beneath", "the", "green", "hill", "and", "nobody", "asks"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("calibrate") / "source")


@pytest.fixture
def files(tmp_path):
    """The same words as a text, as documents and as questions and answers."""
    lines = [" ".join([*WORDS[i % 7 :], str(i)]) for i in range(400)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    (tmp_path / "documents.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    tiny.records(tmp_path / "records.jsonl", 100)
    return tmp_path


def test_windows_come_from_all_of_a_file_and_follow_from_the_seed(source, files):
    tokenizer = models.load_tokenizer(source)
    assert (files / "text.txt").stat().st_size > 3 * STRETCH
    for name in ("text.txt", "documents.jsonl", "records.jsonl"):
        first, again, other = (calibration_windows(files / name, tokenizer, 4, 32, seed) for seed in (1, 1, 2))
        assert first.shape == (4, 32)
        assert torch.equal(first, again)
        assert not torch.equal(first, other)
    document = tokenizer.decode(calibration_windows(files / "documents.jsonl", tokenizer, 1, 64).flatten().tolist())
    assert document.split("\n\n")[1] in (files / "text.txt").read_text().split("\n")


def test_examples_read_as_training_has_them(source, files):
    tokenizer = models.load_tokenizer(source)
    chat = tokenizer.decode(calibration_windows(files / "records.jsonl", tokenizer, 4, 32, template="chat")[0].tolist())
    plain = tokenizer.decode(calibration_windows(files / "records.jsonl", tokenizer, 4, 32)[0].tolist())
    assert "assistant" in chat
    assert "assistant" not in plain


def test_a_short_file_gives_what_it_has_and_one_without_a_window_is_refused(source, files):
    tokenizer = models.load_tokenizer(source)
    (files / "short.txt").write_text(" ".join(WORDS))
    count = len(tokenizer.encode(" ".join(WORDS) + "\n\n"))
    assert calibration_windows(files / "short.txt", tokenizer, 1000, 8).shape == (count // 8, 8)
    with pytest.raises(models.DataError, match=f"short.txt has {count} tokens; one window takes 512"):
        calibration_windows(files / "short.txt", tokenizer)


def test_the_command_writes_a_checkpoint_and_tells_both_errors(source, files, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["--calibrate", str(files / "text.txt"), "--windows", "10", "--window", "32", "--json"]
    assert main(["quantize", str(source), str(out), *arguments]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["calibration_tokens"] == 320
    assert len(result["layers"]) == 14
    assert all(0 < layer["output_error"] < layer["relative_error"] for layer in result["layers"])
    assert models.load(out).config.hidden_size == 64
    how = ["--method", "weighted", "--no-asymmetric", "--seed", "1"]
    assert main(["quantize", str(source), str(tmp_path / "other"), *arguments, *how]) == 0
    other = json.loads(capsys.readouterr().out)
    total, less = (sum(layer["output_error"] for layer in each["layers"]) for each in (other, result))
    assert less < 0.9 * total


def test_how_to_calibrate_needs_a_text(capsys):
    assert main(["quantize", "a", "b", "--windows", "3"]) == 2
    assert "windows says how to calibrate; name a text by --calibrate" in capsys.readouterr().err
    assert main(["quantize", "a", "b", "--calibrate", "c", "--window", "0"]) == 2
    assert "window is 0; at least 1 is needed" in capsys.readouterr().err
