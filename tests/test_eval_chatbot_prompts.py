"""Judges are told what the paper's were told, whatever the answers hold."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eval.chatbot.prompts import SHIPPED, read_templates, shipped
from eval.chatbot.questions import Question
from models import DataError

ROW = {
    "prompt_id": 4,
    "system_prompt": "Be fair.",
    "prompt_template": "Q {question} A {answer_1} B {answer_2} {prompt} {{as it is}}",
    "defaults": {"prompt": "Say {1}."},
    "category": "general",
}


def written(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@given(texts=st.tuples(*[st.text(alphabet="a{}01_!:%$\\ é\n")] * 3))
@pytest.mark.parametrize("name", ["vicuna_prompt_threeclass", "vicuna_prompt_relative", "oa_prompt_threeclass"])
def test_shipped_templates_are_filled_as_the_release_fills_them(name, texts):
    path = SHIPPED / f"{name}.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines() if line]
    for row, template in zip(rows, read_templates(path).rows, strict=True):
        question, first, second = texts
        values = {"question": question, "answer_1": first, "answer_2": second, **row["defaults"]}
        prompt = template.fill(*texts)
        assert prompt.user == row["prompt_template"].format(**values)  # as in the released script
        assert prompt.system == row["system_prompt"]
        assert template.number == row["prompt_id"]


def test_a_question_goes_with_the_template_of_its_category_or_else_with_the_first():
    templates = read_templates(SHIPPED / "vicuna_prompt_threeclass.jsonl")
    numbers = [templates.of(Question("1", "?", it)).number for it in ("coding", "math", "generic", "roleplay", "fermi")]
    assert numbers == [2, 3, 1, 1, 1]


def test_the_papers_prompts_are_the_default():
    vicuna, dialogue = Question("1", "?"), Question("a", "?", key="message_id")
    assert shipped("pairwise", [vicuna, dialogue]).name == "vicuna_prompt_threeclass.jsonl"
    assert shipped("pairwise", [dialogue]).name == "oa_prompt_threeclass.jsonl"
    assert shipped("relative", [dialogue]).name == shipped("relative", [vicuna]).name == "vicuna_prompt_relative.jsonl"
    for file in SHIPPED.glob("*.jsonl"):
        assert read_templates(file).rows


def test_templates_of_ones_own(tmp_path):
    path = written(tmp_path / "p.jsonl", ROW, {**ROW, "prompt_id": "x", "category": "code"})
    templates = read_templates(path)
    assert templates.of(Question("1", "?", "code")).number == 2
    assert templates.rows[0].fill("a", "{prompt}", "}{").user == "Q a A {prompt} B }{ Say {1}. {as it is}"
    other = read_templates(written(tmp_path / "o.jsonl", ROW))
    assert other.digest != templates.digest


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_template": "{question} {answer_1}"}, r"p\.jsonl:1: prompt_template has no place {answer_2}"),
        ({"prompt_template": "{question} {answer_1} {answer_2} {x}"}, r"has a place {x}, but known are answer_1, "),
        ({"prompt_template": "{question.__class__} {answer_1} {answer_2}"}, "that is no plain name"),
        ({"prompt_template": "{question!r} {answer_1} {answer_2}"}, "that is no plain name"),
        ({"prompt_template": "{question} {answer_1} {answer_2:>9}"}, "that is no plain name"),
        ({"prompt_template": '{"a": {question} {answer_1} {answer_2}'}, "write a brace that is meant as such twice"),
        ({"prompt_template": None}, "prompt_template is null; a text is needed"),
        ({"system_prompt": 3}, "system_prompt is a number; a text is needed"),
        ({"defaults": ["a"]}, "defaults is a list; an object of texts is needed"),
        ({"defaults": {"prompt": 1}}, "an object of texts is needed"),
    ],
)
def test_templates_that_cannot_be_filled_are_refused(tmp_path, change, message):
    with pytest.raises(DataError, match=message):
        read_templates(written(tmp_path / "p.jsonl", ROW | change))


def test_a_file_without_prompts_is_refused(tmp_path):
    with pytest.raises(DataError, match="holds no prompt"):
        read_templates(written(tmp_path / "p.jsonl"))
