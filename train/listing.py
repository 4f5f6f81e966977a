"""`qlora list`: what can be named. Every list is read from the place that decides, so none can fall behind it."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from tyro.conf import Positional

from eval.registry import families
from eval.task import Family
from train.data.formats import FORMATS
from train.preset import presets
from train.recipe import RunConfig

if TYPE_CHECKING:
    from rich.console import Console

TRAINED = {
    "auto": "what the model and the data are made for",
    "causal": "a decoder learns the responses in a text",
    "seq2seq": "an encoder reads the prompt, a decoder learns the response (T5)",
    "classification": "one class for a text or a pair of texts (RoBERTa)",
    "regression": "one number for a text or a pair of texts (RoBERTa)",
}

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class ListOptions:
    """List what there is by name: presets, tasks or formats."""

    what: Positional[Literal["presets", "tasks", "formats"]]
    """presets for `train --preset`, tasks of `train` and `eval`, formats of data files."""
    json: bool = False
    """Print one JSON object on stdout."""


def command(options: ListOptions, console: "Console") -> dict[str, Any]:
    lists: dict[str, Callable[[], list[Row]]] = {
        "presets": preset_rows,
        "tasks": task_rows,
        "formats": format_rows,
    }
    rows = lists[options.what]()
    if not options.json:
        console.print(table(rows))
    return {options.what: rows}


def preset_rows() -> list[Row]:
    """Each preset with the sizes that follow its name after a hyphen."""
    return [asdict(preset) for preset in presets(RunConfig.presets)]


def task_rows() -> list[Row]:
    """What a model can be trained for, and what it can be measured by."""
    trained = [{"verb": "train", "name": name, "summary": TRAINED[name]} for name in choices(RunConfig, "task")]
    measured = [{"verb": "eval", "name": it.name, "summary": about(it)} for it in families().values()]
    return trained + measured


def format_rows() -> list[Row]:
    """Each layout of records with the keys that tell it, and what a record looks like."""
    return [
        {"name": name, "keys": ["+".join(keys) for keys in layout.keys], "shape": layout.shape}
        for name, layout in FORMATS.items()
    ]


def choices(cls: type, field: str) -> Sequence[str]:
    """The values that a field's Literal allows."""
    return get_args(get_type_hints(cls)[field])


def about(family: Family) -> str:
    """What a measurement is, the names of its parts if they are few, and what can be chosen."""
    lists = [("also", family.names if len(family.names) <= 12 else ()), ("protocols", family.protocols)]
    lists += [("splits", family.splits), ("data", (family.data,) if family.data else ())]
    return "; ".join([family.summary, *(f"{what}: {', '.join(names)}" for what, names in lists if names)])


def table(rows: Sequence[Row]) -> Any:
    from rich.table import Table
    from rich.text import Text

    drawn = Table()
    for name in rows[0]:
        drawn.add_column(name, overflow="fold", no_wrap=name in ("name", "verb"))
    for row in rows:
        drawn.add_row(*(Text(" ".join(v) if isinstance(v, list | tuple) else str(v)) for v in row.values()))
    return drawn
