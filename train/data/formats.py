"""Layouts of records as people have them, and how one is told.

The layout is found from the keys of the first record, and where several have the same keys from what stands
under them, unless it is named; the others must have it as well. A new layout is a reader and a row of FORMATS.
"""

from collections.abc import Callable
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from functools import partial
from pathlib import Path

from eval.data.records import Record, printable
from models.errors import ConfigError
from train.data import chat_formats, class_formats, glue, instruction_formats, oasst, superni
from train.data.example import Example, Kind, Message

__all__ = ["FORMATS", "Example", "Format", "Message", "detect", "fits", "known", "misfit"]

Keys = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Format:
    """A layout: the keys that tell it, and how a record that has them becomes an Example."""

    keys: Keys
    """Sets of keys; a record has this layout if it has all of one of them."""
    read: Callable[[Record], Example]
    shape: str
    """What a record looks like, for people."""
    named: Keys = ()
    """Sets of keys that it also goes by where it is named, though another layout is found from them."""
    suits: Callable[[Record, Path], bool] | None = None
    """Whether what stands under the keys is of this layout, where that is not plain; it is told the file's path."""
    split: Callable[[Record], list[Record]] | None = None
    """A record that is several examples as one record for each."""
    kind: Kind = "text"
    label_names: tuple[str, ...] = ()
    """The classes by number, where the layout has them fixed."""
    classes: bool = False
    """Whether the classes are those that the file has."""
    threads: bool = False
    """Whether a record is a message, and an example several records."""


CHAT = (("messages",), ("conversations",))
PAIRS = instruction_formats.PAIRS

# The first row that fits decides, so the more telling keys come first.
FORMATS = {
    "chat": Format(CHAT, chat_formats.read_chat, '{"messages": [{"role", "content"}, ...]}'),
    "oasst1": Format(
        (("message_id", "parent_id", "role", "text"),),
        lambda record: oasst.read_thread([record]),
        '{"message_id", "parent_id", "role", "text", "rank"}',
        threads=True,
    ),
    "oasst1-trees": Format(
        (("prompt",),),
        oasst.read_tree,
        '{"prompt": {"role", "text", "replies": [...]}}',
        suits=lambda record, path: oasst.is_tree(record),
    ),
    "superni": Format(
        (("Definition", "Instances"),),
        superni.read_task,
        '{"Definition", "Positive Examples", "Instances": [{"input", "output"}]}',
        split=superni.split_task,
    ),
    "unnatural": Format(
        (("instruction", "instances"),),
        instruction_formats.read_unnatural,
        '{"instruction", "instances": [{"instruction_with_input", "constraints", "output"}]}',
        suits=lambda record, path: instruction_formats.is_unnatural(record),
        split=instruction_formats.split_unnatural,
    ),
    "self-instruct": Format(
        (("instruction", "instances"),),
        instruction_formats.read_self_instruct,
        '{"instruction", "instances": [{"input", "output"}]} or {"prompt", "completion"}',
        named=(("prompt", "completion"),),
        split=instruction_formats.split_self_instruct,
    ),
    "alpaca": Format(
        (("instruction", "output"),), instruction_formats.read_alpaca, '{"instruction", "input", "output"}'
    ),
    "dolly": Format(
        (("instruction", "response"),), instruction_formats.read_dolly, '{"instruction", "context", "response"}'
    ),
    "hh-rlhf": Format((("chosen", "rejected"),), chat_formats.read_hh, '{"chosen", "rejected"}', named=(("chosen",),)),
    **{
        f"glue-{task.name}": Format(
            (task.columns,),
            partial(glue.read, task),
            f"TSV: {', '.join(task.keys)}",
            named=(task.keys,),
            suits=partial(glue.suits, task),
            kind="classification" if task.names else "regression",
            label_names=task.names,
        )
        for task in glue.TASKS
    },
    "classification": Format(
        class_formats.CLASS_KEYS,
        class_formats.read_class,
        '{"text", "label"} or {"sentence1", "sentence2", "label"}',
        suits=lambda record, path: not chat_formats.is_marked(record.get("text")),
        kind="classification",
        classes=True,
    ),
    "regression": Format(
        class_formats.SCORE_KEYS,
        class_formats.read_score,
        '{"text", "score"} or {"sentence1", "sentence2", "score"}',
        suits=lambda record, path: not chat_formats.is_marked(record.get("text")),
        kind="regression",
    ),
    "flan": Format((("inputs", "targets"),), instruction_formats.read_pair, '{"inputs", "targets"}', named=PAIRS),
    "prompt-completion": Format(PAIRS, instruction_formats.read_pair, '{"prompt", "completion"}'),
    "longform": Format((), instruction_formats.read_pair, '{"input", "output"}', named=(("input", "output"),)),
    "chip2": Format(
        (("text",),),
        chat_formats.read_chip2,
        '{"text": "<human>: ...\\n<bot>: ..."}',
        suits=lambda record, path: chat_formats.is_chip2(record),
    ),
    "guanaco": Format((("text",),), chat_formats.read_guanaco, '{"text": "### Human: ...### Assistant: ..."}'),
}


def known(format: str) -> Format:
    """A layout by its name."""
    if format not in FORMATS:
        near = get_close_matches(format, FORMATS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ConfigError(f"data: format {format!r} is not known; give one of {', '.join(FORMATS)}.{hint}")
    return FORMATS[format]


def detect(record: Record, path: Path = Path()) -> str:
    """The layout whose keys a record has."""
    for name, layout in FORMATS.items():
        if fits(record, layout.keys) and (layout.suits is None or layout.suits(record, path)):
            return name
    near = nearest(record)
    if near:
        raise ValueError(unexpected(record, near))
    raise ValueError(f"has the keys of no format; found {found(record)}. Known are {', '.join(FORMATS)}")


def fits(record: Record, keys: Keys) -> bool:
    return any(set(names) <= record.keys() for names in keys)


def misfit(record: Record, name: str) -> str:
    """Why a record is not of a layout."""
    return unexpected(record, [(name, keys) for keys in FORMATS[name].keys or FORMATS[name].named])


def unexpected(record: Record, expected: list[tuple[str, tuple[str, ...]]]) -> str:
    wanted = [f"{'+'.join(keys)} ({name})" for name, keys in expected]
    return f"expected keys {' or '.join(wanted)}; found {found(record)}. Rename the keys in the file"


def found(record: Record) -> str:
    keys = [printable(key if len(key) <= 40 else f"{key[:37]}...") for key in map(str, record)]
    return ", ".join(keys[:10]) + (", ..." if len(keys) > 10 else "") if keys else "none"


NEAR = 0.45  # half of two keys and a little of the other


def nearest(record: Record) -> list[tuple[str, tuple[str, ...]]]:
    """The keys, or a few sets of them, that are most like those of a record, each with its layout."""
    there = [key for key in map(str, record) if len(key) <= 40][:50]
    layouts = [(name, keys) for name, layout in FORMATS.items() for keys in layout.keys]
    scores = [sum(alike(key, there) for key in keys) / len(keys) for _, keys in layouts]
    best = max(score for score in scores if score < 1)  # 1 is a set whose values are of another layout
    return [it for it, score in zip(layouts, scores, strict=True) if score == best][:3] if best >= NEAR else []


def alike(key: str, others: list[str]) -> float:
    """1 for a key that is there, less for one that is misspelt or goes by another case."""
    if key in others:
        return 1
    ratio = max((SequenceMatcher(None, key.lower(), other.lower()).ratio() for other in others), default=0)
    return 0.9 * ratio if ratio > 0.75 else 0
