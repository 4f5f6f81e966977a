"""What a run leaves: one directory, from which the run can be read, plotted, compared and repeated.

    config.toml  env.json  log.txt  metrics.jsonl  timing.jsonl  STATUS
    data/manifest.json  data/preview.txt  checkpoints/  adapter/  eval/  plots/loss.png  nonfinite/

metrics.jsonl holds only what the run determines, so two runs of one config on one machine have equal files;
what the clock decides goes to timing.jsonl. STATUS is one line: `running`, `done`, `failed: reason` or
`interrupted@step`. What is appended step by step are the journals; a run that goes on from a checkpoint cuts them
back to what they were then. config.toml is there from the first moment to the last, so that a run killed anywhere
can be started again. Of several processes one writes; the others have a `Follower` of its run.
"""

import json
import math
import platform
import shutil
import sys
import time
import tomllib
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from models.commit import git_commit
from models.errors import CheckpointError, ConfigError, WriteError
from models.files import TEMPORARY, append_line, cut_back, sync_file, write_whole
from models.lock import Held, lock, unlock
from models.parallel import world
from train.toml import to_toml

LOCK = ".lock"
JOURNALS = ("metrics.jsonl", "timing.jsonl", "eval/samples.jsonl", "eval/mmlu.jsonl")
FILES = ("env.json", "log.txt", *JOURNALS, "STATUS", "save")
FOLDERS = ("data", "checkpoints", "adapter", "model", "eval", "plots", "nonfinite", "tensorboard")
PACKAGES = ("torch", "triton", "numpy", "scipy", "safetensors", "sentencepiece", "tiktoken", "gguf", "tyro")


