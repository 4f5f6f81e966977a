"""Questions and answers of the chatbot benchmark, in every layout that was released, and what is refused."""

import json
import os
from pathlib import Path

import pytest

from eval.chatbot.answers import (
    Answers,
    named,
    read_answers,
    read_systems,
    require_all,
    short_id,
    system_name,
)
from eval.chatbot.questions import Question, read_questions
from models import ConfigError, DataError

PREAMBLE = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions."
)
DIALOGUE = "### Human: Hi\nthere ### Assistant: Hello. ### Human: Why? ### Assistant:"


def lines(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_vicuna_questions_are_read_in_order(tmp_path):
    path = lines(
        tmp_path / "q.jsonl",
        {"question_id": 2, "text": "Why?", "category": "coding"},
        {"question_id": 1, "text": "How?", "category": "math"},
    )
    assert read_questions(path) == [Question("2", "Why?", "coding"), Question("1", "How?", "math")]


def test_a_vicuna_question_is_one_message_and_its_prompt_is_the_released_one():
    question = Question("1", "How can I improve?")
    assert question.messages == [{"role": "user", "content": "How can I improve?"}]
    assert question.prompt == f"{PREAMBLE} ### Human: How can I improve? ### Assistant:"
    assert question.named == {"question_id": 1}


def test_an_openassistant_question_is_a_dialogue_named_by_its_message(tmp_path):
    row = {"input": DIALOGUE, "output": "Because.", "message_id": "a-1", "question_id": "a-1", "category": "generic"}
    [question] = read_questions(
        lines(tmp_path / "q.jsonl", row | {"text": DIALOGUE, "prompt": f"{PREAMBLE} {DIALOGUE}"})
    )
    assert (question.id, question.text, question.named) == ("a-1", DIALOGUE, {"message_id": "a-1"})
    assert question.prompt == f"{PREAMBLE} {DIALOGUE}"
    assert question.messages == [
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"},
    ]
    [same] = read_questions(lines(tmp_path / "p.jsonl", {"message_id": "a-1", "prompt": f"{PREAMBLE} {DIALOGUE}"}))
    assert same == question


def test_a_chat_is_read_as_a_dialogue_and_a_single_message_as_a_question(tmp_path):
    chat = [
        {"role": "user", "content": "Hi\nthere"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Why?"},
    ]
    path = lines(tmp_path / "q.jsonl", {"id": "x", "messages": chat}, {"id": "y", "messages": chat[-1:]})
    dialogue, single = read_questions(path)
    assert dialogue.text == DIALOGUE
    assert dialogue.messages == chat
    assert single.text == "Why?"


def test_marks_within_a_question_that_does_not_begin_with_one_are_text():
    question = Question("1", "What does ### Assistant: mean?")
    assert question.messages == [{"role": "user", "content": "What does ### Assistant: mean?"}]


@pytest.mark.parametrize(("id", "named"), [("12", 12), ("0", 0), ("012", "012"), ("x1", "x1"), ("٣", "٣")])
def test_numbers_stay_numbers_in_files(id, named):
    assert Question(id, "Why?").named == {"question_id": named}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no question"),
        (
            [{"question_id": 1, "text": "a"}, {"question_id": "1", "text": "b"}],
            r"q\.jsonl:2: the question_id 1 comes twice",
        ),
        ([{"text": "a"}], r"q\.jsonl:1: names no question: message_id, question_id or id is needed; it has text"),
        ([{"question_id": True, "text": "a"}], "names no question"),
        ([{"question_id": 1, "text": " "}], r"q\.jsonl:1: has no question: one of text, .* it has question_id, text"),
        ([{"question_id": 1, "text": "a", "category": 3}], r"q\.jsonl:1: the category is a number"),
        ([{"question_id": 1, "messages": []}], "do not end with one from the user"),
        ([{"question_id": 1, "messages": [{"role": "robot", "content": "a"}]}], "has the role 'robot'"),
        ([{"question_id": 1, "messages": ["a"]}], "not an object with a role"),
        ([7], r"q\.jsonl:1: is a number, not an object"),
    ],
)
def test_questions_that_cannot_be_asked_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_questions(lines(tmp_path / "q.jsonl", *rows))


def test_both_released_layouts_of_answers_are_read(tmp_path):
    ours = {"question_id": 1, "text": "Why?", "category": "generic", "prompt": "...", "generation": "So.### Human: A",
            "generation_truncated": "So."}  # fmt: skip
    path = lines(tmp_path / "7b_x.jsonl", ours, ours | {"question_id": 2, "generation_truncated": f"Yes. {PREAMBLE}"})
    assert read_answers(path).texts == {"1": "So.", "2": "Yes. "}
    theirs = {"answer_id": "abc", "model_id": "bard:1", "question_id": 1, "text": "Since.", "metadata": {}}
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(theirs).encode() + b"\r\n")
    answers = read_answers(path, "Bard")
    assert answers == Answers("Bard", {"1": "Since."}, {"1": "abc"}, path)


