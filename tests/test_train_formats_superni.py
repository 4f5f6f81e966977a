"""Super-NaturalInstructions tasks: Tk-Instruct's prompt to the byte, an example for each instance."""

import json

import pytest

from tests.datafiles import examples, refused, write
from train.data.examples import open_examples

TASK = {
    "Contributors": ["nobody"],
    "Definition": ["Say which colour is meant"],
    "Positive Examples": [
        {"input": "of the sky ", "output": "blue", "explanation": "it is"},
        {"input": "Of grass?", "output": "green."},
        {"input": "Of blood?", "output": "red."},
    ],
    "Negative Examples": [{"input": "Of tea?", "output": "loud."}],
    "Instances": [
        {"id": "1", "input": " Of coal", "output": ["black", "dark"]},
        {"id": "2", "input": "Of snow!", "output": ["white"]},
    ],
}


def test_the_prompt_is_tk_instructs(tmp_path):
    found = examples(tmp_path, json.dumps(TASK, indent=1), "task1.json")
    assert (found.format, len(found)) == ("superni", 2)
    assert found[0].prompt == (
        "Definition: Say which colour is meant.\n\n"
        " Positive Example 1 -\nInput: of the sky.\n Output: blue.\n\n"
        " Positive Example 2 -\nInput: Of grass?\n Output: green.\n\n"
        "Now complete the following example -\nInput: Of coal.\nOutput: "
    )
    assert found[0].response == "black"
    assert str(found[1].prompt).endswith("Input: Of snow!\nOutput: ")


def test_a_task_is_the_same_pretty_printed_on_one_line_or_as_a_list(tmp_path):
    wanted = [(e.prompt, e.response) for e in examples(tmp_path, json.dumps(TASK, indent=1), "a.json")]
    backwards = dict(reversed(TASK.items()))
    for content in (json.dumps(TASK), json.dumps([TASK]), json.dumps(backwards, indent=4)):
        assert [(e.prompt, e.response) for e in examples(tmp_path, content, "b.json")] == wanted
    two = examples(tmp_path, [TASK, TASK], "c.jsonl")
    assert [(e.prompt, e.response) for e in two] == wanted * 2


def test_an_instance_knows_its_own_line(tmp_path):
    found = examples(tmp_path, json.dumps(TASK, indent=1), "a.json")
    lines = json.dumps(TASK, indent=1).split("\n")
    for example, id in zip(found, "12", strict=True):
        assert lines[int(example.where.rpartition(":")[2])].strip() == f'"id": "{id}",'


def test_a_directory_of_tasks_keeps_each_definition(tmp_path):
    write(tmp_path, json.dumps(TASK, indent=1), "task1.json")
    write(tmp_path, json.dumps({**TASK, "Definition": "Other."}, indent=1), "task2.json")
    found = open_examples(tmp_path)
    assert [str(e.prompt).partition("\n")[0] for e in found] == [
        "Definition: Say which colour is meant.",
        "Definition: Say which colour is meant.",
        "Definition: Other.",
        "Definition: Other.",
    ]


def test_instances_without_an_output_are_passed_over_and_numbers_are_texts(tmp_path):
    task = {**TASK, "Instances": [{"input": "a", "output": o} for o in ([""], ["", "x"], [5], "y", [])]}
    found = examples(tmp_path, json.dumps(task, indent=1), "a.json")
    assert [e.response for e in found] == ["x", "5", "y"]
    assert [(s.reason, s.count) for s in found.skipped] == [("instances without an output", 2)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"Definition": []}, "Definition is empty"),
        ({"Definition": [5]}, "Definition is a number"),
        ({"Instances": []}, "a.json is empty"),
        ({"Instances": [5]}, "a.json:[0-9]+: Instances: number 1 is a number, not an object"),
        ({"Instances": [{"input": "a"}]}, "output is null"),
        ({"Instances": [{"input": None, "output": "b"}]}, "input is null"),
        ({"Positive Examples": [{"input": "a"}]}, "Positive Examples: number 1: output is null"),
        ({"Positive Examples": "a"}, "Positive Examples is a text; a list is needed"),
    ],
)
def test_a_task_that_lacks_something_is_refused(tmp_path, changes, message):
    refused(tmp_path, json.dumps({**TASK, **changes}, indent=1), message, "a.json")
