"""Answers kept on disk, so that nothing is asked of a model twice: not after a kill, not by another task.

One SQLite file holds the answers of any number of models; a key is the hash of the model's identity and the request.
Batches are committed one by one.
"""

import json
import sqlite3
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from eval.request import Request
from models import DataError
from models.errors import WriteError


class Cache:
    """Answers by model and request; without a path, none are kept."""

    def __init__(self, path: Path | None = None) -> None:
        self.path, self.hits = path, 0
        self.file: sqlite3.Connection | None = None
        if path is None:
            return
        try:
            self.file = sqlite3.connect(path, timeout=60)
            self.file.execute("PRAGMA journal_mode = WAL")
            self.file.execute("CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, answer TEXT) WITHOUT ROWID")
        except sqlite3.DatabaseError as error:
            raise DataError(f"{path}: is not a file of answers ({error}); remove it, or name another one") from error

    def known(self, identity: str, requests: Sequence[Request]) -> dict[Request, Any]:
        """The answers that are there already."""
        found: dict[Request, Any] = {}
        if self.file is None:
            return found
        for request in requests:
            row = self.file.execute("SELECT answer FROM answers WHERE key = ?", (key(identity, request),)).fetchone()
            if row is not None:
                found[request] = json.loads(row[0])
        self.hits += len(found)
        return found

    def keep(self, identity: str, answers: Mapping[Request, Any]) -> None:
        """Add answers, all of them or none."""
        if self.file is None:
            return
        rows = [(key(identity, request), json.dumps(answer)) for request, answer in answers.items()]
        try:
            with self.file:
                self.file.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
        except sqlite3.OperationalError as error:
            raise WriteError(f"{self.path}: answers cannot be kept ({error}); make room and run again") from error

    def close(self) -> None:
        if self.file is not None:
            self.file.close()


def key(identity: str, request: Request) -> bytes:
    """What an answer is found by."""
    return sha256(json.dumps([identity, *request.key]).encode()).digest()
