"""`qlora resume RUN`: go on with a run that was killed, interrupted or full of errors, as if it had never stopped.

Everything comes from the run's directory: its settings, its newest whole checkpoint, and the hashes of what it was
begun from, which must still be the same. Only the length of the run and the device may be given anew. A run that was
killed before its first checkpoint begins again.

It may go on on another number of processes, and in another way of sharing the work among them: the training stays the
same, and figures may differ in their last digits.
"""

import shutil
from collections.abc import Mapping, Set
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tyro.conf import Positional

from models.device import pick_device
from models.errors import ConfigError
from models.files import TEMPORARY
from models.fingerprint import fingerprint
from models.parallel import world
from models.parallel.agreement import agreed
from models.parallel.launch import Processes
from models.parallel.shard import ShardConfig
from train.config import read_config
from train.finetune import introduce, outcome
from train.mmlu import MmluConfig
from train.preparation import Finetuning, prepare, way
from train.recipe import RunConfig
from train.run import Run, environment, run_class
from train.snapshot import Snapshot, newest_snapshot

if TYPE_CHECKING:
    from rich.console import Console

# Settings that may differ from those of a checkpoint: where things are (their hashes are compared), how long the run
# is, and what changes no number.
FREE = {
    *("model", "out", "name", "device", "data.path", "max_steps", "epochs", "log_every", "save_steps"),
    *("keep_checkpoints", "dry_step", "tensorboard", "samples", "sample_prompts", "sample_tokens"),
    *("distributed", "timeout", *(f"fsdp.{field.name}" for field in fields(ShardConfig))),
    *(f"mmlu.{field.name}" for field in fields(MmluConfig)),
}


@dataclass(frozen=True, kw_only=True)
class ResumeOptions:
    """Go on with a run from its newest checkpoint."""

    run: Positional[str]
    """The run's directory."""
    max_steps: int | None = None
    """Make so many steps in all, where the run was to make fewer or more."""
    epochs: float | None = None
    """Go through the data so often in all."""
    device: str | None = None
    """Where to train from now on: cpu, cuda, cuda:1; by default as before."""
    nproc: int = 1
    """Train on so many processes of this machine from now on, a GPU each."""
    distributed: Literal["auto", "ddp", "fsdp"] | None = None
    """With several processes: ddp gives each the whole model, fsdp a share of it; by default as before."""
    quiet: bool = False
    """Show no progress."""
    json: bool = False
    """Print one JSON object on stdout."""

    @property
    def processes(self) -> Processes:
        path = Path(self.run) / "config.toml"
        if not path.is_file():  # the command says so
            return Processes(1, "cpu")
        saved = read_config(RunConfig, path)
        return Processes(self.nproc, self.device or saved.device, saved.timeout)


def command(options: ResumeOptions, console: "Console") -> dict[str, Any]:
    with agreed():
        run = run_class().reopen(options.run)
    with run.untouched():
        config = settings(run, options)
        remove_leftovers(run)
        begin = newest_snapshot(run, lambda text: tell(run, console, text))
        if begin is not None:
            if is_done(run, begin, options):
                console.print(f"{run.directory} is done after {begin.state.step} steps; --max-steps N makes more")
                return {"run": str(run.directory), "status": "done", "steps": begin.state.step}
            check_unchanged(run, config, begin)
            finetuning = prepare(config, run)
            check_data(finetuning, begin)
            introduce(finetuning, config, console)
            return outcome(finetuning, finetuning.train(begin=begin), console)
        run.status("running")  # with which a directory holds a run that may be begun again
    tell(run, console, f"{run.directory} has no checkpoint yet, so it begins again")
    finetuning = prepare(replace(config, out=str(run.directory), overwrite=True))
    introduce(finetuning, config, console)
    return outcome(finetuning, finetuning.train(), console)


