"""Plain texts for perplexities: a file as one text, or a file of documents, a JSON line each."""

from collections.abc import Sequence
from pathlib import Path

from eval.data.records import RecordFile, opened
from eval.data.stream import Stream
from models.errors import ConfigError, DataError

DOCUMENTS = (".jsonl", ".json")
KEYS = ("page", "text")  # of a document's text: in wikitext_document_level, and everywhere else
SPLITS = {"test": ("test",), "validation": ("valid", "validation"), "train": ("train",)}  # as files call them
NAMES = ("wiki.{}.raw", "wiki.{}.tokens", "{}.txt", "{}.jsonl")


def text_file(path: Path, split: str | None) -> Path:
    """The file that a path stands for: itself, or the one of a split (by default test) in a folder."""
    if not path.is_dir():
        if split is not None:
            raise ConfigError(f"split {split!r} is for a folder, but data names one file, {path}; leave the split out")
        return path
    split = split or "test"
    names = [name.format(part) for part in SPLITS[split] for name in NAMES]
    for name in names:
        if (path / name).exists():
            return path / name
    raise DataError(f"data: {path}: has no text of the split {split}; name a file, or put one of {', '.join(names)}")


def read_text(path: Path, max_chars: int | None = None) -> str:
    """The whole text of a UTF-8 file, or its first characters; every line ends in a newline alone."""
    with opened(path) as file:
        stream = Stream(path, file)
        text = "".join(iter(lambda: stream.piece(2**20), ""))
    text = text.replace("\r\n", "\n").replace("\r", "\n")[:max_chars]
    refuse_blank(path, [text], max_chars)
    return text


def holds_documents(path: Path) -> bool:
    """Is this JSON whose first record has a text, and not some other file?"""
    if path.suffix.lower() not in DOCUMENTS:
        return False
    first = next(RecordFile(path).scan(), None)
    return isinstance(first, dict) and any(key in first for key in KEYS)


def read_documents(path: Path, max_chars: int | None = None) -> list[str]:
    """The texts of a file of documents, in order; of all of them together, only the first characters if so asked."""
    file, texts, left = RecordFile(path), [], max_chars
    for number, record in enumerate(file.scan()):
        if isinstance(record, ValueError):
            raise DataError(f"data: {file.where(number)}: {record}")
        text = next((record[key] for key in KEYS if key in record), None)
        if not isinstance(text, str):
            raise DataError(
                f'data: {file.where(number)}: has no text; {{"text": "..."}} or {{"page": "..."}} is needed'
            )
        if left is not None and left <= 0:
            continue  # the rest is still looked at, so that a broken file is refused with any number of characters
        texts.append(text[:left])
        left = None if left is None else left - len(text)
    refuse_blank(path, texts, max_chars)
    return texts


def refuse_blank(path: Path, texts: Sequence[str], max_chars: int | None) -> None:
    if not any(text.strip() for text in texts):
        where = "is empty" if max_chars is None else f"has nothing in its first {max_chars} characters"
        raise DataError(f"data: {path}: {where}; a perplexity needs text")
