"""BIG-bench's JSON tasks: prompts with their defaults, grades of choices, matches of what is written."""

import json

import numpy as np
import pytest

import eval.choice.bigbench as bigbench
from eval.choice.bigbench import FAMILY, BigBench
from models import ConfigError, DataError
from tests.choices import asked, plain, small, spec

COLOURS = {
    "canary": "x",
    "name": "colours",
    "metrics": ["multiple_choice_grade"],
    "preferred_score": "multiple_choice_grade",
    "examples": [
        {"input": "Sky?", "target_scores": {"blue": 1, "red": 0, "blue and wide": 1, "a": 0}, "comment": "of a day"},
        {"input": "Grass?", "target_scores": {"red": 0, "green": 1}},
        {"input": "Grass?", "target_scores": {"red": 0, "green": 1}},
        {"input": "Snow?", "target_scores": {"white": 0.5, "grey": 0.25}},
    ],
}
SUMS = {
    "metrics": ["exact_str_match", "bleu"],
    "preferred_score": "exact_str_match",
    "task_prefix": "Add.",
    "example_input_prefix": "\n",
    "example_output_prefix": " = ",
    "few_shot_example_separator": ";",
    "output_regex": r"[-+]?\d+",
    "examples": [{"input": "1 + 1", "target": "2"}, {"input": "2 + 1", "target": ["3", "three"]}],
}


@pytest.fixture(scope="module")
def examinee(tmp_path_factory):
    return small(tmp_path_factory.mktemp("tiny"))


def write(folder, whole, indent=1):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps(whole, indent=indent))
    return folder


def only(examinee, folder, **more):
    (task,) = FAMILY.build(spec("bigbench", examinee, folder, **more)).tasks
    assert isinstance(task, BigBench)
    return task


def shuffled(*choices):
    return "".join(f"\n  choice: {it}" for it in np.random.RandomState(42).permutation(sorted(choices)))


def test_a_prompt_shows_the_choices_in_one_shuffled_order(examinee, tmp_path):
    task = only(examinee, write(tmp_path / "colours", COLOURS))
    assert (task.name, len(task.documents), list(task.metrics)) == (
        "bigbench_colours",
        3,
        ["multiple_choice_grade", "preferred_score"],
    )
    requests = task.requests(task.documents[0], examinee)
    order = "\n  choice: blue\n  choice: red\n  choice: a\n  choice: blue and wide"  # 1 3 0 2 of the sorted ones
    assert [it.arguments for it in requests] == [
        (f"\nQ: Sky?{order}\nA: ", choice) for choice in ("blue", "red", "blue and wide", "a")
    ]
    hidden = only(examinee, write(tmp_path / "plain", {**COLOURS, "append_choices_to_input": False}))
    assert hidden.requests(hidden.documents[0], examinee)[1].arguments == ("\nQ: Sky?\nA: ", "red")


def test_choices_are_graded_by_the_largest_sum(examinee, tmp_path):
    task = only(examinee, write(tmp_path / "colours", COLOURS))
    for document, found in zip(task.documents, asked(examinee, task), strict=True):
        # the space before an answer belongs to its first token
        context = task.context(document).removesuffix(" ")
        expected = [plain(examinee, context, f" {choice}") for choice in document["target_scores"]]
        assert [answer[0] for answer in found] == pytest.approx(expected, abs=1e-4)
    sky, _, snow = task.documents
    grade = lambda document, *sums: task.score(document, [[it, False] for it in sums])["multiple_choice_grade"]  # noqa: E731
    assert [grade(sky, -1, -2, -3, -4), grade(sky, -3, -2, -1, -4), grade(sky, -3, -2, -2.5, -4)] == [1, 1, 0]
    assert [grade(snow, -1, -1), grade(snow, -2, -1)] == [0.5, 0.25]  # of equal ones the first
    assert task.target(sky) == ["blue", "blue and wide"]
    assert task.target(snow) == ["white"]


