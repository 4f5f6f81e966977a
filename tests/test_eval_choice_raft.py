"""RAFT: prompts as the benchmark's baseline words them, leave-one-out scores, and files for its leaderboard."""

import csv
import itertools
import json
from dataclasses import replace

import pytest

from eval.choice.macro_f1 import MACRO_F1, macro_f1
from eval.choice.raft import FAMILY, Raft
from eval.likelihood import Likelihood
from models import DataError
from tests.choices import asked, small, spec

TRAIN = (
    "Title,Note,Label,ID\r\n"
    'Cats,"they purr, softly",animal,0\r\n'
    "Oaks,,plant,1\r\n"
    "Dogs,they bark,animal,2\r\n"
    "Elms,they grow,plant,3\r\n"
    "Cows,they eat,animal,4\r\n"
)
TEST = 'Title,Note,ID\r\nFir,,50\r\n"Goat, a",eats,51\r\n'


@pytest.fixture(scope="module")
def examinee(tmp_path_factory):
    return small(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path):
    made = tmp_path / "living"
    made.mkdir()
    (made / "train.csv").write_bytes(TRAIN.encode())
    (made / "test_unlabeled.csv").write_bytes(TEST.encode())
    return made


def only(examinee, data, **more):
    (task,) = FAMILY.build(spec("raft", examinee, data, **more)).tasks
    assert isinstance(task, Raft)
    return task


def test_a_prompt_is_worded_as_the_baseline_words_it(examinee, folder):
    task = only(examinee, folder, num_fewshot=0)
    assert [it.arguments for it in task.requests(task.documents[1], examinee)] == [
        ("Possible labels:\n1. animal\n2. plant\n\nTitle: Oaks\nLabel:", f" {label}") for label in ("animal", "plant")
    ]
    (folder / "task.json").write_text(json.dumps({
        "description": "Sort what lives.", "label_columns": {"Label": ["plant", "animal", "fungus"]}}))  # fmt: skip
    task = only(examinee, folder, num_fewshot=0)
    assert task.requests(task.documents[0], examinee)[1].arguments == (
        "Sort what lives.\nPossible labels:\n1. animal\n2. fungus\n3. plant\n\n"
        "Title: Cats\nNote: they purr, softly\nLabel:",
        " fungus",
    )


def test_every_row_is_left_out_of_its_own_examples(examinee, folder):
    task = only(examinee, folder)
    assert (task.num_fewshot, len(task.documents), list(task.metrics)) == (4, 5, ["acc", "f1"])
    for document in task.documents:
        shown = task.examples(document)
        assert sorted(it["id"] for it in [document, *shown]) == list("01234")
        assert {it["label"] for it in shown[:2]} == {"animal", "plant"}  # one of each label first
        assert only(examinee, folder).examples(document) == shown
    two = only(examinee, folder, num_fewshot=2)
    draws = set()
    for two.seed in range(8):
        shown = two.examples(two.documents[0])
        assert {it["label"] for it in shown} == {"animal", "plant"}
        draws.add(tuple(sorted(it["id"] for it in shown)))
    assert len(draws) > 2
    document, shown = task.documents[1], task.examples(task.documents[1])
    (before, _), _ = (it.arguments for it in task.requests(document, examinee))
    words = {"0": "Title: Cats\nNote: they purr, softly", "2": "Title: Dogs\nNote: they bark",
             "3": "Title: Elms\nNote: they grow", "4": "Title: Cows\nNote: they eat"}  # fmt: skip
    assert before == (
        "Possible labels:\n1. animal\n2. plant\n\n"
        + "".join(f"{words[it['id']]}\nLabel: {it['label']}\n\n" for it in shown)
        + "Title: Oaks\nLabel:"
    )


def test_the_first_examples_go_where_there_is_no_room(examinee, folder):
    task = only(examinee, folder)
    document = task.documents[0]
    requests = task.requests(document, examinee)
    whole, room = requests[0].arguments[0], max(it.length for it in requests)
    assert whole.count("Title:") == 5
    assert task.requests(document, replace(examinee, max_tokens=room)) == requests
    fewer = [it for it in task.requests(document, replace(examinee, max_tokens=room - 1)) if isinstance(it, Likelihood)]
    gone, kept = f"Title: {task.examples(document)[0]['fields']['Title']}", fewer[0].arguments[0]
    assert gone in whole
    assert gone not in kept
    assert kept.count("Title:") == 4
    assert [it.cut for it in fewer] == [0, 0]


