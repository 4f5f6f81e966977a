"""Human votes on disk: a SQLite file in which a vote is safe before its rater hears of it.

A row says which system was shown as A and which as B, and the score: 1 where A was better, 2 where B was, 3 for a tie.
A rater votes once on a pair of answers, whichever side they are on.
"""

import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from eval.chatbot.annotate_items import Comparison, Key, fingerprint
from models import DataError
from models.errors import WriteError

TABLES = """
CREATE TABLE IF NOT EXISTS votes (
    question_id TEXT NOT NULL, system_a TEXT NOT NULL, system_b TEXT NOT NULL,
    score INTEGER NOT NULL CHECK (score IN (1, 2, 3)), rater TEXT NOT NULL, at TEXT NOT NULL
);
CREATE UNIQUE INDEX IF NOT EXISTS one_vote_each
    ON votes (rater, question_id, min(system_a, system_b), max(system_a, system_b));
CREATE TABLE IF NOT EXISTS texts (question_id TEXT, system TEXT, sha256 TEXT, PRIMARY KEY (question_id, system));
CREATE TABLE IF NOT EXISTS secret (value BLOB NOT NULL);
"""
COLUMNS = ["question_id", "system_a", "system_b", "score", "rater", "at"]
PAIR = "min(system_a, system_b), max(system_a, system_b)"
SAME = "question_id = ? AND min(system_a, system_b) = ? AND max(system_a, system_b) = ?"

Outcome = Literal["kept", "voted before", "full"]


@dataclass(frozen=True)
class Vote:
    """One row."""

    question_id: str
    system_a: str
    system_b: str
    score: int
    rater: str
    at: str

    @property
    def key(self) -> Key:
        first, second = sorted((self.system_a, self.system_b))
        return self.question_id, first, second


class Votes:
    """An open file of votes; a path where there is nothing gets a new one. For one thread at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(0o600)  # it will hold a secret; files that SQLite puts beside it get the same rights
            self.file = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.OperationalError) as error:
            raise WriteError(f"{path}: cannot be opened ({error}); name a place where files can be made") from error
        try:
            self.prepare()
        except sqlite3.DatabaseError as error:
            self.file.close()
            raise DataError(f"{path}: is not a file of votes ({error}); name another one") from error
        except DataError:
            self.file.close()
            raise

    def prepare(self) -> None:
        """Make the tables of a new file, and see that an old one has them."""
        there = {name for (name,) in self.file.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if there and [row[1] for row in self.file.execute("PRAGMA table_info(votes)")] != COLUMNS:
            raise DataError(
                f"{self.path}: holds other things than votes ({', '.join(sorted(there))}); name another one"
            )
        self.file.execute("PRAGMA journal_mode = WAL")
        self.file.execute("PRAGMA synchronous = FULL")  # a vote outlives a power cut too
        self.file.executescript(TABLES)
        with self.transaction():
            if self.file.execute("SELECT count(*) FROM secret").fetchone() == (0,):
                self.file.execute("INSERT INTO secret VALUES (?)", (secrets.token_bytes(32),))
        (self.secret,) = self.file.execute("SELECT value FROM secret").fetchone()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """All of it is on disk when it ends, or nothing; other processes wait."""
        try:
            self.file.execute("BEGIN IMMEDIATE")
            try:
                yield
                self.file.execute("COMMIT")
            except BaseException:
                if self.file.in_transaction:
                    self.file.execute("ROLLBACK")
                raise
        except sqlite3.OperationalError as error:
            raise WriteError(f"{self.path}: the vote cannot be kept ({error}); make room") from error

    def bind(self, comparisons: Iterable[Comparison]) -> None:
        """Note which texts are voted on, and refuse those that differ from what votes in the file were on."""
        texts = {
            (it.question.id, system): fingerprint(it.question.text, answer)
            for it in comparisons
            for system, answer in zip(it.systems, it.answers, strict=True)
        }
        voted = "SELECT 1 FROM votes v WHERE v.question_id = t.question_id AND t.system IN (v.system_a, v.system_b)"
        known = self.file.execute(f"SELECT * FROM texts t WHERE EXISTS ({voted})").fetchall()
        other = [(id, system) for id, system, hash in known if texts.get((id, system), hash) != hash]
        if other:
            id, system = other[0]
            raise DataError(
                f"{self.path}: holds votes on other texts than those given, as for question {id} and {system} "
                f"({len(other)} in all); give the same files, or name another file for the votes"
            )
        with self.transaction():
            rows = [(*key, hash) for key, hash in texts.items()]
            self.file.executemany("INSERT OR REPLACE INTO texts VALUES (?, ?, ?)", rows)

    def cast(self, shown: Comparison, score: int, rater: str, most: int) -> Outcome:
        """Keep a vote, unless this rater has voted otherwise here before, or `most` others have.

        The same vote again is kept as it was: a page whose server died asks again.
        """
        key = shown.flipped.key if shown.systems[0] > shown.systems[1] else shown.key
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self.transaction():
            mine = f"SELECT system_a, score FROM votes WHERE rater = ? AND {SAME}"
            earlier = self.file.execute(mine, (rater, *key)).fetchone()
            if earlier is not None:
                return "kept" if earlier == (shown.systems[0], score) else "voted before"
            (count,) = self.file.execute(f"SELECT count(*) FROM votes WHERE {SAME}", key).fetchone()
            if count >= most:
                return "full"
            row = (shown.question.id, *shown.systems, score, rater, now)
            self.file.execute("INSERT INTO votes VALUES (?, ?, ?, ?, ?, ?)", row)
        return "kept"

    def withdraw(self, vote: Vote) -> None:
        """Take a vote back."""
        with self.transaction():
            self.file.execute(f"DELETE FROM votes WHERE rater = ? AND {SAME}", (vote.rater, *vote.key))

    def of(self, rater: str) -> list[Vote]:
        """A rater's votes, the earliest first."""
        found = self.file.execute("SELECT * FROM votes WHERE rater = ? ORDER BY rowid", (rater,))
        return [Vote(*row) for row in found]

    def all(self) -> list[Vote]:
        """Every vote, the earliest first."""
        return [Vote(*row) for row in self.file.execute("SELECT * FROM votes ORDER BY rowid")]

    def counts(self) -> dict[Key, int]:
        """How many raters have voted on each comparison."""
        found = self.file.execute(f"SELECT question_id, {PAIR}, count(*) FROM votes GROUP BY 1, 2, 3")
        return {(id, first, second): count for id, first, second, count in found}

    def close(self) -> None:
        self.file.close()