def test_examples_are_drawn_from_the_others_and_stay_the_same(examinee, tmp_path):
    folder = write(tmp_path / "colours", COLOURS)
    task = only(examinee, folder, num_fewshot=2)
    shown = {
        f"\nQ: Grass?{shuffled('red', 'green')}\nA: green",
        f"\nQ: Snow?{shuffled('white', 'grey')}\nA: white",
        f"\nQ: Sky?{shuffled('blue', 'red', 'blue and wide', 'a')}\nA: blue",
    }
    for document in task.documents:
        question = next(it for it in shown if it.startswith(f"\nQ: {document['input']}"))
        context = task.context(document)
        others = shown - {question}
        joined = [a + "\n" + b for a in others for b in others if a != b]
        assert context in [f"{it}\n{question[: question.rindex('A: ') + 3]}" for it in joined]
        assert only(examinee, folder, num_fewshot=2).context(document) == context
    draws = {only(examinee, folder, num_fewshot=1, seed=seed).context(task.documents[0]) for seed in range(8)}
    assert len(draws) == 2
    with pytest.raises(ConfigError, match=r"num_fewshot is 3, but .* has 3 different examples"):
        only(examinee, folder, num_fewshot=3)


def test_an_answer_is_written_and_compared(examinee, tmp_path, monkeypatch):
    monkeypatch.setattr(bigbench, "MAX_NEW_TOKENS", 4)
    task = only(examinee, write(tmp_path / "sums", SUMS), num_fewshot=1)
    assert (task.output_type, list(task.metrics)) == ("generate_until", ["exact_str_match", "preferred_score"])
    (request,) = task.requests(task.documents[0], examinee)
    assert request.arguments[0] == "Add.\n2 + 1 = 3;\n1 + 1 = "
    assert request.arguments[1]["max_gen_toks"] == 4
    assert request.arguments[1]["until"] == []
    assert all(set(task.score(it, found)) == {"exact_str_match", "preferred_score"} for it, found in zip(
        task.documents, asked(examinee, task), strict=True))  # fmt: skip
    texts = ["3, of course", " 3\n4", "three", "it is -3", "none", ""]
    assert [task.score(task.documents[1], [it])["exact_str_match"] for it in texts] == [1, 1, 0, 0, 0, 0]
    assert task.prompt(task.documents[0], examinee)["output"] == "2"


@pytest.mark.parametrize(
    ("rule", "written", "answer"),
    [
        ({}, "\n Paris. It is", "Paris"),  # the default: up to the first of . ? ! ; and the line's end
        ({}, "...", ""),
        ({"stop_string": "."}, "Paris", "Paris"),  # the stop string is not part of what comes back
        ({"stop_string": "."}, "a; b", "a; b"),
        ({"output_regex": r"\d+"}, "no 12, 13", "12"),
        ({"output_regex": r"is (\w+)"}, "it is red", "red"),
        ({"output_regex": r"\d+", "stop_string": "."}, "n 7", "7"),
    ],
)
def test_the_stop_rule(examinee, tmp_path, rule, written, answer):
    whole = {"metrics": ["exact_str_match"], **rule, "examples": [{"input": "?", "target": "Paris."}]}
    task = only(examinee, write(tmp_path / "t", whole))
    assert task.answered(written) == answer
    (request,) = task.requests(task.documents[0], examinee)
    assert request.arguments[1]["until"] == ([rule["stop_string"]] if "stop_string" in rule else [])
    if rule == {"stop_string": "."}:  # a target may have the stop string at its end
        assert task.score(task.documents[0], ["Paris"]) == {"exact_str_match": 1.0, "preferred_score": 1.0}


