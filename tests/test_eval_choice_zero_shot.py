"""The five sets of the paper's Figure 3, read as they are published and worded as the harness words them."""

import shutil

import pytest

from eval.choice.published import arc, hellaswag, piqa, winogrande
from eval.choice.zero_shot import FAMILY, SETS
from eval.examinee import Examinee
from models import ConfigError, DataError
from tests.choices import asked, lines, plain, small, spec

JUG = {
    "qID": "3-1",
    "sentence": "The jug did not fit in the crate because the _ was too big. Jo kept _ out.",
    "option1": "jug",
    "option2": "crate",
    "answer": "1",
}
DOG = {
    "ind": 4,
    "activity_label": "Washing a dog",
    "ctx_a": "A dog stands in a tub.",
    "ctx_b": "a WOMAN",
    "ctx": "A dog stands in a tub. a WOMAN",
    "endings": ["sings.", "[step] washes  it.", "flies.", "reads [substeps] a map."],
    "label": 1,
}
WOOD = {"goal": "To cut wood,", "sol1": "use a spoon.", "sol2": "use a saw."}
STAR = {
    "id": "M1",
    "question": {
        "stem": "Which is a star?",
        "choices": [{"text": "Moon", "label": "1"}, {"text": "Sun", "label": "2"}, {"text": "Mars", "label": "3"}],
    },
    "answerKey": "2",
}
ROCK = {"id": "M2", "question": "Hard?", "choices": {"text": ["rock", "air"], "label": ["A", "B"]}, "answerKey": "A"}


@pytest.fixture(scope="module")
def examinee(tmp_path_factory) -> Examinee:
    return small(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tmp_path):
    """The published files, as their archives unpack."""
    lines(tmp_path / "winogrande_1.1" / "dev.jsonl", JUG, {**JUG, "answer": "2"})
    lines(tmp_path / "winogrande_1.1" / "train_xl.jsonl", JUG)
    lines(tmp_path / "hellaswag" / "data" / "hellaswag_val.jsonl", DOG)
    lines(tmp_path / "piqa" / "valid.jsonl", WOOD, WOOD)
    (tmp_path / "piqa" / "valid-labels.lst").write_bytes(b"1\r\n0\r\n")
    lines(tmp_path / "ARC-V1-Feb2018-2" / "ARC-Easy" / "ARC-Easy-Test.jsonl", STAR)
    lines(tmp_path / "ARC-V1-Feb2018-2" / "ARC-Easy" / "ARC-Easy-Dev.jsonl", STAR, STAR)
    lines(tmp_path / "ARC-V1-Feb2018-2" / "ARC-Challenge" / "ARC-Challenge-Test.jsonl", ROCK)
    return tmp_path


def test_winogrande_scores_what_follows_the_blank():
    assert winogrande(JUG) == {
        "choices": [
            "The jug did not fit in the crate because the jug",
            "The jug did not fit in the crate because the crate",
        ],
        "continuation": "was too big. Jo kept _ out.",
        "gold": 0,
    }


def test_hellaswag_is_cleaned_of_marks():
    assert hellaswag(DOG) == {
        "query": "Washing a dog: A dog stands in a tub. A woman",  # capitalize() makes the rest small
        "choices": ["sings.", " washes it.", "flies.", "reads a map."],
        "gold": 1,
    }
    howto = {**DOG, "ctx_b": "", "ctx_a": " [header] How to rest [title] Lie down. [step] Sleep. ", "label": "3"}
    assert hellaswag(howto)["query"] == "Washing a dog:  How to rest. Lie down. Sleep."
    assert hellaswag(howto)["gold"] == 3
    without = {key: value for key, value in DOG.items() if key not in ("ctx_a", "ctx_b")}
    assert hellaswag(without)["query"] == "Washing a dog: A dog stands in a tub. a WOMAN"


