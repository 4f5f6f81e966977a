"""Commands that train, run by several processes at once, what may happen to them, and what each of them wrote."""

import os
import signal
import sys
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def commands(jobs: list[tuple[Any, ...]], timeout: float = 60.0) -> list[dict[str, Any]]:
    """Run `(verb, arguments, what else happens)` one after the other, as one of several processes, or alone."""
    import train.loop
    from models.parallel import world

    with warnings.catch_warnings(), patched(train.loop, "plot_runs", lambda plot: unplotted):
        warnings.simplefilter("error")
        with world.world("cpu", timeout=timeout):
            return [one(*job) for job in jobs]


def unplotted(runs: Any, target: Path) -> list[Path]:
    """No pictures: they have tests of their own, and take a second for each run."""
    return []


def one(verb: str, arguments: list[str], happens: tuple[Any, ...] = ()) -> dict[str, Any]:
    """The result of a command, or its error or exit code; and what this process did to files of the run."""
    from rich.console import Console

    from models.parallel import world
    from train import finetune, resume
    from train.config import parse

    options: Any = parse({"train": finetune.TrainOptions, "resume": resume.ResumeOptions}[verb], arguments)
    command = {"train": finetune.command, "resume": resume.command}[verb]
    made: dict[str, Any] = {"result": None, "error": None, "exit": None}
    name, *how = happens or ("nothing",)
    with writes_below(str(getattr(options, "out", None) or options.run)) as written, EVENTS[name](*how):
        try:
            made["result"] = command(options, Console(quiet=True))
        except SystemExit as stop:
            made["exit"] = stop.code
        except ValueError as error:
            made["error"] = f"{type(error).__name__}: {error}"
    world.barrier()
    return made | {"written": written}


@contextmanager
def writes_below(place: str):
    """What this process does to files at a place, as Python's audit hooks tell it."""
    found: list[str] = []
    listening = True

    def hook(event: str, given: tuple[Any, ...]) -> None:
        if not listening or not given or not isinstance(given[0], str | os.PathLike):
            return
        writes = event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir") or (event == "open" and given[2] & WRITES)
        if writes and os.fspath(given[0]).startswith(place):
            found.append(f"{event} {given[0]}")

    sys.addaudithook(hook)
    try:
        yield found
    finally:
        listening = False


# What may happen


@contextmanager
def patched(owner: Any, name: str, make: Any):
    before = getattr(owner, name)
    setattr(owner, name, make(before))
    try:
        yield
    finally:
        setattr(owner, name, before)


def in_step(number: int, act: Any):
    """Something happens while a step is made."""
    import train.loop

    def make(update):
        def acting(passes, optimizer, micro_batches, step, *rest):
            if step == number:
                act()
            return update(passes, optimizer, micro_batches, step, *rest)

        return acting

    return patched(train.loop, "update", make)


def sigterm(number: int):
    """A signal comes to the last process."""
    return in_step(number, lambda: is_last() and os.kill(os.getpid(), signal.SIGTERM))


def request(number: int, run: Path):
    """Somebody asks for a checkpoint; where the main process is."""
    from models.parallel import world

    return in_step(number, lambda: world.is_main() and (run / "save").touch())


def poison(token: int):
    """The loss of whatever holds a token is no number."""
    from models.llama import Llama

    def make(loss):
        def poisoned(self, *, input_ids, labels, attention_mask=None):
            value = loss(self, input_ids=input_ids, labels=labels, attention_mask=attention_mask)
            return value * float("nan") if self.training and token in input_ids.flatten().tolist() else value

        return poisoned

    return patched(Llama, "loss", make)


def another_base(name: str):
    """The last process has read another weight than the rest."""
    import train.preparation

    def make(trainable_model):
        def other(*arguments):
            model = trainable_model(*arguments)
            if is_last():
                dict(model.named_parameters())[name].data[3, 1] ^= 1
            return model

        return other

    return patched(train.preparation, "trainable_model", make)


def unreached():
    """The model has a parameter that its loss does not depend on."""
    import torch

    import train.preparation

    def make(trainable_model):
        def other(*arguments):
            model = trainable_model(*arguments)
            model.model.register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))
            return model

        return other

    return patched(train.preparation, "trainable_model", make)


def base_kept():
    """Raise unless this process's part of every weight that is not trained is the same, to the bit, after training."""
    import torch

    import train.preparation
    from models.parallel import shares

    def make(train):
        def checked(model, *arguments, **how):
            def base():
                shares.let_go(model)
                return {n: shares.local(p).clone() for n, p in model.named_parameters() if not p.requires_grad}

            before = base()
            result = train(model, *arguments, **how)
            after = base()
            assert before.keys() == after.keys()
            assert any(p.dtype == torch.uint8 for p in before.values())
            assert all(torch.equal(before[name], after[name]) for name in before)
            return result

        return checked

    return patched(train.preparation, "train", make)


def is_last() -> bool:
    from models.parallel import world

    return world.rank() == world.size() - 1


EVENTS = {
    "nothing": nullcontext,
    "sigterm": sigterm,
    "request": request,
    "poison": poison,
    "another base": another_base,
    "unreached": unreached,
    "base kept": base_kept,
}
