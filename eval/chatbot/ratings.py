"""All ratings that a command is given: files and folders of them, sorted by folder and judge.

A set holds *verdicts*, which of two answers is better, or *grades*, two scores out of ten.

In the released relative ratings some files have the two answers in the other order than their names say. Answers
have ids, so that this shows: an answer that is in several files belongs to the system that all of these name.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from eval.chatbot.answers import read_answers
from eval.chatbot.rating_files import Note, Row, RowFile, read_rows, votes
from eval.chatbot.systems import Names, one_line
from eval.chatbot.votes import Verdict
from models.errors import DataError

ROWS = (".jsonl",)
VOTES = (".sqlite", ".sqlite3", ".db")
HUMAN = "human"  # a judge's name in files of people's ratings


class Grade(NamedTuple):
    """Two answers' scores out of ten, in the order in which they were shown; None if the reply was not parsed."""

    question: str
    first: str
    second: str
    scores: tuple[float, float] | None


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
    unparsed: list[Note]
    """Replies that the parsers do not read: where, question, and the stored score, which counts unless it is -1."""
    differing: list[Note]
    """Replies that the parsers read otherwise than the stored score says; the stored one counts."""
    turned: list[str]
    """Files whose answers are in the other order than their names say."""
    warnings: list[str]


def read_ratings(
    paths: Sequence[str | Path],
    aliases: Mapping[str, str] | None = None,
    answers: Sequence[str | Path] = (),
    pool: bool = False,
) -> Ratings:
    """Read files and folders of ratings.

    Files of `answers` tell whose answer an id is, where the ratings do not. With `pool` the ratings of one judge
    belong together whatever their folders. A row that is no rating is refused with its file and line.
    """
    read = Ratings([], {}, [], [], [], [])
    names = Names(aliases)
    groups: dict[tuple[str, str, str], RatingSet] = {}
    files: list[RowFile] = []

    def group(path: Path, judge: str, key: str) -> RatingSet:
        folder = "" if pool else str(path.resolve().parent)
        return groups.setdefault((folder, judge, key), RatingSet(folder, judge))

    for path in listed(paths):
        if path.suffix.lower() in VOTES:
            group(path, HUMAN, "votes").verdicts.extend(votes(path, names))
        else:
            files.append(read_rows(path, names))
    read.names = names.found()
    known = {**owners(file.rows for file in files), **told(answers, names)}
    for file in files:
        add(file, crossed(file.rows, known), group(file.path, file.judge, file.key))
    read.unparsed = [note for file in files for note in file.unparsed]
    read.differing = [note for file in files for note in file.differing]
    read.turned = [str(file.path) for file in files if crossed(file.rows, known)]
    read.warnings += [f"{file.path} is empty" for file in files if not file.rows]
    read.sets = labelled({key: each for key, each in groups.items() if each.verdicts or each.grades})
    if not read.sets:
        raise DataError(f"ratings: there are none in {', '.join(map(str, paths))}")
    return read


def add(file: RowFile, turned: bool, ratings: RatingSet) -> None:
    """Add a file's rows, whose answers may be in the other order than their systems."""
    rater = "one of several" if file.judge == HUMAN else ""
    for row in file.rows:
        first, second = row.systems[::-1] if turned else row.systems
        if isinstance(row.score, int):
            ratings.verdicts.append(Verdict(row.question, first, second, row.score, rater))
        else:
            ratings.grades.append(Grade(row.question, first, second, row.score))


def listed(paths: Sequence[str | Path]) -> list[Path]:
    """The files, and those of the folders, each once and in an order that does not hang on how they are given."""
    found: set[Path] = set()
    for path in map(Path, paths):
        if path.is_dir():
            inside = {each for each in path.rglob("*") if each.suffix.lower() in ROWS + VOTES and each.is_file()}
            if not inside:
                raise DataError(f"{path} holds no file of ratings ({', '.join(ROWS + VOTES)})")
            found |= inside
        elif not path.exists():
            raise DataError(f"{path} does not exist")
        else:
            found.add(path)
    return sorted({path.resolve(): path for path in sorted(found)}.values())


# Whose answers they are


def owners(files: Iterable[Sequence[Row]]) -> dict[str, str]:
    """The systems of those answers that are in files enough to tell: the one that every pair has in common."""
    common: dict[str, frozenset[str]] = {}
    for rows in files:
        for row in rows:
            for id in row.ids or ():
                common[id] = common.get(id, frozenset(row.systems)) & frozenset(row.systems)
    return {id: next(iter(systems)) for id, systems in common.items() if len(systems) == 1}


def told(files: Sequence[str | Path], names: Names) -> dict[str, str]:
    """The systems of those answers that files of answers hold, unless two systems gave the same."""
    systems: dict[str, set[str]] = {}
    for file in files:
        answers = read_answers(file)
        for id in answers.ids.values():
            systems.setdefault(id, set()).add(names(answers.system))
    return {id: next(iter(found)) for id, found in systems.items() if len(found) == 1}


def crossed(rows: Sequence[Row], known: Mapping[str, str]) -> bool:
    """Whether more of a file's answers are the other system's than the one's they should be."""
    pairs = [(known.get(id), row.systems[place], row.systems[1 - place])
             for row in rows for place, id in enumerate(row.ids or ())]  # fmt: skip
    return sum(owner == other for owner, _, other in pairs) > sum(owner == own for owner, own, _ in pairs)


def labelled(groups: Mapping[tuple[str, str, str], RatingSet]) -> list[RatingSet]:
    """The sets under labels that tell them apart: the folder's name, with the judge's and the path where needed."""
    choices = [
        (Path(folder).name or "ratings", f"{Path(folder).name or 'ratings'} ({judge or 'judge'})",
         f"{folder} ({judge or 'judge'})", f"{folder} ({judge or 'judge'}, {key})")
        for folder, judge, key in groups
    ]  # fmt: skip
    for group, labels in zip(groups.values(), choices, strict=True):
        alone = (label for at, label in enumerate(labels) if sum(other[at] == label for other in choices) == 1)
        group.label = one_line(next(alone, labels[-1]))
    return list(groups.values())
