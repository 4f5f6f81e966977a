"""Who is compared with whom, and the judge's ratings on disk: a file for each ordered pair of systems.

A file's rows are in the released layout, with the names of both systems: the first is the one whose answer the judge
saw first. A row is appended as its reply comes, so a run that was killed asks only for what is missing.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from eval.chatbot.answers import Answers, row_id, short_id
from eval.chatbot.asking import Prompt, Reply
from eval.chatbot.journal import Journal
from eval.chatbot.prompts import Mode, Templates
from eval.chatbot.questions import Question
from eval.chatbot.verdicts import UNPARSED, parse_relative, parse_threeclass
from eval.data.records import Record
from models import DataError


def ordered_pairs(systems: Sequence[Answers], reference: Answers | None) -> list[tuple[Answers, Answers]]:
    """Every system with every other in both orders, or with the reference alone."""
    pairs = permutations(systems, 2)
    return [pair for pair in pairs if reference is None or reference in pair]


class PairFile:
    """Two systems in one order, the questions that both are compared on, and the ratings so far."""

    def __init__(
        self,
        first: Answers,
        second: Answers,
        questions: Sequence[Question],
        *,
        directory: Path,
        judge: str,
        mode: Mode,
        templates: Templates,
        settings: Mapping[str, Any],
    ) -> None:
        """Ratings that are there already must be of the same answers, made with the same settings."""
        self.first, self.second, self.mode, self.templates = first, second, mode, templates
        self.questions = {it.id: it for it in questions if it.id in first.texts and it.id in second.texts}
        self.settings = {**settings, "prompts": templates.digest}
        suffix = "-threeclass" if mode == "pairwise" else ""
        self.path = directory / f"{first.system}-vs-{second.system}-{judge}-reviewer{suffix}.jsonl"
        self.journal = Journal(self.path, key=row_id)
        try:
            self.journal.refuse_others(self.settings)
            self.refuse_other_answers()
        except BaseException:
            self.journal.close()
            raise

    def refuse_other_answers(self) -> None:
        for id, row in self.journal.rows.items():
            if id in self.questions and row.get("answer1_id") != self.first.ids[id]:
                raise self.other_answer(id, self.first)
            if id in self.questions and row.get("answer2_id") != self.second.ids[id]:
                raise self.other_answer(id, self.second)

    def other_answer(self, id: str, answers: Answers) -> DataError:
        return DataError(
            f"{self.path}: rates another answer to question {id} than {answers.path} holds; give another --out, or "
            "remove the file"
        )

    def missing(self, retry_unparsed: bool = False) -> list[Question]:
        """Questions without a rating; also those whose reply decides nothing, if they are to be asked again."""
        rows = self.journal.rows
        return [q for q in self.questions.values() if q.id not in rows or (retry_unparsed and unparsed(rows[q.id]))]

    def prompt(self, question: Question) -> Prompt:
        texts = self.first.texts[question.id], self.second.texts[question.id]
        return self.templates.of(question).fill(question.text, *texts)

    def key(self, question: Question) -> str:
        """What tells this request from all others, a second one for the same rating too."""
        return f"{self.path.name} {question.id} {len(self.earlier(question))}"

    def earlier(self, question: Question) -> list[str]:
        """Replies that decided nothing, from before this one."""
        row = self.journal.rows.get(question.id)
        return [] if row is None else [*row["metadata"].get("earlier", []), row["text"]]

    def keep(self, question: Question, reply: Reply) -> Record:
        """Append a rating."""
        earlier = self.earlier(question)
        row = {
            "review_id": short_id(f"{self.path.name} {question.id}"),
            **question.named,
            "answer1_id": self.first.ids[question.id],
            "answer2_id": self.second.ids[question.id],
            "reviewer_id": self.templates.of(question).number,
            "metadata": {**self.settings, **reply.details, **({"earlier": earlier} if earlier else {})},
            "text": reply.text,
            "score": score(reply.text, self.mode),
            "system1": self.first.system,
            "system2": self.second.system,
        }
        self.journal.append(row)
        return row

    def rated(self) -> Iterator[Record]:
        """The ratings of these questions."""
        return (self.journal.rows[id] for id in self.questions if id in self.journal.rows)

    def close(self) -> None:
        """Put the rows in the questions' order, and let the file go."""
        try:
            self.journal.finish(self.questions)
        finally:
            self.journal.close()


def score(text: str, mode: Mode) -> Any:
    """What a reply decides, as files store it: 1, 2 or 3, or two scores; -1 for each where it decides nothing."""
    if mode == "pairwise":
        return parse_threeclass(text)
    return list(parse_relative(text) or (UNPARSED, UNPARSED))


def unparsed(row: Record) -> bool:
    return row.get("score") in (UNPARSED, [UNPARSED, UNPARSED])
