"""Ratings of answers, read from files: a judge's, as released or as written here, and people's.

A file holds either *verdicts*, which of two answers is better, or *grades*, two scores out of ten. A JSON file is
one ordered pair of systems, named by its rows (`system1`, `system2`) or else by its name (`A-vs-B-gpt-4-reviewer`);
an SQLite file is the votes of people who were each shown an order of their own. Files of one folder and one judge
belong together.

In the released relative ratings some files have the two answers in the other order than their names say. Answers
have ids, so that this shows: an answer that is in several files belongs to the system that all of these name.
"""

import math
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from eval.chatbot.systems import FileName, Names, parse_file_name
from eval.chatbot.verdicts import FIRST, SECOND, TIE, UNPARSED, parse_relative, parse_threeclass
from eval.data.records import Record, RecordFile, kind
from models.errors import DataError

ROWS = (".jsonl",)
VOTES = (".sqlite", ".sqlite3", ".db")
REPLIED = {"review_id", "reviewer_id", "answer1_id", "answer2_id", "system1", "system2"}
"""A row with one of these keys has a judge's reply as its text; in people's ratings the text is the question."""

Score = int | tuple[float, float] | None


class Verdict(NamedTuple):
    """Which of two answers to a question is better: 1 the one shown first, 2 the other, 3 neither, -1 unparsed."""

    question: str
    first: str
    second: str
    score: int
    rater: str = ""

    def turned(self) -> "Verdict":
        """The same verdict as if the answers had been shown in the other order."""
        score = {FIRST: SECOND, SECOND: FIRST}.get(self.score, self.score)
        return self._replace(first=self.second, second=self.first, score=score)


class Grade(NamedTuple):
    """Two answers' scores out of ten, in the order in which they were shown; None if the reply was not parsed."""

    question: str
    first: str
    second: str
    scores: tuple[float, float] | None


class Row(NamedTuple):
    """A row of a JSON file, before it is clear which answer is whose."""

    question: str
    systems: tuple[str, str]
    ids: tuple[str, str] | None
    score: Score
    where: str


@dataclass
class RatingSet:
    """The ratings of one folder by one judge."""

    label: str
    judge: str
    verdicts: list[Verdict] = field(default_factory=list)
    grades: list[Grade] = field(default_factory=list)


@dataclass
class Ratings:
    """All that was read, and what there is to say about it."""

    sets: list[RatingSet]
    names: dict[str, list[str]]
    """Each system's short name, with the names that it has in the files."""
    unparsed: list[dict[str, Any]]
    """Replies that the parsers do not read: where, question, and the stored score, which counts unless it is -1."""
    differing: list[dict[str, Any]]
    """Replies that the parsers read otherwise than the stored score says; the stored one counts."""
    turned: list[str]
    """Files whose answers are in the other order than their names say."""
    warnings: list[str]


def read_ratings(
    paths: Sequence[str | Path],
    aliases: Mapping[str, str] | None = None,
    owners: Mapping[str, str] | None = None,
    pool: bool = False,
) -> Ratings:
    """Read files and folders of ratings.

    `owners` tells of answers' ids the systems that gave them. With `pool` the ratings of one judge belong together
    whatever their folders. A row that is no rating is refused with its file and line.
    """
    names = Names(aliases)
    known = {id: names(system) for id, system in (owners or {}).items()}
    names.found.clear()
    read = Ratings([], {}, [], [], [], [])
    groups: dict[tuple[str, str, str], RatingSet] = {}
    held: list[tuple[RatingSet, Path, list[Row]]] = []
    for path in listed(paths):
        folder = "" if pool else str(path.resolve().parent)
        if path.suffix.lower() in VOTES:
            group = groups.setdefault((folder, "human", "question_id"), RatingSet(folder, "human"))
            group.verdicts += votes(path, names)
            continue
        named = parse_file_name(path.stem)
        rows, key = read_rows(path, named, names, read)
        judge = named.judge if named else ""
        held.append((groups.setdefault((folder, judge, key), RatingSet(folder, judge)), path, rows))
        if not rows:
            read.warnings.append(f"{path} is empty")
    known = {**owners_of(rows for _, _, rows in held), **known}
    for group, path, rows in held:
        straight = sum(known.get(row.ids[place]) == row.systems[place] for row in rows if row.ids for place in (0, 1))
        crossed = sum(
            known.get(row.ids[place]) == row.systems[1 - place] for row in rows if row.ids for place in (0, 1)
        )
        if crossed > straight:
            read.turned.append(str(path))
        for row in rows:
            first, second = row.systems[::-1] if crossed > straight else row.systems
            if isinstance(row.score, int):
                group.verdicts.append(Verdict(row.question, first, second, row.score))
            else:
                group.grades.append(Grade(row.question, first, second, row.score))
    read.sets = labelled({key: group for key, group in groups.items() if group.verdicts or group.grades})
    if not read.sets:
        raise DataError(f"ratings: there are none in {', '.join(map(str, paths))}")
    read.names = {short: sorted(found) for short, found in sorted(names.found.items())}
    return read


