"""GLUE as prompts for a model that was not fine-tuned for it: the tasks of the lm-evaluation-harness.

Each label has a word, and the most probable word after the prompt is the prediction. Solved examples come from the
train split, drawn as the harness draws them: for every document anew, from one generator, without replacement.
STS-B is not among these tasks, since a score is no choice of words.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

from eval.examinee import Examinee
from eval.glue.documents import Documents
from eval.glue.task import GluePart
from eval.likelihood import likelihood
from eval.request import Request
from eval.task import Document
from models import ConfigError


@dataclass(frozen=True)
class Prompt:
    """How a task is put, and the words for its labels in the order of their numbers."""

    form: str | Callable[[str, str], str]
    words: tuple[str, ...]
    version: float = 1.0
    """The harness's."""

    def render(self, texts: Sequence[str]) -> str:
        return self.form.format(*texts) if isinstance(self.form, str) else self.form(*texts)


def entailment(premise: str, hypothesis: str) -> str:
    """A premise, and what may follow from it as a sentence.

    >>> entailment("It rains.", "It is wet ")
    'It rains.\\nQuestion: It is wet. True, False or Neither?\\nAnswer:'
    """
    claim = hypothesis.strip()
    return f"{premise}\nQuestion: {claim}{'' if claim.endswith('.') else '.'} True, False or Neither?\nAnswer:"


PROMPTS = {  # lm-evaluation-harness, tasks/glue
    "cola": Prompt("{}\nQuestion: Does this sentence make sense?\nAnswer:", ("no", "yes")),
    "sst2": Prompt("{}\nQuestion: Is this sentence positive or negative?\nAnswer:", ("negative", "positive")),
    "mrpc": Prompt(
        "Sentence 1: {}\nSentence 2: {}\nQuestion: Do both sentences mean the same thing?\nAnswer:", ("no", "yes")
    ),
    "qqp": Prompt(
        "Question 1: {}\nQuestion 2: {}\nQuestion: Do both questions ask the same thing?\nAnswer:", ("no", "yes"), 2.0
    ),
    "mnli": Prompt(entailment, ("True", "Neither", "False")),
    "mnli_mismatch": Prompt(entailment, ("True", "Neither", "False")),
    "qnli": Prompt("{}\n{}\nQuestion: Does this response answer the question?\nAnswer:", ("yes", "no")),
    "rte": Prompt("{}\nQuestion: {} True or False?\nAnswer:", ("True", "False")),
    "wnli": Prompt("{}\nQuestion: {} True or False?\nAnswer:", ("False", "True"), 2.0),
    "ax": Prompt(entailment, ("True", "Neither", "False")),
}


class Prompted(GluePart):
    """The label is the one whose word is the most probable after the prompt."""

    output_type = "multiple_choice"

    def __init__(self, found: Documents, train: Documents | None = None, num_fewshot: int = 0, seed: int = 1234):
        super().__init__(found, "prompt", {"num_fewshot": num_fewshot, "fewshot_seed": seed} if num_fewshot else None)
        self.asked = PROMPTS[self.name]
        self.version, self.num_fewshot = self.asked.version, num_fewshot
        self.train = train.rows if train is not None else ()
        self.shots = drawn(found, self.train, num_fewshot, seed)

    def requests(self, document: Document, examinee: Examinee) -> list[Request]:
        solved = [self.train[place] for place in self.shots[document["row"]]]
        shots = "".join(f"{self.asked.render(it['texts'])} {self.asked.words[it['label']]}\n\n" for it in solved)
        context = shots + self.asked.render(document["texts"])
        return [likelihood(examinee, context, f" {word}") for word in self.asked.words]

    def prediction(self, document: Document, answers: Sequence[Any]) -> int | float:
        values = [answer[0] for answer in answers]
        return values.index(max(values))

    def target(self, document: Document) -> Any:
        """The word of the label."""
        return None if document["label"] is None else self.asked.words[document["label"]]


def drawn(found: Documents, train: Sequence[Document], count: int, seed: int) -> list[list[int]]:
    """Which rows of the train split stand before each document; never the document itself."""
    itself = found.split == "train" and count > 0
    if count + itself > len(train):
        raise ConfigError(f"num_fewshot is {count}, but the train split of {found.part.name} has {len(train)} examples")
    random = Random(seed)
    draws = [random.sample(range(len(train)), count + itself) for _ in found.rows]
    if itself:
        draws = [[place for place in places if place != row][:count] for row, places in enumerate(draws)]
    return draws
