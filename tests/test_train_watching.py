"""Watching a run: answers at each evaluation, TensorBoard, the live line, and plots over several runs."""

import doctest
import importlib
import json
import sys
import types

import pytest
import torch

import models
import qlora
import train.samples
import train.tensorboard
from models.errors import ConfigError
from tests import tiny
from train.config import parse
from train.plot import plot_runs
from train.preparation import prepare
from train.progress import Progress
from train.recipe import RunConfig
from train.run import Run, read_metrics
from train.samples import sampler


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tiny.records(tmp_path_factory.mktemp("data") / "colours.jsonl")


def settings(model, data, out, *more):
    flags = "--dtype float32 --max-steps 4 --batch-size 2 --accumulation 1 --lora.rank 4 --quiet --data.eval-size 4"
    given = ["--model", str(model), "--data.path", str(data), "--out", str(out), *flags.split()]
    return [*given, "--eval-steps", "2", "--optimizer.learning-rate", "0.02", *more]


def trained(model, data, out, *more):
    finetuning = prepare(parse(RunConfig, settings(model, data, out, *more)))
    finetuning.train()
    return finetuning


# Answers


def test_the_same_prompts_are_answered_at_each_evaluation(model, data, tmp_path):
    more = ["--samples", "2", "--sample-prompts", "Name colour", "--sample-tokens", "5"]
    finetuning = trained(model, data, tmp_path / "run", *more)
    lines = read_metrics(tmp_path / "run", "eval/samples.jsonl")
    assert [line["step"] for line in lines] == [0, 0, 0, 2, 2, 2, 4, 4, 4]
    assert len({line["prompt"] for line in lines}) == 3
    held_out = finetuning.data.held_out[0]
    learned = next(i for i, label in enumerate(held_out.labels) if label != -100)
    prompt = held_out.input_ids[:learned]
    assert lines[0]["prompt"] == finetuning.tokenizer.decode(prompt)
    assert lines[0]["prompt"].endswith("### Response:")
    assert lines[2]["prompt"] == "Name colour"

    ids = models.generate(finetuning.model, torch.tensor([prompt]), max_new_tokens=5)[0, learned:]
    stop = [i for i in ids.tolist() if i < finetuning.tokenizer.vocab_size]
    assert lines[6]["text"] == finetuning.tokenizer.decode(stop)
    assert "step 4  '" in (tmp_path / "run" / "log.txt").read_text()


def test_a_run_with_samples_makes_the_same_steps_as_one_without(model, data, tmp_path):
    dropout = ["--lora.dropout", "0.3"]  # where a stray random number would show
    trained(model, data, tmp_path / "without", *dropout)
    trained(model, data, tmp_path / "with", *dropout, "--samples", "3", "--sample-tokens", "4")
    for name in ("metrics.jsonl", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()
    assert not (tmp_path / "without" / "eval").exists()


def test_a_run_that_goes_on_has_the_samples_of_one_that_never_stopped(model, data, tmp_path, capsys):
    more = ["--samples", "1", "--sample-tokens", "4", "--optimizer.warmup-steps", "0"]
    trained(model, data, tmp_path / "whole", *more)
    trained(model, data, tmp_path / "parted", *more, "--max-steps", "2")
    assert qlora.main(["resume", str(tmp_path / "parted"), "--max-steps", "4", "--quiet", "--json"]) == 0
    capsys.readouterr()
    for name in ("eval/samples.jsonl", "metrics.jsonl"):
        assert (tmp_path / "parted" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_text_is_asked_as_a_message_where_chats_are_learned(model, data, tmp_path):
    more = ["--sample-prompts", "Which colour?", "--sample-tokens", "2"]
    finetuning = prepare(parse(RunConfig, settings(model, data, tmp_path / "chat", *more, "--data.template", "chat")))
    write = sampler(finetuning.config, finetuning.model, finetuning.tokenizer, finetuning.data.held_out, finetuning.run)
    assert write is not None
    expected, _ = models.chat.render_chat(
        finetuning.tokenizer, [{"role": "user", "content": "Which colour?"}], add_generation_prompt=True
    )
    assert write.prompts == (tuple(expected),)


def test_a_model_in_training_mode_is_given_back_in_it(model, data, tmp_path):
    finetuning = prepare(parse(RunConfig, settings(model, data, tmp_path / "run", "--samples", "1")))
    finetuning.model.train()
    write = sampler(finetuning.config, finetuning.model, finetuning.tokenizer, finetuning.data.held_out, finetuning.run)
    assert write is not None
    modes = []
    finetuning.model.get_submodule("model.norm").register_forward_hook(lambda m, *_: modes.append(m.training))
    assert len(write(7)) == 1
    assert set(modes) == {False}  # answers are given without dropout
    assert finetuning.model.training


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--samples", "1", "--data.eval-size", "0"], "samples answers held-out examples, and there are none"),
        (["--samples", "1", "--data.train-on-source"], "samples cannot tell prompts from answers where"),
        (["--sample-prompts", "colour " * 300], r"prompt 1 has \d+ tokens, which leaves no room .* 256 positions"),
    ],
)
def test_prompts_that_cannot_be_answered_are_refused_before_the_first_step(model, data, tmp_path, more, says):
    with pytest.raises(ConfigError, match=says):
        trained(model, data, tmp_path / "run", *more)
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


