"""Settings: one frozen dataclass is the TOML file, the flags, the help and the record of a run.

Values come from the dataclass's defaults, then from presets if the class has any, then from TOML files (a later
file wins), then from dotted flags. Flags are tyro's: the docstring under a field is its help. The config is built
only when all are read, so that every value that a `__post_init__` refuses is listed, with the preset, the file or
the flag it came from.
"""

import argparse
import dataclasses
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from models.errors import ConfigError
from train.preset import preset_layers, with_presets
from train.qlora_names import translation
from train.toml import Layer, Values, all_keys, load_table, merge, supersede, to_toml

__all__ = ["parse", "read_config", "to_toml"]

C = TypeVar("C")


def parse(cls: type[C], argv: Sequence[str] | None = None, *, prog: str | None = None, description: str = "") -> C:
    """Give the config that the flags, the files named by `--config` and the presets ask for.

    An unknown flag or a value of the wrong type ends the process with exit code 2 and a suggestion on stderr;
    everything else that is wrong is one ConfigError. `--lora.rank-pattern` and its like, when given, replace
    what a file says. `--print-config` prints the config with the origin of each value, and ends the process.
    """
    import tyro

    first = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False)
    first.add_argument("--config", action="append", default=[], metavar="FILE")
    first.add_argument("--print-config", action="store_true")
    note = "--config FILE reads a TOML file, whose values become the defaults below; a later one wins. "
    note += "--print-config prints all settings, each with where it comes from, and ends."
    if presets_of(cls):
        first.add_argument("--preset", action="append", default=[], metavar="NAME")
        note += " --preset NAME lays shipped settings under those files (qlora list presets)."
    given, flags = first.parse_known_args(sys.argv[1:] if argv is None else list(argv))
    values, origins, problems = read_sources(cls, getattr(given, "preset", []), given.config)
    problems += foreign_flags(cls, flags)

    start = as_defaults(cls, values, tyro.MISSING)
    try:
        chosen: Any = tyro.cli(
            type(start), args=flags, default=start, prog=prog, description=f"{description}\n\n{note}".strip()
        )
    except SystemExit as stop:
        if stop.code and problems:  # what tyro printed may follow from the file, so say both
            raise ConfigError(listed(problems)) from None
        raise
    take_flags(cls, chosen, start, values, origins, {flag.partition("=")[0].replace("_", "-") for flag in flags})
    config = finish(cls, values, origins, problems)
    if given.print_config:
        print(to_toml(config, lambda key: origins.get(key, "default")), end="")
        raise SystemExit(0)
    return config


def read_config(cls: type[C], *paths: Path | str) -> C:
    """Give the config that the TOML files alone ask for; a later one wins."""
    return finish(cls, *read_sources(cls, [], paths))


def read_sources(
    cls: type, presets: Sequence[str], paths: Sequence[Path | str]
) -> tuple[Values, dict[str, str], list[str]]:
    """Merge presets and then files into (values, the origin of each dotted key, problems)."""
    directory = presets_of(cls)
    layers: list[Layer] = []
    problems: list[str] = []
    for name in presets:
        assert directory is not None
        try:
            layers += preset_layers(directory, name)
        except ConfigError as error:
            problems.append(str(error))
    for path in paths:
        try:
            layers += with_presets(directory, Layer(str(path), load_table(Path(path))))
        except ConfigError as error:
            problems.append(str(error))
    values, origins, wrong = merge(cls, layers)
    return values, origins, problems + wrong


def presets_of(cls: type) -> Path | None:
    """Give the directory of a config's presets, which its class names as `presets`."""
    return getattr(cls, "presets", None)


# Flags over files


def as_defaults(cls: type, values: Values, missing: Any) -> Any:
    """Give an unchecked instance with the files' values, for tyro to show as defaults and to fill in.

    Dicts stay as the class has them: tyro would turn the entries of a filled one into flags of their own.
    """
    kind = unchecked(cls)
    start: Values = {}
    hints = get_type_hints(cls)
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(hints[field.name]):
            inner = filled(field, values.get(field.name, {}))  # of cls: the twin's fields have no defaults of their own
            start[field.name] = as_defaults(hints[field.name], inner, missing)
        elif field.name in values and not isinstance(values[field.name], dict):
            start[field.name] = values[field.name]
        else:
            start[field.name] = default_of(field, missing)
    return kind(**start)


@functools.cache  # one twin per class, also where it is nested
def unchecked(cls: type) -> type:
    """Give the dataclass without its checks, all the way down.

    tyro builds the config itself and would stop at the first `__post_init__` that refuses. Being a subclass,
    the twin keeps the docstrings that tyro reads.
    """
    hints = get_type_hints(cls)
    nested = [
        (field.name, unchecked(hints[field.name]), dataclasses.field())
        for field in dataclasses.fields(cls)
        if dataclasses.is_dataclass(hints[field.name])
    ]
    namespace = {"__post_init__": lambda self: None, "__doc__": cls.__doc__, "__module__": cls.__module__}
    return dataclasses.make_dataclass(
        cls.__name__, nested, bases=(cls,), namespace=namespace, frozen=True, kw_only=True
    )


