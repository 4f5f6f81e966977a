"""A model's sampled answers to questions, each a row in the released layout.

Each question's draws come from the seed and the question's id alone, so an answer depends on neither the order of the
questions nor on which others share its batch (as far as a model's sums do not: their last digits can change with a
batch's shape).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from eval.answering import BatchSize, answered
from eval.chatbot.answers import short_id
from eval.chatbot.journal import Journal
from eval.chatbot.questions import Question
from eval.data.records import Record
from eval.examinee import Examinee
from eval.generation import Generate, generation
from eval.progress import Show
from eval.request import Request
from models import Sampling, render_chat

TURN = "### Human:"  # where a model goes on to write the user's next turn, its answer has ended


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the answers of a model, as each row records it."""

    system: str
    max_new_tokens: int
    sampling: Sampling
    seed: int
    identity: str
    chat: bool

    @property
    def record(self) -> dict[str, Any]:
        form = "chat" if self.chat else "benchmark"
        return {
            **vars(self.sampling),
            "max_new_tokens": self.max_new_tokens,
            "seed": self.seed,
            "form": form,
            "model": self.identity,
        }

    def request(self, examinee: Examinee, question: Question) -> Generate:
        """What is asked of the model; the seed is the question's own."""
        ids, prompt, stop = None, question.prompt, (TURN,)
        if self.chat:
            ids, _ = render_chat(examinee.tokenizer, question.messages, add_generation_prompt=True)
            prompt = examinee.tokenizer.decode(ids, skip_special=False)
        seed = own_seed(self.seed, question.id)
        return generation(examinee, prompt, self.max_new_tokens, stop, self.sampling, seed, ids)

    def row(self, question: Question, request: Generate, text: str) -> Record:
        """A row in the released layout, with the answer's id and what it was made with."""
        text = text.strip()  # as the released answers are
        return {
            **question.named,
            "text": question.text,
            "category": question.category,
            "prompt": request.prompt,
            "generation": text,
            "answer_id": short_id(text),
            "model_id": self.system,
            "metadata": self.record | ({"cut": request.cut} if request.cut else {}),
        }


def own_seed(seed: int, key: str) -> int:
    """The seed of one prompt's draws, of 63 bits."""
    return int.from_bytes(sha256(f"{seed}\0{key}".encode()).digest()[:8]) >> 1


def write_answers(
    examinee: Examinee,
    questions: Sequence[Question],
    requests: Mapping[str, Generate],
    settings: Settings,
    batch_size: BatchSize,
    journal: Journal | None,
    show: Show,
) -> None:
    """Ask, and append every answer as it comes; of several processes the main one alone has a journal."""
    asked: dict[Request, Question] = {requests[question.id]: question for question in questions}  # their seeds differ
    known = len(requests) - len(asked)
    show(known, len(requests))
    for fresh in answered(examinee, list(asked), batch_size):
        for request, text in fresh.items():
            question = asked[request]
            if journal is not None:
                journal.append(settings.row(question, requests[question.id], text))
        known += len(fresh)
        show(known, len(requests))
