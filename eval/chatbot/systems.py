"""One name for each system, whatever the files call it.

The released ratings name their systems by file, in several spellings: `7b-guanaco-vicuna-generations-topp0.9-temp0.7`,
`answer_guanaco-7b`, `answer-gpt35`, `gpt-3.5`. The rules here make one short name of these; a user's alias goes
before the rules, so that nothing is merged that should stay apart.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from eval.data.records import printable
from models.errors import ConfigError

LLAMA = "llama|guanaco|alpaca|flan-?v2|hh-rlhf|unnatural.*|chip2|longform|self-?instruct|oasst1?"

RULES: tuple[tuple[str, str], ...] = (  # in this order, on a name in lower case with hyphens for underscores
    (r"^.*/(?=[^/]*\.jsonl?$)", ""),  # the directory of a file
    (r"\.jsonl?$", ""),
    (r"^answers?-(?=.)", ""),
    (r"(?<=.)(-(vicuna|oa))?-generations?(-.*)?$", ""),  # what a system was asked, and how it was sampled
    (r"(?<=.):20\d{6}.*$", ""),  # the day of an answer
    (r"^(\d+(?:\.\d+)?b)-(.+)$", r"\2-\1"),  # a size in front
    (r"^(chat-?gpt|gpt-?3\.?5)(-turbo)?$", "gpt-3.5"),
    (r"^gpt-?4$", "gpt-4"),
    (rf"^({LLAMA})-30b$", r"\1-33b"),  # the first LLaMA's third size, 32.5 billion, was rounded both ways
)

JUDGES = r"human|gpt-?(?:4|3\.?5)[a-z]?(?:-turbo|-mini|-preview)*(?:-\d{4}(?:-\d\d-\d\d)?)?"
REVIEWED = re.compile(r"[-_]reviewer(?:[-_].*)?$")


class FileName(NamedTuple):
    """What a rating file's name tells: the system shown first, the one shown second, and who judged."""

    first: str
    second: str
    judge: str


def short_name(name: str) -> str:
    """The short name of a system.

    >>> [short_name(name) for name in ("30b-guanaco-vicuna-generations-topp0.9-temp0.7", "answer_guanaco-33b")]
    ['guanaco-33b', 'guanaco-33b']
    >>> [short_name(name) for name in ("answer-gpt35", "gpt-3.5-oa-generations", "GPT-4", "my_model")]
    ['gpt-3.5', 'gpt-3.5', 'gpt-4', 'my-model']
    """
    short = name.strip().lower().replace("_", "-")
    for pattern, replacement in RULES:
        short = re.sub(pattern, replacement, short)
    return short


def parse_file_name(stem: str, known: str = "") -> FileName | None:
    """The systems and the judge in a name such as `A-vs-B-gpt-4-reviewer-threeclass`, or None.

    Where the second system ends is clear if it is `known`, or else by the judge's name: one of those that JUDGES
    describes, or a single word.

    >>> parse_file_name("gpt-3.5-vs-vicuna-13b-gpt4-reviewer")
    FileName(first='gpt-3.5', second='vicuna-13b', judge='gpt-4')
    """
    first, mark, rest = re.sub(r"[-_]vs[-_]", "\0", stem, count=1).partition("\0")
    second, judge = rest, ""
    if reviewed := REVIEWED.search(rest):
        rest = rest[: reviewed.start()]
        ways = (rf"({re.escape(known)})[-_](.+)", rf"(.+)[-_]({JUDGES})", r"(.+)[-_]([^-_]+)")
        found = next((way for each in ways if (way := re.fullmatch(each, rest, re.IGNORECASE))), None)
        second, judge = found.groups() if found else (rest, "")
    return FileName(first, second, short_name(judge)) if mark and first and second else None


class Names:
    """The short names of the systems that were met, each with the names that files give it."""

    def __init__(self, aliases: Mapping[str, str] | None = None) -> None:
        self.aliases = dict(aliases or {})
        self.short: dict[str, str] = {}

    def __call__(self, name: str) -> str:
        if name not in self.short:
            short = short_name(name)
            self.short[name] = one_line(self.aliases.get(name) or self.aliases.get(short) or short)
        return self.short[name]

    def found(self) -> dict[str, list[str]]:
        """Each short name, with the names that it stands for."""
        return {
            short: sorted(n for n, s in self.short.items() if s == short) for short in sorted(set(self.short.values()))
        }


def one_line(text: str) -> str:
    """A text for a cell of a table: white space of any kind is a space, and control characters are written out."""
    return printable(" ".join(text.split()))


def parse_aliases(aliases: Sequence[str]) -> dict[str, str]:
    """`name=short` of each system that is to be called something else.

    >>> parse_aliases(["answer_x=mine"])
    {'answer_x': 'mine'}
    """
    table: dict[str, str] = {}
    for alias in aliases:
        name, _, short = (part.strip() for part in alias.rpartition("="))
        if not name or not short:
            raise ConfigError(f"alias: {alias!r} is not NAME=SHORT, a system's name in the files and what to call it")
        if table.setdefault(name, short) != short:
            raise ConfigError(f"alias: {name!r} is to be called {table[name]!r} and {short!r}; give it one name")
    return table
