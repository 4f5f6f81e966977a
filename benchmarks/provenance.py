"""Where and with what a figure was measured: without that, it is worth nothing a month later."""

import datetime
import importlib.metadata
import importlib.util
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

from train.doctor import devices

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "bitsandbytes")


def provenance(device: str, commit: str | None = None) -> dict[str, Any]:
    """Device, threads, versions, commit and date. `commit` is for a copy of the tree that git knows nothing of."""
    return {
        "device": device,
        "machine": devices(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit or commit_here(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None


def commit_here() -> str | None:
    """The commit of this tree, marked when files differ from it; None outside of git."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return None
