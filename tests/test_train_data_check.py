"""`qlora data check` and `qlora data preview`: what they tell of a file, to a person and to a script."""

import functools
import io
import json
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
import qlora
from models.errors import DataError
from tests import tiny, tiny_roberta, tiny_t5
from train.data import token_view
from train.data.check import DataOptions, check, command, spread
from train.data.examples import open_examples
from train.data.tokenized import IGNORED, Tokenized


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def file(tmp_path):
    def write(records, name="my.jsonl"):
        path = tmp_path / name
        content = records if isinstance(records, str) else "".join(json.dumps(r) + "\n" for r in records)
        path.write_text(content, encoding="utf-8")
        return path

    return write


def told(capsys, *arguments, code=0):
    """The verb's JSON, and what it said to stderr."""
    assert qlora.main(["data", *map(str, arguments)]) == code
    out, err = capsys.readouterr()
    return (json.loads(out) if "--json" in arguments and out else out), err


PAIRS = [{"prompt": f"Say {n}:", "completion": "x" * (n + 1)} for n in range(20)]


# check


def test_a_check_tells_layout_files_lengths_and_what_is_learned(file, tokenizer, capsys):
    path = file(PAIRS)
    found, err = told(capsys, "check", path, "--tokenizer", tokenizer, "--json")
    assert (found["format"], found["why"], found["kind"]) == ("prompt-completion", "keys prompt, completion", "text")
    assert (found["records"], found["examples"], found["checked"]) == (20, 20, 20)
    assert [(f["name"], f["bytes"]) for f in found["files"]] == [("my.jsonl", path.stat().st_size)]
    assert re.fullmatch("[0-9a-f]{64}", found["files"][0]["sha256"])
    tok = models.load_tokenizer(tokenizer)
    pairs = [tok.encode_pair(p["prompt"], " " + p["completion"]) for p in PAIRS]
    prompts, responses = sorted(len(a) for a, _ in pairs), sorted(len(b) + 1 for _, b in pairs)
    assert found["unit"] == "tokens"
    for part, expected in (("prompt", prompts), ("response", responses)):
        assert found[part]["longest"] == expected[-1]
        assert found[part]["median"] == expected[9]
        assert found[part]["p90"] == expected[17]
        assert sum(count for _, _, count in found[part]["histogram"]) == 20
    assert found["label_tokens"] == sum(responses)
    assert found["label_share"] == pytest.approx(sum(responses) / sum(prompts + responses), abs=1e-4)
    assert found["dropped"]["count"] == found["cut_prompts"] == found["cut_responses"] == 0
    assert found["end_of_text"]["share"] == 1.0
    assert found["problems"] == []
    for said in (
        "prompt-completion (keys prompt, completion)",
        "lengths in tokens",
        "dropped: none",
        "is learned in 20",
    ):
        assert said in err


def test_drops_are_listed_with_file_line_and_reason(file, tokenizer, capsys):
    path = file([*PAIRS, {"prompt": "a long prompt " * 20, "completion": "b"}])
    found, err = told(capsys, "check", path, "--tokenizer", tokenizer, "--max-len", 40, "--json")
    assert found["dropped"]["count"] == 1
    assert found["dropped"]["first"] == [f"{path}:21"]
    assert found["dropped"]["reason"] == "no token to learn is left within max_len=40"
    assert f"dropped: 1\n  {path}:21: no token to learn is left within max_len=40" in err
    assert found["checked"] == 21


def test_what_is_cut_is_counted(file, tokenizer, capsys):
    limits = ("--source-max-len", 3, "--target-max-len", 4)
    found, _ = told(capsys, "check", file(PAIRS), "--tokenizer", tokenizer, *limits, "--json")
    assert found["cut_prompts"] == 20
    assert 0 < found["cut_responses"] < 20
    assert found["end_of_text"]["examples"] == 20 - found["cut_responses"]
    assert found["prompt"]["longest"] == 3
    assert found["response"]["longest"] == 4


def test_a_file_of_which_no_end_is_learned_is_not_fit(file, tokenizer, capsys):
    path = file([{"prompt": "a", "completion": "many words to write down here"}] * 2)
    arguments = ("check", path, "--tokenizer", tokenizer, "--target-max-len", 2, "--json")
    found, err = told(capsys, *arguments, code=3)
    assert "is not fit to train on:\n  the end of a text is learned in none of 2 examples" in err
    assert "target_max_len=2; raise target_max_len" in err
    assert found["problems"]
    assert found["end_of_text"]["examples"] == 0


