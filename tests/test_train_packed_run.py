"""`qlora train` with packed rows, and with batches of a number of tokens: the same step, put together otherwise."""

import json

import pytest

import qlora
from tests import tiny, tiny_t5


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    tiny.checkpoint(folder / "model")
    lines = [
        {"prompt": f"Count to {n}:", "completion": " ".join(map(str, range(1, n + 1)))} for n in (*range(1, 30), 3, 4)
    ]
    (folder / "my.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def one_step(folder, name, *flags):
    """Metrics of a run whose one step goes over the whole epoch."""
    whole = ["--epochs", "1", "--accumulation", "1000", "--dtype", "float32", "--lora.dropout", "0", "--quiet"]
    data = ["--data.path", str(folder / "my.jsonl"), "--data.max-len", "120", "--data.eval-size", "4"]
    out = ["--out", str(folder / name), "--overwrite"]
    assert qlora.main(["train", "--model", str(folder / "model"), *data, *whole, *out, *flags]) == 0
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    (step,) = (line for line in lines if line["split"] == "train")
    return step, [line["loss"] for line in lines if line["split"] == "eval"]


PLAIN = ("--batch-size", "4")
ways = {
    "packed": ("--data.pack", "--batch-size", "2"),
    "packed, by tokens": ("--data.pack", "--batch-tokens", "360"),
    "by tokens": ("--batch-tokens", "360"),
    "by tokens, not grouped": ("--batch-tokens", "130", "--data.no-group-by-length"),
}


@pytest.mark.parametrize("way", ways)
def test_a_step_over_all_examples_is_the_same_however_they_are_put_together(folder, way):
    (plain, plain_losses), (step, losses) = one_step(folder, "plain", *PLAIN), one_step(folder, "other", *ways[way])
    assert (step["labels"], step["tokens"]) == (plain["labels"], plain["tokens"])
    for name in ("loss", "grad_norm"):
        assert step[name] == pytest.approx(plain[name], rel=1e-5)
    assert losses == pytest.approx(plain_losses, rel=1e-5)


def test_packing_without_a_length_is_bad_usage(folder, capsys):
    settings = ["--model", str(folder / "model"), "--data.path", str(folder / "my.jsonl"), "--max-steps", "1"]
    assert qlora.main(["train", *settings, "--data.pack", "--out", str(folder / "none")]) == 2
    assert "pack needs max_len, the length of the rows to fill" in capsys.readouterr().err


def test_a_batch_too_small_for_an_example_names_it(folder, capsys):
    settings = ["--model", str(folder / "model"), "--data.path", str(folder / "my.jsonl"), "--max-steps", "1"]
    assert qlora.main(["train", *settings, "--batch-tokens", "20", "--out", str(folder / "small"), "--quiet"]) == 2
    said = capsys.readouterr().err
    assert f"{folder / 'my.jsonl'}:" in said
    assert "more than batch_tokens=20; raise batch_tokens or lower data.max_len" in said


def test_a_model_that_reads_one_text_a_row_is_not_given_several(folder, capsys):
    model = tiny_t5.checkpoint(folder / "t5")
    settings = ["--model", str(model), "--data.path", str(folder / "my.jsonl"), "--max-steps", "1"]
    flags = ["--data.pack", "--data.max-len", "40", "--out", str(folder / "t5run"), "--quiet"]
    assert qlora.main(["train", *settings, *flags]) == 2
    assert "only a causal language model can learn packed rows, not seq2seq" in capsys.readouterr().err
