"""`qlora eval`: what is asked for, what it leaves, and that a killed evaluation goes on where it was."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import models
import qlora
from eval import registry
from eval.command import EvalOptions
from eval.examinee import Examinee
from eval.registry import Settings, build, data_path, wanted
from eval.statistics import mean_stderr, pooled_stderr
from eval.task import Spec
from models import ConfigError, DataError
from tests import tiny, toy_tasks
from train.config import parse


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    """The toy family is one of those that are known."""
    families = dict(registry.families())
    monkeypatch.setattr(registry, "families", lambda: {**families, "toy": toy_tasks.FAMILY})


@pytest.fixture(scope="module")
def examinee(model):
    loaded = models.load(model, dtype=torch.float32).eval()
    return Examinee(tokenizer=models.load_tokenizer(model), architecture="llama", max_tokens=256, loaded=loaded)


def told(capsys, *arguments, code=0) -> Any:
    assert qlora.main(["eval", *map(str, arguments), "--load.dtype", "float32", "--json"]) == code
    out, err = capsys.readouterr()
    return (json.loads(out) if code == 0 else None), err


def right(examinee, context):
    """Whether the model finds " red" more probable than " blue", from whole texts."""
    values = []
    for choice in (" red", " blue"):
        before, after = examinee.pair(context, choice)
        logits = examinee.model(torch.tensor([[*before, *after]]))[0].log_softmax(-1)
        values.append(sum(logits[len(before) + i - 1, id].item() for i, id in enumerate(after)))
    return float(values[0] > values[1])


def test_results_have_the_harnesss_keys_and_the_values_that_counting_gives(model, examinee, tmp_path, capsys):
    found, err = told(capsys, model, "--task", "toy,toy_write", "--out", tmp_path)
    a = [right(examinee, text) for text in ("It is", "A", "The small")]
    b = [right(examinee, text) for text in ("Name colour",) * 4 + ("and so",)]
    results = found["results"]
    assert list(results) == ["toy", "toy_a", "toy_b", "toy_macro", "toy_write"]
    assert results["toy_a"]["acc,none"] == pytest.approx(sum(a) / 3)
    assert results["toy_a"]["acc_stderr,none"] == pytest.approx(mean_stderr(a))
    assert results["toy"]["acc,none"] == pytest.approx(sum(a + b) / 8)
    assert results["toy"]["acc_stderr,none"] == pytest.approx(
        pooled_stderr([mean_stderr(a) or 0, mean_stderr(b) or 0], [3, 5])
    )
    assert results["toy_macro"]["acc,none"] == pytest.approx((sum(a) / 3 + sum(b) / 5) / 2)
    squares = (mean_stderr(a) or 0) ** 2 + (mean_stderr(b) or 0) ** 2
    assert results["toy_macro"]["acc_stderr,none"] == pytest.approx(squares**0.5 / 2)
    assert results["toy_write"]["acc_stderr,none"] == "N/A"
    assert results["toy_a"]["alias"].strip() == "- a"
    assert found["groups"] == {name: results[name] for name in ("toy", "toy_macro")}
    assert found["group_subtasks"]["toy"] == ["toy_a", "toy_b"]
    assert found["n-samples"]["toy_b"] == {"original": 5, "effective": 5}
    assert found["higher_is_better"]["toy"] == {"acc": True}
    assert found["configs"]["toy_a"]["output_type"] == "multiple_choice"
    assert found["configs"]["toy_a"]["dataset_path"] == "toy"
    assert {"versions", "n-shot", "config", "git_hash", "date", "task_hashes", "model_name"} <= found.keys()
    assert found["limited"] is False
    assert len(set(found["task_hashes"].values())) == 3
    assert "acc" in err
    assert "toy_macro" in err


def test_files_say_what_was_asked_and_answered(model, examinee, tmp_path, capsys):
    found, _ = told(capsys, model, "--task", "toy_a", "--out", tmp_path)
    files = [Path(file) for file in found.pop("files")]
    assert all(file.parent == tmp_path / "model" for file in files)
    assert json.loads(files[0].read_text()) == found
    rows = [json.loads(line) for line in files[1].read_text().splitlines()]
    assert [row["doc_id"] for row in rows] == [0, 1, 2]
    assert rows[0]["doc"] == {"context": "It is"}
    assert rows[0]["arguments"]["gen_args_1"] == {"arg_0": "It is", "arg_1": " blue"}
    assert rows[0]["target"] == " red"
    assert rows[0]["acc"] == right(examinee, "It is") == float(rows[0]["resps"][0][0][0] > rows[0]["resps"][1][0][0])
    assert rows[0]["filtered_resps"] == [answer[0] for answer in rows[0]["resps"]]
    assert len(rows[0]["doc_hash"]) == 64


def test_a_limit_is_marked(model, tmp_path, capsys):
    found, err = told(capsys, model, "--task", "toy", "--limit", 2, "--out", tmp_path)
    assert found["limited"] is True
    assert found["config"]["limit"] == 2
    assert found["n-samples"]["toy_b"] == {"original": 5, "effective": 2}
    assert "for trying out only" in err
    share, _ = told(capsys, model, "--task", "toy", "--limit", 0.4, "--out", tmp_path)
    assert [it["effective"] for it in share["n-samples"].values()] == [1, 2]
    least, _ = told(capsys, model, "--task", "toy", "--limit", 0.01, "--out", tmp_path)
    assert [it["effective"] for it in least["n-samples"].values()] == [1, 1]
    for wrong in ("0", "-1", "2.5"):
        _, err = told(capsys, model, "--task", "toy", "--limit", wrong, "--out", tmp_path, code=2)
        assert "limit is" in err


def test_an_evaluation_that_is_repeated_asks_the_model_nothing(model, tmp_path, capsys, monkeypatch):
    first, _ = told(capsys, model, "--task", "toy,toy_write", "--out", tmp_path)
    monkeypatch.setattr("eval.answering.answered", lambda examinee, requests, size: iter([]) if not requests else 1 / 0)
    again, err = told(capsys, model, "--task", "toy,toy_write", "--out", tmp_path)
    assert again["results"] == first["results"]
    assert "answers were there" in err
    assert first["files"][0] != again["files"][0]
    with pytest.raises(ZeroDivisionError):
        told(capsys, model, "--task", "toy", "--no-cache", "--out", tmp_path)


def test_another_precision_or_format_has_answers_of_its_own(model, tmp_path, capsys):
    told(capsys, model, "--task", "toy", "--out", tmp_path)
    _, err = told(capsys, model, "--task", "toy", "--out", tmp_path, "--load.quantize", True)
    assert "answers were there" not in err
    _, err = told(capsys, model, "--task", "toy", "--out", tmp_path, "--load.quantize", True)
    assert "answers were there" in err


ASKING = """if True:
    import os, sys, time
    import qlora
    from eval import likelihood, registry
    from tests import toy_tasks
    registry.families = lambda: {"toy": toy_tasks.FAMILY}
    answer_rows = likelihood.answer_rows
    def noted(examinee, rows):
        print("asked", flush=True)
        time.sleep(float(os.environ["PAUSE"]))
        return answer_rows(examinee, rows)
    likelihood.answer_rows = noted
    sys.exit(qlora.main(sys.argv[1:]))
