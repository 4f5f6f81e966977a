"""The two kinds of files that ratings are in: rows of JSON, of a model or of people, and people's votes in SQLite.

A JSON file is about one ordered pair of systems. Its rows name them (`system1`, `system2`), or else the file's name
does (`A-vs-B-gpt-4-reviewer`). Whether a row is a verdict or two scores out of ten shows in its `score`.
"""

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

from eval.chatbot.questions import identifier, records
from eval.chatbot.systems import FileName, Names, parse_file_name
from eval.chatbot.verdicts import FIRST, SECOND, TIE, UNPARSED, parse_relative, parse_threeclass
from eval.chatbot.votes import Verdict
from eval.data.records import Record, kind
from models.errors import DataError

REPLIED = {"review_id", "reviewer_id", "answer1_id", "answer2_id", "system1", "system2"}
"""A row with one of these keys has a judge's reply as its text; in people's ratings the text is the question."""

Score = int | tuple[float, float] | None


Note = dict[str, Any]


class Row(NamedTuple):
    """A row of a JSON file, before it is clear which answer is whose."""

    question: str
    systems: tuple[str, str]
    ids: tuple[str, str] | None
    score: Score


class RowFile(NamedTuple):
    """The rows of a JSON file, who judged, and what the questions' ids are called."""

    path: Path
    rows: list[Row]
    judge: str
    key: str
    unparsed: list[Note]
    """Replies that the parsers do not read: where, question, and the stored score."""
    differing: list[Note]
    """Replies that the parsers read otherwise than the stored score says."""


def read_rows(path: Path, names: Names) -> RowFile:
    """A file's rows; one that is no rating is refused with its file and line."""
    rows: list[Row] = []
    unparsed: list[Note] = []
    differing: list[Note] = []
    keys: set[str] = set()
    named = parse_file_name(path.stem)
    for where, row in records(path):
        key, question = identifier(row, where)
        keys.add(key)
        first, second = systems_of(row, named, where)
        if not rows:
            named = parse_file_name(path.stem, known=second) or named
        systems = names(first), names(second)
        if systems[0] == systems[1]:
            raise alike(where, first, second, systems[0])
        score = score_of(row, where)
        ids = row.get("answer1_id"), row.get("answer2_id")
        telling = all(isinstance(id, str) and id for id in ids) and "system1" not in row
        rows.append(Row(question, systems, (str(ids[0]), str(ids[1])) if telling else None, score))
        note = {"where": where, "question": question, "stored": row["score"]}
        parsed = parsed_reply(row, score)
        if parsed in (None, UNPARSED):
            unparsed.append(note)
        elif parsed != score:
            differing.append({**note, "parsed": parsed})
    if len({isinstance(row.score, int) for row in rows}) > 1:
        raise DataError(f"{path}: mixes verdicts and pairs of scores; put them into two files")
    if len(keys) > 1:
        raise DataError(f"{path}: names questions by {' and by '.join(sorted(keys))}; one key is needed")
    return RowFile(path, rows, named.judge if named else "", next(iter(keys), ""), unparsed, differing)


def alike(where: str, first: str, second: str, short: str) -> DataError:
    return DataError(
        f"{where}: {first!r} and {second!r} are both called {short!r}; "
        "if they are two systems, tell them apart with --alias NAME=SHORT"
    )


def systems_of(row: Record, named: FileName | None, where: str) -> tuple[str, str]:
    """The systems whose answers a row compares, by its own word or by its file's name."""
    if "system1" in row or "system2" in row:
        for key in ("system1", "system2"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise DataError(f"{where}: {key} is {kind(row.get(key))}; it must name a system")
        return row["system1"], row["system2"]
    if named is None:
        raise DataError(
            f"{where}: says not which systems it compares; name the file A-vs-B-JUDGE-reviewer.jsonl, "
            "or give its rows system1 and system2"
        )
    return named.first, named.second


def score_of(row: Record, where: str) -> Score:
    """1, 2, 3 or -1; or two scores, None for two of -1."""
    score = row.get("score")
    if number(score) and score in (FIRST, SECOND, TIE, UNPARSED):
        return int(score)
    if isinstance(score, list) and len(score) == 2 and all(map(number, score)):
        if score == [UNPARSED, UNPARSED]:
            return None
        if min(score) >= 0:
            return float(score[0]), float(score[1])
    raise DataError(f"{where}: score is {score!r}; it must be 1, 2, 3 or -1, or a list of two scores of 0 or more")


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def parsed_reply(row: Record, score: Score) -> Score:
    """What the parser reads in a row's reply; where there is none, the stored score."""
    text = row.get("text")
    if not isinstance(text, str) or not REPLIED & row.keys():
        return score
    return parse_threeclass(text) if isinstance(score, int) else parse_relative(text)


# Votes of people


def votes(path: Path, names: Names) -> Iterator[Verdict]:
    """People's votes; of a rater's several on one question in one order the last counts."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
            found = base.execute(
                "SELECT rowid, question_id, system_a, system_b, score, rater FROM votes ORDER BY rowid"
            )
            rows = found.fetchall()
    except sqlite3.Error as error:
        raise DataError(f"{path}: is no file of votes ({error})") from error
    last: dict[tuple[str, str, str, str], Verdict] = {}
    for rowid, question, first, second, score, rater in rows:
        where = f"{path}: vote {rowid}"
        for name, value in (("question_id", question), ("system_a", first), ("system_b", second), ("rater", rater)):
            if value is None or not str(value).strip():
                raise DataError(f"{where}: {name} is empty")
        if score not in (FIRST, SECOND, TIE):
            raise DataError(f"{where}: score is {score!r}; it must be 1, 2 or 3")
        a, b = names(str(first)), names(str(second))
        if a == b:
            raise alike(where, str(first), str(second), a)
        last[str(question), a, b, str(rater)] = Verdict(str(question), a, b, score, str(rater))
    yield from last.values()
