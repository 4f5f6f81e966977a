"""A part of GLUE as a task: its documents and metrics, and the file of predictions that its leaderboard takes.

How a label is asked of a model is the protocol's (`finetuned.py`, `prompted.py`).
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.glue.documents import Documents
from eval.glue.resampling import METRICS, reported
from eval.task import Document, Task
from models.files import write_whole

BY_NAME = ("mnli", "mnli_mismatch", "qnli", "rte", "ax")  # predictions that the leaderboard wants as labels' names


class GluePart(Task):
    """What all protocols share. Documents without labels have no metrics: their predictions are written to a file."""

    def __init__(self, found: Documents, protocol: str, settings: Mapping[str, Any] | None = None) -> None:
        self.found, self.part, self.task = found, found.part, found.part.task
        self.name = self.alias = found.part.name
        self.documents = found.rows
        self.measures = self.task.measures if found.labelled else ()
        self.metrics = {reported(name): METRICS[name] for name in self.measures}
        self.settings = {
            "data": str(found.path),
            "split": found.split,
            "protocol": f"glue-{protocol}",
            **(settings or {}),
        }

    @abstractmethod
    def prediction(self, document: Document, answers: Sequence[Any]) -> int | float:
        """The label that the answers come to."""

    def score(self, document: Document, answers: Sequence[Any]) -> dict[str, Any]:
        """Right or wrong for the accuracy; [label, prediction] for what is counted over all documents."""
        if document["label"] is None:
            return {}
        label, given = document["label"], self.prediction(document, answers)
        pair: list[int | float] = [label, given]
        return {reported(name): float(label == given) if name == "accuracy" else pair for name in self.measures}

    def target(self, document: Document) -> Any:
        """The name of the label, or the score."""
        label = document["label"]
        return self.task.names[label] if label is not None and self.task.names else label

    def write(self, directory: Path, documents: Sequence[Document], answers: Sequence[Sequence[Any]]) -> list[Path]:
        """Predictions for test documents in the leaderboard's format."""
        if self.found.split != "test":
            return []
        given = [self.prediction(document, asked) for document, asked in zip(documents, answers, strict=True)]
        lines = [f"{it['idx']}\t{self.submitted(label)}\n" for it, label in zip(documents, given, strict=True)]
        path = directory / self.part.submission
        write_whole(path, "".join(["index\tprediction\n", *lines]))
        return [path]

    def submitted(self, label: int | float) -> str:
        """A prediction as the leaderboard wants it: a name, a number, or a score from 0 to 5; it takes nothing else."""
        if not self.task.names:
            return f"{min(max(label, 0), 5):.3f}"
        number = max(int(label), 0)
        return self.task.names[number] if self.name in BY_NAME else str(number)
