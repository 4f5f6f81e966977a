"""Readers of instruction data: what each layout becomes, and what is refused, with file and line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError, DataError
from train.data.chat_formats import turns
from train.data.examples import open_examples
from train.data.formats import FORMATS
from train.data.instruction_formats import ALPACA, ALPACA_INPUT

# No half surrogate pairs (UTF-8 has none), and no marks of Guanaco's form.
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="#"), max_size=20)
answers = texts.filter(str.strip)


@pytest.fixture
def file(tmp_path):
    def write(content, name="my.jsonl"):
        path = tmp_path / name
        if isinstance(content, list):
            content = "".join(json.dumps(record) + "\n" for record in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def read_examples(path, format=None):
    examples = open_examples(path, format)
    return list(examples), examples.format


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


@given(conversation=st.lists(st.tuples(texts, answers), min_size=1, max_size=4), opening=texts)
def test_guanaco_text_gives_back_the_turns_it_was_made_of(conversation, opening):
    text = opening + "".join(f"### Human: {q}### Assistant: {a}" for q, a in conversation)
    system = [{"role": "system", "content": opening.strip()}] if opening.strip() else []
    expected = [turn for q, a in conversation for turn in (user(q.strip()), assistant(a.strip()))]
    assert turns(text) == system + expected


@given(pairs=st.lists(st.tuples(texts, answers), min_size=1, max_size=5), ends=st.sampled_from(["\n", "\r\n"]))
def test_a_list_lines_and_tables_of_the_same_records_read_alike(tmp_path_factory, pairs, ends):
    folder = tmp_path_factory.mktemp("same")
    pairs = [(q.replace("\r", " ").replace("\0", " "), a.replace("\r", ".").replace("\0", ".")) for q, a in pairs]
    rows = [{"prompt": q, "completion": a} for q, a in pairs]
    quoted = [",".join('"' + cell.replace('"', '""') + '"' for cell in pair) for pair in pairs]
    (folder / "a.json").write_bytes(json.dumps(rows, indent=1).replace("\n", ends).encode())
    (folder / "a.jsonl").write_bytes(ends.join(json.dumps(row, ensure_ascii=False) for row in rows).encode())
    (folder / "a.csv").write_bytes(ends.join(["prompt,completion", *quoted]).encode("utf-8-sig"))
    read = [read_examples(folder / name)[0] for name in ("a.json", "a.jsonl", "a.csv")]
    assert [[e.messages for e in examples] for examples in read] == [
        [(user(q.strip()), assistant(a.strip())) for q, a in pairs]
    ] * 3


def test_alpaca_has_one_prompt_with_an_input_and_one_without(file):
    path = file(
        [
            {"instruction": "Add.", "input": "2 and 3", "output": "5"},
            {"instruction": "Greet.", "input": "", "output": "Hello."},
            {"instruction": "Greet.", "output": "Hello."},
            {"instruction": "Greet.", "input": None, "output": "Hello."},
        ]
    )
    examples, layout = read_examples(path)
    assert layout == "alpaca"
    assert examples[0].prompt == (
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n2 and 3\n\n### Response:"
    )
    assert examples[0].messages == (user("Add.\n\n2 and 3"), assistant("5"))
    for example in examples[1:]:
        assert example.prompt == (
            "Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.\n\n"
            "### Instruction:\nGreet.\n\n### Response:"
        )
        assert example.messages == (user("Greet."), assistant("Hello."))


def test_braces_in_alpaca_records_stay_as_they_are(file):
    examples, _ = read_examples(file([{"instruction": "{input} {0}", "input": "{x}", "output": "{}"}]))
    assert examples[0].prompt == ALPACA_INPUT.replace("{instruction}", "{input} {0}", 1).replace(
        "### Input:\n{input}", "### Input:\n{x}"
    )
    assert "{instruction}" in ALPACA


@pytest.mark.parametrize("keys", FORMATS["prompt-completion"].keys)
def test_pairs_go_by_four_pairs_of_names(file, keys):
    examples, layout = read_examples(file([dict(zip(keys, ("Name a colour.", "Blue."), strict=True))]))
    assert layout == ("flan" if keys == ("inputs", "targets") else "prompt-completion")
    assert (examples[0].prompt, examples[0].response) == ("Name a colour.", " Blue.")
    assert examples[0].messages == (user("Name a colour."), assistant("Blue."))


@pytest.mark.parametrize(("prompt", "response"), [("Q:\n", "A"), ("Q:", "\nA"), ("", "A")])
def test_pairs_with_white_space_between_get_no_more(file, prompt, response):
    examples, _ = read_examples(file([{"prompt": prompt, "completion": response}]))
    assert (examples[0].prompt, examples[0].response) == (prompt, response)


def test_an_oasst1_question_is_a_conversation_of_which_the_last_answer_counts(file):
    asked = "### Human: What is 1 + 1? ### Assistant: 2 ### Human: And doubled? ### Assistant:"
    record = {"input": asked, "output": "4", "text": "### Human: other", "lang": "en"}
    (example,), layout = read_examples(file([record]))
    assert layout == "prompt-completion"
    assert example.messages == (user("What is 1 + 1?"), assistant("2"), user("And doubled?"), assistant("4"))
    assert example.last_only
    assert (example.prompt, example.response) == (asked, " 4")
    assert example.opening == "What is 1 + 1?"


def test_guanaco_text_is_found_and_every_answer_counts(file):
    (example,), layout = read_examples(file([{"text": "### Human: Hi### Assistant: Hello### Human: Bye"}]))
    assert layout == "guanaco"
    assert example.messages == (user("Hi"), assistant("Hello"), user("Bye"))
    assert not example.last_only


def test_chat_messages_and_sharegpt_are_the_same_conversation(file):
    ours = {"messages": [{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello")]}
    theirs = {
        "conversations": [
            {"from": "system", "value": "Be brief."},
            {"from": "human", "value": "Hi"},
            {"from": "gpt", "value": "Hello"},
        ]
    }
    examples, layout = read_examples(file([ours, theirs]))
    assert layout == "chat"
    assert examples[0].messages == examples[1].messages
    assert examples[0].messages[0] == {"role": "system", "content": "Be brief."}
    assert examples[0].opening == "Be brief.\nHi"


def test_a_named_format_is_used_instead_of_the_found_one(file):
    record = {"instruction": "A", "output": "B", "text": "### Human: C### Assistant: D"}
    (example,), layout = read_examples(file([record]), "guanaco")
    assert layout == "guanaco"
    assert example.messages == (user("C"), assistant("D"))


def test_examples_know_the_line_that_they_begin_on(file):
    rows = '[\n {"prompt": "a",\n  "completion": "b"},\n\n {"prompt": "c", "completion": "d"}]'
    lists, _ = read_examples(file(rows, "my.json"))
    assert [e.where.rpartition(":")[2] for e in lists] == ["2", "5"]
    lines, _ = read_examples(file('{"prompt": "a", "completion": "b"}\n\n{"prompt": "c", "completion": "d"}'))
    assert [e.where.rpartition(":")[2] for e in lines] == ["1", "3"]
    table, _ = read_examples(file('prompt\tcompletion\n"a\nb"\tc\nd\te\n', "my.tsv"))
    assert [e.where.rpartition(":")[2] for e in table] == ["2", "4"]


def test_a_byte_order_mark_windows_ends_and_line_separators_in_texts_are_accepted(file):
    text = '﻿{"prompt": "a b", "completion": "c"}\r\n{"prompt": "d", "completion": "e"}\r\n'
    examples, _ = read_examples(file(text))
    assert [e.prompt for e in examples] == ["a b", "d"]


def test_windows_ends_within_a_cell_become_newlines(file):
    examples, _ = read_examples(file('prompt,completion\r\na,"b\r\nc"\r\n', "my.csv"))
    assert examples[0].messages == (user("a"), assistant("b\nc"))


def test_a_field_of_ten_megabytes_is_read(file):
    long = "word " * 2_000_000
    assert len(read_examples(file([{"prompt": "a", "completion": long}]))[0][0].response or "") > 10_000_000
    assert len(read_examples(file(f"prompt,completion\na,{long}\n", "my.csv"))[0]) == 1


# Refusals


GOOD = {"instruction": "Greet.", "output": "Hello."}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "answer": "b"},
            r"my.jsonl:2: expected keys instruction\+output \(alpaca\); found prompt, answer. Rename",
        ),
        (
            {"instruction": "a"},
            r"my.jsonl:2: expected keys instruction\+output \(alpaca\); found instruction",
        ),
        ({}, r"my.jsonl:2: expected keys .*; found none"),
        ({"instruction": "a", "output": None}, "my.jsonl:2: output is null"),
        ({"instruction": "a", "output": ""}, "my.jsonl:2: output is empty"),
        ({"instruction": "a", "output": " \n\t"}, "my.jsonl:2: output is empty"),
        ({"instruction": "a", "output": 5}, "my.jsonl:2: output is a number; text is needed"),
        ({"instruction": "a", "output": ["b"]}, "my.jsonl:2: output is a list; text is needed"),
        ({"instruction": "a", "input": True, "output": "b"}, "my.jsonl:2: input is a truth value"),
        ([GOOD], "my.jsonl:2: is a list, not an object"),
        ("text", "my.jsonl:2: is a text, not an object"),
        (None, "my.jsonl:2: is null, not an object"),
    ],
)
def test_a_record_that_does_not_fit_is_named_with_its_line(file, record, message):
    with pytest.raises(DataError, match=message):
        read_examples(file([GOOD, record, GOOD]))


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"prompt": "a", "answer": "b"},
            r"expected keys prompt\+completion \(prompt-completion\); found prompt, answer. Rename",
        ),
        ({"prompt": None, "completion": "b"}, "prompt is null; text is needed"),
        ({"prompt": "a", "completion": None}, "completion is null"),
        ({"text": "no marks"}, "text has no '### Human:'"),
        ({"text": "### Human: a"}, "text has no response by the assistant"),
        ({"text": "### Human: a### Assistant: "}, "text: the response in turn 2 is empty"),
        (
            {"text": "### Human: a### Assistant: b### Human: c### Assistant:"},
            "the response in turn 4 is empty",
        ),
        ({"messages": None}, "messages is null; a list of turns is needed"),
        ({"messages": []}, "messages has no response"),
        ({"messages": ["a"]}, "messages: turn 1 is a text, not an object"),
        ({"messages": [user("a")]}, "messages has no response"),
        ({"messages": [user("a"), assistant(" ")]}, "messages: the response in turn 2 is empty"),
        ({"messages": [user("a"), assistant(None)]}, "messages: turn 2: content is null"),
        ({"messages": [user("a"), {"role": "assistant"}]}, "messages: turn 2: content is missing"),
        (
            {"messages": [user("a"), {"role": "tool", "content": "b"}]},
            "turn 2 is by 'tool'; known are system",
        ),
        ({"messages": [user("a"), {"role": ["x"], "content": "b"}]}, r"turn 2 is by \['x'\]"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "conversations: turn 1: value is a number"),
    ],
)
def test_a_first_record_that_does_not_fit_is_refused(file, record, message):
    with pytest.raises(DataError, match=f"my.jsonl:1: .*{message}"):
        read_examples(file([record]))


def test_of_many_bad_records_the_first_few_and_their_number_are_given(file):
    with pytest.raises(DataError) as refusal:
        read_examples(file([GOOD] * 3 + [{"instruction": "a", "output": ""}] * 12))
    lines = str(refusal.value).splitlines()
    assert "12 of 15 records" in lines[0]
    assert ":4: output is empty" in lines[1]
    assert len(lines) == 7
    assert lines[-1].strip() == "and 7 more"


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "my.jsonl", "my.jsonl is empty"),
        (b" \n\n", "my.jsonl", "my.jsonl is empty"),
        (b"[]", "my.json", "my.json is empty"),
        (b"prompt,completion\n", "my.csv", "my.csv is empty"),
        (b'{"prompt": "a", "completion": "b"}\n{"prompt": "\xff"}', "my.jsonl", "my.jsonl:2: is not UTF-8"),
        ("{}".encode("utf-16"), "my.jsonl", "my.jsonl is UTF-16"),
        (
            b'{"prompt": "a", "completion": "b"}\n{"prompt": "c"',
            "my.jsonl",
            ":2: .*ends in the middle of this",
        ),
        (b"{'prompt': 1}\n{}\n", "my.jsonl", ":1: is not JSON .*; one record a line"),
        (
            b'[{"prompt": "a", "completion": "b"},\n{"prom',
            "my.json",
            "my.json:2: is not JSON .*may be cut off",
        ),
        (b'[{"prompt": "a", "completion": "b"}\n', "my.json", "my.json:2: expected a comma or ]"),
        (b'[{"prompt": "a", "completion": "b"}\n,]', "my.json", "my.json:2: is not JSON"),
        (b"[", "my.json", "my.json:1: is not JSON .*cut off"),
        (b"[" * 100_000, "my.json", "nested too deeply"),
        (b'{"prompt": ' + b"[" * 100_000, "my.jsonl", "nested too deeply"),
        (b'prompt,completion\na,"b', "my.csv", "my.csv:2: is not CSV"),
        (b"prompt\tcompletion\na\n", "my.tsv", "my.tsv:2: has another number of fields .* than the header .2"),
        (b"prompt,completion\na,b,c\n", "my.csv", "my.csv:2: has another number of fields"),
    ],
)
def test_a_broken_file_gets_one_message(file, content, name, message):
    with pytest.raises(DataError, match=message):
        read_examples(file(content, name))


def test_a_missing_file_or_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"none.jsonl cannot be read: No such file"):
        read_examples(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match=r"has no files that end in .json, .jsonl, .csv, .tsv; name a file"):
        read_examples(tmp_path)


def test_an_unknown_format_is_refused_with_the_known_ones(file):
    with pytest.raises(ConfigError, match=r"'alpcaa' is not known; give one of chat, .* Did you mean alpaca\?"):
        read_examples(file([GOOD]), "alpcaa")
