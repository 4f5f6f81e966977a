"""The loop on a toy model: what a step is, what is written down, and what stops a run."""

import os
import signal
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import train.loop as train_loop
from models.errors import ConfigError, DataError, NonFiniteError
from train.checkpoint import checkpoints
from train.data.batches import Batch
from train.interrupt import Interrupt
from train.loop import BatchSource, LoopConfig, train
from train.optimizer import OptimizerConfig
from train.passes import Passes
from train.progress import Progress
from train.run import Run, read_metrics
from train.seed import seed_everything
from train.snapshot import newest_snapshot
from train.step import update

VOCABULARY, WIDTH, RANK, LENGTH = 11, 8, 2, 6


class Toy(nn.Module):
    """A frozen linear next-token model with one adapter, B zero at the start; the models' loss contract."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.head = nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(RANK, WIDTH))
        self.lora_b = nn.Parameter(torch.zeros(VOCABULARY, RANK))
        self.dropout = nn.Dropout(dropout)

    def loss(self, input_ids, attention_mask, labels):
        x = self.embed(input_ids)
        logits = self.head(x) + self.dropout(x) @ self.lora_a.T @ self.lora_b.T
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)

    def label_count(self, labels):
        return int((labels[:, 1:] != -100).sum())


class Rows(BatchSource):
    """Rows of ids in micro-batches, shuffled anew in each epoch."""

    def __init__(self, rows, size=1, shuffle=True):
        self.rows, self.size, self.shuffle = rows, size, shuffle

    def count(self, number):
        return -(-len(self.rows) // self.size)

    def micro_batch(self, number, place, part=0, parts=1):
        assert (part, parts) == (0, 1), "one process takes whole ones"
        order = range(len(self.rows))
        if self.shuffle:
            order = torch.randperm(len(self.rows), generator=torch.Generator().manual_seed(number)).tolist()
        return collate([self.rows[i] for i in order[place * self.size : (place + 1) * self.size]])


def collate(rows):
    """Rows are (ids, number of leading ids that are not trained on)."""
    ids = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for i, (row, source) in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, source : len(row)] = ids[i, source : len(row)]
    return Batch({"input_ids": ids, "attention_mask": mask, "labels": labels})


def some_rows(number, seed=0):
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, LENGTH + 1, (number,), generator=draw).tolist()
    return [(torch.randint(1, VOCABULARY, (n,), generator=draw).tolist(), int(n) // 3) for n in lengths]


ROWS = some_rows(10)
FAST = OptimizerConfig(learning_rate=0.05, max_grad_norm=100.0)
CONFIG = LoopConfig(accumulation=4, max_steps=5, optimizer=FAST)


def a_run(
    tmp_path,
    config=CONFIG,
    name="run",
    model=None,
    batches=None,
    seed=1,
    held_out=None,
    quiet=True,
    **options,
):
    """Train a toy; give (result, run, model)."""
    seed_everything(seed)
    model = model or Toy()
    if held_out:
        options["eval_fn"] = lambda step: evaluated(model, held_out)
    run = Run.create(tmp_path / name, config)
    batches = Rows(ROWS) if batches is None else batches
    result = train(model, batches, config, run, seed=seed, quiet=quiet, save=save, restore=restore, **options)
    return result, run, model


def save(model, directory):
    save_file(
        {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}, directory / "toy.safetensors"
    )


def restore(model, directory):
    model.load_state_dict(load_file(directory / "toy.safetensors"), strict=False)


def evaluated(model, rows):
    """Held-out loss as the caller gives it to the loop; the model goes back to training."""
    batch = collate(rows).inputs
    model.eval()
    with torch.no_grad():
        loss = model.loss(**batch).item()
    model.train()
    return {"loss": loss, "labels": model.label_count(batch["labels"])}


def text(run, name):
    return (run.directory / name).read_text()


def train_lines(run):
    return [line for line in read_metrics(run.directory) if line["split"] == "train"]


# A step

rows = st.lists(
    st.lists(st.integers(1, VOCABULARY - 1), min_size=1, max_size=LENGTH).flatmap(
        lambda ids: st.tuples(st.just(ids), st.integers(0, len(ids)))
    ),
    min_size=1,
    max_size=8,
)


@given(rows=rows, size=st.integers(1, 4), seed=st.integers(0, 99))
def test_accumulated_micro_batches_give_the_step_of_one_big_batch(rows, size, seed):
    if not any(len(ids) > max(1, source) for ids, source in rows):
        return  # no label at all, which is refused
    torch.manual_seed(seed)
    together = Toy()
    nn.init.normal_(together.lora_b)
    apart = Toy()
    apart.load_state_dict(together.state_dict())

    steps = []
    for model, number in ((together, len(rows)), (apart, size)):
        passes, source = Passes(model), Rows(rows, number, shuffle=False)
        optimizer = torch.optim.SGD(passes.moved.values(), lr=1.0)
        micro_batches = [source.micro_batch(0, place) for place in range(source.count(0))]
        steps.append(update(passes, optimizer, micro_batches, 1, float("inf")))
    assert steps[0] == pytest.approx(steps[1], rel=1e-6, abs=1e-6)
    assert steps[0].labels == steps[1].labels
    torch.testing.assert_close(apart.lora_a, together.lora_a, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(apart.lora_b, together.lora_b, rtol=1e-6, atol=1e-6)


def test_a_step_counts_the_labels_that_enter_the_loss_and_the_tokens_without_padding(tmp_path):
    rows = [([1, 2, 3, 4], 0), ([5, 6, 7], 2)]  # the first id of a row is predicted by nothing
    config = replace(CONFIG, accumulation=2, max_steps=1)
    _, run, _ = a_run(tmp_path, config, batches=Rows(rows))
    assert [(line["labels"], line["tokens"]) for line in train_lines(run)] == [(3 + 1, 7)]


def test_gradients_are_clipped_to_the_norm_and_the_norm_before_is_written(tmp_path):
    clipped = replace(CONFIG, max_steps=1, optimizer=replace(FAST, max_grad_norm=1e-3, eps=1.0))
    free = replace(clipped, optimizer=replace(clipped.optimizer, max_grad_norm=float("inf")))
    moved = []
    for name, config in (("clipped", clipped), ("free", free)):
        _, run, model = a_run(tmp_path, config, name)
        norm = train_lines(run)[0]["grad_norm"]
        moved.append(model.lora_b.detach().norm().item())
        assert norm > 0.1
    # with eps = 1 AdamW's first step is lr g / (|g| + 1), nearly linear in a small gradient
    assert moved[0] == pytest.approx(0.05 * 1e-3, rel=1e-2)
    assert moved[1] > 50 * moved[0]


def test_training_lowers_the_loss_and_moves_only_what_requires_a_gradient(tmp_path):
    seed_everything(1)
    before = Toy().state_dict()
    result, _, model = a_run(tmp_path, replace(CONFIG, max_steps=60), held_out=ROWS)
    first, last = result.evaluations
    assert last["loss"] < 0.7 * first["loss"]
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"lora_a", "lora_b"}


# What is written down


def test_a_run_leaves_its_figures_and_a_plot(tmp_path):
    result, run, _ = a_run(tmp_path, replace(CONFIG, eval_steps=2), held_out=ROWS[:3])
    assert (result.status, result.state.step, result.signal) == ("done", 5, None)
    assert [(line["step"], line["split"]) for line in read_metrics(run.directory)] == [
        (0, "eval"), (1, "train"), (2, "train"), (2, "eval"), (3, "train"), (4, "train"), (4, "eval"),
        (5, "train"), (5, "eval"),
    ]  # fmt: skip
    assert result.loss == train_lines(run)[-1]["loss"]
    assert result.state.tokens == sum(line["tokens"] for line in train_lines(run))
    assert [line["step"] for line in result.evaluations] == [0, 2, 4, 5]
    assert result.peak_memory > 0
    assert (run.directory / "plots" / "loss.png").stat().st_size > 10_000
    assert text(run, "STATUS") == "running\n", "done is said by whoever has saved the adapter"
    assert "held-out loss" in text(run, "log.txt")


def test_metrics_hold_only_what_the_run_determines_and_timing_the_rest(tmp_path):
    _, run, _ = a_run(tmp_path, held_out=ROWS[:3])
    for line in read_metrics(run.directory):
        wanted = {"train": {"loss", "lr", "grad_norm", "labels", "tokens"}, "eval": {"loss", "labels"}}[line["split"]]
        assert set(line) == {"step", "split"} | wanted
    for line in read_metrics(run.directory, "timing.jsonl"):
        assert set(line) == {"step", "seconds", "tokens_per_second", "peak_memory"}


def test_two_runs_with_one_seed_are_equal_bit_for_bit_and_another_seed_differs(tmp_path):
    def make(name, seed):
        seed_everything(seed)
        return a_run(tmp_path, name=name, model=Toy(dropout=0.3), seed=seed, held_out=ROWS[:3])

    (_, one, model_one), (_, two, model_two), (_, other, _) = make("one", 7), make("two", 7), make("other", 8)
    assert text(one, "metrics.jsonl") == text(two, "metrics.jsonl") != text(other, "metrics.jsonl")
    assert torch.equal(model_one.lora_a, model_two.lora_a)
    assert torch.equal(model_one.lora_b, model_two.lora_b)


def test_evaluating_does_not_change_the_training(tmp_path):
    def make(name, **options):
        seed_everything(7)
        return a_run(tmp_path, name=name, model=Toy(dropout=0.3), **options)[1]

    plain, watched = make("plain"), make("watched", held_out=ROWS, config=replace(CONFIG, eval_steps=1))
    assert train_lines(plain) == train_lines(watched)


def test_an_evaluation_that_leaves_dropout_off_does_not_leave_it_off_in_training(tmp_path):
    model = Toy()

    def careless(step):
        model.eval()
        return {"loss": 1.0}

    a_run(tmp_path, model=model, eval_fn=careless)
    assert model.training


def test_the_rate_of_the_schedule_is_the_rate_of_the_step(tmp_path):
    config = replace(CONFIG, optimizer=replace(FAST, warmup_steps=2, schedule="cosine", eps=1e-30))
    _, run, _ = a_run(tmp_path, config)
    assert [round(line["lr"], 6) for line in train_lines(run)] == [0.025, 0.05, 0.05, 0.0375, 0.0125]
    _, run, model = a_run(tmp_path, replace(config, optimizer=replace(config.optimizer, warmup_steps=5)), "slow")
    # AdamW moves every weight by at most the sum of the rates, 1/5 + ... + 5/5 of 0.05
    assert 0.01 <= model.lora_b.abs().max() <= 0.05 * 3 + 1e-6


class Named(Toy):
    """The same, with B under the name that it has in a model."""

    def __init__(self):
        super().__init__()
        b = self.lora_b
        del self.lora_b
        self.layer = nn.ModuleDict({"lora_B": nn.ParameterDict({"weight": b})})
        self.__dict__["lora_b"] = b


def test_b_has_a_rate_of_its_own_at_every_step_and_the_base_rate_is_logged(tmp_path):
    optimizer = replace(FAST, warmup_steps=2, schedule="cosine", eps=1e-30, lora_plus_ratio=4.0)
    _, run, model = a_run(tmp_path, replace(CONFIG, max_steps=1, optimizer=optimizer), model=Named())
    assert [line["lr"] for line in train_lines(run)] == [0.025]
    moved = model.lora_b.detach().abs()  # from zero, in the first step, by the rate wherever there is a gradient
    torch.testing.assert_close(moved[moved > 0], torch.full_like(moved[moved > 0], 4 * 0.025), rtol=1e-3, atol=0)


# How long


@pytest.mark.parametrize(("epochs", "steps"), [(1.0, 3), (2.0, 6), (0.5, 2)])
def test_an_epoch_takes_every_micro_batch_once_and_a_step_never_spans_two(tmp_path, epochs, steps):
    result, _, _ = a_run(tmp_path, replace(CONFIG, max_steps=None, epochs=epochs))
    assert result.state.step == steps
    if epochs >= 1:
        assert result.state.tokens == epochs * sum(len(ids) for ids, _ in ROWS)
        assert (result.state.epoch, result.state.batch) == (epochs - 1, len(ROWS))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({}, "exactly one of max_steps and epochs says how long to train; got neither"),
        ({"max_steps": 1, "epochs": 2.0}, "exactly one of max_steps and epochs .*; got 1 and 2.0"),
        ({"max_steps": 0}, "max_steps must be at least 1, not 0"),
        ({"epochs": 0.0}, "epochs must be above 0, not 0.0"),
        ({"epochs": float("inf")}, "epochs must be above 0, not inf"),
        ({"epochs": 1.0, "accumulation": 0}, "accumulation must be at least 1, not 0"),
        ({"epochs": 1.0, "batch_size": -1}, "batch_size must be at least 1, not -1"),
        ({"epochs": 1.0, "eval_steps": 0}, "eval_steps must be at least 1, not 0"),
        ({"epochs": 1.0, "log_every": 0}, "log_every must be at least 1, not 0"),
        ({"epochs": 1.0, "save_steps": -1}, "save_steps must be at least 0, not -1"),
        ({"epochs": 1.0, "keep_checkpoints": 0}, "keep_checkpoints must be at least 1, not 0"),
    ],
)
def test_an_impossible_length_or_size_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        LoopConfig(**fields)


# What stops a run


class Breaks(Toy):
    """Its loss, or only its gradient, stops being a number at the given call."""

    def __init__(self, call, value):
        super().__init__()
        self.calls, self.call, self.value = 0, call, value

    def loss(self, input_ids, attention_mask, labels):
        self.calls += 1
        loss = super().loss(input_ids, attention_mask, labels)
        if self.calls != self.call:
            return loss
        if self.value == "gradient":
            return loss + (self.lora_b.sum() * 0).abs().sqrt()  # 0, with derivative 0 * inf
        return loss * self.value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), "gradient"])
def test_a_loss_or_gradient_that_is_no_number_stops_before_anything_moved(tmp_path, value):
    seed_everything(1)
    _, _, good = a_run(tmp_path, replace(CONFIG, max_steps=2, optimizer=replace(FAST, warmup_steps=0)), "good")
    seed_everything(1)
    model = Breaks(call=10, value=value)  # the second micro-batch of the third step
    config = replace(CONFIG, optimizer=replace(FAST, warmup_steps=0))
    with pytest.raises(NonFiniteError, match=r"^step 3: the loss is .* and the gradient norm .*lora_") as caught:
        a_run(tmp_path, config, model=model)
    assert caught.value.exit_code == 6
    assert torch.equal(model.lora_b, good.lora_b)
    run = Run(tmp_path / "run")
    assert text(run, "STATUS").startswith("failed: step 3: the loss is")
    assert [line["step"] for line in train_lines(run)] == [1, 2]
    assert "Traceback" in text(run, "log.txt")
    assert (run.directory / "plots" / "loss.png").exists()


def test_a_held_out_loss_that_is_no_number_stops(tmp_path):
    with pytest.raises(NonFiniteError, match="the held-out loss after step 0 is nan"):
        a_run(tmp_path, eval_fn=lambda step: {"loss": float("nan")})


def test_a_trainable_parameter_that_the_loss_does_not_reach_is_named(tmp_path):
    model = Toy()
    model.unused = nn.Parameter(torch.ones(1))
    with pytest.raises(ConfigError, match="step 1: 1 of 3 trainable parameters got no gradient: unused;"):
        a_run(tmp_path, model=model)
    assert text(Run(tmp_path / "run"), "STATUS").startswith("failed: step 1: 1 of 3")


def test_a_model_with_nothing_to_train_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no trainable parameter; attach adapters"):
        a_run(tmp_path, model=Toy().requires_grad_(False))


def test_data_without_batches_or_labels_is_refused(tmp_path):
    with pytest.raises(DataError, match="there is no batch to train on"):
        a_run(tmp_path, batches=Rows([]), name="a")
    masked = Rows([([1, 2, 3], 3)])
    with pytest.raises(DataError, match="step 1: none of its 1 batches has a label token to learn from"):
        a_run(tmp_path, batches=masked, name="b")


def test_an_epoch_that_turns_out_empty_is_refused(tmp_path):
    class Once(Rows):
        def count(self, number):
            return 0 if number else 1

    with pytest.raises(DataError, match="epoch 1 has no batch to train on"):
        a_run(tmp_path, batches=Once(ROWS))


def test_micro_batches_without_labels_weigh_nothing(tmp_path):
    silent = ([1, 2, 3], 3)
    config = replace(CONFIG, accumulation=len(ROWS) + 1, max_steps=2)
    _, with_silent, _ = a_run(tmp_path, config, "with", batches=Rows([silent, *ROWS], shuffle=False))
    _, without, _ = a_run(tmp_path, config, "without", batches=Rows(ROWS, shuffle=False))
    assert [line["loss"] for line in train_lines(with_silent)] == [line["loss"] for line in train_lines(without)]


class Signals(Toy):
    """Sends its own process a signal in the middle of a step."""

    number = signal.SIGINT

    def __init__(self, calls):
        super().__init__()
        self.calls, self.seen = calls, 0

    def loss(self, input_ids, attention_mask, labels):
        self.seen += 1
        if self.seen in self.calls:
            os.kill(os.getpid(), self.number)
        return super().loss(input_ids, attention_mask, labels)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_it_and_says_so(tmp_path, number):
    before = signal.getsignal(number)
    model = Signals(calls=[7])  # the second micro-batch of the second step, after one held-out batch
    model.number = number
    result, run, _ = a_run(tmp_path, model=model, held_out=ROWS[:3])
    assert (result.status, result.state.step, result.signal) == ("interrupted", 2, number)
    assert [line["step"] for line in train_lines(run)] == [1, 2]
    assert text(run, "STATUS") == "interrupted@2\n"
    assert signal.getsignal(number) is before
    assert [place.name for place in checkpoints(run.checkpoints)] == ["step-000002"]


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        a_run(tmp_path, model=Signals(calls=[6, 7]))
    run = Run(tmp_path / "run")
    assert text(run, "STATUS") == "interrupted@1\n"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_sigterm_ends_the_process_with_its_code(tmp_path):
    model = Signals(calls=[6, 7])
    model.number = signal.SIGTERM
    with pytest.raises(SystemExit) as stop:
        a_run(tmp_path, model=model)
    assert stop.value.code == 143
    assert text(Run(tmp_path / "run"), "STATUS") == "interrupted@1\n"


def test_a_thread_trains_without_touching_the_signals(tmp_path):
    with Interrupt() as outer:
        done = []
        thread = threading.Thread(target=lambda: done.append(a_run(tmp_path)[0].status))
        thread.start()
        thread.join()
        assert signal.getsignal(signal.SIGINT) == outer.note
    assert done == ["done"]


# Going on


def go_on(run, model, config, **options):
    begin = newest_snapshot(run, print)
    batches = options.pop("batches", Rows(ROWS))
    return train(model, batches, config, run, seed=1, begin=begin, save=save, restore=restore, quiet=True, **options)


@pytest.mark.parametrize("at", range(10))
def test_a_run_that_went_on_ends_as_one_that_was_never_stopped(tmp_path, monkeypatch, at):
    """Stopped by a signal in any micro-batch of its first steps, of which the epoch's last has fewer."""
    monkeypatch.setattr(train_loop, "plot_runs", lambda runs, target: [])  # most of the time
    config = replace(CONFIG, eval_steps=2)
    seed_everything(1)
    expected, whole, model = a_run(tmp_path, config, "whole", Toy(dropout=0.3), held_out=ROWS[:3])
    seed_everything(1)
    stopped = Signals(calls=[1 + at])
    stopped.dropout.p = 0.3
    result, run, _ = a_run(tmp_path, config, "stopped", stopped, held_out=ROWS[:3])
    assert result.status == "interrupted"
    seed_everything(99)
    fresh = Toy(dropout=0.3)
    frozen = {name: value for name, value in model.state_dict().items() if "lora" not in name}
    fresh.load_state_dict(frozen, strict=False)
    result = go_on(run, fresh, config, eval_fn=lambda step: evaluated(fresh, ROWS[:3]))
    assert (result.status, result.evaluations, result.loss) == ("done", expected.evaluations, expected.loss)
    assert result.state == expected.state
    assert text(run, "metrics.jsonl") == text(whole, "metrics.jsonl")
    assert torch.equal(fresh.lora_a, model.lora_a)
    assert torch.equal(fresh.lora_b, model.lora_b)


