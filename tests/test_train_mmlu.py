"""MMLU while a model learns: when it is asked, what is written down, and that nothing is learned otherwise for it."""

import json
import math

import pytest
import torch

import models
import qlora
import train.mmlu
from eval.mmlu.tracking import Examination
from models.errors import ConfigError, DataError, NonFiniteError
from tests import tiny, tiny_mmlu
from train.config import parse
from train.plot import plot_runs
from train.preparation import prepare
from train.recipe import RunConfig
from train.run import read_metrics

ANSWERS = {"anatomy": "BBAC", "virology": "BC", "sociology": "DBA"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.records(tmp_path_factory.mktemp("data") / "colours.jsonl")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Nine questions about three subjects."""
    return tiny_mmlu.folder(tmp_path_factory.mktemp("mmlu"), ANSWERS)


@pytest.fixture(scope="module")
def measured(model, data, questions, tmp_path_factory):
    """A run that was measured at each evaluation, and what it was made from."""
    run = tmp_path_factory.mktemp("run") / "run"
    return run, trained(model, data, run, *asking(questions))[0]


def settings(model, data, out, *more):
    flags = "--dtype float32 --max-steps 4 --batch-size 2 --accumulation 1 --lora.rank 4 --quiet --data.eval-size 4"
    given = ["--model", str(model), "--data.path", str(data), "--out", str(out), *flags.split()]
    return [*given, "--eval-steps", "2", "--optimizer.learning-rate", "0.02", *more]


def asking(questions, *more, task="mmlu_anatomy"):
    flags = ["--mmlu.data", str(questions), "--mmlu.task", task, "--mmlu.num-fewshot", "0", "--mmlu.max-len", "200"]
    return [*flags, *more]


def trained(model, data, out, *more):
    finetuning = prepare(parse(RunConfig, settings(model, data, out, *more)))
    return finetuning, finetuning.train()


def lines(run, split):
    return [line for line in read_metrics(run) if line["split"] == split]


# What is written down


def test_mmlu_is_measured_at_each_evaluation(measured):
    run, finetuning = measured
    found = lines(run, "mmlu")
    assert [line["step"] for line in found] == [line["step"] for line in lines(run, "eval")] == [0, 2, 4]
    assert {line["questions"] for line in found} == {4}
    journal = read_metrics(run, "eval/mmlu.jsonl")
    assert [line["step"] for line in journal] == [0, 2, 4]
    for line, subjects in zip(found, journal, strict=True):
        assert subjects["subjects"] == {"anatomy": line["accuracy"]}
        assert line["accuracy"] == line["accuracy_micro"] == subjects["accuracy"]
        assert math.isfinite(line["mmlu_loss"])
    assert found[0]["mmlu_loss"] != found[-1]["mmlu_loss"]  # it has learned something

    assert finetuning.examination is not None
    last = finetuning.examination.take(finetuning.model)  # the same as after the last step
    assert found[-1]["mmlu_loss"] == last.loss
    assert found[-1]["accuracy"] == last.accuracy
    log = (run / "log.txt").read_text()
    assert f"step 4  MMLU {100 * last.accuracy:.1f} % ± " in log
    assert f"loss {last.loss:.4f} on 4 questions" in log


def test_it_is_what_qlora_eval_measures_of_the_run(measured, questions, capsys):
    run, _ = measured
    target = ["eval", str(run), "--task", "mmlu_anatomy", "--data", str(questions), "--protocol", "qlora", "--json"]
    more = ["--num-fewshot", "0", "--window", "200", "--load.dtype", "float32", "--load.device", "cpu"]
    assert qlora.main([*target, *more]) == 0
    result = json.loads(capsys.readouterr().out)["results"]["mmlu_anatomy"]
    last = lines(run, "mmlu")[-1]
    assert result["acc,none"] == last["accuracy"]
    assert result["acc_stderr,none"] == last["accuracy_stderr"]
    assert result["mmlu_loss,none"] == pytest.approx(last["mmlu_loss"], rel=1e-5)


def test_a_frequency_of_its_own(model, data, questions, tmp_path):
    trained(model, data, tmp_path / "seldom", *asking(questions, "--mmlu.eval-steps", "3"))
    assert [line["step"] for line in lines(tmp_path / "seldom", "mmlu")] == [0, 3, 4]
    assert [line["step"] for line in lines(tmp_path / "seldom", "eval")] == [0, 2, 4]


def test_a_run_without_held_out_examples_is_measured_too(model, data, questions, tmp_path):
    trained(model, data, tmp_path / "run", *asking(questions, "--data.eval-size", "0"))
    assert [line["step"] for line in lines(tmp_path / "run", "mmlu")] == [0, 2, 4]


def test_limit_split_and_a_file_of_prompts(model, data, questions, tmp_path):
    finetuning = prepare(
        parse(RunConfig, settings(model, data, tmp_path / "a", *asking(questions, "--mmlu.limit", "3")))
    )
    assert finetuning.examination is not None
    assert len(finetuning.examination) == 3
    rows = [{"subject": "anatomy", "input": "Is it?\nAnswer:", "output": letter} for letter in "AB"]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    more = ["--mmlu.data", str(file), "--mmlu.task", "mmlu_anatomy"]
    trained(model, data, tmp_path / "b", *more)
    assert {line["questions"] for line in lines(tmp_path / "b", "mmlu")} == {2}


def test_val_is_the_split_if_nobody_says(model, data, tmp_path):
    tiny_mmlu.folder(tmp_path / "mmlu", {"anatomy": "AB"})
    (tmp_path / "mmlu" / "test" / "anatomy_test.csv").write_text("Is it?,a,b,c,d,A\n")
    for split, count in ((), 2), (("--mmlu.split", "test"), 1):
        flags = asking(tmp_path / "mmlu", *split)
        finetuning = prepare(parse(RunConfig, settings(model, data, tmp_path / f"run{count}", *flags)))
        assert finetuning.examination is not None
        assert len(finetuning.examination) == count


# What is learned


def test_a_run_with_mmlu_makes_the_same_steps_as_one_without(model, data, questions, tmp_path):
    dropout = ["--lora.dropout", "0.3"]  # where a stray random number would show
    trained(model, data, tmp_path / "without", *dropout)
    trained(model, data, tmp_path / "with", *dropout, *asking(questions, "--mmlu.eval-steps", "1"))
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "with" / adapter).read_bytes() == (tmp_path / "without" / adapter).read_bytes()
    kept = [line for line in read_metrics(tmp_path / "with") if line["split"] != "mmlu"]
    assert kept == read_metrics(tmp_path / "without")
    assert not (tmp_path / "without" / "eval").exists()


def test_a_run_that_goes_on_has_the_numbers_of_one_that_never_stopped(model, data, questions, tmp_path, capsys):
    more = asking(questions, "--mmlu.eval-steps", "1", "--optimizer.warmup-steps", "0", "--save-steps", "2")
    trained(model, data, tmp_path / "whole", *more)
    trained(model, data, tmp_path / "parted", *more, "--max-steps", "2")
    for name in ("eval/mmlu.jsonl", "metrics.jsonl"):  # what a kill behind the checkpoint leaves
        with open(tmp_path / "parted" / name, "a") as file:
            file.write('{"step": 3, "split": "mmlu", "accuracy": 0.5}\n')
    assert qlora.main(["resume", str(tmp_path / "parted"), "--max-steps", "4", "--quiet", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    for name in ("eval/mmlu.jsonl", "metrics.jsonl"):
        assert (tmp_path / "parted" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert [line["step"] for line in said["mmlu"]] == [0, 1, 2, 3, 4]


def test_what_is_measured_may_change_when_a_run_goes_on(model, data, questions, tmp_path, capsys):
    run = tmp_path / "run"
    trained(model, data, run, *asking(questions), "--max-steps", "2", "--optimizer.warmup-steps", "0")
    config = run / "config.toml"
    config.write_text(config.read_text().replace('task = "mmlu_anatomy"', 'task = "mmlu_virology"'))
    assert qlora.main(["resume", str(run), "--max-steps", "4", "--quiet", "--json"]) == 0
    assert [line["questions"] for line in lines(run, "mmlu")] == [4, 4, 2]


# What a person sees


def test_the_command_tells_before_and_after(model, data, questions, tmp_path, capsys):
    assert qlora.main(["train", *settings(model, data, tmp_path / "run", *asking(questions))]) == 0
    said = capsys.readouterr()
    text = " ".join((said.out + said.err).split())
    assert "MMLU: 4 questions at each evaluation" in text
    first, *_, last = lines(tmp_path / "run", "mmlu")
    for line in (first, last):
        assert f"loss {line['mmlu_loss']:.4f} after step {line['step']}" in text


def test_the_picture_has_a_panel_of_mmlu(measured, tmp_path):
    run, _ = measured
    plain = tmp_path / "plain"
    plain.mkdir()
    kept = [line for line in read_metrics(run) if line["split"] != "mmlu"]
    (plain / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    pictures = [plot_runs([run], tmp_path / run.name)[1].read_text() for run in (run, plain)]
    assert ["MMLU accuracy" in picture for picture in pictures] == [True, False]


def test_names_of_qlora_py_are_answered(model, data):
    for flag, ours in {
        "--do_mmlu_eval": "mmlu.data",
        "--mmlu_dataset": "mmlu.data and mmlu.num_fewshot",
        "--mmlu_split": "mmlu.split",
        "--mmlu_source_max_len": "mmlu.max_len",
        "--max_mmlu_samples": "mmlu.limit",
    }.items():
        with pytest.raises(ConfigError, match=f"qlora.py's {flag[2:]} is {ours} here"):
            parse(RunConfig, settings(model, data, "out", flag, "1"))


# What is refused


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--mmlu.data", "nowhere"], "nowhere does not exist"),
        (["--mmlu.data", "{questions}"], "has no abstract_algebra_val.csv, and 53 more files"),
        (["--mmlu.data", "{questions}", "--mmlu.task", "mmlu_anatomy", "--mmlu.num-fewshot", "6"], "MMLU has 5"),
        (
            ["--mmlu.data", "{questions}", "--mmlu.task", "mmlu_anatomy"],
            r"4 prompts have more tokens than the 256 that the model takes, .*; set mmlu.max_len = 256",
        ),
    ],
)
def test_what_cannot_be_asked_is_refused_before_there_is_a_run(model, data, questions, tmp_path, more, says):
    given = [text.format(questions=questions) for text in more]
    with pytest.raises((ConfigError, DataError), match=says):
        prepare(parse(RunConfig, settings(model, data, tmp_path / "run", *given)))
    assert not (tmp_path / "run").exists()


def test_other_models_than_llama_are_refused(questions, tmp_path):
    from tests import tiny_roberta

    model = tiny_roberta.checkpoint(tmp_path / "model")
    texts = tmp_path / "labels.jsonl"
    texts.write_text("".join(json.dumps({"text": "M K V" + " M" * n, "label": n % 2}) + "\n" for n in range(8)))
    flags = ["--model", str(model), "--data.path", str(texts), "--out", str(tmp_path / "run"), "--max-steps", "1"]
    with pytest.raises(ConfigError, match=r"mmlu is measured on a causal language model .* leave out mmlu.data"):
        prepare(parse(RunConfig, [*flags, *asking(questions)]))


@pytest.mark.parametrize(
    "more",
    [
        ["--mmlu.task", "mmlu_alchemy"],
        ["--mmlu.data", ""],
        ["--mmlu.limit", "0"],
        ["--mmlu.eval-steps", "0"],
        ["--mmlu.max-len", "1"],
        ["--mmlu.num-fewshot", "-1"],
        ["--mmlu.batch-size", "0"],
    ],
)
def test_impossible_settings_are_refused(more):
    with pytest.raises(ConfigError, match=more[0][2:].partition(".")[2].replace("-", "_")):
        parse(RunConfig, settings("m", "d", "o", *more))


def test_a_loss_that_is_not_finite_ends_the_run(model, data, questions, tmp_path, monkeypatch):
    finetuning = prepare(parse(RunConfig, settings(model, data, tmp_path / "run", *asking(questions))))

    def certain(hidden):
        """Logits that leave nothing to any token but the first."""
        logits = torch.full((*hidden.shape[:-1], 1403), -math.inf)
        logits[..., 0] = 0.0
        return logits

    monkeypatch.setattr(finetuning.model, "head", certain)
    with pytest.raises(NonFiniteError, match="the loss on MMLU after step 0 is inf"):
        finetuning.watchers()[-1](0)
    assert lines(tmp_path / "run", "mmlu") == []


def test_prompts_that_lose_their_end_by_choice_are_told_of(model, data, questions, tmp_path):
    config = parse(RunConfig, settings(model, data, tmp_path / "run", *asking(questions, "--mmlu.max-len", "20")))
    asked = train.mmlu.examination(config.mmlu, models.load_tokenizer(model), models.checkpoint.describe(model))
    assert isinstance(asked, Examination)
    (said,) = train.mmlu.remark(asked, config.mmlu)
    assert said == "MMLU: 4 questions at each evaluation; 4 prompts are longer than 20 tokens and lose their end"
