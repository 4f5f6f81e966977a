"""Super-NaturalInstructions' files as tasks: which are meant, what is in them, what is asked and what is written."""

import json
from dataclasses import replace

import pytest

import models
from eval.answering import answer_all
from eval.examinee import Examinee
from eval.superni.family import FAMILY, PREDICTIONS
from eval.superni.tasks import read_task, task_files
from eval.task import Spec
from models.errors import ConfigError, DataError
from tests import tiny, tiny_t5

POSITIVE = [{"input": "Of grass?", "output": "green"}, {"input": "Of blood?", "output": "red"}]
T5 = Examinee(tokenizer=models.load_tokenizer(tiny_t5.TOKENIZER), architecture="t5")
BPE = Examinee(tokenizer=models.load_tokenizer(tiny.TOKENIZER), architecture="llama")


def task(count=3, category="Data to Text", **changes):
    instances = [{"id": f"i{n}", "input": f"Of number {n}", "output": [f"colour {n}", "none"]} for n in range(count)]
    return {
        "Categories": [category],
        "Definition": ["Say which colour is meant"],
        "Positive Examples": POSITIVE,
        "Negative Examples": [{"input": "Of tea?", "output": "loud"}],
        "Instances": instances,
        **changes,
    }


def written(folder, **tasks):
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in tasks.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content, indent=1))
    return folder


def official(root, **tasks):
    """A clone with the first task in training and the others in the test."""
    written(root / "tasks", **tasks)
    splits = root / "splits" / "default"
    splits.mkdir(parents=True)
    first, *others = tasks
    (splits / "train_tasks.txt").write_text(f"{first}\n")
    (splits / "test_tasks.txt").write_text("".join(f"{name}\r\n" for name in reversed(others)) + "\n")
    return root


def suite(path, examinee=BPE, name="superni", **asked):
    return FAMILY.build(Spec(name=name, examinee=examinee, data=path, **asked))


def asked(suite, number=0, examinee=BPE):
    (found,) = suite.tasks[0].requests(suite.tasks[0].documents[number], examinee)
    return found


# Files


def test_a_path_is_a_file_or_a_folder_or_a_clone_with_its_splits(tmp_path):
    folder = written(tmp_path / "some", task2=task(), task1=task())
    (folder / "notes.txt").write_text("x")
    assert [file.stem for file in task_files(folder)] == ["task1", "task2"]
    assert task_files(folder / "task2.json") == [folder / "task2.json"]
    clone = official(tmp_path / "clone", task1=task(), task2=task(), task3=task())
    assert [file.stem for file in task_files(clone)] == ["task3", "task2"]  # in the split's order
    assert [file.stem for file in task_files(clone, "train")] == ["task1"]


def test_a_split_that_lacks_tasks_is_refused(tmp_path):
    clone = official(tmp_path, task1=task(), task2=task(), task3=task())
    (clone / "tasks" / "task3.json").unlink()
    with pytest.raises(DataError, match=r"lacks 1 of the 2 tasks .*\(first: task3.json\)"):
        task_files(clone)
    (clone / "splits" / "default" / "test_tasks.txt").write_text("\n")
    with pytest.raises(DataError, match=r"test_tasks.txt is empty"):
        task_files(clone)
    (clone / "splits" / "default" / "test_tasks.txt").unlink()
    with pytest.raises(DataError, match=r"test_tasks.txt cannot be read"):
        task_files(clone)


@pytest.mark.parametrize("form", [lambda it: json.dumps(it, indent=4), json.dumps, lambda it: json.dumps([it])])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_the_first_hundred_instances_are_the_test(tmp_path, form, mark):
    folder = written(tmp_path, task1=mark + form(task(130)).replace("\n", "\r\n"))
    found = read_task(folder / "task1.json")
    assert [it["id"] for it in found.instances] == [f"i{n}" for n in range(100)]
    assert found.instances[7] == {"id": "i7", "input": "Of number 7", "output": ["colour 7", "none"]}
    assert (found.name, found.category, found.head["Task"]) == ("task1", "data_to_text", "task1")
    assert "Instances" not in found.head


