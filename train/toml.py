"""TOML to and from dataclasses: what a settings file may say, and how a config is written down.

A nested dataclass is a table of the file; a dict or a tuple is one value, replaced as a whole. Reading lists
every unknown key and every value of the wrong type, each with its file and its dotted key, before anything
is refused: a person who gets three keys wrong wants to hear of all three at once.
"""

import dataclasses
import json
import tomllib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from models.errors import ConfigError
from train.qlora_names import translation

Values = dict[str, Any]  # field name -> value, and for a nested dataclass -> Values


@dataclass(frozen=True)
class Layer:
    """One table of settings, to be laid over others, and where it is from."""

    origin: str
    """A file, or "preset NAME"."""
    table: dict[str, Any]


def load_table(path: Path) -> dict[str, Any]:
    """Read a TOML file, or say why it cannot be read."""
    try:
        return tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: is not UTF-8 text (byte {error.start})") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None


def merge(cls: type, layers: Iterable[Layer]) -> tuple[Values, dict[str, str], list[str]]:
    """Merge layers into (values, the origin of each dotted key, problems); a later one wins."""
    merged: Values = {}
    origins: dict[str, str] = {}
    problems: list[str] = []
    for layer in layers:
        read_table(cls, layer.table, "", merged, origins, layer.origin, problems, all_keys(cls))
    return merged, origins, problems


def read_table(
    cls: type,
    table: dict[str, Any],
    prefix: str,
    into: Values,
    origins: dict[str, str],
    origin: str,
    problems: list[str],
    known: Sequence[str],
) -> None:
    """Check one table against its dataclass and put what is right into `into`."""
    hints = get_type_hints(cls)
    names = {field.name for field in dataclasses.fields(cls)}
    seen: set[str] = set()
    for spelled, value in table.items():
        name = spelled.replace("-", "_")
        key = prefix + name
        if name not in names:
            problems.append(f"{origin}: {prefix}{spelled}: unknown key{suggestion(key, known)}")
        elif name in seen:
            problems.append(f"{origin}: {key}: given twice, with - and with _")
        elif not dataclasses.is_dataclass(hints[name]):
            try:
                into[name] = convert(value, hints[name])
                origins[key] = origin
            except ValueError:
                wanted = describe(hints[name])
                hint = suggestion(str(value), [str(choice) for choice in literals(hints[name])])
                problems.append(f"{origin}: {key}: must be {wanted}, not {toml_or_repr(value)}{hint}")
        elif isinstance(value, dict):
            inner = into.setdefault(name, {})
            read_table(hints[name], value, key + ".", inner, origins, origin, problems, known)
        else:
            problems.append(f"{origin}: {key}: must be a table, [{key}], not {toml_or_repr(value)}")
        seen.add(name)
    supersede(cls, seen, into, origins, prefix)


def supersede(cls: type, given: Collection[str], into: Values, origins: dict[str, str], prefix: str = "") -> None:
    """Take out what was set before and is another way to say what is given now.

    A class names such fields as `alternatives`: who asks for epochs over a preset of so many steps wants no steps.
    """
    for group in getattr(cls, "alternatives", ()):
        if any(name in given for name in group):
            for name in group:
                if name not in given:
                    into.pop(name, None)
                    origins.pop(prefix + name, None)


def all_keys(cls: type, prefix: str = "") -> list[str]:
    """List every dotted key that a file may set."""
    keys = []
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        keys.append(prefix + field.name)
        if dataclasses.is_dataclass(hints[field.name]):
            keys += all_keys(hints[field.name], f"{prefix}{field.name}.")
    return keys


def suggestion(word: str, known: Sequence[str]) -> str:
    """Say which known word was probably meant: the same last part elsewhere, else the nearest spelling.

    A name of qlora.py's, for which there is another one here, is translated.
    """
    leaf = word.rpartition(".")[2]
    if said := translation(leaf, known):
        return f"; {said}"
    elsewhere = [other for other in known if other.rpartition(".")[2] == leaf]
    near = elsewhere or get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:
        leaves = {other.rpartition(".")[2]: other for other in known}
        near = [leaves[name] for name in get_close_matches(leaf, leaves, n=1, cutoff=0.75)]
    return f"; did you mean {' or '.join(near)}?" if near else ""


# Types


def convert(value: Any, kind: Any) -> Any:
    """Give a TOML value as a field holds it: lists become tuples, and whole numbers floats where wanted."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for option in arguments:
            try:
                return convert(value, option)
            except ValueError:
                continue
    elif origin is Literal:
        if any(type(value) is type(choice) and value == choice for choice in arguments):
            return value
    elif origin is tuple and isinstance(value, list):
        if arguments[1:] == (...,):
            return tuple(convert(item, arguments[0]) for item in value)
        if len(arguments) == len(value):
            return tuple(convert(item, each) for item, each in zip(value, arguments, strict=True))
    elif origin is dict and isinstance(value, dict):
        return {name: convert(item, arguments[1]) for name, item in value.items()}
    elif kind is float and type(value) in (int, float):
        return float(value)
    elif kind in (str, int, bool) and type(value) is kind:  # type(): True is an int to isinstance
        return value
    raise ValueError(value)


def describe(kind: Any) -> str:
    """Say in words what a field takes."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " or ".join(describe(option) for option in arguments if option is not NoneType)
    if origin is Literal:
        return "one of " + ", ".join(json.dumps(choice) for choice in arguments)
    if origin is tuple and arguments[1:] == (...,):
        return f"a list, each item {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}: {', '.join(map(describe, arguments))}"
    if origin is dict:
        return f"a table, each value {describe(arguments[1])}"
    return {str: "text", int: "a whole number", float: "a number", bool: "true or false"}[kind]


def literals(kind: Any) -> list[Any]:
    """List the choices of a Literal, also inside a union."""
    if get_origin(kind) is Literal:
        return list(get_args(kind))
    return [choice for option in get_args(kind) for choice in literals(option)]


# Writing


def to_toml(config: Any, note: Callable[[str], str] | None = None) -> str:
    """Write a config so that reading it back gives an equal one.

    None is left out, so a field may be None only where that is its default. Fields with the metadata
    `saved=False` belong to one call and not to the recipe, and are left out too. `note` gives a comment for
    each dotted key; with it, what is left out as None is there as a comment.
    """
    return "\n".join(toml_table(config, (), note)).strip() + "\n"


def toml_table(config: Any, path: tuple[str, ...], note: Callable[[str], str] | None) -> list[str]:
    """Give the lines of a table and then of the tables in it."""
    lines = ["", f"[{'.'.join(path)}]"] if path else []
    tables: list[str] = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not field.metadata.get("saved", True):
            continue
        comment = f"  # {note('.'.join((*path, field.name)))}" if note else ""
        if value is None:
            if field.default is not None:
                raise ValueError(f"{'.'.join((*path, field.name))} is None, which TOML cannot say")
            lines += [f"# {field.name} is not set{comment}"] if note else []
        elif dataclasses.is_dataclass(value):
            tables += toml_table(value, (*path, field.name), note)
        else:
            lines.append(f"{field.name} = {toml_value(value)}{comment}")
    return lines + tables


def toml_value(value: Any) -> str:
    """Give a value as TOML spells it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):  # a JSON string is a TOML string, except that TOML forbids a bare DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml_value(name)} = {toml_value(item)}" for name, item in value.items()) + "}"
    raise ValueError(f"TOML has no form for {type(value).__name__}")


def toml_or_repr(value: Any) -> str:
    """Give what came as the file would say it (dates, which no setting takes, as Python says them)."""
    try:
        return toml_value(value)
    except ValueError:
        return str(value)