def test_piqa_and_arc_are_questions_with_answers():
    assert piqa({**WOOD, "label": "1"}) == piqa({**WOOD, "label": 1}) == {
        "query": "Question: To cut wood,\nAnswer:",
        "choices": ["use a spoon.", "use a saw."],
        "gold": 1,
    }  # fmt: skip
    assert arc(STAR) == {
        "query": "Question: Which is a star?\nAnswer:",
        "choices": ["Moon", "Sun", "Mars"],
        "gold": 1,
    }
    assert arc(ROCK) == {"query": "Question: Hard?\nAnswer:", "choices": ["rock", "air"], "gold": 0}


def test_the_five_are_found_where_their_archives_put_them(examinee, folder):
    suite = FAMILY.build(spec("zero_shot", examinee, folder))
    assert [task.name for task in suite.tasks] == list(SETS)
    assert [len(task.documents) for task in suite.tasks] == [2, 1, 2, 1, 1]
    assert [list(task.metrics) for task in suite.tasks] == [["acc"]] + [["acc", "acc_norm"]] * 4
    assert [it["gold"] for task in suite.tasks for it in task.documents] == [0, 1, 1, 1, 0, 1, 0]
    assert {(task.version, task.output_type, task.num_fewshot) for task in suite.tasks} == {(1, "multiple_choice", 0)}
    (group,) = suite.groups
    assert (group.name, group.members, group.equal) == ("zero_shot", tuple(SETS), True)
    assert [task.settings["split"] for task in suite.tasks] == ["validation"] * 3 + ["test"] * 2
    (easy,) = FAMILY.build(spec("arc_easy", examinee, folder, split="validation")).tasks
    assert len(easy.documents) == 2


@pytest.mark.parametrize("name", SETS)
def test_a_folder_with_one_set_or_its_file_will_do(examinee, folder, name):
    (whole,) = FAMILY.build(spec(name, examinee, folder)).tasks
    path = folder / whole.settings["data"]
    for data in (path, path.parent):
        (one,) = FAMILY.build(spec(name, examinee, data)).tasks
        assert one.documents == whole.documents
        assert one.name == name


def test_winogrande_by_another_computation(examinee, folder):
    (task,) = FAMILY.build(spec("winogrande", examinee, folder)).tasks
    answers = asked(examinee, task)
    rest = " was too big. Jo kept _ out."
    expected = [plain(examinee, f"The jug did not fit in the crate because the {it}", rest) for it in ("jug", "crate")]
    for found in answers:
        assert [answer[0] for answer in found] == pytest.approx(expected, abs=1e-4)
    first = expected[0] >= expected[1]
    scored = [task.score(it, found) for it, found in zip(task.documents, answers, strict=True)]
    assert scored == [{"acc": first}, {"acc": not first}]
    assert task.prompt(task.documents[1], examinee) == {
        "task": "winogrande",
        "input": "The jug did not fit in the crate because the crate",
        "output": "was too big. Jo kept _ out.",
    }


def test_examples_come_from_the_training_file_or_else_are_not_scored(examinee, folder):
    (task,) = FAMILY.build(spec("winogrande", examinee, folder, num_fewshot=1)).tasks
    filled = "The jug did not fit in the crate because the jug was too big. Jo kept _ out.\n\n"
    assert task.requests(task.documents[0], examinee)[1].arguments == (
        f"{filled}The jug did not fit in the crate because the crate",
        " was too big. Jo kept _ out.",
    )
    assert len(task.documents) == 2
    (task,) = FAMILY.build(spec("piqa", examinee, folder / "piqa" / "valid.jsonl", num_fewshot=1)).tasks
    assert task.requests(task.documents[0], examinee)[0].arguments == (
        "Question: To cut wood,\nAnswer: use a saw.\n\nQuestion: To cut wood,\nAnswer:",
        " use a spoon.",
    )
    assert [it["gold"] for it in task.documents] == [0]
    train = lines(folder / "hellaswag" / "data" / "hellaswag_train.jsonl", DOG, {**DOG, "label": 2})
    for data, more in ((train, {}), (folder, {"split": "train"})):
        (task,) = FAMILY.build(spec("hellaswag", examinee, data, num_fewshot=1, **more)).tasks
        assert [it["gold"] for it in task.documents] == [2]