def test_outputs_are_a_list_of_texts_and_an_id_is_made_up_where_there_is_none(tmp_path):
    folder = written(tmp_path, t=task(Instances=[{"input": "a", "output": 5}, {"input": "b", "output": [1, "c"]}]))
    assert [(it["id"], it["output"]) for it in read_task(folder / "t.json").instances] == [
        ("t-0", ["5"]),
        ("t-1", ["1", "c"]),
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "t.json has no instances"),
        (json.dumps(task(0), indent=1), "t.json has no instances"),
        ("[1]", r"t.json:1: is a number, not an object"),
        (json.dumps([task(), task()]), r"t.json:1: is a second task"),
        (json.dumps({"Definition": "a"}), r"t.json:1: Instances is null; a task has a list of them"),
        (json.dumps(task(Instances=[{"input": "a", "output": []}]), indent=1), r"t.json:\d+: output is an empty list"),
        (json.dumps(task(Instances=[{"input": "a"}]), indent=1), r"t.json:\d+: output is null"),
        (json.dumps(task(Instances=[{"output": "a"}]), indent=1), r"t.json:\d+: input is missing"),
        (json.dumps(task(Instances=[7]), indent=1), r"t.json:\d+: an instance is a number; an object is needed"),
        (json.dumps(task(Definition=" "), indent=1), r"t.json: Definition is "),
        (json.dumps(task(), indent=1)[:-30], "is not JSON|cut off"),
    ],
)
def test_a_file_that_is_no_task_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        suite(written(tmp_path, t=content))


def test_what_cannot_be_evaluated_is_refused(tmp_path):
    with pytest.raises(DataError, match="has no task files"):
        suite(tmp_path)
    with pytest.raises(ConfigError, match="superni needs data: a task file"):
        suite(None)
    with pytest.raises(ConfigError, match="this one is a RoBERTa"):
        suite(tmp_path, replace(BPE, architecture="roberta"))
    with pytest.raises(DataError, match=r"none of the 1 tasks .* of superni_word_analogy"):
        suite(written(tmp_path, t=task()), name="superni_word_analogy")


# Tasks and groups


def test_tasks_are_grouped_by_category(tmp_path):
    folder = written(
        tmp_path,
        a=task(),
        b=task(category="Textual Entailment"),
        c=task(),
        d=task(Categories=None),
        e=task(Categories=[]),
    )
    found = suite(folder)
    assert [it.name for it in found.tasks] == [f"superni_{it}" for it in "abcde"]
    assert {it.name: it.members for it in found.groups} == {
        "superni": ("superni_data_to_text", "superni_textual_entailment", "superni_d", "superni_e"),
        "superni_data_to_text": ("superni_a", "superni_c"),
        "superni_textual_entailment": ("superni_b",),
    }
    assert not any(it.equal for it in found.groups)  # every instance counts the same
    one = suite(folder, name="superni_textual_entailment")
    assert ([it.name for it in one.tasks], [it.name for it in one.groups]) == (
        ["superni_b"],
        ["superni_textual_entailment"],
    )
    assert "superni_textual_entailment" in FAMILY.names


def test_the_split_decides_which_tasks(tmp_path):
    clone = official(tmp_path, task1=task(), task2=task(), task3=task())
    assert [it.alias for it in suite(clone).tasks] == ["task3", "task2"]
    assert [it.alias for it in suite(clone, split="train").tasks] == ["task1"]


@pytest.mark.parametrize("examinee", [T5, BPE])
def test_a_prompt_is_tk_instructs(tmp_path, examinee):
    path = written(tmp_path, t=task())
    whole = (
        "Definition: Say which colour is meant.\n\n"
        " Positive Example 1 -\nInput: Of grass?\n Output: green.\n\n"
        " Positive Example 2 -\nInput: Of blood?\n Output: red.\n\n"
        "Now complete the following example -\nInput: Of number 1.\nOutput: "
    )
    found = asked(suite(path, examinee), 1, examinee)
    assert found.prompt == whole
    assert list(found.ids) == examinee.prompted(whole.strip())
    assert (found.max_new_tokens, found.sampling.temperature) == (128, 0.0)
    assert found.stop == (() if examinee is T5 else ("\n\n",))
    row = suite(path, examinee).tasks[0].prompt(suite(path, examinee).tasks[0].documents[1], examinee)
    assert row == {"task": "superni_t", "input": whole, "output": ["colour 1", "none"]}


def test_protocols_and_shots_change_what_is_shown(tmp_path):
    path = written(tmp_path, t=task())
    shown = {name: asked(suite(path, protocol=name)).prompt for name in FAMILY.protocols}
    assert shown["default"] == asked(suite(path)).prompt
    counts = {
        name: [text.count(it) for it in ("Definition", "Positive", "Negative", "Explanation")]
        for name, text in shown.items()
    }
    assert counts == {
        "default": [1, 2, 0, 0],
        "def": [1, 0, 0, 0],
        "pos": [0, 2, 0, 0],
        "def-pos-neg": [1, 2, 1, 0],
        "def-pos-expl": [1, 2, 0, 0],
    }
    one = suite(path, num_fewshot=1)
    assert asked(one).prompt.count("Positive") == 1
    assert one.tasks[0].num_fewshot == 1