def listed(paths: Sequence[str | Path]) -> list[Path]:
    """The files, and those of the folders, each once and in an order that does not hang on how they are given."""
    found: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            inside = {each for each in path.rglob("*") if each.suffix.lower() in ROWS + VOTES and each.is_file()}
            if not inside:
                raise DataError(f"ratings: {path} holds no file of ratings ({', '.join(ROWS + VOTES)})")
            found |= inside
        elif not path.exists():
            raise DataError(f"ratings: {path} does not exist")
        else:
            found.add(path)
    return sorted({path.resolve(): path for path in sorted(found)}.values())


# The rows of a JSON file


def read_rows(path: Path, named: FileName | None, names: Names, read: Ratings) -> tuple[list[Row], str]:
    """A file's rows, and the key that names their questions."""
    file = RecordFile(path)
    rows: list[Row] = []
    keys: set[str] = set()
    for number, row in enumerate(file.scan()):
        where = file.where(number) if number < len(file) else str(path)
        if isinstance(row, ValueError):
            raise DataError(f"ratings: {where}: {row}")
        key, question = question_of(row, where)
        keys.add(key)
        first, second = systems_of(row, named, where)
        systems = names(first), names(second)
        if systems[0] == systems[1]:
            raise DataError(
                f"ratings: {where}: {first!r} and {second!r} are both called {systems[0]!r}; "
                "if they are two systems, tell them apart with --alias NAME=SHORT"
            )
        score = score_of(row, where)
        ids = row.get("answer1_id"), row.get("answer2_id")
        told = all(isinstance(id, str) and id for id in ids) and ids[0] != ids[1] and "system1" not in row
        check_reply(row, score, {"where": where, "question": question, "stored": row["score"]}, read)
        rows.append(Row(question, systems, (str(ids[0]), str(ids[1])) if told else None, score, where))
    if len({type(row.score) is int for row in rows}) > 1:
        raise DataError(f"ratings: {path} mixes verdicts and pairs of scores; put them into two files")
    if len(keys) > 1:
        raise DataError(f"ratings: {path} names some questions by question_id and others by message_id")
    return rows, next(iter(keys), "question_id")


def question_of(row: Record, where: str) -> tuple[str, str]:
    for key in ("question_id", "message_id"):
        value = row.get(key)
        if (isinstance(value, str) and value) or (isinstance(value, int) and not isinstance(value, bool)):
            return key, str(value)
    raise DataError(f"ratings: {where}: has no question_id or message_id; it has {', '.join(row) or 'nothing'}")


