"""Tokens, masks, limits and the split: what is learned of an example, and what never is."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError, DataError
from models.tokenizer import Tokenizer
from train.data import DataConfig, load_data, padding_id, preview
from train.data.batches import Measured
from train.data.causal import tokenize
from train.data.examples import open_examples
from train.data.formats import FORMATS, Example
from train.data.split import split
from train.data.survey import survey
from train.data.tokenized import IGNORED, Tokenized, collate

BOS, EOS, START, END = 256, 257, 258, 259
DEMO = Path(__file__).parent.parent / "train" / "demo_data" / "oasst1_english.jsonl"


class ByteTokenizer(Tokenizer):
    """Every byte is a token; special tokens lie above."""

    adds_bos = False

    def __init__(self, special, adds_bos, pad, eos):
        self.special_tokens, self.adds_bos = special, adds_bos
        self.bos_token_id, self.eos_token_id, self.pad_token_id, self.unk_token_id = BOS, eos, pad, None
        self.starts_with_space, self.chat_template, self.vocab_size = False, None, 260

    def encode(self, text, bos=False, eos=False, max_length=None):
        end = None if max_length is None else max_length - bos - eos
        return [BOS] * bos + list(text.encode())[:end] + [EOS] * eos

    def decode(self, ids, skip_special=True):
        names = {i: "" if skip_special else name for name, i in self.special_tokens.items()}
        return b"".join(names[i].encode() if i in names else bytes([i]) for i in ids).decode("utf-8", "replace")


def byte_tokenizer(*, chatml=False, adds_bos=False, pad=None, eos=EOS):
    special = {"<s>": BOS, "</s>": EOS} | ({"<|im_start|>": START, "<|im_end|>": END} if chatml else {})
    return ByteTokenizer(special, adds_bos, pad, eos)


PLAIN, LLAMA, CHATML = byte_tokenizer(), byte_tokenizer(adds_bos=True), byte_tokenizer(chatml=True, pad=EOS)

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
answers = texts.filter(str.strip)
tokenizers = st.sampled_from([PLAIN, LLAMA, CHATML])
lengths = st.none() | st.integers(2, 60)


def configs(path="x", **changes: Any):
    return DataConfig(path=path, **changes)


def pair(prompt, completion):
    return FORMATS["prompt-completion"].read({"prompt": prompt, "completion": completion})


def alpaca(instruction, given, output):
    return FORMATS["alpaca"].read({"instruction": instruction, "input": given, "output": output})


def chat(*turns):
    roles = ["user", "assistant"] * len(turns)
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]
    return FORMATS["chat"].read({"messages": messages})


# Arguments only: beartype's checks draw from the global generator, which hypothesis forbids to strategies.
examples = st.one_of(
    st.tuples(st.just(pair), texts, answers),
    st.tuples(st.just(alpaca), answers, texts, answers),
    st.lists(st.tuples(texts, answers), min_size=1, max_size=3).map(lambda t: (chat, *(c for p in t for c in p))),
)
any_config = st.builds(
    configs,
    template=st.sampled_from(["plain", "chat"]),
    max_len=lengths,
    source_max_len=lengths,
    target_max_len=lengths,
    train_on_source=st.booleans(),
)


def learned_text(tokenized, tokenizer):
    ids = [label for label in tokenized.labels if label != IGNORED]
    return tokenizer.decode(ids, skip_special=False)


@given(example=examples, tokenizer=tokenizers, config=any_config)
def test_a_label_is_ignored_or_the_id_at_its_place_and_the_first_is_ignored(example, tokenizer, config):
    make, *arguments = example
    example = make(*arguments)
    result = tokenize(example, tokenizer, config)
    assert len(result.labels) == len(result.input_ids)
    assert all(label in (IGNORED, i) for label, i in zip(result.labels, result.input_ids, strict=True))
    assert result.labels[:1] in ([], [IGNORED])
    assert result.label_count == sum(label != IGNORED for label in result.labels)


@given(prompt=answers, completion=answers, tokenizer=st.sampled_from([PLAIN, LLAMA]))
def test_of_a_pair_the_response_and_its_end_are_learned(prompt, completion, tokenizer):
    result = tokenize(pair(prompt, completion), tokenizer, configs())
    apart = prompt[-1].isspace() or completion[0].isspace()
    assert learned_text(result, tokenizer) == ("" if apart else " ") + completion + "</s>"
    everything = tokenizer.decode(result.input_ids, skip_special=False)
    assert everything == ("<s>" if tokenizer is LLAMA else "") + prompt + learned_text(result, tokenizer)
    assert result.labels[-1] == EOS


@given(instruction=answers, given=texts, output=answers)
def test_of_alpaca_the_output_and_its_end_are_learned(instruction, given, output):
    result = tokenize(alpaca(instruction, given, output), PLAIN, configs())
    assert learned_text(result, PLAIN) == f"\n{output}</s>"


@given(turns=st.lists(st.tuples(texts, answers), min_size=1, max_size=4))
def test_of_a_chat_every_answer_and_its_end_are_learned(turns):
    result = tokenize(chat(*(c for turn in turns for c in turn)), CHATML, configs())
    assert learned_text(result, CHATML) == "".join(f"{a}<|im_end|>" for _, a in turns)
    assert result.labels[-1] == END


@given(question=answers, answer=answers, asked=answers, answered=answers)
def test_of_a_conversation_before_a_question_nothing_is_learned(question, answer, asked, answered):
    history = f"### Human: {question.replace('#', '')}### Assistant: {answer.replace('#', '')}"
    example = pair(f"{history}### Human: {asked.replace('#', '')} ### Assistant:", answered)
    result = tokenize(example, CHATML, configs(template="chat"))
    assert learned_text(result, CHATML) == f"{answered.strip()}<|im_end|>"


def test_guanaco_records_keep_their_form_and_end_every_answer():
    example = FORMATS["guanaco"].read({"text": "### Human: Hi### Assistant: Hello### Human: Bye### Assistant: So long"})
    result = tokenize(example, CHATML, configs(), "guanaco")  # not the tokenizer's own form
    text = CHATML.decode(result.input_ids, skip_special=False)
    assert text == "### Human: Hi### Assistant: Hello</s>### Human: Bye### Assistant: So long</s>"
    assert learned_text(result, CHATML) == " Hello</s> So long</s>"


@given(example=examples, tokenizer=tokenizers, template=st.sampled_from(["plain", "chat"]))
def test_training_on_the_source_learns_all_but_the_first_token(example, tokenizer, template):
    make, *arguments = example
    example = make(*arguments)
    whole = tokenize(example, tokenizer, configs(train_on_source=True, template=template))
    assert whole.labels == [IGNORED, *whole.input_ids[1:]]
    assert whole.input_ids == tokenize(example, tokenizer, configs(template=template)).input_ids


@given(example=examples, tokenizer=tokenizers, config=any_config)
def test_limits_hold(example, tokenizer, config):
    make, *arguments = example
    example = make(*arguments)
    result = tokenize(example, tokenizer, config)
    assert len(result.input_ids) <= (config.max_len or 10**9)
    whole = tokenize(example, tokenizer, configs(template=config.template))
    if result.label_count and not config.train_on_source:
        first = next(i for i, label in enumerate(result.labels) if label != IGNORED)
        assert first <= (config.source_max_len or 10**9) + 1  # the beginning-of-text id stays
        assert result.label_count <= whole.label_count
    if not (result.cut_prompt or result.cut_response):
        assert result.input_ids == whole.input_ids


@given(prompt=answers, completion=answers, limit=st.integers(2, 40))
def test_a_cut_response_has_no_made_up_end_and_a_whole_one_keeps_its_own(prompt, completion, limit):
    result = tokenize(pair(prompt, completion), PLAIN, configs(target_max_len=limit))
    whole = tokenize(pair(prompt, completion), PLAIN, configs())
    assert result.cut_response == (whole.label_count > limit)
    assert result.label_count == min(limit, whole.label_count)
    assert (result.labels[-1] == EOS) == (not result.cut_response)
    assert whole.input_ids[: len(result.input_ids)] == result.input_ids


def test_a_long_prompt_keeps_its_end_and_the_beginning_of_text_id():
    result = tokenize(pair("a long question?", "Yes."), LLAMA, configs(source_max_len=9))
    assert LLAMA.decode(result.input_ids, skip_special=False) == "<s>question? Yes.</s>"[:3] + "question? Yes.</s>"
    assert result.cut_prompt
    assert not result.cut_response


def test_a_chat_ends_where_a_response_is_cut():
    result = tokenize(chat("a", "bb", "c", "too long", "d", "e"), CHATML, configs(target_max_len=3))
    assert learned_text(result, CHATML) == "bb<|im_end|>too"
    assert CHATML.decode(result.input_ids, skip_special=False).endswith("assistant\ntoo")


def test_a_trailing_question_is_left_out():
    result = tokenize(chat("a", "b", "c"), CHATML, configs())
    assert CHATML.decode(result.input_ids, skip_special=False).endswith("b<|im_end|>")


@given(example=examples, pad=st.sampled_from([EOS, END, 0, 65]))
def test_padding_is_never_learned_though_its_id_is_one_that_is(example, pad):
    make, *arguments = example
    example = make(*arguments)
    result = tokenize(example, CHATML, configs())
    longer = Tokenized([*result.input_ids, 1, 2], [*result.labels, IGNORED, IGNORED], "")
    batch = collate([result, longer], pad)
    n = len(result.input_ids)
    assert batch["labels"][0].tolist() == [*result.labels, IGNORED, IGNORED]
    assert batch["input_ids"][0].tolist() == [*result.input_ids, pad, pad]
    assert batch["attention_mask"].tolist() == [[1] * n + [0, 0], [1] * (n + 2)]
    assert batch["labels"][0, n - 1] in (EOS, END)


def test_padding_falls_back_to_the_end_of_text_id_and_then_to_0():
    assert padding_id(byte_tokenizer(pad=7)) == 7
    assert padding_id(byte_tokenizer(pad=0)) == 0
    assert padding_id(byte_tokenizer()) == EOS
    assert padding_id(byte_tokenizer(eos=None)) == 0


# Splitting


def parted(openings, size, seed):
    """Split examples that open so: the numbers of those to train on and of those held out."""
    found = survey([Tokenized([1, 2], [IGNORED, 2], f"f:{n}", o) for n, o in enumerate(openings)], ())
    train, held_out = split(found.openings, size, seed, lambda n: f"f:{n}")
    return train.tolist(), held_out.tolist()


def plainly(openings, count, seed):
    """The rule in a few words of Python: whole groups in shuffled order, as long as they fit."""
    groups = {}
    for place, opening in enumerate(openings):
        groups.setdefault(opening, []).append(place)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    chosen = []
    for group in order:
        if len(chosen) + len(group) <= count:
            chosen += group
    return sorted(set(range(len(openings))) - set(chosen)), sorted(chosen)


@given(openings=st.lists(st.integers(0, 9).map(str), min_size=2, max_size=40), seed=st.integers(0, 99))
def test_a_split_parts_the_examples_and_keeps_those_that_open_alike_together(openings, seed):
    biggest = max(openings.count(o) for o in openings)
    if biggest >= len(openings):
        return
    train, held_out = parted(openings, biggest, seed)
    assert sorted(train + held_out) == list(range(len(openings)))
    assert 0 < len(held_out) <= biggest
    assert not {openings[n] for n in train} & {openings[n] for n in held_out}
    assert (train, held_out) == (sorted(train), sorted(held_out))  # in the file's order
    assert (train, held_out) == plainly(openings, biggest, seed) == parted(openings, biggest, seed)


def test_a_split_of_different_openings_has_exactly_the_size_asked_for():
    openings = list(map(str, range(50)))
    for size, count in ((0, 0), (1, 1), (7, 7), (0.1, 5), (0.001, 1), (49, 49)):
        assert len(parted(openings, size, 1)[1]) == count
    assert parted(openings, 7, 1) != parted(openings, 7, 2)


def test_examples_without_an_opening_are_each_their_own():
    assert len(parted(["", "", "", ""], 2, 0)[1]) == 2


def test_a_split_that_cannot_be_made_is_refused():
    with pytest.raises(DataError, match=r"4 usable examples cannot give 4 held-out ones; lower data.eval_size"):
        parted("abcd", 4, 0)
    with pytest.raises(DataError, match=r"no 1 of 4 .* open alike \(f:0 and others\)"):
        parted("aaaa", 1, 0)


# Files


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my.jsonl"
    records = [{"prompt": f"Say {n}:", "completion": "x" * (n + 1)} for n in range(20)]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def test_a_dataset_says_what_became_of_its_file(file):
    data = load_data(configs(path=str(file), max_len=12, eval_size=5), PLAIN)
    assert {k: v for k, v in data.manifest.items() if k != "label_share"} == {
        "file": "my.jsonl",
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        "bytes": file.stat().st_size,
        "format": "prompt-completion",
        "task": "causal",
        "template": "plain",
        "records": 20,
        "passed_over": {},
        "examples": 20,
        "dropped": 0,
        "first_dropped": [],
        "cut_prompts": 0,
        "cut_responses": 16,  # beside 6 tokens of prompt, a space and the end, 12 leave room for 4 of x
        "train": 15,
        "held_out": 5,
        "tokens": 20 * 12 - 6,
        "label_tokens": 20 * 12 - 6 - 10 * 6 - 10 * 7,
        "longest": 12,
        "longest_target": 0,
        "ends": 4,
    }
    json.dumps(data.manifest)


def test_examples_without_a_token_to_learn_are_dropped_and_listed(tmp_path):
    path = tmp_path / "my.jsonl"
    records = [{"prompt": "x" * n, "completion": "y"} for n in range(1, 9)]  # n + 3 tokens, of which n are asked
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    data = load_data(configs(path=str(path), max_len=5, eval_size=1), PLAIN)
    expected = [f"{path}:{line}: no token to learn is left within max_len=5" for line in range(5, 9)]
    assert list(data.drops) == data.manifest["first_dropped"] == expected
    assert data.drops[-1] == expected[-1]
    assert list(data.drops[1:3]) == expected[1:3]
    assert (data.manifest["dropped"], data.manifest["train"], data.manifest["held_out"]) == (4, 3, 1)
    assert {e.where for e in (*data.train, *data.held_out)} == {f"{path}:{line}" for line in range(1, 5)}
    assert data.warnings == ()  # half is not yet more than half
    (warning,) = load_data(configs(path=str(path), max_len=4, eval_size=1), PLAIN).warnings
    assert warning == (
        f"data: 5 of 8 examples are dropped (first: {path}:4: no token to learn is left within max_len=4). "
        "Raise data.max_len, or lower data.source_max_len"
    )


def test_a_file_of_which_nothing_can_be_learned_is_refused(file):
    with pytest.raises(DataError, match=r"20 of 20 examples are dropped \(first: .*my.jsonl:1: .* max_len=5\). Raise"):
        load_data(configs(path=str(file), max_len=5), PLAIN)


def test_a_file_whose_responses_never_end_is_refused(file):
    says = r"my.jsonl has an end-of-text id to learn.* all 20 responses are cut to target_max_len=2. Raise data.target"
    with pytest.raises(DataError, match=says):
        load_data(configs(path=str(file), target_max_len=2), PLAIN)
    ends = [load_data(configs(path=str(file), target_max_len=n), PLAIN).manifest["ends"] for n in (3, 5, 99)]
    assert ends == [1, 3, 20]  # the completions have 1, 2, 3, ... tokens, and a space and the end


def test_the_end_of_a_turn_is_an_end_too(file):
    data = load_data(configs(path=str(file), template="chat"), CHATML)
    assert data.manifest["ends"] == 20


def test_examples_are_tokenized_when_they_are_asked_for(file, monkeypatch):
    made = []
    data = load_data(configs(path=str(file), eval_size=5), PLAIN)
    whole = [*data.train, *data.held_out]
    encode = ByteTokenizer.encode
    monkeypatch.setattr(ByteTokenizer, "encode", lambda *a, **k: made.append(a[1]) or encode(*a, **k))
    assert data.train[3] == whole[3]
    assert len(made) == 2  # a prompt and its response
    assert data.held_out[-1] == whole[-1]
    assert list(data.train[2:4]) == whole[2:4]
    with pytest.raises(IndexError):
        data.train[15]


@given(sizes=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=3, max_size=20), limit=lengths)
def test_the_sizes_known_beforehand_are_those_of_the_examples(tmp_path_factory, sizes, limit):
    path = tmp_path_factory.mktemp("sizes") / "my.jsonl"
    records = [{"prompt": "x" * a, "completion": "y" * b} for a, b in sizes]
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    try:
        data = load_data(configs(path=str(path), source_max_len=limit, eval_size=1), PLAIN)
    except DataError:
        return
    for part in (data.train, data.held_out, data.train[1:]):
        assert isinstance(part, Measured)
        assert part.sizes.tolist() == [[len(e.input_ids), 0] for e in part]


def test_what_was_read_is_named_with_its_hash_and_several_files_with_that_of_their_list(tmp_path):
    record = json.dumps({"prompt": "x", "completion": "y"}) + "\n"
    contents = {"a.jsonl": record * 2, "b.jsonl": record.replace("x", "z")}
    hashes = {name: hashlib.sha256(content.encode()).hexdigest() for name, content in contents.items()}
    for name, content in contents.items():
        (tmp_path / name).write_text(content)
    single = load_data(configs(path=str(tmp_path / "a.jsonl"), eval_size=0), PLAIN).manifest
    assert (single["file"], single["sha256"], single["bytes"]) == ("a.jsonl", hashes["a.jsonl"], 2 * len(record))
    several = load_data(configs(path=str(tmp_path), eval_size=0), PLAIN).manifest
    listed = "".join(f"{digest}  {name}\n" for name, digest in hashes.items())
    expected = (tmp_path.name, hashlib.sha256(listed.encode()).hexdigest(), 3 * len(record))
    assert (several["file"], several["sha256"], several["bytes"]) == expected


def test_what_a_task_cannot_learn_is_refused(file):
    with pytest.raises(
        DataError, match=r"\(prompt-completion\) holds examples of text, but regression needs regression"
    ):
        load_data(configs(path=str(file)), PLAIN, "regression")
    with pytest.raises(ConfigError, match="only a causal language model can learn packed rows, not seq2seq"):
        load_data(configs(path=str(file), pack=True, max_len=9), PLAIN, "seq2seq")


def test_a_tokenizer_without_an_end_is_refused():
    with pytest.raises(ConfigError, match="no end-of-text id"):
        tokenize(pair("a", "b"), byte_tokenizer(eos=None), configs())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "path must name a data file"),
        ({"max_len": 1}, "max_len is 1"),
        ({"source_max_len": 0}, "source_max_len is 0"),
        ({"target_max_len": -1}, "target_max_len is -1"),
        ({"eval_size": -0.1}, "eval_size is -0.1"),
        ({"eval_size": float("nan")}, "eval_size is nan"),
        ({"pack": True}, "pack needs max_len, the length of the rows to fill"),
        ({"eval_size": 1.5}, "eval_size is 1.5; give a share below 1 or a whole number"),
    ],
)
def test_impossible_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        configs(**changes)


def test_a_preview_marks_what_is_learned():
    result = tokenize(pair("2 + 2 =", "4"), LLAMA, configs())
    assert preview([result], LLAMA) == "--- , 11 tokens, 3 learned\n<s>2 + 2 =[[ 4</s>]]"
    cut = tokenize(pair("2 + 2 =", "four"), LLAMA, configs(source_max_len=3, target_max_len=3))
    assert preview([cut], LLAMA).startswith("--- , 7 tokens, 3 learned, prompt cut, response cut\n<s>2 =[[ fo]]")


@given(example=examples, tokenizer=tokenizers, config=any_config)
def test_a_preview_shows_every_token(example, tokenizer, config):
    make, *arguments = example
    example = make(*arguments)
    result = tokenize(example, tokenizer, config)
    shown = preview([result], tokenizer).partition("\n")[2]
    assert shown.count("[[") >= bool(result.label_count)
    if result.input_ids and all(i < 128 or i > 255 for i in result.input_ids):
        text = tokenizer.decode(result.input_ids, skip_special=False)
        assert shown.replace("[[", "").replace("]]", "") == text.replace("[[", "").replace("]]", "")


def test_a_preview_shows_a_target_of_its_own_and_a_label():
    translated = Tokenized(list(b"ein Haus"), [*b"a house", EOS], "f:1")
    assert preview([translated], PLAIN) == "--- f:1, 16 tokens, 8 learned\nein Haus[[a house</s>]]"
    labelled = Tokenized(list(b"so good"), [], "f:2", label=1)
    assert preview([labelled], PLAIN) == "--- f:2, 7 tokens, 1 learned\nso good[[1]]"


# What is shipped


def test_the_demo_data_reads_as_conversations_that_end_with_an_answer():
    examples = open_examples(DEMO)
    assert examples.format == "prompt-completion"
    assert len(examples) == 320
    assert all(e.last_only and e.messages[0]["role"] == "user" for e in examples)
    records = [json.loads(line) for line in DEMO.read_text().splitlines()]
    assert all(list(r) == ["input", "output", "lang", "message_id"] and r["lang"] == "en" for r in records)
    assert len({r["message_id"] for r in records}) == len({(r["input"], r["output"]) for r in records}) == 320
    assert all(r["output"] == r["output"].strip() for r in records)


def test_no_question_of_the_demos_held_out_part_is_trained_on():
    data = load_data(DataConfig(path=str(DEMO), template="chat"), CHATML)
    assert 28 <= len(data.held_out) <= 32  # whole groups of 320 records, a tenth or a little less
    assert not {e.opening for e in data.train} & {e.opening for e in data.held_out}


def test_an_example_is_plain_data():
    assert Example(({"role": "assistant", "content": "a"},)).opening == ""
