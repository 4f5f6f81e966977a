"""Any multiple choice of one's own: `--task choice --data FILE`.

A record has what is asked, the choices and the answer:

- "question": the prompt is "Question: ...\\nAnswer:", as in ARC and PIQA; or "context": the prompt is that text as it
  is; with both, the context stands on the lines before the question. A choice follows after one space.
- "choices": a list of two texts or more. In a table, a cell with a JSON list, or columns A, B, C and so on, of which
  the last may be empty where a question has fewer choices.
- "answer": the number of the right choice, from 0; or its letter, from A; or its text. A text is first compared with
  the choices, then taken as a letter, then as a number. Other keys are passed over.

The data is a file (JSON lines, a JSON list, CSV, TSV), or a folder with train, validation and test files of that kind.
Examples are the first records of the folder's training file; of a single file, its own first records, which are then
not scored.
"""

import json
from pathlib import Path
from string import ascii_uppercase

from eval.choice.reading import brief, chosen, documents, place, text, texts, whole
from eval.choice.task import Choice, few, first, set_apart
from eval.task import Document, Family, Spec, Suite
from models import ConfigError, DataError

SPLITS = {"test": ("test",), "validation": ("validation", "valid", "val", "dev"), "train": ("train",)}
SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")


def build(spec: Spec) -> Suite:
    """The one task that the file makes."""
    data, number = place(spec, FAMILY.data), few(spec.num_fewshot)
    if not data.is_dir():
        if spec.split is not None:
            raise ConfigError(f"split is {spec.split}, but {data} is a file; a split is chosen from a folder")
        examples, scored = set_apart(documents(data, document), number, str(data))
        return Suite([Choice("choice", scored, examples, settings={"data": str(data)})])
    split = spec.split or "test"
    path = find(data, split)
    if path is None:
        raise DataError(
            f"data: {data} has no {split} file ({' or '.join(SPLITS[split])}, ending in .jsonl, .json, .csv, .tsv)"
        )
    source, scored, examples = find(data, "train") or path, documents(path, document), []
    if number and source == path:
        examples, scored = set_apart(scored, number, str(path))
    elif number:
        examples = first(documents(source, document), number, str(source))
    settings = {"data": str(path), "split": split, "fewshot_data": str(source) if number else None}
    return Suite([Choice("choice", scored, examples, settings=settings)])


def find(folder: Path, split: str) -> Path | None:
    """The file of a split."""
    paths = [folder / f"{name}{suffix}" for name in SPLITS[split] for suffix in SUFFIXES]
    return next((path for path in paths if path.is_file()), None)


def document(record: Document) -> Document:
    """A record's document.

    >>> document({"question": "Two and two?", "choices": ["four", "five"], "answer": "A"})
    {'query': 'Question: Two and two?\\nAnswer:', 'choices': ['four', 'five'], 'gold': 0}
    """
    parts = [text(record, "context")] if "context" in record else []
    if "question" in record:
        parts.append(f"Question: {text(record, 'question')}\nAnswer:")
    query = "\n".join(filter(None, parts))
    if not query.strip():
        raise ValueError("asks nothing: it has no 'question' and no 'context', or they are empty")
    choices, answer = listed(record), record.get("answer")
    last = ascii_uppercase[: len(choices)][-1:]
    gold = chosen(
        choices, number_of(answer, choices), answer, f"0 to {len(choices) - 1}, A to {last} or a choice's text"
    )
    return {"query": query, "choices": choices, "gold": gold}


def listed(record: Document) -> list[str]:
    """The choices of a record."""
    value = record.get("choices")
    if isinstance(value, str):
        try:
            record = {**record, "choices": json.loads(value)}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"its 'choices' are not a JSON list of texts ({brief(value)} came)") from error
    elif value is None and "A" in record:
        columns = [record[letter] for letter in ascii_uppercase if letter in record]
        while len(columns) > 2 and columns[-1] in ("", None):
            columns.pop()
        record = {**record, "choices": columns}
    return texts(record, "choices")


def number_of(answer: object, choices: list[str]) -> int | None:
    """The number of the choice that an answer names, or None."""
    if not isinstance(answer, str):
        return whole(answer)
    if choices.count(answer) == 1:
        return choices.index(answer)
    if choices.count(answer) > 1:
        raise ValueError(f"its answer {brief(answer)} is the text of {choices.count(answer)} choices; name its letter")
    letter = answer.strip().upper()
    return ascii_uppercase.index(letter) if len(letter) == 1 and letter in ascii_uppercase else whole(answer)


FAMILY = Family(
    name="choice",
    summary="multiple choice by likelihood over a file of your own: question or context, choices, answer",
    build=build,
    splits=tuple(SPLITS),
    data="a file of records with question or context, choices and answer, or a folder with such test and train files",
)