def systems_of(row: Record, named: FileName | None, where: str) -> tuple[str, str]:
    """The systems whose answers a row compares, by its own word or by its file's name."""
    if "system1" in row or "system2" in row:
        for key in ("system1", "system2"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise DataError(f"ratings: {where}: {key} is {kind(row.get(key))}; it must name a system")
        return row["system1"], row["system2"]
    if named is None:
        raise DataError(
            f"ratings: {where}: says not which systems it compares; name the file A-vs-B-JUDGE-reviewer.jsonl, "
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
    raise DataError(
        f"ratings: {where}: score is {score!r}; it must be 1, 2, 3 or -1, or a list of two scores of 0 or more"
    )


def number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_reply(row: Record, score: Score, entry: dict[str, Any], read: Ratings) -> None:
    """Note a reply that the parser does not read, or not as its stored score says."""
    text = row.get("text")
    if not isinstance(text, str) or not REPLIED & row.keys():
        if score in (None, UNPARSED):
            read.unparsed.append(entry)
        return
    parsed = parse_threeclass(text) if isinstance(score, int) else parse_relative(text)
    if parsed in (None, UNPARSED):
        read.unparsed.append(entry)
    elif parsed != score:
        read.differing.append({**entry, "parsed": parsed})


def owners_of(files: Iterable[Sequence[Row]]) -> dict[str, str]:
    """The systems of those answers that are in files enough to tell: the one that every pair has in common."""
    common: dict[str, frozenset[str]] = {}
    for rows in files:
        for row in rows:
            for id in row.ids or ():
                common[id] = common.get(id, frozenset(row.systems)) & frozenset(row.systems)
    return {id: next(iter(systems)) for id, systems in common.items() if len(systems) == 1}


# The votes of an SQLite file


def votes(path: Path, names: Names) -> Iterator[Verdict]:
    """People's votes; of a rater's several on one question in one order the last counts."""
    try:
        with closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as base:
            found = base.execute(
                "SELECT rowid, question_id, system_a, system_b, score, rater FROM votes ORDER BY rowid"
            )
            rows = found.fetchall()
    except sqlite3.Error as error:
        raise DataError(f"ratings: {path}: is no file of votes ({error})") from error
    last: dict[tuple[str, str, str, str], Verdict] = {}
    for rowid, question, first, second, score, rater in rows:
        where = f"{path}: vote {rowid}"
        for name, value in (("question_id", question), ("system_a", first), ("system_b", second), ("rater", rater)):
            if value is None or not str(value).strip():
                raise DataError(f"ratings: {where}: {name} is empty")
        if score not in (FIRST, SECOND, TIE):
            raise DataError(f"ratings: {where}: score is {score!r}; it must be 1, 2 or 3")
        a, b = names(str(first)), names(str(second))
        if a == b:
            raise DataError(f"ratings: {where}: {first!r} and {second!r} are both called {a!r}; see --alias")
        last[str(question), a, b, str(rater)] = Verdict(str(question), a, b, score, str(rater))
    yield from last.values()


def labelled(groups: Mapping[tuple[str, str, str], RatingSet]) -> list[RatingSet]:
    """The sets under labels that tell them apart: the folder's name, with the judge's and the path where needed."""
    choices = [
        (Path(folder).name or "ratings", f"{Path(folder).name or 'ratings'} ({judge or 'judge'})",
         f"{folder} ({judge or 'judge'})", f"{folder} ({judge or 'judge'}, {key})")
        for folder, judge, key in groups
    ]  # fmt: skip
    for group, labels in zip(groups.values(), choices, strict=True):
        group.label = next(
            (label for at, label in enumerate(labels) if sum(other[at] == label for other in choices) == 1), labels[-1]
        )
    return list(groups.values())


# Votes to verdicts


def items(verdicts: Sequence[Verdict]) -> list[list[Verdict]]:
    """The votes on each pair of answers, as if all had been shown in one order.

    Votes of named raters belong together in both orders, since each rater was shown one by chance; they are turned
    to the order that most of them saw. Other votes belong together in one order only.
    """
    groups: dict[tuple[str, frozenset[str], str], list[Verdict]] = {}
    for vote in verdicts:
        order = "" if vote.rater else vote.first
        groups.setdefault((vote.question, frozenset((vote.first, vote.second)), order), []).append(vote)
    return [in_one_order(votes) for votes in groups.values()]


def in_one_order(votes: Sequence[Verdict]) -> list[Verdict]:
    """Votes turned to the order that most of them saw; of two, the first vote's."""
    first = Counter(vote.first for vote in votes).most_common(1)[0][0]
    return [vote if vote.first == first else vote.turned() for vote in votes]


def majority(votes: Sequence[Verdict]) -> Verdict:
    """What more than half of an item's parsed votes say; a tie if no such half is, unparsed if none is parsed."""
    parsed = Counter(vote.score for vote in votes if vote.score != UNPARSED)
    score, count = parsed.most_common(1)[0] if parsed else (UNPARSED, 1)
    return votes[0]._replace(score=score if 2 * count > parsed.total() else TIE, rater="")


def majorities(verdicts: Sequence[Verdict]) -> list[Verdict]:
    """One verdict an item."""
    return [majority(votes) for votes in items(verdicts)]