def test_both_metrics_and_examples_without_choices(examinee, tmp_path):
    both = {**COLOURS, "metrics": ["multiple_choice_grade", "exact_str_match"], "preferred_score": "exact_str_match"}
    task = only(examinee, write(tmp_path / "both", both))
    assert list(task.metrics) == ["exact_str_match", "multiple_choice_grade", "preferred_score"]
    graded = only(examinee, write(tmp_path / "graded", {**both, "preferred_score": "multiple_choice_grade"}))
    assert list(graded.metrics) == ["multiple_choice_grade", "exact_str_match", "preferred_score"]
    assert len(task.requests(task.documents[0], examinee)) == 5
    answers = [[-1.0, False], [-2.0, False], [-3.0, False], [-4.0, False], " blue and wide"]
    both_right = {"multiple_choice_grade": 1.0, "exact_str_match": 1.0, "preferred_score": 1.0}
    assert task.score(task.documents[0], answers) == both_right
    wrong = [*answers[:-1], "red"]
    assert [it.score(it.documents[0], wrong)["preferred_score"] for it in (task, graded)] == [0, 1]
    mixed = {"metrics": ["multiple_choice_grade"], "examples": [*COLOURS["examples"], SUMS["examples"][0]]}
    task = only(examinee, write(tmp_path / "mixed", mixed))
    assert len(task.requests(task.documents[-1], examinee)) == 1
    assert task.score(task.documents[-1], ["2"]) == {"exact_str_match": 1.0, "preferred_score": 1.0}
    unknown = only(examinee, write(tmp_path / "unknown", {**SUMS, "metrics": ["bleu"], "preferred_score": "bleu"}))
    assert list(unknown.metrics) == ["exact_str_match", "preferred_score"]
    assert unknown.settings["preferred_score"] == "bleu"


def test_a_folder_of_folders_is_a_group(examinee, tmp_path):
    write(tmp_path / "all" / "colours", COLOURS, indent=None)
    write(tmp_path / "all" / "sums", {"name": "introduces only"})
    write(tmp_path / "all" / "sums" / "one", SUMS)
    write(tmp_path / "all" / "sums" / "two", SUMS)
    suite = FAMILY.build(spec("bigbench", examinee, tmp_path / "all"))
    names = ["bigbench_colours", "bigbench_sums_one", "bigbench_sums_two"]
    assert [task.name for task in suite.tasks] == names
    (group,) = suite.groups
    assert (group.name, group.members, group.equal) == ("bigbench", tuple(names), True)
    assert only(examinee, tmp_path / "all" / "colours" / "task.json").name == "bigbench_colours"
    loose = tmp_path / "loose"
    loose.mkdir()
    (loose / "a.json").write_text(json.dumps(COLOURS))
    assert only(examinee, loose).name == "bigbench_a"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"examples": []}, "has no list of 'examples'"),
        ({"examples": {"a": 1}}, "has no list of 'examples'"),
        ({"examples": ["a"]}, "example 1: is a text, not an object"),
        ({"examples": [COLOURS["examples"][0], {"target": "a"}]}, "example 2: has no 'input'"),
        ({"examples": [{"input": "a"}]}, "example 1: has neither 'target_scores' nor 'target'"),
        ({"examples": [{"input": "a", "target": 3}]}, "example 1: its 'target' is no text"),
        ({"examples": [{"input": "a", "target_scores": {"b": 1}}]}, "are not two choices or more"),
        ({"examples": [{"input": "a", "target_scores": {"b": 1, " ": 0}}]}, "none of them empty"),
        ({"examples": [{"input": "a", "target_scores": {"b": 1, "c": "0"}}]}, "is no number"),
        ({"output_regex": "("}, "is no regular expression"),
        ({"output_regex": "(a)(b)"}, "has 2 groups"),
        ({"task_prefix": 1}, "its 'task_prefix' is a number"),
    ],
)
def test_a_task_file_that_cannot_be_used_is_refused(examinee, tmp_path, change, message):
    with pytest.raises(DataError, match=rf"task.json:1: .*{message}"):
        only(examinee, write(tmp_path / "t", {**COLOURS, **change}))


def test_there_has_to_be_a_task_file(examinee, tmp_path):
    with pytest.raises(DataError, match=r"holds no task.json"):
        only(examinee, tmp_path)
    (tmp_path / "task.json").write_text(json.dumps([COLOURS, SUMS]))
    with pytest.raises(DataError, match="has 2 records; one BIG-bench task is expected"):
        only(examinee, tmp_path)
