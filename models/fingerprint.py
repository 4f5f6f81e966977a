"""Which checkpoint this is, without reading all of it: enough to notice that a run's base is no longer the same."""

from hashlib import sha256
from pathlib import Path

from models.errors import CheckpointError

SUFFIXES = {".safetensors", ".bin", ".pth", ".pt", ".gguf", ".json", ".model", ".txt"}
END = 2**20  # bytes at either end of a file: headers are at one, the last tensors at the other


def fingerprint(path: str | Path) -> dict[str, str]:
    """The sha256 of each file's name, size, and first and last MiB, by name; of a directory or of one file.

    Files that say nothing of weights, settings or tokens, such as a README, do not count.
    """
    path = Path(path)
    if path.is_file():
        return {path.name: digest(path)}
    if not path.is_dir():
        raise CheckpointError(f"{path}: there is no such checkpoint")
    files = sorted(p for p in path.iterdir() if p.suffix in SUFFIXES and not p.name.startswith(".") and p.is_file())
    return {p.name: digest(p) for p in files}


def digest(path: Path) -> str:
    size = path.stat().st_size
    found = sha256(f"{path.name}\0{size}\0".encode())
    with open(path, "rb") as file:
        found.update(file.read(END))
        file.seek(max(END, size - END))
        found.update(file.read(END))
    return found.hexdigest()
