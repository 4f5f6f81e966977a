"""What a system answered to each question: a file a system, in the released layouts or our own.

Two layouts are released. A row of a model of the paper has the question as `text` and the answer as `generation`,
with `generation_truncated` where the model went on to write the user's next turn itself: that is what judges were
shown. A row of another system has the answer as `text`, with an `answer_id`.

Ratings name answers by their ids. An answer without one is named by the id that the released ratings give it, which
follows from its text, so that ratings old and new can be matched with the answers.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import NAMESPACE_DNS, NAMESPACE_URL, uuid5

from eval.chatbot.questions import PREAMBLE, Question, identifier, listed, records, well_formed
from eval.data.records import Record
from models import ConfigError, DataError

ALPHABET = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"  # without those that look alike
ID_LENGTH = 22  # the fewest of these letters that hold 128 bits
AGAIN = PREAMBLE[: PREAMBLE.index(" assistant")]  # where this is written, a model repeats its prompt


@dataclass(frozen=True)
class Answers:
    """One system's answers, by the questions' ids."""

    system: str
    texts: dict[str, str]
    ids: dict[str, str]
    path: Path

    def missing(self, questions: Iterable[Question]) -> list[str]:
        """Ids of questions that have no answer."""
        return [question.id for question in questions if question.id not in self.texts]


def read_answers(path: str | Path, system: str | None = None) -> Answers:
    """A file's answers; the system is named by its file unless a name is given.

    A row without a question's id or an answer is refused, and so is a second answer to a question.
    """
    path = Path(path)
    texts: dict[str, str] = {}
    ids: dict[str, str] = {}
    for where, row in records(path):
        key, id = identifier(row, where)
        if id in texts:
            raise DataError(f"{where}: the {key} {id} comes twice; a system answers each question once")
        texts[id] = well_formed(answer_text(row, where))
        given = row.get("answer_id")
        ids[id] = given if isinstance(given, str) and given else short_id(texts[id])
    if not texts:
        raise DataError(f"{path}: holds no answer")
    return Answers(system or system_name(path), texts, ids, path)


def system_name(path: Path) -> str:
    """A system's name by its file, as the released ratings write it.

    >>> system_name(Path("generations/answer_gpt35.jsonl"))
    'answer-gpt35'
    """
    return path.name.removesuffix(".jsonl").removesuffix(".json").replace("_", "-")


def row_id(row: Record) -> str:
    """The id of the question that a row of ours is about; a KeyError where it has none."""
    return str(row["message_id"] if "message_id" in row else row["question_id"])


def answer_text(row: Record, where: str) -> str:
    """The answer in a row, without what a model wrote behind it in the user's name."""
    for name in ("generation_truncated", "generation", "answer"):
        if isinstance(row.get(name), str):
            return row[name].partition(AGAIN)[0]
    if isinstance(row.get("text"), str) and ("category" not in row or {"answer_id", "model_id"} & row.keys()):
        return row["text"]
    raise DataError(
        f"{where}: has no answer: generation, answer, or text with an answer_id is needed; it has {listed(row)}"
    )


def read_systems(paths: Sequence[str]) -> list[Answers]:
    """The answers of all systems, whose names differ and can be part of a file's name."""
    systems: dict[str, Answers] = {}
    for given in paths:
        name, _, path = given.rpartition("=") if not Path(given).exists() else ("", "", given)
        answers = read_answers(path, name or None)
        if answers.system in systems:
            raise ConfigError(
                f"answers: {systems[answers.system].path} and {answers.path} are both named {answers.system}; "
                "name one as in NAME=FILE"
            )
        if "/" in answers.system or os.sep in answers.system or answers.system.startswith("."):
            raise ConfigError(
                f"answers: {answers.system!r} cannot be a system's name: it becomes part of a file's name"
            )
        systems[answers.system] = answers
    return list(systems.values())


def named(systems: Sequence[Answers], name: str | None) -> Answers | None:
    """The system of that name."""
    if name is None:
        return None
    for answers in systems:
        if name in (answers.system, str(answers.path)):
            return answers
    raise ConfigError(f"reference: {name} is none of the systems {', '.join(it.system for it in systems)}")


def require_all(systems: Sequence[Answers], questions: Sequence[Question]) -> None:
    """Refuse systems that leave questions without an answer, all of them at once."""
    lacking = {answers.path: answers.missing(questions) for answers in systems}
    problems = [
        f"{path} has no answer to {len(ids)} of {len(questions)} questions ({', '.join(ids[:5])}"
        f"{', ...' if len(ids) > 5 else ''})"
        for path, ids in lacking.items()
        if ids
    ]
    if problems:
        raise DataError("; ".join(problems))


def short_id(text: str) -> str:
    """The id that the released ratings name an answer by: its version-5 UUID, in letters that do not look alike."""
    space = NAMESPACE_URL if text.lower().startswith(("http://", "https://")) else NAMESPACE_DNS
    return short(uuid5(space, text).int)


def short(number: int) -> str:
    """128 bits as 22 letters, the most significant first.

    >>> short(57 * 3 + 1)
    '2222222222222222222253'
    """
    letters = ""
    while number:
        number, digit = divmod(number, len(ALPHABET))
        letters = ALPHABET[digit] + letters
    return letters.rjust(ID_LENGTH, ALPHABET[0])
