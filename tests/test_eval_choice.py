"""Multiple choice by likelihood: the choice is the most probable one, and records that cannot be used are refused."""

import json

import pytest

from eval.choice.generic import FAMILY, document
from eval.choice.task import Choice, best
from models import ConfigError, DataError
from tests.choices import asked, lines, plain, small, spec

CAPITAL = {"question": "What is the capital of France?", "choices": ["Paris", "Paris is not", "Rome"], "answer": 0}
SEA = {"context": "Fish swim in", "choices": ["water", "the dark blue sea", "fire"], "answer": "B"}
SNOW = {"question": "¿Qué color? ❄", "choices": ["white", "blanco ❄"], "answer": "blanco ❄"}


@pytest.fixture(scope="module")
def examinee(tmp_path_factory):
    return small(tmp_path_factory.mktemp("tiny"))


def task(examinee, path, **more):
    (only,) = FAMILY.build(spec("choice", examinee, path, **more)).tasks
    assert isinstance(only, Choice)
    return only


def test_answers_are_the_log_probabilities_of_the_choices(examinee, tmp_path):
    one = task(examinee, lines(tmp_path / "mine.jsonl", CAPITAL, SEA, SNOW))
    prompts = [
        ("Question: What is the capital of France?\nAnswer:", [" Paris", " Paris is not", " Rome"]),
        ("Fish swim in", [" water", " the dark blue sea", " fire"]),
        ("Question: ¿Qué color? ❄\nAnswer:", [" white", " blanco ❄"]),
    ]
    answers = asked(examinee, one)
    for found, (context, choices) in zip(answers, prompts, strict=True):
        expected = [plain(examinee, context, choice) for choice in choices]
        assert [answer[0] for answer in found] == pytest.approx(expected, abs=1e-4)
    for it, found in zip(one.documents, answers, strict=True):
        sums = [answer[0] for answer in found]
        each = [total / len(choice) for total, choice in zip(sums, it["choices"], strict=True)]
        expected = {"acc": sums.index(max(sums)) == it["gold"], "acc_norm": each.index(max(each)) == it["gold"]}
        assert one.score(it, found) == expected
    assert one.output_type == "multiple_choice"
    assert (one.name, one.num_fewshot, one.target(one.documents[1])) == ("choice", 0, 1)
    assert one.prompt(one.documents[1], examinee) == {
        "task": "choice",
        "input": "Fish swim in",
        "output": "the dark blue sea",
    }


@pytest.mark.parametrize(
    ("sums", "gold", "acc", "acc_norm"),
    [
        ([-4.0, -6.0], 0, 1, 0),  # -4/2 = -2 and -6/6 = -1: per character the longer one is better
        ([-4.0, -6.0], 1, 0, 1),
        ([-4.0, -12.0], 0, 1, 1),  # per character both have -2: the first counts
        ([-5.0, -5.0], 1, 0, 1),  # the sums are equal: the first counts
    ],
)
def test_norm_divides_by_characters_and_the_first_of_equals_counts(sums, gold, acc, acc_norm):
    one = Choice("mine", [{"query": "?", "choices": ["éß", "sixsix"], "gold": gold}])
    assert one.score(one.documents[0], [[value, False] for value in sums]) == {"acc": acc, "acc_norm": acc_norm}


def test_the_first_of_equals_is_best():
    assert [best(it) for it in ([0.0, 0.0], [-2.0, -1.0, -1.0], [-float("inf")] * 2)] == [0, 1, 0]


def test_the_first_records_are_examples_and_are_not_scored(examinee, tmp_path):
    one = task(examinee, lines(tmp_path / "mine.jsonl", CAPITAL, SEA, SNOW), num_fewshot=2)
    assert (len(one.documents), one.num_fewshot) == (1, 2)
    assert one.requests(one.documents[0], examinee)[1].arguments == (
        "Question: What is the capital of France?\nAnswer: Paris\n\n"
        "Fish swim in the dark blue sea\n\n"
        "Question: ¿Qué color? ❄\nAnswer:",
        " blanco ❄",
    )


