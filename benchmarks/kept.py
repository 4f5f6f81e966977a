"""What a benchmark has measured so far, a file for each result, so that one which was stopped goes on where it was.

Several processes may add to a directory. It is for one setting: results of another model, text or number of windows
would be taken for those asked for, and are refused.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from models.errors import ConfigError
from models.files import write_whole


class Kept:
    """Results by name, as JSON; without a directory they are kept for as long as the process lives."""

    def __init__(self, directory: str | Path | None, settings: dict[str, Any]) -> None:
        self.directory = Path(directory) if directory else None
        self.results: dict[str, Any] = {}
        settings = json.loads(json.dumps(settings))  # as they would be read
        before = self.made("settings", lambda: settings)
        differing = [
            f"the {key} {before.get(key)!r}, but this run's is {settings.get(key)!r}"
            for key in settings.keys() | before.keys()
            if before.get(key) != settings.get(key)
        ]
        if differing:
            raise ConfigError(f"work: {directory} holds results with {'; '.join(differing)}; name another directory")

    def has(self, name: str) -> bool:
        return name in self.results or (self.directory is not None and self.path(name).exists())

    def made(self, name: str, make: Callable[[], Any]) -> Any:
        """The result of that name: measured and written down, unless it is there already."""
        if name in self.results:
            return self.results[name]
        if not self.has(name):
            self.results[name] = make()
            if self.directory:
                write_whole(self.path(name), json.dumps(self.results[name], indent=1) + "\n")
        else:
            self.results[name] = read(self.path(name))
        return self.results[name]

    def path(self, name: str) -> Path:
        assert self.directory is not None
        return self.directory / f"{quote(name, safe=' ,=')}.json"


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"work: {path} is not a result of a benchmark ({error}); delete it") from error
