"""A file of rows that grows as answers or replies come, so that a killed command goes on where it was.

Each row is appended whole, by one process at a time. Half a line, as a full disk can leave one, is cut off when
the file is opened again; anything else that cannot be read is refused. At the end the rows are put in order, so that
the finished file does not tell in which order they came.
"""

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.data.records import Record
from models import DataError
from models.errors import WriteError
from models.files import append_line, cut_back, write_whole
from models.lock import Held, lock, unlock


class Journal:
    """The rows of a file by key: those that were there, and those that come."""

    def __init__(self, path: Path, key: Callable[[Record], str]) -> None:
        """Opens or makes the file; a row without a key is refused, a later one takes the place of an earlier one."""
        self.path, self.key = path, key
        self.rows: dict[str, Record] = {}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.held = lock(path)
        except Held as error:
            raise DataError(f"{path}: another process is writing it; wait for it, or name another file") from error
        except OSError as error:
            raise self.unwritable(error) from error
        try:
            self.read()
        except BaseException:
            self.close()
            raise

    def read(self) -> None:
        content = self.path.read_bytes() if self.path.exists() else b""
        whole, _, rest = content.rpartition(b"\n")
        if rest.strip():
            if isinstance(parsed(rest), dict):  # of a file that another program made, without a newline at its end
                whole = content
                self.append_line("")
            else:
                cut_back(self.path, len(content) - len(rest))
        for number, line in enumerate(whole.split(b"\n"), 1):
            if line.strip():
                row = parsed(line.removeprefix(b"\xef\xbb\xbf"))
                try:
                    self.rows[self.key(row)] = row
                except (KeyError, TypeError) as error:
                    raise DataError(
                        f"{self.path}:{number}: is not a row that this command wrote; remove the file, or name another"
                    ) from error

    def refuse_others(self, settings: Mapping[str, Any]) -> None:
        """What was made in another way, as the rows' metadata say, must not be mixed with what is to come."""
        for row in self.rows.values():
            made = row.get("metadata", {})
            for name, value in settings.items():
                if made.get(name) != value:
                    raise DataError(
                        f"{self.path}: holds rows that were made with {name} {made.get(name)!r}, and now it is "
                        f"{value!r}; name another place, or remove the file"
                    )

    def append(self, row: Record) -> None:
        self.append_line(json.dumps(row))
        self.rows[self.key(row)] = row

    def append_line(self, line: str) -> None:
        try:
            append_line(self.path, line)
        except OSError as error:
            raise self.unwritable(error) from error

    def finish(self, order: Iterable[str]) -> None:
        """Write the rows once more, one for each key, in this order; rows with other keys follow."""
        keys = dict.fromkeys([*(key for key in order if key in self.rows), *self.rows])
        content = "".join(json.dumps(self.rows[key]) + "\n" for key in keys).encode()
        if self.path.exists() and self.path.read_bytes() == content:
            return
        try:
            write_whole(self.path, content)
        except OSError as error:
            raise self.unwritable(error) from error

    def close(self) -> None:
        """Let others have the file, or remove it where nothing came."""
        if self.path.exists() and not self.path.stat().st_size:
            self.path.unlink()
        unlock(self.held)
        self.held = None

    def unwritable(self, error: OSError) -> WriteError:
        return WriteError(
            f"{self.path}: cannot be written ({os.strerror(error.errno or 0)}); make room or name another place, and "
            "run the same command again: what is there is kept"
        )


def parsed(line: bytes) -> Any:
    """A line's value; None where it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
