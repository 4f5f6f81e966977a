"""What a benchmark has measured so far, in a file, so that one which was stopped goes on where it was.

A file is for one setting: results of another model, text or number of windows would be taken for those asked for, and
are refused.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models.errors import ConfigError
from models.files import write_whole


class Kept:
    """Results by name, as JSON; without a folder they are kept for as long as the process lives."""

    def __init__(self, folder: str | None, name: str, setting: dict[str, Any]) -> None:
        self.path = Path(folder) / f"{name}.json" if folder else None
        self.setting = json.loads(json.dumps(setting))
        self.results: dict[str, Any] = {}
        if self.path and self.path.exists():
            self.results = self.read(self.path)

    def read(self, path: Path) -> dict[str, Any]:
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            setting, results = found["setting"], found["results"]
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"work: {path} does not hold results of a benchmark ({error}); delete it") from error
        for key in self.setting.keys() | setting.keys():
            if setting.get(key) != self.setting.get(key):
                raise ConfigError(
                    f"work: {path} holds results with the {key} {setting.get(key)!r}, but this run's is "
                    f"{self.setting.get(key)!r}; name another folder"
                )
        return results

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The result of that name: measured and written down, unless it is there already."""
        if name not in self.results:
            self.results[name] = measure()
            if self.path:
                text = json.dumps({"setting": self.setting, "results": self.results}, indent=1)
                write_whole(self.path, text + "\n")
        return self.results[name]
