"""Super-NaturalInstructions tasks: Tk-Instruct's prompt to the byte, as long as there is room for, and one output."""

import json

import pytest

import models
from tests import tiny, tiny_t5
from tests.datafiles import examples, refused, write
from train.data import DataConfig, load_data
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


# As it is learned

T5, BPE = (models.load_tokenizer(it.TOKENIZER) for it in (tiny_t5, tiny))
DEFINITION = "Definition: Say which colour is meant.\n\n"
FIRST = " Positive Example 1 -\nInput: of the sky.\n Output: blue.\n\n"
SECOND = " Positive Example 2 -\nInput: Of grass?\n Output: green.\n\n"
SNOW = "Now complete the following example -\nInput: Of snow!\nOutput: "


def learned(path, tokenizer, **settings):
    """What is read and what is to be written, of each instance."""
    task = "seq2seq" if tokenizer is T5 else "causal"
    config = DataConfig(path=str(path), eval_size=0, **settings)
    return load_data(config, tokenizer, task).train


def wide(count, outputs=("black", "dark", "sooty", "inky")):
    return {**TASK, "Instances": [{"input": f"Of coal {n}", "output": list(outputs)} for n in range(count)]}


@pytest.mark.parametrize("tokenizer", [T5, BPE])
def test_examples_are_shown_only_while_the_source_fits(tmp_path, tokenizer):
    path, end = write(tmp_path, json.dumps(TASK, indent=1), "a.json"), int(tokenizer is T5)
    for text, fewer in ((DEFINITION + FIRST + SECOND + SNOW, 0), (DEFINITION + FIRST + SNOW, 1)):
        room = len(tokenizer.encode(DEFINITION + FIRST + SECOND + SNOW)) + end - fewer
        snow = learned(path, tokenizer, source_max_len=room)[1]
        assert not snow.cut_prompt
        if tokenizer is T5:
            assert snow.input_ids == T5.encode(text, eos=True)
            assert snow.labels == T5.encode("white", eos=True)
        else:  # tokens begin with their space
            assert snow.input_ids == [*BPE.encode(text[:-1]), *BPE.encode(" white"), BPE.eos_token_id]
            assert sum(label != -100 for label in snow.labels) == len(BPE.encode(" white")) + 1


def test_a_source_too_long_without_examples_is_cut_as_the_reference_cuts_it(tmp_path):
    task = {**TASK, "Instances": [{"input": "one two three four " * 40, "output": ["ten"]}]}
    path = write(tmp_path, json.dumps(task, indent=1), "a.json")
    whole = DEFINITION + "Now complete the following example -\nInput: " + ("one two three four " * 40).strip()
    (found,) = learned(path, T5, source_max_len=50)
    assert found.cut_prompt
    assert found.input_ids == [*T5.encode(T5.decode(T5.encode(whole)[:50]))[:49], T5.eos_token_id]
    (found,) = learned(path, BPE, source_max_len=50)
    assert found.cut_prompt
    assert found.input_ids[:50] == BPE.encode(whole)[:50]
    assert BPE.decode(found.input_ids[50:]) == " ten"


def test_without_a_limit_of_the_source_all_examples_are_shown(tmp_path):
    path = write(tmp_path, json.dumps(TASK, indent=1), "a.json")
    assert learned(path, T5)[1].input_ids == T5.encode(DEFINITION + FIRST + SECOND + SNOW, eos=True)
    assert BPE.decode(learned(path, BPE)[1].input_ids) == DEFINITION + FIRST + SECOND + SNOW + "white"
    both = len(T5.encode(DEFINITION + FIRST + SECOND + SNOW, eos=True))
    assert learned(path, T5, max_len=both - 1)[1].input_ids == T5.encode(DEFINITION + FIRST + SNOW, eos=True)


def test_a_chat_has_the_prompt_that_fits_and_the_output_drawn(tmp_path):
    path = write(tmp_path, json.dumps(TASK, indent=1), "a.json")
    room = len(BPE.encode(DEFINITION + FIRST + SECOND + SNOW)) - 1
    text = BPE.decode(learned(path, BPE, source_max_len=room, template="chat", chat_style="chatml")[1].input_ids)
    assert "Positive Example 1" in text
    assert "Positive Example 2" not in text
    assert "white" in text


def test_which_output_is_learned_is_drawn_by_the_seed(tmp_path):
    path = write(tmp_path, json.dumps(wide(80), indent=1), "a.json")

    def drawn(seed):
        return [T5.decode(it.labels) for it in learned(path, T5, seed=seed)]

    first = drawn(1)
    counts = [first.count(word) for word in ("black", "dark", "sooty", "inky")]
    assert sum(counts) == 80
    assert all(5 <= count <= 35 for count in counts)  # 20 on average; four standard deviations are 15
    assert drawn(1) == first
    assert sum(a != b for a, b in zip(drawn(2), first, strict=True)) > 40
    (folder := tmp_path / "elsewhere").mkdir()
    assert [T5.decode(it.labels) for it in learned(path.rename(folder / "b.json"), T5, seed=1)] == first


def test_so_many_instances_of_each_task_are_drawn(tmp_path):
    write(tmp_path, json.dumps(wide(30, ["black"]), indent=1), "a.json")
    write(tmp_path, json.dumps(wide(5, ["white"]), indent=1), "b.json")
    write(tmp_path, json.dumps([wide(30, ["red"]), wide(30, ["blue"])]), "c.json")

    def words(seed, per_task=10):
        return [(it.where, T5.decode(it.labels)) for it in learned(tmp_path, T5, per_task=per_task, seed=seed)]

    found = words(1)
    assert [word for _, word in found] == ["black"] * 10 + ["white"] * 5 + ["red"] * 10 + ["blue"] * 10
    assert words(1) == found != words(2)
    assert len(words(1, None)) == 95
    assert len({where for where, word in found if word == "black"}) == 10  # each from a line of its own


def test_other_layouts_have_no_tasks_to_draw_from(tmp_path):
    path = write(tmp_path, [{"instruction": f"a {n}", "output": "b"} for n in range(5)], "a.jsonl")
    assert len(learned(path, T5, per_task=1)) == 5
    with pytest.raises(ValueError, match="per_task is 0"):
        DataConfig(path="x", per_task=0)


def test_a_clone_of_the_repository_stands_for_its_training_tasks(tmp_path):
    for name in ("task2", "task1", "task3"):
        write(tmp_path, json.dumps({**TASK, "Definition": name}, indent=1), f"tasks/{name}.json")
    write(tmp_path, "task2\ntask1\n", "splits/default/train_tasks.txt")
    write(tmp_path, "task3\n", "splits/default/test_tasks.txt")
    found = open_examples(tmp_path)
    assert [str(it.prompt).partition("\n")[0] for it in found] == ["Definition: task2."] * 2 + [
        "Definition: task1."
    ] * 2
