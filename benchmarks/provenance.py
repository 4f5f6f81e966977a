"""Where and with what a figure was measured: without that, it is worth nothing a month later."""

import datetime
import importlib.metadata
import importlib.util
import platform
from typing import Any

import torch

from models.commit import git_commit
from train.doctor import devices

PACKAGES = ("torch", "triton", "bitsandbytes")


def provenance(device: str, commit: str | None = None) -> dict[str, Any]:
    """Device, threads, versions, commit and date. `commit` is for a copy of the tree that git knows nothing of."""
    return {
        "device": device,
        "machine": devices(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "commit": commit or git_commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def version(package: str) -> str | None:
    return importlib.metadata.version(package) if importlib.util.find_spec(package) else None
