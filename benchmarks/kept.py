"""Results of long measurements that are kept in a directory, so that what is done is not done again."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.errors import ConfigError


class Kept:
    """A directory of results, one file each, all measured under the same settings."""

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        if (before := self.get("settings", settings)) != settings:
            differing = [key for key in settings if before.get(key) != settings[key]]
            raise ConfigError(f"work: {directory} has results of other {', '.join(differing)}; name another directory")

    def get(self, name: str, default: dict[str, Any]) -> dict[str, Any]:
        """The result of this name, which becomes the default if there is none."""
        return self.made(name, lambda: default)

    def made(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The result of this name; it is measured if it is not there."""
        path = self.directory / f"{name}.json"
        if not path.exists():
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(make()), encoding="utf-8")
            os.replace(partial, path)
        return json.loads(path.read_text(encoding="utf-8"))