def test_a_file_of_which_nothing_can_be_learned_is_not_fit(file, tokenizer, capsys):
    path = file([{"prompt": "a long prompt " * 20, "completion": "b"}] * 2)
    found, err = told(capsys, "check", path, "--tokenizer", tokenizer, "--max-len", 5, "--json", code=3)
    assert f"none of 2 examples has a token to learn within max_len=5 (first: {path}:1)" in err
    assert found["dropped"]["count"] == 2


def test_records_that_cannot_be_used_are_listed(file, capsys):
    _, err = told(capsys, "check", file([*PAIRS, {"prompt": "a", "completion": ""}, {"prompt": "b"}]), code=3)
    assert "2 of 22 records" in err
    assert "my.jsonl:21: completion is empty" in err
    assert "my.jsonl:22: expected keys prompt+completion" in err


def test_duplicates_and_empty_prompts_are_counted(file, capsys):
    again = {"prompt": "Say 3:", "completion": "xxxx"}
    found, err = told(capsys, "check", file([*PAIRS, again, {"prompt": "", "completion": "b"}, again]), "--json")
    assert found["duplicates"]["count"] == 2
    assert [where.rpartition(":")[2] for where in found["duplicates"]["first"]] == ["21", "23"]
    assert found["empty_prompts"]["count"] == 1
    assert "examples that repeat an earlier one: 2 (my.jsonl:21, my.jsonl:23)" in err


def test_without_a_tokenizer_characters_are_counted_and_it_is_said(file, capsys):
    found, err = told(capsys, "check", file(PAIRS), "--json")
    assert "without --tokenizer only the structure is checked, and lengths are in characters" in err
    assert found["unit"] == "characters"
    assert (found["prompt"]["longest"], found["response"]["longest"]) == (len("Say 10:"), 20)
    assert "label_share" not in found
    assert "end_of_text" not in found


def test_a_limit_looks_at_the_first_examples_but_reads_every_record(file, tokenizer, capsys):
    found, err = told(capsys, "check", file(PAIRS), "--tokenizer", tokenizer, "--limit", 5, "--json")
    assert (found["examples"], found["checked"]) == (20, 5)
    assert "of which 5 are looked at" in err
    told(capsys, "check", file([*PAIRS, {"prompt": "a"}]), "--limit", 5, code=3)


def test_the_labels_of_a_classification_file_are_counted(file, capsys):
    rows = "text,label\n" + "".join(f"t{n},{'good' if n % 3 else 'bad'}\n" for n in range(9))
    found, err = told(capsys, "check", file(rows, "my.csv"), "--json")
    assert found["kind"] == "classification"
    assert found["labels"] == {"bad": 3, "good": 6}
    assert "66.7%" in err
    scores = [{"sentence1": "a", "sentence2": str(n), "score": n} for n in range(5)]
    found, err = told(capsys, "check", file(scores), "--json")
    assert found["scores"] == {"lowest": 0, "mean": 2, "highest": 4}
    assert "scores from 0 to 4, mean 2" in err


def test_a_check_is_made_for_the_task_that_is_to_be_learned(file, capsys):
    path = file("index\tsentence1\tsentence2\tlabel\n" + "0\ta b\tc\tentailment\n" * 3, "rte.tsv")
    t5 = tiny.TOKENIZER.parent / "t5"
    found, err = told(capsys, "check", path, "--task", "seq2seq", "--tokenizer", t5, "--json")
    tok = models.load_tokenizer(t5)
    assert found["response"]["longest"] == len(tok.encode("entailment", eos=True))
    assert found["prompt"]["longest"] == len(tok.encode("rte sentence1: a b sentence2: c", eos=True))
    assert found["end_of_text"]["ids"] == {"</s>": tok.eos_token_id}
    assert "is learned in 3 examples, 100.0%" in err
    out, _ = told(capsys, "preview", path, "--task", "seq2seq", "--tokenizer", t5, "--count", 1)
    assert "rte sentence1: a b sentence2: c</s>[[entailment</s>]]" in out
    _, err = told(capsys, "check", file(PAIRS), "--task", "classification", code=3)
    assert "my.jsonl (prompt-completion) holds text, which is not classification" in err


