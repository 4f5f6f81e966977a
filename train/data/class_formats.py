"""Texts with a label, in any file: a class by its name or number, or a score.

Names are numbered in sorted order, over all of the file. Numbers stay as they are, so that two files agree.
"""

import math

from eval.data.fields import text_of
from eval.data.records import Record, kind
from train.data.example import Example, exchange

TEXTS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text",), ("sentence",))
CLASS_KEYS = tuple((*texts, "label") for texts in TEXTS)
SCORE_KEYS = tuple((*texts, "score") for texts in TEXTS)
MOST = 1000  # classes; a column with more is none of classes


def class_of(record: Record) -> int | str:
    """A record's class as it has it; a number may be written as text, as in tables."""
    given = record["label"]
    if isinstance(given, bool):
        return str(given).lower()
    if isinstance(given, str) and given.strip():
        number = int(given) if given.isascii() and given.isdigit() and len(given) < 10 else -1
        return number if str(number) == given and number < MOST else given
    if isinstance(given, int) and 0 <= given < MOST:
        return given
    raise ValueError(
        f"label is {given if isinstance(given, (int, float)) else kind(given)}; a class is a text or "
        f"a whole number from 0 to {MOST - 1}. A number to foretell belongs under score"
    )


def class_names(found: set[int | str]) -> tuple[str, ...]:
    """The classes by number."""
    if all(isinstance(it, int) for it in found):
        return tuple(map(str, range(max(map(int, found), default=-1) + 1)))
    return tuple(sorted(map(str, found)))


def read_class(record: Record) -> Example:
    """Texts and the name of their class; its number is known once all of the file is."""
    return labelled(record, str(class_of(record)))


def read_score(record: Record) -> Example:
    """Texts and their score."""
    given = record["score"]
    try:
        score = math.nan if isinstance(given, (bool, list, dict)) or given is None else float(given)
    except (ValueError, OverflowError):
        score = math.nan
    if not math.isfinite(score):
        raise ValueError(f"score is {given!r:.80}; a number is needed")
    return labelled(record, f"{score:g}", score)


def labelled(record: Record, answer: str, label: float | None = None) -> Example:
    keys = next(texts for texts in TEXTS if set(texts) <= record.keys())
    texts = tuple(text_of(record, key, blank=len(keys) > 1) for key in keys)
    prompt = " ".join(f"{key}: {text}" for key, text in zip(keys, texts, strict=True))
    made = exchange(prompt, answer, prompt, f" {answer}")
    return Example(made.messages, made.prompt, made.response, texts=texts, label=label)
