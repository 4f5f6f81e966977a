"""Which tasks there are, and what was asked for: names to families, settings to the tasks they are for."""

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from eval.examinee import Examinee
from eval.task import Family, Spec, Suite
from models import ConfigError, DataError

MODULES = (
    "eval.perplexity",
    "eval.mmlu.family",
    "eval.glue.family",
    "eval.superni.family",
    "eval.crows",
    "eval.choice.generic",
    "eval.choice.zero_shot",
    "eval.choice.bigbench",
    "eval.choice.raft",
    "eval.lemons.family",
)  # each with a FAMILY


@cache
def families() -> dict[str, Family]:
    """The families by name."""
    found = [importlib.import_module(module).FAMILY for module in MODULES]
    return {family.name: family for family in found}


def family_of(name: str) -> Family:
    """The family that a task's name belongs to."""
    names = {known: family for family in families().values() for known in (family.name, *family.names)}
    if name not in names:
        near = get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]}?" if near else " `qlora list tasks` shows them."
        raise ConfigError(f"task {name!r} is not known.{hint}")
    return names[name]


@dataclass(frozen=True)
class Settings:
    """What goes with the tasks: each setting is VALUE, for all tasks, or NAME=VALUE, for one."""

    data: Sequence[str] = ()
    protocol: Sequence[str] = ()
    split: Sequence[str] = ()
    num_fewshot: Sequence[str] = ()
    window: Sequence[str] = ()
    max_chars: int | None = None
    seed: int = 1234


@dataclass(frozen=True)
class Wanted:
    """A name with what goes with it, checked as far as that can be done without data or a model."""

    family: Family
    fields: dict[str, Any]
    """All of a Spec but the examinee."""


def wanted(tasks: str, settings: Settings) -> list[Wanted]:
    """What a list of names asks for."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise ConfigError("task names nothing; give one or several, with commas between them")
    owners = {name: family_of(name) for name in names}
    known = {*names, *(family.name for family in owners.values())}
    for option in ("data", "protocol", "split", "num_fewshot", "window"):
        check_names(option, getattr(settings, option), known)
    return [Wanted(family, fields_of(name, family, settings)) for name, family in owners.items()]


def fields_of(name: str, family: Family, settings: Settings) -> dict[str, Any]:
    """The settings of one name."""
    who = (name, family.name)
    protocol, split = (chosen(option, getattr(settings, option), who) for option in ("protocol", "split"))
    check_choice("protocol", protocol, family.protocols, family.name)
    check_choice("split", split, family.splits, family.name)
    return {
        "name": name,
        "data": data_path(chosen("data", settings.data, who), who),
        "protocol": protocol,
        "split": split,
        "num_fewshot": whole("num_fewshot", chosen("num_fewshot", settings.num_fewshot, who), 0),
        "window": whole("window", chosen("window", settings.window, who), 2),
        "max_chars": settings.max_chars,
        "seed": settings.seed,
    }


def build(asked: Sequence[Wanted], examinee: Examinee) -> list[Suite]:
    """The tasks, with their data read."""
    suites = [it.family.build(Spec(examinee=examinee, **it.fields)) for it in asked]
    twice = duplicates([task.name for suite in suites for task in suite.tasks])
    if twice:
        names = ", ".join(it.fields["name"] for it in asked)
        raise ConfigError(f"task: {names} ask for {', '.join(twice)} more than once; name each part once")
    return suites


def chosen(option: str, given: Sequence[str], who: Sequence[str]) -> str | None:
    """The value of a setting for a task: its own, or its family's, or that of all."""
    for name in who:
        own = [item.partition("=")[2] for item in given if is_named(item) and item.partition("=")[0] == name]
        if own:
            return own[-1]
    plain = [item for item in given if not is_named(item)]
    if len(plain) > 1:
        raise ConfigError(f"{option} is given as {' and '.join(plain)}; write NAME={plain[0]} for the task it is for")
    return plain[0] if plain else None


def is_named(item: str) -> bool:
    """NAME=VALUE, and not a path with an equals sign in it."""
    name, equals, _ = item.partition("=")
    return bool(equals) and name.replace("_", "").replace("-", "").isalnum()


def check_names(option: str, given: Sequence[str], known: set[str]) -> None:
    for item in given:
        name = item.partition("=")[0]
        if is_named(item) and name not in known:
            raise ConfigError(
                f"{option} {item!r} is for {name}, which is not among the tasks: {', '.join(sorted(known))}"
            )


def check_choice(option: str, value: str | None, choices: Sequence[str], family: str) -> None:
    if value is not None and value not in choices:
        has = f"{family} has {', '.join(choices)}" if choices else f"{family} has none to choose"
        raise ConfigError(f"{option} {value!r} is not known; {has}")


def whole(option: str, value: str | None, least: int) -> int | None:
    if value is None:
        return None
    try:
        number = int(value)
    except ValueError:
        raise ConfigError(f"{option} is {value!r}; a whole number is needed") from None
    if number < least:
        raise ConfigError(f"{option} is {number}; it must be at least {least}")
    return number


def data_path(given: str | None, who: Sequence[str]) -> Path | None:
    """The path as given, or a folder below it with the task's or its family's name: one folder can hold all data."""
    if given is None:
        return None
    path = Path(given)
    if not path.exists():
        raise DataError(f"data: {path} does not exist")
    return next((path / name for name in who if (path / name).is_dir()), path)


def duplicates(names: Sequence[str]) -> list[str]:
    return sorted({name for name in names if names.count(name) > 1})