def test_of_labels_no_end_of_text_is_asked(file, tokenizer, capsys):
    path = file("text,label\na long text to read,x\nb,y\n", "my.csv")
    arguments = ("--task", "classification", "--tokenizer", tokenizer, "--max-len", 4, "--json")
    found, err = told(capsys, "check", path, *arguments)
    assert found["whole"]["longest"] == 4
    assert found["cut_prompts"] == 1
    assert found["label_tokens"] == 0
    assert "end of text" not in err


def test_what_is_passed_over_is_told(file, capsys):
    chosen = "\n\nHuman: a\n\nAssistant:"
    rows = [{"chosen": f"{chosen} b", "rejected": ""}, {"chosen": chosen, "rejected": ""}]
    found, err = told(capsys, "check", file(rows), "--json")
    assert found["passed_over"][0]["count"] == 1
    assert "passed over: 1 chosen texts that do not end with an answer (first: " in err
    assert ("my.jsonl:2)") in err


def test_a_run_and_its_base_have_one_tokenizer(file, tokenizer, tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text(f'model = "{tokenizer}"\n')
    path = file(PAIRS)
    ours, _ = told(capsys, "check", path, "--tokenizer", run, "--json")
    assert ours == told(capsys, "check", path, "--tokenizer", tokenizer, "--json")[0]


@given(st.lists(st.integers(0, 5000), min_size=1, max_size=60))
def test_percentiles_are_lengths_of_examples_and_the_histogram_counts_each_once(lengths):
    from array import array

    found, ordered = spread(array("I", lengths)), sorted(lengths)
    assert found["longest"] == ordered[-1]
    for name, share in (("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
        assert found[name] in lengths
        assert sum(length <= found[name] for length in lengths) >= share * len(lengths)
        assert sum(length < found[name] for length in lengths) <= share * len(lengths)
    for low, high, count in found["histogram"]:
        assert count == sum(low <= length <= high for length in lengths)
    assert sum(count for _, _, count in found["histogram"]) == len(lengths)


# preview


def test_a_preview_marks_what_is_learned_where_there_is_no_colour(file, tokenizer, capsys):
    out, _ = told(capsys, "preview", file(PAIRS), "--tokenizer", tokenizer, "--count", 2)
    assert "prompt-completion, 20 examples" in out
    assert "my.jsonl:1, " in out
    assert "Say 0:[[ x<|im_end|>]]" in out
    assert "Say 1:[[ xx<|im_end|>]]" in out
    assert "Say 2:" not in out
    assert "\x1b" not in out


def test_a_preview_draws_other_examples_by_a_seed_and_prints_ids(file, tokenizer, capsys):
    path = file(PAIRS)
    arguments = ("preview", path, "--tokenizer", tokenizer, "--seed", 1, "--ids")
    found, err = told(capsys, *arguments, "--json")
    lines = [int(example["where"].rpartition(":")[2]) for example in found["examples"]]
    assert lines == [n + 1 for n in sorted(random.Random(1).sample(range(20), 3))] != [1, 2, 3]
    ids = found["examples"][0]["input_ids"]
    assert f"ids: {' '.join(map(str, ids))}\n" in err
    assert "labels: -100 " in err


def test_control_characters_in_data_do_not_reach_the_terminal(file, tokenizer, capsys):
    evil = "\x1b[31mred\x1b]0;title\x07\r\u202ertl [bold]b[/bold]"
    path = file([{"prompt": f"Hi {evil}", "completion": f"yes {evil}"}] * 2)
    for colour in (False, True):
        console, out = terminal(colour)
        command(options(path, tokenizer, action="preview"), console)
        text = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()) if colour else out.getvalue()
        assert not set(text) & set("\x1b\x07\r\u202e")
        assert r"\x1b[31mred\x1b]0;title\x07\r\u202ertl [bold]b[/bold]" in text.replace("↵", "")
        assert "\x1b[31m" not in out.getvalue()
    _, err = told(capsys, "check", file([{"pro\x1b[31mmpt": "a"}]), code=3)
    assert "\x1b" not in err
    assert r"pro\x1b[31mmpt" in err


def terminal(colour):
    from rich.console import Console

    out = io.StringIO()
    return Console(file=out, force_terminal=colour, color_system="standard" if colour else None, width=200), out


def options(path, tokenizer, action="check"):
    return DataOptions(action=action, path=str(path), tokenizer=str(tokenizer))


def test_in_colour_every_token_has_its_bounds_and_what_is_learned_its_colour(file, tokenizer):
    console, out = terminal(True)
    command(options(file(PAIRS[:1]), tokenizer, action="preview"), console)
    body = out.getvalue().split("learned\n", 1)[1]
    runs = re.findall(r"\x1b\[([0-9;]+)m([^\x1b]*)\x1b\[0m", body)
    tok = models.load_tokenizer(tokenizer)
    prompt, response = tok.encode_pair("Say 0:", " x")
    assert tok.eos_token_id is not None
    response = [*response, tok.eos_token_id]
    assert [text for _, text in runs] == [tok.decode([i], skip_special=False) for i in prompt + response]
    assert {style for style, _ in runs[: len(prompt)]} == {"2", "2;4"}
    assert [style for style, _ in runs[len(prompt) :]] == ["30;42", "30;102"] * (len(response) // 2) + ["30;42"] * (
        len(response) % 2
    )


loaded = functools.cache(models.load_tokenizer)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)


@given(text=texts)
def test_the_pieces_of_tokens_are_the_text(tokenizer, text):
    tok = loaded(tokenizer)
    ids = tok.encode(text)
    pieces = list(token_view.pieces(ids, tok))
    assert len(pieces) == len(ids)
    assert "".join(pieces) == tok.decode(ids)


def test_a_token_that_ends_a_character_shows_it(tokenizer):
    tok = models.load_tokenizer(tokenizer)
    pieces = list(token_view.pieces(tok.encode("a 😀 b"), tok))
    assert "😀" in "".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_target_of_its_own_and_a_label_stand_behind_an_arrow(tokenizer):
    tok = models.load_tokenizer(tokenizer)
    source, target = tok.encode("It is"), tok.encode("red")
    assert str(token_view.view(Tokenized(source, target, "f:1"), tok)).endswith("It is → red")
    assert str(token_view.view(Tokenized(source, [], "f:1", label=1), tok)).endswith("It is → 1")
    alike = Tokenized(source, [IGNORED] * (len(source) - 1) + source[-1:], "f:1")
    assert str(token_view.view(alike, tok)) == "It is"


# Settings


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chekc", "f"), "action must be one of check, preview, not 'chekc'; did you mean check?"),
        (("check", "f", "--max-len", "1"), "max_len is 1; at least 2 tokens are needed"),
        (("check", "f", "--limit", "0"), "limit is 0; at least 1 example is needed"),
        (("preview", "FILE"), "data preview shows tokens, so it needs --tokenizer"),
        (("check", "FILE", "--format", "alpcaa"), "Did you mean alpaca?"),
    ],
)
def test_impossible_settings_are_refused(file, capsys, arguments, message):
    path = file(PAIRS)
    _, err = told(capsys, *(str(path) if a == "FILE" else a for a in arguments), code=2)
    assert message in err