def settings(run: Run, options: ResumeOptions) -> RunConfig:
    """The run's settings, with what was given anew."""
    config = read_config(RunConfig, run.directory / "config.toml")
    given: dict[str, Any] = {"quiet": options.quiet}
    if options.device is not None:
        given["device"] = options.device
    if options.distributed is not None:
        given["distributed"] = options.distributed
    if options.max_steps is not None or options.epochs is not None:
        given |= {"max_steps": options.max_steps, "epochs": options.epochs}
    try:
        return replace(config, **given)
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error


def remove_leftovers(run: Run) -> None:
    """Remove what writers that were killed have left; those of checkpoints go with the next one."""
    if not world.is_main():
        return
    for folder in (run.directory, *(run.directory / name for name in ("data", "eval", "adapter"))):
        for pattern in (*TEMPORARY, ".*.partial"):
            for path in folder.glob(pattern):
                path.unlink()
    for path in run.directory.glob(".model.partial-*"):
        shutil.rmtree(path)


def is_done(run: Run, begin: Snapshot, options: ResumeOptions) -> bool:
    """Whether the run has ended, its result is there, and no more is asked for."""
    status = run.directory / "STATUS"
    ended = status.exists() and status.read_text("utf-8").strip() == "done" and begin.state.step >= begin.total
    result = any((run.directory / name).is_dir() for name in ("adapter", "model"))
    return ended and result and options.epochs is None and options.max_steps in (None, begin.state.step)


def check_unchanged(run: Run, config: RunConfig, begin: Snapshot) -> None:
    """Refuse settings and a base that are not those of the checkpoint, and note what else is new."""
    if config.max_steps is not None and config.max_steps < begin.state.step:
        raise ConfigError(
            f"{run.directory} has made {begin.state.step} steps, which is more than the {config.max_steps} asked for"
        )
    changed = differences(leaves(begin.origin["config"]), leaves(run.origin()["config"]), FREE)
    refuse(f"{run.directory / 'config.toml'} is not that of {begin.directory.name}", changed, "put it back as it was")
    if begin.origin["base"]:
        changed = differences(begin.origin["base"], fingerprint(config.model))
        refuse(f"the base {config.model} is not the one that the run began with", changed, "put it back, or train anew")
    then, now = leaves(run.read_env()), leaves(environment(pick_device(config.device), [], way(config)))
    unknown = {"argv", "distributed"} if config.distributed == "auto" else {"argv"}
    for text in differences({key: value for key, value in then.items() if key in now}, now, unknown):
        run.log(f"not as when the run began: {text}; figures may differ in their last digits")


def check_data(finetuning: Finetuning, begin: Snapshot) -> None:
    """Refuse data that is not what the checkpoint has learned from; a file may have another name."""
    manifest, before = finetuning.data.manifest, begin.origin["data"]
    now = {manifest["file"]: manifest["sha256"]}
    if before and sorted(before.values()) != sorted(now.values()):
        path = finetuning.config.data.path
        refuse(
            f"the data {path} is not what the run began with", differences(before, now), "put it back, or train anew"
        )


def differences(before: Mapping[str, Any], now: Mapping[str, Any], free: Set[str] = frozenset()) -> list[str]:
    """What has another value than before, in words."""
    return [
        f"{key} was {short(before.get(key))} and is {short(now.get(key))}"
        for key in dict.fromkeys([*before, *now])
        if key not in free and before.get(key) != now.get(key)
    ]


def leaves(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested tables by dotted key."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def short(value: Any) -> str:
    return "not there" if value is None else repr(value)[:60]


def refuse(what: str, changed: list[str], remedy: str) -> None:
    if changed:
        more = f"; and {len(changed) - 4} more" if len(changed) > 4 else ""
        raise ConfigError(f"{what}: {'; '.join(changed[:4])}{more}. {remedy[0].upper()}{remedy[1:]}")


def tell(run: Run, console: "Console", text: str) -> None:
    """Say a line to the person and to log.txt."""
    console.print(text, markup=False)
    run.log(text)