def test_an_answer_to_an_openassistant_message_is_not_the_human_reference(tmp_path):
    row = {"input": "### Human: a", "output": "reference", "message_id": "m", "question_id": "q", "generation": "b"}
    assert read_answers(lines(tmp_path / "a.jsonl", row)).texts == {"m": "b"}


def test_ids_of_answers_are_short_uuids():
    # The package's examples, the second one in the order of digits that it has since version 1.0.
    assert short_id("example.com") == "exu3DTbj2ncsn9tLdLWspw"
    assert short_id("http://example.com") == "c8sh5y9hdSMS6zVnrvf53T"[::-1]


def test_halves_of_surrogate_pairs_are_replaced(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"question_id": 1, "text": "a\ud800 \U0001f600"})
    assert read_answers(path).texts == {"1": "a\ufffd \U0001f600"}
    assert read_questions(path) == [Question("1", "a\ufffd \U0001f600")]


def test_a_system_is_named_as_released_ratings_name_it():
    assert system_name(Path("x/answer_vicuna-13b.jsonl")) == "answer-vicuna-13b"
    assert system_name(Path("7b-guanaco-vicuna-generations-topp0.9-temp0.7.jsonl")).endswith("temp0.7")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "holds no answer"),
        ([{"question_id": 1, "text": "a"}] * 2, r"a\.jsonl:2: the question_id 1 comes twice"),
        (
            [{"question_id": 1, "text": "a", "category": "math"}],
            r"a\.jsonl:1: has no answer: generation, answer, or text",
        ),
        ([{"question_id": 1, "generation": None}], "has no answer"),
        ([{"generation": "a"}], "names no question"),
    ],
)
def test_answers_that_cannot_be_compared_are_refused(tmp_path, rows, message):
    with pytest.raises(DataError, match=message):
        read_answers(lines(tmp_path / "a.jsonl", *rows))


def test_a_file_without_a_last_newline_loses_nothing(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"question_id": 1, "text": "a"}\n{"question_id": 2, "text": "b"}')
    assert read_answers(path).texts == {"1": "a", "2": "b"}


def test_all_that_lack_answers_are_named_at_once(tmp_path):
    questions = [Question(str(n), "?") for n in range(8)]
    full = Answers("full", dict.fromkeys(map(str, range(8)), ""), {}, Path("full.jsonl"))
    one, none = (Answers(name, texts, {}, Path(name)) for name, texts in (("one", {"3": "a"}), ("none", {})))
    require_all([full], questions)
    told = r"one has no answer to 7 of 8 questions \(0, 1, 2, 4, 5, \.\.\.\); none has no answer to 8 of 8"
    with pytest.raises(DataError, match=told):
        require_all([full, one, none], questions)


def test_systems_get_names_of_their_own(tmp_path):
    path = lines(tmp_path / "a.jsonl", {"question_id": 1, "text": "a"})
    other = lines(tmp_path / "b=c.jsonl", {"question_id": 1, "text": "b"})
    systems = read_systems([str(path), f"B={path}", str(other)])
    assert [it.system for it in systems] == ["a", "B", "b=c"]
    assert named(systems, "B") is systems[1]
    assert named(systems, str(other)) is systems[2]
    assert named(systems, None) is None
    with pytest.raises(ConfigError, match=r"reference: C is none of the systems a, B, b=c"):
        named(systems, "C")
    with pytest.raises(ConfigError, match="are both named a; name one as in NAME=FILE"):
        read_systems([str(path), f"a={path}"])
    with pytest.raises(ConfigError, match=r"'x/y' cannot be a system's name"):
        read_systems([f"x/y={path}"])


SHARED = os.environ.get("QLORA_SHARED")


@pytest.mark.skipif(SHARED is None, reason="QLORA_SHARED names the folder with the released files")
def test_the_released_files_fit_together():
    assert SHARED is not None
    folder = Path(SHARED) / "assets" / "data" / "chatbot"
    questions = read_questions(folder / "prompts" / "vicuna_questions.jsonl")
    systems = [read_answers(path) for path in sorted((folder / "generations").iterdir())]
    require_all(systems, questions)
    assert len(questions) == 80
    assert {len(answers.texts) for answers in systems} == {80}
    ids = {answers.system: answers.ids for answers in systems}
    checked = 0
    for path in (folder / "ratings-gpt4" / "vicuna-pairwise").iterdir():
        names = path.name.removesuffix("-gpt-4-reviewer-threeclass.jsonl").split("-vs-")
        for row in map(json.loads, path.read_text().splitlines()):
            for name, key in zip(names, ("answer1_id", "answer2_id"), strict=True):
                if name in ids:
                    assert ids[name][str(row["question_id"])] == row[key]
                    checked += 1
    assert checked == 80 * 2 * 7 * 6  # six of the eight systems are given, each in 14 files
    for path in (folder / "generations").glob("*guanaco*"):
        rows = {str(row["question_id"]): row for row in map(json.loads, path.read_text().splitlines())}
        assert all(question.prompt == rows[question.id]["prompt"] for question in questions)