def test_a_check_is_plain_data_for_a_library_caller(file, tokenizer):
    path = file(PAIRS)
    report = check(options(path, tokenizer), open_examples(path), models.load_tokenizer(tokenizer))
    assert json.loads(json.dumps(report)) == report
    with pytest.raises(DataError, match="cannot be read"):
        command(options("nowhere.jsonl", tokenizer), terminal(False)[0])


@pytest.mark.parametrize("made", ["t5", "roberta", "nothing"])
def test_the_task_is_what_the_checkpoint_would_learn_of_the_records(made, tmp_path, capsys):
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps({"text": f"text {n}", "label": "ab"[n % 2]}) + "\n" for n in range(4)))
    arguments = ["data", "check", str(path), "--json"]
    if made == "roberta":
        arguments += ["--tokenizer", str(tiny_roberta.checkpoint(tmp_path / "model"))]
    if made == "t5":
        path.write_text(json.dumps({"prompt": "x", "completion": "y"}) + "\n")
        arguments += ["--tokenizer", str(tiny_t5.checkpoint(tmp_path / "model"))]
    assert qlora.main(arguments) == 0
    wanted = "seq2seq" if made == "t5" else "classification"
    assert json.loads(capsys.readouterr().out)["task"] == wanted


def test_a_preview_says_of_an_example_that_it_is_dropped(tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"prompt": "long " * 50, "completion": "y"}) + "\n")
    model = tiny.checkpoint(tmp_path / "model")
    assert qlora.main(["data", "preview", str(path), "--tokenizer", str(model), "--max-len", "5"]) == 0
    assert "long.jsonl:1: dropped, no token to learn is left within max_len=5" in capsys.readouterr().out