def test_a_source_has_1024_tokens_at_most_and_a_t5s_ends(tmp_path):
    long = task(Instances=[{"input": "one two three " * 700, "output": "x"}])
    path = written(tmp_path, t=long)
    found = asked(suite(path, T5), examinee=T5)
    assert len(found.ids) == 1024
    whole = "Definition: Say which colour is meant. Now complete the following example - Input: "
    assert found.cut == len(T5.prompted(whole + "one two three " * 699 + "one two three. Output:")) - 1024
    assert found.ids[-1] == T5.tokenizer.eos_token_id
    assert found.prompt.startswith("Definition: Say which colour is meant. Now complete")  # a T5 knows no line ends
    assert list(found.ids[:1000]) == T5.tokenizer.encode(found.prompt)[:1000]
    assert len(asked(suite(path)).ids) <= 1024
    small = replace(BPE, max_tokens=200)  # of which 128 are for the answer
    assert len(asked(suite(path, small), examinee=small).ids) <= 72
    short = written(tmp_path / "short", t=task())
    assert (asked(suite(short, small), examinee=small).cut, asked(suite(short)).cut) == (0, 0)
    with pytest.raises(DataError, match="128 tokens are to be written, but the model takes 128 at once"):
        asked(suite(path), examinee=replace(BPE, max_tokens=128))


def test_a_chat_keeps_its_frame_around_what_is_cut(tmp_path):
    path = written(tmp_path, t=task(Instances=[{"input": "one two three " * 700, "output": "x"}]))
    chat = replace(BPE, chat=True, max_tokens=300)
    found = asked(suite(path, chat), examinee=chat)
    assert len(found.ids) <= 300 - 128
    assert list(found.ids) == chat.opened(found.prompt.strip())
    assert found.prompt.startswith("Definition: ")


def test_scores_are_in_percent_and_the_best_over_the_references(tmp_path):
    found = suite(written(tmp_path, t=task())).tasks[0]
    document = found.documents[2]
    assert found.score(document, [" Colour 2! "]) == {"rougeL": 100.0, "exact_match": 100.0}
    assert found.score(document, ["colour"]) == {"rougeL": pytest.approx(200 / 3), "exact_match": 0.0}
    assert found.score(document, ["none"]) == {"rougeL": 100.0, "exact_match": 100.0}


def test_predictions_are_written_to_one_file_as_the_reference_does(tmp_path):
    folder = written(tmp_path / "tasks", a=task(2), b=task(1))
    found = suite(folder)
    old = tmp_path / "out" / PREDICTIONS
    old.parent.mkdir()
    old.write_text("an earlier evaluation's\n")
    paths = []
    for it in found.tasks:
        answers = [[f" {it.alias} {n}\n"] for n in range(len(it.documents))]
        paths += it.write(old.parent, it.documents, answers)
    assert paths == [old]
    rows = [json.loads(line) for line in old.read_text().splitlines()]
    assert [(row["Task"], row["id"], row["prediction"]) for row in rows] == [
        ("a", "i0", "a 0"),
        ("a", "i1", "a 1"),
        ("b", "i0", "b 0"),
    ]
    content = task(2)
    (_, instance) = content.pop("Instances")
    assert rows[1] == {**content, "Task": "a", "id": "i1", "Instance": instance, "prediction": "a 1"}


@pytest.mark.parametrize("tiny_model", [tiny, tiny_t5])
def test_a_model_answers(tmp_path, tiny_model):
    where = tiny_model.checkpoint(tmp_path / "model")
    model = models.load(where)
    examinee = Examinee(
        tokenizer=models.load_tokenizer(where),
        architecture="t5" if tiny_model is tiny_t5 else "llama",
        max_tokens=model.max_tokens or 2048,
        loaded=model,
    )
    found = suite(written(tmp_path / "tasks", t=task(2)), examinee).tasks[0]
    requests = [found.requests(document, examinee)[0] for document in found.documents]
    answers = answer_all(examinee, requests)
    for document, answer in zip(found.documents, answers, strict=True):
        assert isinstance(answer, str)
        assert "\n\n" not in answer
        assert set(found.score(document, [answer])) == set(found.metrics)
