"""MMLU as tasks: a subject is a task, whose questions come from the published files or as ready prompts."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from eval.examinee import Examinee
from eval.likelihood import Likelihood, in_one_row, likelihood
from eval.mmlu.protocols import LETTERS, PROTOCOLS, written
from eval.mmlu.subjects import VERSION
from eval.request import Request
from eval.statistics import MEAN, Metric, mean, mean_stderr
from eval.task import Document, Task

LOSS = Metric(mean, mean_stderr, higher_is_better=False, micro=True)


class Subject(Task):
    """The questions about one subject. The answer is the most probable letter, of equal ones the first."""

    version = VERSION
    output_type = "multiple_choice"

    def __init__(
        self,
        subject: str,
        documents: Sequence[Document],
        protocol: str,
        settings: Mapping[str, Any],
        window: int | None,
        lengths: Mapping[str, int],
    ) -> None:
        """`window` is the most tokens of a prompt, if not the protocol's number; `lengths` has those of each answer."""
        self.subject, self.documents, self.protocol = subject, documents, PROTOCOLS[protocol]
        self.name, self.alias = f"mmlu_{subject}", subject
        self.window, self.lengths = window or self.protocol.tokens, lengths
        self.metrics = {"acc": MEAN, "mmlu_loss": LOSS} if self.protocol.loss else {"acc": MEAN}
        self.settings = {"dataset_name": subject, "protocol": protocol, "window": self.window, **settings}

    @abstractmethod
    def context(self, document: Document, examinee: Examinee) -> str:
        """The whole prompt, up to where the letter comes."""

    @abstractmethod
    def target(self, document: Document) -> str:
        """The right letter."""

    def requests(self, document: Document, examinee: Examinee) -> list[Request]:
        """How probable each letter is and, where the protocol has a loss, what training would learn from."""
        context = self.context(document, examinee)

        def asked(letter: str, ends: bool = False) -> Likelihood:
            return likelihood(examinee, context, f" {letter}", self.protocol.keep, self.window, ends)

        found = [asked(letter) for letter in LETTERS]
        if self.protocol.loss:
            found.append(asked(self.target(document), ends=True))
        return [*in_one_row(found)]

    def score(self, document: Document, answers: Sequence[Any]) -> dict[str, Any]:
        values = [answer[0] for answer in answers[: len(LETTERS)]]
        right = LETTERS.index(self.target(document))
        found = {"acc": float(values.index(max(values)) == right)}
        if self.protocol.loss:
            found["mmlu_loss"] = -answers[-1][0] / self.lengths[self.target(document)]
        return found

    def prompt(self, document: Document, examinee: Examinee) -> dict[str, Any]:
        """A row of the files that the paper's script takes."""
        return {"subject": self.subject, "input": self.context(document, examinee), "output": self.target(document)}


class Questions(Subject):
    """Questions as they were published, below solved ones."""

    def __init__(self, *args: Any, shots: Sequence[Document]) -> None:
        super().__init__(*args)
        self.shots, self.num_fewshot = shots, len(shots)

    def context(self, document: Document, examinee: Examinee) -> str:
        most = self.window or examinee.max_tokens
        return written(document, self.shots, self.protocol, lambda text: len(examinee.prompted(text)) <= most)

    def target(self, document: Document) -> str:
        return LETTERS[document["answer"]]


class Prompts(Subject):
    """Prompts that are ready, with as many solved questions as their maker gave them."""

    def context(self, document: Document, examinee: Examinee) -> str:
        return document["input"]

    def target(self, document: Document) -> str:
        return document["output"]


def answer_lengths(examinee: Examinee) -> dict[str, int]:
    """Tokens of each letter and of the end of the text behind it, which training learns together."""
    asked = {letter: likelihood(examinee, "Answer:", f" {letter}", ends=True) for letter in LETTERS}
    return {letter: len(it.continuation_ids) for letter, it in asked.items()}