def test_a_folder_has_a_file_a_split_and_examples_come_from_training(examinee, tmp_path):
    lines(tmp_path / "train.jsonl", SEA, SNOW)
    (tmp_path / "test.json").write_text(json.dumps([CAPITAL, SEA]))
    one = task(examinee, tmp_path, num_fewshot=1)
    assert len(one.documents) == 2
    assert one.shown == "Fish swim in the dark blue sea\n\n"
    assert one.settings["fewshot_data"] == str(tmp_path / "train.jsonl")
    assert len(task(examinee, tmp_path, split="train", num_fewshot=1).documents) == 1
    with pytest.raises(DataError, match="has no validation file"):
        task(examinee, tmp_path, split="validation")
    with pytest.raises(ConfigError, match=r"num_fewshot is 3, but .*train.jsonl has 2"):
        task(examinee, tmp_path, num_fewshot=3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("t.csv", 'question,A,B,C,answer\r\n"Two, and two?",four,five,,A\r\nSky?,red,green,blue,2\r\n'),
        ("t.csv", '\ufeffquestion,choices,answer\n"Two, and two?","[""four"", ""five""]",four\n'
                  'Sky?,"[""red"", ""green"", ""blue""]",c\n'),
        ("t.tsv", "question\tA\tB\tC\tanswer\nTwo, and two?\tfour\tfive\t\t0\nSky?\tred\tgreen\tblue\tblue\n"),
    ],
)  # fmt: skip
def test_tables_have_the_choices_in_columns_or_in_a_cell(examinee, tmp_path, name, content):
    (tmp_path / name).write_bytes(content.encode())
    assert task(examinee, tmp_path / name).documents == [
        {"query": "Question: Two, and two?\nAnswer:", "choices": ["four", "five"], "gold": 0},
        {"query": "Question: Sky?\nAnswer:", "choices": ["red", "green", "blue"], "gold": 2},
    ]


@pytest.mark.parametrize(
    ("choices", "answer", "gold"),
    [
        (["B", "A"], "A", 1),  # a choice's text goes before a letter
        (["2", "1", "0"], "0", 2),  # and before a number
        (["x", "y", "z"], "1", 1),
        (["x", "y", "z"], 2, 2),
        (["x", "y", "z"], " c ", 2),
    ],
)
def test_an_answer_is_a_text_a_letter_or_a_number_from_0(choices, answer, gold):
    assert document({"question": "Q", "choices": choices, "answer": answer})["gold"] == gold


def test_a_context_stands_before_its_question():
    both = document({"context": "It rains.", "question": "Is it dry?", "choices": ["yes", "no"], "answer": 1})
    assert both["query"] == "It rains.\nQuestion: Is it dry?\nAnswer:"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"answer": 3}, r"its answer is 3, but 0 to 2, A to C or a choice's text is expected"),
        ({"answer": -1}, r"its answer is -1"),
        ({"answer": "D"}, r"its answer is \"D\""),
        ({"answer": "London"}, r"its answer is \"London\""),
        ({"answer": True}, r"its answer is true"),
        ({"answer": None}, r"its answer is nothing.*not published"),
        ({"answer": ""}, r"its answer is \"\".*not published"),
        ({"choices": ["a", " ", "c"]}, r"its choice 2 of 3 is empty"),
        ({"choices": ["a"]}, r"has 1 choice\(s\); there must be at least 2"),
        ({"choices": ["a", 1]}, r"its 'choices' is not a list of texts"),
        ({"choices": "a, b"}, r"are not a JSON list of texts"),
        ({"choices": ["x", "x", "y"], "answer": "x"}, r"is the text of 2 choices"),
        ({"question": 3}, r"its 'question' is a number, not a text"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_by_its_line(examinee, tmp_path, change, message):
    path = lines(tmp_path / "mine.jsonl", CAPITAL, {**CAPITAL, **change})
    with pytest.raises(DataError, match=r"mine.jsonl:2: .*" + message):
        task(examinee, path)


def test_what_is_asked_has_to_be_there(examinee, tmp_path):
    with pytest.raises(DataError, match=r":1: asks nothing"):
        task(examinee, lines(tmp_path / "a.jsonl", {"choices": ["a", "b"], "answer": 0}))
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(CAPITAL)}\n{{")
    with pytest.raises(DataError, match=r"a.jsonl:2: is not JSON"):
        task(examinee, tmp_path / "a.jsonl")
    (tmp_path / "a.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"has no records"):
        task(examinee, tmp_path / "a.jsonl")


def test_data_has_to_be_named_and_there(examinee, tmp_path):
    with pytest.raises(ConfigError, match="choice needs data"):
        task(examinee, None)
    with pytest.raises(DataError, match="is not there"):
        task(examinee, tmp_path / "none.jsonl")
    path = lines(tmp_path / "mine.jsonl", CAPITAL, SEA)
    for number, message in ((2, "2, but .* has 2 record"), (-1, "it must be 0 or more")):
        with pytest.raises(ConfigError, match=f"num_fewshot is {message}" if number > 0 else message):
            task(examinee, path, num_fewshot=number)
    with pytest.raises(ConfigError, match="a split is chosen from a folder"):
        task(examinee, path, split="test")
