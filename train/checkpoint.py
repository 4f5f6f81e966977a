"""A checkpoint is a directory that is there whole or not at all, and that shows if it was altered since.

    checkpoints/step-000250/...  checkpoints/step-000250/MANIFEST.json  checkpoints/latest

It is written beside its place (`.tmp-step-000250`), every file synced and read back for its hash, MANIFEST.json last,
and then renamed. A kill leaves the name with everything behind it or without anything. Reading trusts only what agrees
with the manifest; `latest` is for people and scripts, and is never believed.
"""

import json
import os
import re
import shutil
from collections.abc import Callable
from hashlib import file_digest
from pathlib import Path
from typing import Any

from models.errors import CheckpointError
from models.files import sync_file, write_whole

MANIFEST = "MANIFEST.json"
ASIDE = ".tmp-"


def write_checkpoint(folder: Path, step: int, fill: Callable[[Path], None], keep: int) -> Path:
    """Make the checkpoint of a step from the files that `fill` writes, and remove old ones beyond the last `keep`.

    If the step has a good one, it is one that the run began from, and stays; a kill may have come before the rest.
    """
    folder.mkdir(parents=True, exist_ok=True)
    remove_partial(folder)
    place = step_directory(folder, step)
    if not (place.exists() and problem(place) is None):
        put(place, fill)
    write_whole(folder / "latest", f"{place.name}\n")
    prune(folder, keep)
    return place


def step_directory(folder: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return folder / f"step-{step:06d}"


def put(place: Path, fill: Callable[[Path], None]) -> None:
    """Write a checkpoint beside its place, and rename it when it is whole."""
    aside = place.with_name(f"{ASIDE}{place.name}")
    try:
        aside.mkdir()
        fill(aside)
        seal(aside)
        if place.exists():
            discard(place)  # it is torn, or it would have stayed
        os.rename(aside, place)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # what cannot be removed now is removed before the next one
    sync_file(place.parent)


def newest_checkpoint(folder: Path, tell: Callable[[str], None]) -> Path | None:
    """Give the newest checkpoint that is whole, telling of each newer one what is wrong; None if there never was one.

    If there are some and none is whole, that is a CheckpointError.
    """
    found = checkpoints(folder)
    for directory in found:
        wrong = problem(directory)
        if wrong is None:
            return directory
        tell(f"{directory} is not used: {wrong}")
    if found:
        raise CheckpointError(
            f"{folder}: none of its {len(found)} checkpoints is whole, so there is nothing to go on from; "
            "train again with --overwrite, or put back a copy of one"
        )
    return None


def checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, newest first."""
    if not folder.is_dir():
        return []
    steps = {int(match[1]): path for path in folder.iterdir() if (match := re.fullmatch(r"step-(\d{6,})", path.name))}
    return [steps[step] for step in sorted(steps, reverse=True)]


def problem(directory: Path) -> str | None:
    """Say in which way a checkpoint is not as it was written; None if it is."""
    try:
        files = read_manifest(directory / MANIFEST)
        for name, (size, digest) in files.items():
            path = directory / name
            if not path.is_file():
                return f"it lacks {name}"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, and MANIFEST.json says {size}"
            if sha256_of(path) != digest:
                return f"{name} has another sha256 than MANIFEST.json says"
    except FileNotFoundError:
        return f"it lacks {MANIFEST}, which is written last"
    except (OSError, ValueError) as error:
        return f"{error}"
    return None


def read_manifest(path: Path) -> dict[str, tuple[int, str]]:
    """The size and sha256 of each file of a checkpoint; a ValueError if it does not say so."""
    try:
        entries = json.loads(path.read_text("utf-8"))["files"]
        files = {entry["name"]: (entry["bytes"], entry["sha256"]) for entry in entries}
        plain = all(name == Path(name).name and isinstance(size, int) for name, (size, _) in files.items())
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None
    if not plain or "state.json" not in files:
        raise ValueError(f"{MANIFEST} does not list the files of a checkpoint")
    return files


def seal(directory: Path) -> None:
    """Sync every file, and write the manifest from what is then read back."""
    files = sorted(directory.iterdir())
    for path in files:
        sync_file(path)
    entries = [{"name": path.name, "bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in files]
    manifest: dict[str, Any] = {"format": 1, "files": entries}
    write_whole(directory / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def prune(folder: Path, keep: int) -> None:
    """Remove what is older than the newest `keep` whole checkpoints.

    What is torn or altered does not count, so that the only good one is never removed for its sake.
    """
    if len(checkpoints(folder)) <= keep:
        return
    good = 0
    for directory in checkpoints(folder):
        if good >= keep:
            discard(directory)
        elif problem(directory) is None:
            good += 1


def discard(directory: Path) -> None:
    """Remove a checkpoint; a kill in the middle leaves nothing that looks like one."""
    gone = directory.with_name(f"{ASIDE}gone-{directory.name}")
    os.rename(directory, gone)
    shutil.rmtree(gone)


def remove_partial(folder: Path) -> None:
    """Remove what writers that were killed have left beside the checkpoints: whatever is hidden there."""
    for path in folder.glob(".*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return file_digest(file, "sha256").hexdigest()