@pytest.mark.parametrize("more", [["--samples", "-1"], ["--sample-tokens", "0"], ["--sample-prompts", ""]])
def test_impossible_settings_of_samples_are_refused(more):
    with pytest.raises(ConfigError, match="sample"):
        parse(RunConfig, settings("m", "d", "o", *more))


def test_a_t5_answers_what_its_encoder_reads(tmp_path):
    from tests.tiny_t5 import checkpoint

    t5, tokenizer = models.load(checkpoint(tmp_path / "t5")), models.load_tokenizer(tmp_path / "t5")
    ids = tokenizer.encode("a text", eos=True)
    config = RunConfig(
        model="m", data=train.data.DataConfig(path="d"), max_steps=1, sample_prompts=("a text",), sample_tokens=3
    )
    run = Run.create(tmp_path / "run", config)
    write = sampler(config, t5, tokenizer, [], run)
    assert write is not None
    write(0)
    assert write.prompts == (tuple(ids),)
    written = models.generate(t5, torch.tensor([ids]), max_new_tokens=3)[0, 1:].tolist()
    (line,) = read_metrics(run.directory, "eval/samples.jsonl")
    assert line["text"] == tokenizer.decode([i for i in written if i < tokenizer.vocab_size])


# TensorBoard


class Writer:
    """Stands in for torch.utils.tensorboard.SummaryWriter and keeps what it is given."""

    made: list["Writer"] = []

    def __init__(self, directory, purge_step=None):
        self.directory, self.purge_step, self.scalars, self.closed = directory, purge_step, [], False
        Writer.made.append(self)

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.closed = True


@pytest.fixture
def writer(monkeypatch):
    monkeypatch.setattr(Writer, "made", [])
    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer  # pyrefly: ignore[missing-attribute]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(train.tensorboard, "find_spec", lambda name: object())
    return Writer


def test_tensorboard_gets_what_the_journals_get(writer, model, data, tmp_path):
    trained(model, data, tmp_path / "run", "--tensorboard", "--samples", "1", "--sample-tokens", "2")
    (written,) = writer.made
    assert (written.directory, written.purge_step, written.closed) == (str(tmp_path / "run/tensorboard"), None, True)
    losses = [(value, step) for tag, value, step in written.scalars if tag == "train/loss"]
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "train"]
    assert losses == [(line["loss"], line["step"]) for line in lines]
    tags = {tag for tag, _, _ in written.scalars}
    assert {"eval/loss", "train/lr", "timing/tokens_per_second", "timing/peak_memory"} <= tags
    assert all(isinstance(value, int | float) for _, value, _ in written.scalars)


def test_a_run_that_goes_on_takes_back_what_was_written_beyond_its_checkpoint(writer, tmp_path):
    run = Run.create(tmp_path / "run", RunConfig(model="m", data=train.data.DataConfig(path="d"), max_steps=9))
    with train.tensorboard.tensorboard(run, 5):
        run.metrics(6, "train", loss=1.0)
    run.metrics(7, "train", loss=1.0)
    (written,) = writer.made
    assert (written.purge_step, written.scalars) == (6, [("train/loss", 1.0, 6)])