"""


def test_a_killed_evaluation_goes_on_where_it_was(model, tmp_path):
    """A process of its own is killed when two answers are there; the next one asks for the rest only."""
    arguments = ["eval", model, "--task", "toy", "--out", tmp_path, "--batch-size", 1, "--load.dtype", "float32"]
    command = [sys.executable, "-c", ASKING, *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "PAUSE": "0"}
    slowly = {**environment, "PAUSE": "0.3"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=slowly) as victim:
        assert victim.stdout is not None
        for _ in range(3):
            assert victim.stdout.readline() == "asked\n"
        victim.kill()
    assert not list((tmp_path / "model").glob("results_*"))
    texts = [
        subprocess.run([*command, *more], capture_output=True, text=True, env=environment, check=True).stdout
        for more in ([], ["--no-cache"])
    ]
    asked = [text.count("asked\n") for text in texts]
    assert asked[0] == asked[1] - 2 > 0
    first, second = (json.loads(path.read_text()) for path in sorted((tmp_path / "model").glob("results_*")))
    assert first["results"] == second["results"]


def test_prompts_are_written_and_the_model_is_asked_nothing(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eval.command.load_examinee", lambda *_: 1 / 0)
    found, _ = told(capsys, model, "--task", "toy_a,toy_write", "--limit", 2, "--prompts", tmp_path / "p.jsonl")
    assert found == {"prompts": 3, "file": str(tmp_path / "p.jsonl")}
    rows = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert rows[0] == {"task": "toy_a", "input": "It is", "output": " red"}


def test_an_unknown_task_is_refused_with_a_hint(model, tmp_path, capsys):
    _, err = told(capsys, model, "--task", "toy_q", "--out", tmp_path, code=2)
    assert "task 'toy_q' is not known. Did you mean toy_" in err
    _, err = told(capsys, model, "--task", " , ", "--out", tmp_path, code=2)
    assert "names nothing" in err
    _, err = told(capsys, model, "--task", "toy,toy_a", "--out", tmp_path, code=2)
    assert "toy_a more than once" in err


def test_what_is_wrong_is_said_before_the_model_is_loaded_and_nothing_is_left(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eval.command.load_examinee", lambda *_: 1 / 0)
    for arguments, code in (
        (("--task", "nothing"), 2),
        (("--task", "toy", "--protocol", "z"), 2),
        (("--task", "toy", "--data", tmp_path / "gone"), 3),
    ):
        told(capsys, model, *arguments, "--out", tmp_path / "out", code=code)
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_said_before_anything_is_asked(model, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eval.command.evaluate", lambda *_, **__: 1 / 0)
    (tmp_path / "file").write_text("")
    _, err = told(capsys, model, "--task", "toy", "--out", tmp_path / "file", "--no-cache", code=7)
    assert "cannot be made" in err


def test_settings_are_for_all_tasks_or_for_one(examinee, monkeypatch, tmp_path):
    seen = {}

    def record(spec: Spec):
        seen[spec.name] = spec
        return toy_tasks.build(spec)

    family = toy_tasks.Family(
        name="toy", summary="", build=record, names=("toy_a", "toy_b"), protocols=("x", "y"), splits=("dev",)
    )
    monkeypatch.setattr(registry, "families", lambda: {"toy": family})
    settings = Settings(
        data=[str(tmp_path)],
        protocol=["toy_a=x", "toy=y"],
        split=["dev"],
        num_fewshot=["3", "toy_b=0"],
        window=["toy_a=7"],
    )
    build(wanted("toy_a,toy_b", settings), examinee)
    assert seen["toy_a"].data == seen["toy_b"].data == tmp_path
    assert (seen["toy_a"].protocol, seen["toy_b"].protocol) == ("x", "y")
    assert (seen["toy_a"].num_fewshot, seen["toy_b"].num_fewshot) == (3, 0)
    assert (seen["toy_a"].window, seen["toy_b"].window) == (7, None)
    wrong = [
        (Settings(protocol=["z"]), "protocol 'z' is not known; toy has x, y"),
        (Settings(split=["test"]), "toy has dev"),
        (Settings(num_fewshot=["two"]), "a whole number is needed"),
        (Settings(num_fewshot=["-1"]), "at least 0"),
        (Settings(window=["1"]), "at least 2"),
        (Settings(data=["mmlu=/there"]), "not among the tasks"),
        (Settings(data=["/not/there"]), "data: /not/there does not exist"),
        (Settings(data=["/here", "/there"]), "write NAME=/here"),
    ]
    for settings, message in wrong:
        with pytest.raises((ConfigError, DataError), match=message):
            wanted("toy_a", settings)


def test_a_path_with_an_equals_sign_is_a_path(examinee, tmp_path):
    folder = tmp_path / "a=b"
    folder.mkdir()
    assert registry.chosen("data", [str(folder)], ("toy",)) == str(folder)


def test_one_folder_can_hold_the_data_of_all(tmp_path):
    (tmp_path / "toy").mkdir()
    assert data_path(str(tmp_path), ("toy_a", "toy")) == tmp_path / "toy"
    assert data_path(str(tmp_path / "toy"), ("toy_a", "toy")) == tmp_path / "toy"
    (tmp_path / "toy_a").mkdir()
    assert data_path(str(tmp_path), ("toy_a", "toy")) == tmp_path / "toy_a"
    assert data_path(None, ("toy_a", "toy")) is None


def test_options_come_from_a_file_as_well(tmp_path):
    (tmp_path / "e.toml").write_text('task = "toy"\ndata = ["toy=x"]\nlimit = 5\nbatch_size = 3\n')
    options = parse(EvalOptions, ["m", "--config", str(tmp_path / "e.toml")])
    assert (options.task, options.data, options.limit, options.batch_size) == ("toy", ("toy=x",), 5, 3)
    assert parse(EvalOptions, ["m", "--batch-size", "auto"]).batch_size == "auto"
    with pytest.raises(ConfigError, match="batch_size is 0"):
        parse(EvalOptions, ["m", "--batch-size", "0"])