def test_a_record_that_has_its_answer_needs_no_label(examinee, folder):
    (folder / "winogrande_1.1" / "dev-labels.lst").write_text("2\n1\n")
    (task,) = FAMILY.build(spec("winogrande", examinee, folder)).tasks
    assert [it["gold"] for it in task.documents] == [0, 1]


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("winogrande", {**JUG, "answer": ""}, r'its answer is "", but 1 or 2 is expected; .* not published'),
        ("winogrande", {**JUG, "answer": "3"}, r'its answer is "3"'),
        ("winogrande", {**JUG, "answer": "0"}, r'its answer is "0"'),
        ("winogrande", {**JUG, "sentence": "No blank."}, r"has no blank '_'"),
        ("winogrande", {**JUG, "sentence": "It is _ "}, r"nothing follows the blank"),
        ("winogrande", {"sentence": "A _ b"}, r"has no 'option1'; its keys are sentence"),
        ("hellaswag", {**DOG, "label": ""}, r'its answer is "", but 0 to 3'),
        ("hellaswag", {**DOG, "label": 4}, r"its answer is 4"),
        ("hellaswag", {**DOG, "endings": ["a", "[b]", "c", "d"]}, r"its choice 2 of 4 is empty"),
        ("hellaswag", {**DOG, "endings": "abcd"}, r"its 'endings' is not a list"),
        ("piqa", WOOD, r"its answer is nothing, but 0 or 1 \(from NAME-labels.lst"),
        ("piqa", {**WOOD, "label": -1}, r"its answer is -1"),
        ("arc_easy", {**STAR, "answerKey": "B"}, r'its answer is "B", but one of 1, 2, 3 is expected'),
        ("arc_easy", {**STAR, "question": {"stem": "?", "choices": ["a"]}}, r"not a list of objects"),
        ("arc_challenge", {**ROCK, "choices": ["rock", "air"]}, r"not an object of 'text' and 'label'"),
        ("arc_challenge", {**ROCK, "choices": {"text": ["a", "b"], "label": ["A"]}}, r"2 choices but 1 labels"),
    ],
)
def test_a_record_that_cannot_be_used_is_refused_by_its_line(examinee, tmp_path, name, record, message):
    with pytest.raises(DataError, match=r"one.jsonl:1: .*" + message):
        FAMILY.build(spec(name, examinee, lines(tmp_path / "one.jsonl", record)))


def test_labels_have_to_fit_their_records(examinee, folder):
    (folder / "piqa" / "valid-labels.lst").write_text("1\n0\n1\n")
    with pytest.raises(DataError, match=r"valid-labels.lst has 3 labels, but .*valid.jsonl has 2 records"):
        FAMILY.build(spec("piqa", examinee, folder))
    (folder / "piqa" / "valid-labels.lst").write_text("1\n2\n")
    with pytest.raises(DataError, match=r'valid.jsonl:2: its answer is "2"'):
        FAMILY.build(spec("piqa", examinee, folder))


def test_what_is_missing_is_named(examinee, folder):
    shutil.rmtree(folder / "hellaswag")
    with pytest.raises(DataError, match=r"no file of hellaswag's validation split \(hellaswag_val.jsonl or"):
        FAMILY.build(spec("zero_shot", examinee, folder))
    with pytest.raises(ConfigError, match="needs a folder with all of winogrande"):
        FAMILY.build(spec("zero_shot", examinee, folder / "piqa" / "valid.jsonl"))
    with pytest.raises(ConfigError, match="split is test, but"):
        FAMILY.build(spec("piqa", examinee, folder / "piqa" / "valid.jsonl", split="test"))
    with pytest.raises(ConfigError, match=r"num_fewshot is 2, but .*train_xl.jsonl has 1"):
        FAMILY.build(spec("winogrande", examinee, folder, num_fewshot=2))