def test_a_resumed_run_tells_tensorboard_where_it_goes_on(writer, model, data, tmp_path, capsys):
    trained(model, data, tmp_path / "run", "--tensorboard", "--max-steps", "2", "--optimizer.warmup-steps", "0")
    assert qlora.main(["resume", str(tmp_path / "run"), "--max-steps", "4", "--quiet", "--json"]) == 0
    capsys.readouterr()
    assert [each.purge_step for each in writer.made] == [None, 3]
    assert {step for tag, _, step in writer.made[1].scalars if tag == "train/loss"} == {3, 4}


def test_a_missing_tensorboard_is_said_before_anything_has_begun(model, data, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train.tensorboard, "find_spec", lambda name: None)
    assert qlora.main(["train", *settings(model, data, tmp_path / "run", "--tensorboard")]) == 2
    assert "pip install 'qlora-from-scratch[tensorboard]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_real_tensorboard_reads_the_events_back(model, data, tmp_path):
    pytest.importorskip("tensorboard")
    reader = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")

    trained(model, data, tmp_path / "run", "--tensorboard")
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("eval/loss")]
    lines = [line for line in read_metrics(tmp_path / "run") if line["split"] == "eval"]
    assert [step for step, _ in found] == [line["step"] for line in lines]
    assert [value for _, value in found] == pytest.approx([line["loss"] for line in lines])


# The live line


def test_the_time_left_counts_only_the_steps_of_this_session(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    lines = []
    progress = Progress(200, done=100, every=1, quiet=True, write=lines.append)
    now[0] += 500  # an evaluation before the first step
    progress.begin()
    now[0] += 2
    progress.begin()
    now[0] += 18  # ten steps of two seconds, so 90 more take three minutes, whatever the first hundred took
    progress.step(110, 1.0, 2e-4, 500, 2**30)
    assert lines == ["step 110/200  loss 1.0000  lr 2.00e-04  500 tokens/s  1.00 GiB  3m00s left"]


# Plots


def a_run(directory, steps=40, **measured):
    run = Run.create(directory, RunConfig(model="m", data=train.data.DataConfig(path="d"), max_steps=steps))
    for step in range(1, steps + 1):
        run.metrics(step, "train", loss=2 + 1 / step, lr=2e-4, grad_norm=0.1, labels=10, tokens=20)
        if step % 20 == 0:
            run.metrics(step, "eval", loss=2.1, labels=10, **measured)
    return directory


def test_an_accuracy_has_a_panel_of_its_own(tmp_path):
    svg = plot_runs([a_run(tmp_path / "one", accuracy=0.5)], tmp_path / "loss.png")[1].read_text()
    assert "<!-- accuracy -->" in svg
    assert "<!-- accuracy -->" not in plot_runs([a_run(tmp_path / "two")], tmp_path / "loss.png")[1].read_text()


def test_six_runs_have_a_legend_of_one_entry_each(tmp_path):
    runs = [a_run(tmp_path / f"rank={2**i},lr=1e-4,seed=42") for i in range(6)]
    png, svg = plot_runs(runs, tmp_path / "six.png")
    text = svg.read_text()
    for run in runs:
        assert text.count(f"<!-- {run.name} -->") == 1
    for said in ("training, each step", "held out"):
        assert text.count(f"<!-- {said} -->") == 1
    assert png.read_bytes()[:4] == b"\x89PNG"


def test_the_examples_in_the_docstrings_hold():
    assert doctest.testmod(train.samples).failed == doctest.testmod(train.tensorboard).failed == 0


def test_a_line_of_samples_is_json_of_step_prompt_and_text(model, data, tmp_path):
    trained(model, data, tmp_path / "run", "--samples", "1", "--sample-tokens", "2")
    for line in (tmp_path / "run" / "eval" / "samples.jsonl").read_text().splitlines():
        assert list(json.loads(line)) == ["step", "prompt", "text"]
