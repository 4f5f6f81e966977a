"""What can be asked of a model: each kind of question is a class that knows how to answer many at once.

Kinds are `Likelihood` (eval/likelihood.py), `Generate` (eval/generation.py), `PseudoLikelihood`
(eval/pseudo.py) and `Label` (eval/labelling.py). An answer is a JSON value, so that it can be kept on disk.
"""

from collections.abc import Hashable, Sequence
from typing import Any, Protocol, runtime_checkable

from eval.examinee import Examinee


@runtime_checkable
class Request(Protocol):
    """One question to a model. Instances are frozen dataclasses, equal if the same is asked."""

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What is asked, as texts and JSON values: for samples, hashes and the file of prompts."""
        ...

    @property
    def key(self) -> tuple[Any, ...]:
        """JSON values that decide the answer, for a given model; the cache finds it by them."""
        ...

    @property
    def row(self) -> Hashable:
        """Requests with an equal row can be answered from one row of a batch."""
        ...

    @property
    def length(self) -> int:
        """Tokens of the row."""
        ...

    @classmethod
    def answer(cls, examinee: Examinee, rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
        """Answers to all requests of some rows, in one batch; each row is a list of requests with an equal `row`."""
        ...
