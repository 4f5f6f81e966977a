"""What a run leaves: one directory, from which the run can be read, plotted, compared and repeated.

    config.toml  env.json  log.txt  metrics.jsonl  timing.jsonl  STATUS
    data/manifest.json  data/preview.txt  adapter/  plots/loss.png

metrics.jsonl holds only what the run determines, so two runs of one config on one machine have equal files;
what the clock decides goes to timing.jsonl. STATUS is one line: `running`, `done`, `failed: reason` or
`interrupted@step`.
"""

import json
import math
import platform
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from models.errors import ConfigError
from train.files import append_line, write_whole
from train.toml import to_toml

FILES = ("config.toml", "env.json", "log.txt", "metrics.jsonl", "timing.jsonl", "STATUS")
FOLDERS = ("data", "checkpoints", "adapter", "eval", "plots", "tensorboard")
PACKAGES = ("torch", "triton", "numpy", "scipy", "safetensors", "sentencepiece", "tiktoken", "gguf", "tyro")


class Run:
    """The directory of one run.

    As a context (`with run:`, which may be nested) it turns what ends the block early into STATUS and
    log.txt: an error into `failed: reason`, Ctrl-C into `interrupted@step`. Whoever saves the result says
    `done`.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)
        self.step = 0
        """The last step in metrics.jsonl."""
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
    ) -> "Run":
        """Make the directory with config.toml, env.json and STATUS; `data` maps each data file to its hash.

        A directory with something in it is refused. With `overwrite` the files of an earlier run are removed
        first, and only those: a directory that holds no run is refused still.
        """
        run = cls(directory)
        clear(run.directory, overwrite)
        run.directory.mkdir(parents=True, exist_ok=True)
        run.status("running")
        write_whole(run.directory / "config.toml", to_toml(config))
        run.write_json("env.json", environment(device, sys.argv if argv is None else argv, data or {}))
        for name in ("log.txt", "metrics.jsonl", "timing.jsonl"):
            (run.directory / name).touch()
        return run

    def status(self, text: str) -> None:
        """Replace STATUS; only the first line of a reason stays."""
        write_whole(self.directory / "STATUS", text.strip().partition("\n")[0] + "\n")

    def log(self, text: str) -> None:
        """Append to log.txt, with the time in front."""
        append_line(self.directory / "log.txt", f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}")

    def append(self, journal: str, **record: Any) -> None:
        """Append a line to one of the run's journals."""
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

    def __enter__(self) -> "Run":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            return
        if isinstance(error, KeyboardInterrupt):
            self.status(f"interrupted@{self.step}")
        else:
            self.status(f"failed: {str(error).strip() or type(error).__name__}")
        self.log("".join(traceback.format_exception(kind, error, trace)).rstrip())


def read_metrics(directory: Path | str, name: str = "metrics.jsonl") -> list[dict[str, Any]]:
    """Read the lines of a run's metrics (or timing) file."""
    path = Path(directory) / name
    try:
        return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        raise ConfigError(f"{directory} is not a run: it has no {name}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is damaged: {error}") from None


def clear(directory: Path, overwrite: bool) -> None:
    """Make sure that the directory is new, empty, or that of a run that may be overwritten."""
    if directory.is_dir():
        present = sorted(path.name for path in directory.iterdir())
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
    for name in FOLDERS:
        shutil.rmtree(directory / name, ignore_errors=True)
    for name in FILES:
        (directory / name).unlink(missing_ok=True)


def json_line(record: dict[str, Any]) -> str:
    """Give one line of JSON; a number that JSON cannot hold is a bug of the caller."""
    for name, value in record.items():
        assert not isinstance(value, float) or math.isfinite(value), f"{name} is {value}"
    return json.dumps(record, ensure_ascii=False)


def environment(device: torch.device | str, argv: Sequence[str], data: Mapping[str, str]) -> dict[str, Any]:
    """Describe what the run ran on: enough to repeat it, nothing that names a person or a host."""
    device = torch.device(device)
    return {
        "argv": list(argv),
        "commit": git_commit(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: installed(name) for name in ("qlora-from-scratch", *PACKAGES)},
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        "cuda": torch.version.cuda,
        "threads": torch.get_num_threads(),
        "data": dict(data),
    }


def installed(package: str) -> str | None:
    """Give a package's version, or None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def git_commit() -> str | None:
    """Give this code's commit, with "+changes" if files differ from it; None outside a repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # installed inside someone else's repository?
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):
        return None
