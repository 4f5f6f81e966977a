"""What a judge is told: templates by category of question, in the layout of the paper's release.

A row has a `system_prompt`, a `prompt_template` with places in braces and the `defaults` for some of them. A question
goes with the template of its category, or else with the first. Three files are shipped: pairwise and relative prompts
for the Vicuna questions, which have templates for coding and math, and a pairwise one for OpenAssistant's dialogues.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from string import Formatter
from typing import Any, Literal

from eval.chatbot.asking import Prompt
from eval.chatbot.questions import Question, records
from eval.data.records import Record, kind
from models import DataError

Mode = Literal["pairwise", "relative"]
SHIPPED = Path(__file__).parent / "judge_prompts"
NEEDED = ("question", "answer_1", "answer_2")


@dataclass(frozen=True)
class Template:
    """A prompt with places for a question and two answers."""

    number: int
    category: str
    system: str
    pieces: tuple[tuple[str, str | None], ...]
    """Text, and the name of what follows it."""
    defaults: dict[str, str]

    def fill(self, question: str, first: str, second: str) -> Prompt:
        """The prompt about two answers; whatever braces they hold stay as they are."""
        values = {**self.defaults, "question": question, "answer_1": first, "answer_2": second}
        parts = (text + ("" if name is None else values[name]) for text, name in self.pieces)
        return Prompt(self.system, "".join(parts))


@dataclass(frozen=True)
class Templates:
    """A file of templates."""

    rows: tuple[Template, ...]
    digest: str
    """Tells files apart: the start of the SHA-256 of its content."""

    def of(self, question: Question) -> Template:
        """The template for a question's category, else the first."""
        return next((row for row in self.rows if row.category == question.category), self.rows[0])


def shipped(mode: Mode, questions: Sequence[Question]) -> Path:
    """The file that the paper judged such questions with; dialogues in relative mode had none of their own."""
    if mode == "relative":
        return SHIPPED / "vicuna_prompt_relative.jsonl"
    dialogues = all(question.key == "message_id" for question in questions)
    return SHIPPED / ("oa_prompt_threeclass.jsonl" if dialogues else "vicuna_prompt_threeclass.jsonl")


def read_templates(path: str | Path) -> Templates:
    """The templates of a file; one with an unknown place, or without one for the question or an answer, is refused."""
    path = Path(path)
    rows = tuple(template(row, where, number) for number, (where, row) in enumerate(records(path), 1))
    if not rows:
        raise DataError(f"{path}: holds no prompt")
    return Templates(rows, sha256(path.read_bytes()).hexdigest()[:16])


def template(row: Record, where: str, number: int) -> Template:
    defaults = row.get("defaults", {})
    if not isinstance(defaults, dict) or not all(isinstance(value, str) for value in defaults.values()):
        raise DataError(f"{where}: defaults is {kind(defaults)}; an object of texts is needed")
    known = {*NEEDED, *defaults}
    pieces = split(text_of(row, "prompt_template", where), where)
    named = {name for _, name in pieces if name is not None}
    if unknown := sorted(named - known):
        raise DataError(
            f"{where}: prompt_template has a place {{{unknown[0]}}}, but known are {', '.join(sorted(known))}; "
            "write a brace that is meant as such twice"
        )
    if lacking := [name for name in NEEDED if name not in named]:
        raise DataError(f"{where}: prompt_template has no place {{{lacking[0]}}}")
    given = row.get("prompt_id")
    return Template(
        number=given if isinstance(given, int) else number,
        category=text_of(row, "category", where, "general"),
        system=text_of(row, "system_prompt", where),
        pieces=pieces,
        defaults=defaults,
    )


def split(text: str, where: str) -> tuple[tuple[str, str | None], ...]:
    """A template at its places.

    >>> split("Is {answer_1} {{right}}?", "here")
    (('Is ', 'answer_1'), (' {', None), ('right}', None), ('?', None))
    """
    try:
        parts = list(Formatter().parse(text))
    except ValueError as error:
        raise DataError(f"{where}: prompt_template: {error}; write a brace that is meant as such twice") from error
    for _, name, spec, conversion in parts:
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise DataError(f"{where}: prompt_template has a place {{{name}}} that is no plain name")
    return tuple((literal, name) for literal, name, _, _ in parts)


def text_of(row: Record, name: str, where: str, default: str | None = None) -> str:
    value: Any = row.get(name, default)
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {kind(value) if name in row else 'not there'}; a text is needed")
    return value