class Run:
    """The directory of one run.

    As a context (`with run:`, which may be nested) it keeps other processes out of the directory, and turns what ends
    the block early into STATUS and log.txt: an error into `failed: reason`, Ctrl-C into `interrupted@step`. Whoever
    saves the result says `done`.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.checkpoints = self.directory / "checkpoints"
        self.step = 0
        """The last step in metrics.jsonl."""
        self.held: int | None = None
        """The lock on the directory, while this process has it."""
        self.depth = 0
        self.told: BaseException | None = None
        """The error that STATUS and log.txt tell of already."""
        self.listeners: list[Callable[[str, Mapping[str, Any]], None]] = []
        """Called with a journal's name and each record that is appended to it."""

    @classmethod
    def create(
        cls,
        directory: Path | str,
        config: Any,
        *,
        overwrite: bool = False,
        device: torch.device | str = "cpu",
        argv: Sequence[str] | None = None,
        data: Mapping[str, str] | None = None,
        base: Mapping[str, str] | None = None,
        distributed: str | None = None,
    ) -> "Run":
        """Make the directory with config.toml, env.json and STATUS; `data` and `base` map files to their hashes.

        `distributed` is the way in which several processes train, which env.json tells.

        A directory with something in it is refused. With `overwrite` the files of an earlier run are removed
        first, and only those: a directory that holds no run is refused still.
        """
        run = cls(directory)
        check_free(run.directory, overwrite)
        try:
            run.directory.mkdir(parents=True, exist_ok=True)
            run.hold()
            run.begin(
                config, environment(device, argv, distributed) | {"data": dict(data or {}), "base": dict(base or {})}
            )
        except OSError as error:
            raise WriteError(
                f"the run directory {run.directory} cannot be written: {error.strerror}; "
                "make room, or give another --out"
            ) from error
        return run

    @classmethod
    def reopen(cls, directory: Path | str) -> "Run":
        """Take a directory that holds a run, to go on with it."""
        run = cls(directory)
        if not (run.directory / "config.toml").is_file():
            raise ConfigError(f"{directory} holds no run: it has no config.toml; name a directory that train has made")
        run.hold()
        return run

    def begin(self, config: Any, env: Mapping[str, Any]) -> None:
        """Write what a run has before its first step, in place of whatever a run has left in the directory."""
        clear(self.directory)
        self.settings(config)
        self.status("running")
        self.write_json("env.json", env)
        for name in ("log.txt", "metrics.jsonl", "timing.jsonl"):
            (self.directory / name).touch()

    def go_on(self, config: Any, journals: Mapping[str, int]) -> list[str]:
        """Take the run back to a checkpoint at which its journals had these sizes; say what that cut from them."""
        self.settings(config)
        self.status("running")
        return [f"cut {count} lines of {name}" for name, count in self.cut_journals(journals).items()]

    def settings(self, config: Any) -> None:
        """Replace config.toml."""
        write_whole(self.directory / "config.toml", to_toml(config))

    def status(self, text: str) -> None:
        """Replace STATUS; only the first line of a reason stays."""
        write_whole(self.directory / "STATUS", text.strip().partition("\n")[0] + "\n")

    def log(self, text: str) -> None:
        """Append to log.txt, with the time in front."""
        append_line(self.directory / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def append(self, journal: str, **record: Any) -> None:
        """Append a line to one of the journals; they are cut back to a checkpoint by the run that goes on from it."""
        assert journal in JOURNALS, f"{journal} is not one of {', '.join(JOURNALS)}"
        path = self.directory / journal
        path.parent.mkdir(exist_ok=True)
        append_line(path, json_line(record))
        for listener in self.listeners:
            listener(journal, record)

    def metrics(self, step: int, split: str, **values: int | float) -> None:
        """Append a line to metrics.jsonl: only what the run determines, and only finite numbers."""
        self.step = step
        self.append("metrics.jsonl", step=step, split=split, **values)

    def timing(self, step: int, **values: int | float) -> None:
        """Append a line to timing.jsonl: what depends on the machine and the moment."""
        self.append("timing.jsonl", step=step, **values)

    def write_json(self, name: str, content: Any) -> None:
        """Write a file of the run as JSON, for example data/manifest.json."""
        text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
        write_whole(self.directory / name, text + "\n")

    def write_data(self, manifest: Mapping[str, Any], preview: str) -> None:
        """Write what was trained on: hashes, counts and drops, and some examples as training sees them."""
        self.write_json("data/manifest.json", manifest)
        write_whole(self.directory / "data" / "preview.txt", preview.rstrip("\n") + "\n")

    # Going on from a checkpoint

    def sync_journals(self) -> dict[str, int]:
        """Make the journals survive a power cut, and give their sizes in bytes."""
        paths = {name: self.directory / name for name in JOURNALS}
        sizes = {name: path.stat().st_size for name, path in paths.items() if path.exists()}
        for name in sizes:
            sync_file(paths[name])
        return sizes

    def cut_journals(self, sizes: Mapping[str, int]) -> dict[str, int]:
        """Cut the journals back to these sizes, to nothing where none is given; give how many lines each lost."""
        lost = {}
        for name in JOURNALS:
            path, size = self.directory / name, sizes.get(name, 0)
            there = path.stat().st_size if path.exists() else 0
            if there < size:
                raise CheckpointError(
                    f"{path} has {there} bytes and had {size} when the checkpoint was made, so lines are missing; "
                    "put the file back as it was"
                )
            if there > size:
                lost[name] = cut_back(path, size)
        return lost

    def origin(self) -> dict[str, Any]:
        """Where the run comes from: its settings, and the hashes of its data and of its base."""
        settings = tomllib.loads((self.directory / "config.toml").read_text("utf-8"))
        env = self.read_env()
        return {"config": settings, "data": env.get("data", {}), "base": env.get("base", {})}

    def read_env(self) -> dict[str, Any]:
        """What env.json says; nothing if the run was killed before it was written."""
        path = self.directory / "env.json"
        try:
            return json.loads(path.read_text("utf-8"))
        except FileNotFoundError:
            return {}
        except ValueError as error:
            raise ConfigError(f"{path} is damaged: {error}") from None

    # One writer at a time

    def hold(self) -> None:
        """Keep other processes out, until the outermost `with` is left."""
        if self.held is None:
            try:
                self.held = lock(self.directory / LOCK)
            except Held:
                raise ConfigError(
                    f"{self.directory} is being written by a process that is still running; wait for it, "
                    "or stop it first"
                ) from None

    @contextmanager
    def untouched(self) -> Iterator["Run"]:
        """As `with run:`, but how the block ends leaves no trace in the directory."""
        self.hold()
        self.depth += 1
        try:
            yield self
        finally:
            self.leave()

    def leave(self) -> None:
        self.depth -= 1
        if self.depth == 0:
            unlock(self.held)
            self.held = None

    def __enter__(self) -> "Run":
        self.hold()
        self.depth += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and error is not self.told:
            self.told = error
            self.tell_of(error)
        self.leave()

    def tell_of(self, error: BaseException) -> None:
        """Say in STATUS and in log.txt how the run ended; on a full disk that may not work, and the error counts."""
        try:
            self.write_end(error)
        except OSError as unwritten:
            error.add_note(f"STATUS and log.txt do not say so: {unwritten}")

    def write_end(self, error: BaseException) -> None:
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            self.status(f"interrupted@{self.step}")
        elif isinstance(error, torch.OutOfMemoryError):
            self.status("failed: out of memory")
        else:
            self.status(f"failed: {str(error).strip() or type(error).__name__}")
        self.log("".join(traceback.format_exception(error)).rstrip())


class Follower(Run):
    """The run as all processes but the main one have it: they know its directory and its step, and write nothing."""

    def settings(self, config: Any) -> None:
        """Leave config.toml to the main process, as everything below."""

    def status(self, text: str) -> None: ...

    def log(self, text: str) -> None: ...

    def append(self, journal: str, **record: Any) -> None: ...

    def write_json(self, name: str, content: Any) -> None: ...

    def write_data(self, manifest: Mapping[str, Any], preview: str) -> None: ...

    def sync_journals(self) -> dict[str, int]:
        return {}

    def cut_journals(self, sizes: Mapping[str, int]) -> dict[str, int]:
        return {}

    def hold(self) -> None: ...


def run_class() -> type[Run]:
    """What this process has of a run that all of them make."""
    return Run if world.is_main() else Follower


def read_metrics(directory: Path | str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Read the lines of a run's metrics (or timing) file."""
    path = Path(directory) / name
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        raise ConfigError(f"{directory} is not a run: it has no {name}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def check_free(directory: Path, overwrite: bool) -> None:
    """Make sure that the directory is new, empty, or that of a run that may be overwritten."""
    if directory.is_dir():
        present = sorted(path.name for path in directory.iterdir() if not leftover(path))
    elif directory.exists():
        raise ConfigError(f"the run directory {directory} exists and is a file; give another --out")
    else:
        present = []
    if not present:
        return
    shown = ", ".join(present[:4]) + (", ..." if len(present) > 4 else "")
    if not overwrite:
        raise ConfigError(
            f"the run directory {directory} is not empty (it holds {shown}); "
            f"give another --out, or --overwrite to replace the run in it"
        )
    if "STATUS" not in present or "config.toml" not in present:
        raise ConfigError(
            f"{directory} holds {shown} but no run (STATUS and config.toml), so it is not overwritten; "
            f"give another --out"
        )


def clear(directory: Path) -> None:
    """Remove an earlier run's files, but for its config.toml, which is replaced: a kill leaves a run that can start."""
    for folder in (directory / name for name in FOLDERS):
        if folder.exists():
            shutil.rmtree(folder)
    for name in FILES:
        (directory / name).unlink(missing_ok=True)
    for path in (path for pattern in TEMPORARY for path in directory.glob(pattern)):
        path.unlink()


def leftover(path: Path) -> bool:
    """Whether a file is what a killed writer leaves, or the lock."""
    return path.name == LOCK or any(map(path.match, TEMPORARY))


def json_line(record: dict[str, Any]) -> str:
    """Give one line of JSON; a number that JSON cannot hold is a bug of the caller."""
    for name, value in record.items():
        assert not isinstance(value, float) or math.isfinite(value), f"{name} is {value}"
    return json.dumps(record, ensure_ascii=False)


def environment(
    device: torch.device | str, argv: Sequence[str] | None = None, distributed: str | None = None
) -> dict[str, Any]:
    """Describe what the run ran on: enough to repeat it, nothing that names a person or a host."""
    device = torch.device(device)
    return {
        "argv": list(sys.argv if argv is None else argv),
        "commit": git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: installed(name) for name in ("qlora-from-scratch", *PACKAGES)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "processes": world.size(),
        "distributed": distributed,
    }


def installed(package: str) -> str | None:
    """Give a package's version, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