def test_checkpoints_come_every_so_many_steps_at_the_end_and_when_asked(tmp_path):
    class Asks(Toy):
        calls = 0

        def loss(self, input_ids, attention_mask, labels):
            self.calls += 1
            if self.calls == 1:
                (tmp_path / "run" / "save").touch()
            return super().loss(input_ids, attention_mask, labels)

    _, run, _ = a_run(tmp_path, replace(CONFIG, max_steps=7, save_steps=3, keep_checkpoints=9), model=Asks())
    assert [place.name[-1] for place in checkpoints(run.checkpoints)] == ["7", "6", "3", "1"]
    assert not (run.directory / "save").exists()
    _, run, _ = a_run(tmp_path, replace(CONFIG, save_steps=0), "last")
    assert [place.name[-1] for place in checkpoints(run.checkpoints)] == ["5"]


def test_fewer_steps_than_were_made_are_refused_and_nothing_is_cut(tmp_path):
    _, run, model = a_run(tmp_path)
    before = text(run, "metrics.jsonl")
    with pytest.raises(ConfigError, match="has made 5 steps already, which is more than the 3 that are asked for"):
        go_on(run, model, replace(CONFIG, max_steps=3))
    assert text(run, "metrics.jsonl") == before


# What a person sees


def test_progress_goes_to_stderr_in_plain_lines_and_quiet_says_nothing(tmp_path, capsys):
    a_run(tmp_path, replace(CONFIG, log_every=2), "loud", held_out=ROWS[:3], quiet=False)
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    starts = ("step 0/5", "step 1/5", "step 2/5", "step 4/5", "step 5/5", "step 5/5")
    assert len(lines) == len(starts)
    assert all(line.startswith(start) for line, start in zip(lines, starts, strict=True))
    for figure in ("loss ", "lr 5.00e-02", "tokens/s", "GiB", "left"):
        assert figure in lines[-2]
    a_run(tmp_path, name="quiet")
    assert capsys.readouterr() == ("", "")
    assert "step 5/5" in text(Run(tmp_path / "quiet"), "log.txt")


def test_a_terminal_gets_one_live_line(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    said = []
    with Progress(10, write=said.append) as progress:
        assert progress.live is not None
        progress.step(1, 2.5, 2e-4, 1234.0, 2**30)
        progress.say("held-out loss 2.5")
        assert progress.live.tasks[0].completed == 1
        assert progress.live.tasks[0].fields["figures"].startswith("loss 2.5000  lr 2.00e-04  1,234 tokens/s  1.00 GiB")
    out, err = capsys.readouterr()
    assert out == ""
    assert "held-out loss 2.5" in err
    assert len(said) == 2


def test_one_seed_decides_all_three_generators():
    import random

    import numpy as np

    def draw(seed):
        seed_everything(seed)
        return random.random(), float(np.random.rand()), torch.rand(1).item()

    first, again, other = draw(2**40 + 1), draw(2**40 + 1), draw(2**40 + 2)
    assert first == again
    assert all(a != b for a, b in zip(first, other, strict=True))