def filled(field: Field, given: Values) -> Values:
    """Give a nested config's values: what its field has by default, under what is given."""
    default = default_of(field, None)
    return under(default, given) if dataclasses.is_dataclass(default) else given


def under(default: Any, given: Values) -> Values:
    """Lay the given values over those of a config."""
    values: Values = {}
    for field in dataclasses.fields(default):
        current = getattr(default, field.name)
        if dataclasses.is_dataclass(current):
            values[field.name] = under(current, given.get(field.name, {}))
        else:
            values[field.name] = given.get(field.name, current)
    return values


def take_flags(
    cls: type, chosen: Any, start: Any, values: Values, origins: dict[str, str], given: set[str], key: str = ""
) -> None:
    """Put what the flags changed into `values`, and the flags that were given into `origins`."""
    for field in dataclasses.fields(cls):
        new, old = getattr(chosen, field.name), getattr(start, field.name)
        flag = f"--{key}{field.name}".replace("_", "-")
        if dataclasses.is_dataclass(old):
            inner = values.setdefault(field.name, {})
            take_flags(type(old), new, old, inner, origins, given, f"{key}{field.name}.")
        elif new != old or {flag, f"--{key}no-{field.name}".replace("_", "-")} & given:
            values[field.name] = new
            origins[key + field.name] = flag
    asked = {field.name for field in dataclasses.fields(cls) if f"--{key}{field.name}".replace("_", "-") in given}
    supersede(cls, asked, values, origins, key)


def foreign_flags(cls: type, flags: Sequence[str]) -> list[str]:
    """List the flags that are qlora.py's names of settings, each with the name here."""
    known = all_keys(cls)
    names = [flag.partition("=")[0] for flag in flags if flag.startswith("--")]
    said = {name: translation(name[2:].replace("-", "_"), known) for name in names}
    return [f"{name}: unknown flag; {text}" for name, text in said.items() if text]


# Building


def finish(cls: type[C], values: Values, origins: dict[str, str], problems: list[str]) -> C:
    """Build the checked config, or raise one ConfigError with every problem."""
    config = build(cls, values, "", origins, problems)
    if problems:
        raise ConfigError(listed(problems))
    return config


def build(cls: type[C], values: Values, prefix: str, origins: dict[str, str], problems: list[str]) -> Any:
    """Build the innermost configs first; a problem is noted with its origin, and the default stands in."""
    hints = get_type_hints(cls)
    arguments: Values = {}
    for field in dataclasses.fields(cls):  # pyrefly: ignore[bad-argument-type]
        if dataclasses.is_dataclass(hints[field.name]):
            inner = filled(field, values.get(field.name, {}))
            value = build(hints[field.name], inner, f"{prefix}{field.name}.", origins, problems)
        else:
            value = values.get(field.name, MISSING)
        if value is not MISSING:
            arguments[field.name] = value
        elif default_of(field, MISSING) is MISSING:
            if not dataclasses.is_dataclass(hints[field.name]):
                problems.append(f"{prefix}{field.name}: is not set and has no default")
            return MISSING

    try:
        return cls(**arguments)
    except ValueError as error:
        for name, message in impossible(cls, arguments, str(error)):
            named = [name] if name else [field for field in arguments if field in message]
            where = dict.fromkeys(origins[prefix + field] for field in named if prefix + field in origins)
            key = "" if any(origin.startswith("--") for origin in where) else f"{prefix}{name}".rstrip(".")
            problems.append(": ".join(filter(None, [", ".join(where), key, message])))
        return MISSING


def impossible(cls: Callable[..., Any], arguments: Values, joint: str) -> list[tuple[str, str]]:
    """List (field, message) of each value refused by itself; field "" where only the whole is refused."""
    required = {
        field.name: arguments[field.name]
        for field in dataclasses.fields(cls)  # pyrefly: ignore[bad-argument-type]
        if default_of(field, MISSING) is MISSING
    }

    def refused(values: Values) -> str:
        try:
            cls(**values)
        except ValueError as error:
            return str(error)
        return ""

    empty = refused(required)
    alone = [(name, refused({**required, name: value})) for name, value in arguments.items()]
    found = [(name, message) for name, message in alone if message not in ("", empty)]
    if not found:
        return [("", joint)]
    wrong = dict(found).keys() - required.keys()
    rest = refused({name: value for name, value in arguments.items() if name not in wrong})
    return found if rest in ("", empty, *dict(found).values()) else [*found, ("", rest)]


def default_of(field: Field, otherwise: Any) -> Any:
    """Give a field's default."""
    if field.default is not MISSING:
        return field.default
    return otherwise if field.default_factory is MISSING else field.default_factory()


def listed(problems: Sequence[str]) -> str:
    """Say one problem as a sentence, several as a list."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems in the settings:", *(f"  {problem}" for problem in problems)])