def test_a_label_is_right_or_not(examinee, folder):
    task = only(examinee, folder)
    answers = [[-3.0, False], [-2.0, False]]
    assert task.score(task.documents[0], answers) == {"acc": 0.0, "f1": ["animal", "plant"]}
    assert task.score(task.documents[1], answers) == {"acc": 1.0, "f1": ["plant", "plant"]}
    assert task.write(folder, task.documents, []) == []
    assert task.target(task.documents[1]) == "plant"


def test_predictions_have_the_layout_of_the_leaderboard(examinee, folder, tmp_path):
    task = only(examinee, folder, split="test", num_fewshot=1)
    assert (len(task.documents), dict(task.metrics), task.target(task.documents[0])) == (2, {}, None)
    answers = asked(examinee, task)
    assert task.score(task.documents[0], answers[0]) == {}
    assert len({task.examples({"id": str(id)})[0]["id"] for id in range(8)}) > 2  # drawn for every row
    (path,) = task.write(tmp_path / "out", task.documents, answers)
    assert path == tmp_path / "out" / "raft" / "living" / "predictions.csv"
    labels = ["plant" if found[1][0] > found[0][0] else "animal" for found in answers]
    with open(path, newline="") as file:
        assert list(csv.reader(file)) == [
            ["ID", "Label"],
            *([id, it] for id, it in zip(("50", "51"), labels, strict=True)),
        ]
    assert b"\r" not in path.read_bytes()


def test_a_folder_of_tasks_is_a_group(examinee, folder):
    (folder.parent / "again").mkdir()
    (folder.parent / "again" / "train.csv").write_bytes(TRAIN.encode())
    suite = FAMILY.build(spec("raft", examinee, folder.parent))
    assert [task.name for task in suite.tasks] == ["raft_again", "raft_living"]
    (group,) = suite.groups
    assert (group.name, group.members, group.equal) == ("raft", ("raft_again", "raft_living"), True)
    assert only(examinee, folder / "train.csv").name == "raft_living"


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ("Title,Label\nCats,animal\n", "train.csv:2: has no 'ID'"),
        ("Title,ID\nCats,1\n", "train.csv:2: has no 'Label'"),
        ("Title,Label,ID\nCats,animal,0\nOaks,,1\n", "train.csv:3: has no label"),
        ("Title,Label,ID\nCats,Unlabeled,0\n", "train.csv:2: has no label"),
        ("Title,Label,ID\n ,animal,0\n", "train.csv:2: all of its fields are empty"),
        ("Title,Label,ID\nCats,animal\n", "train.csv:2: has another number of fields"),
        ("Title,Label,ID\nCats,animal,0\n", "has one label only"),
        ("Title,Label,ID\n", "has no records"),
    ],
)
def test_a_table_that_cannot_be_used_is_refused_by_its_line(examinee, folder, train, message):
    (folder / "train.csv").write_text(train)
    with pytest.raises(DataError, match=message):
        only(examinee, folder)


def test_labels_have_to_be_those_of_the_task_file(examinee, folder):
    (folder / "task.json").write_text(json.dumps({"label_columns": {"Label": ["plant", "stone"]}}))
    with pytest.raises(DataError, match=r"has the label 'animal', which .*task.json does not name"):
        only(examinee, folder)
    (folder / "train.csv").unlink()
    with pytest.raises(DataError, match=r"holds no train.csv"):
        only(examinee, folder)


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        ([("a", "a"), ("b", "b")], 1),
        ([("a", "b"), ("b", "a")], 0),
        ([("a", "a"), ("a", "a")], 1),  # one class only
        ([("a", "b")], 0),
        # a: 2 right of 3 said and 2 true: 4/5; b: 1 of 1 said, 2 true: 2/3; c: never said nor found right: 0
        ([("a", "a"), ("a", "a"), ("b", "a"), ("b", "b"), ("c", "d")], (4 / 5 + 2 / 3 + 0 + 0) / 4),
    ],
)
def test_macro_f1_by_hand(pairs, expected):
    assert macro_f1(pairs) == pytest.approx(expected)
    assert macro_f1([list(it) for it in reversed(pairs)]) == pytest.approx(expected)


def test_the_error_of_macro_f1_is_that_of_all_resamples():
    pairs = [("a", "a"), ("a", "b"), ("b", "b")]
    values = [macro_f1(drawn) for drawn in itertools.product(pairs, repeat=3)]
    mean = sum(values) / 27
    exact = (sum((it - mean) ** 2 for it in values) / 27) ** 0.5
    assert MACRO_F1.stderr(pairs) == pytest.approx(exact, rel=0.01)
    assert MACRO_F1.stderr(pairs[:1]) is None
