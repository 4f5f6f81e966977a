"""The page of a report: one HTML file without scripts, in which what systems wrote is text and nothing else.

Filters are radio buttons that stand before what they filter, so that style rules alone can do it. Should a text ever
be taken for HTML, the page's Content-Security-Policy still runs and fetches nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from models.errors import DataError

Row = dict[str, Any]
Name = tuple[str, str]  # of a probe: its category and id

STYLE = Path(__file__).parent / "page.css"
SPEAKERS = {"user": "User", "assistant": "Assistant", "system": "System"}


@dataclass(frozen=True)
class Sheet:
    """A system's answers."""

    system: str
    rows: Sequence[Row]
    """As `lemons.jsonl` has them."""


def as_html(sheets: Sequence[Sheet]) -> str:
    """The whole page."""
    probes = by_probe(sheets)
    categories = list(dict.fromkeys(category for category, _ in probes))
    titles = ["all categories", *map(title, categories)]
    shown = ["everything", "with a failure", *(["where systems differ"] if len(sheets) > 1 else [])]
    style = STYLE.read_text(encoding="utf-8") + "\n".join(filter_rules(len(categories), len(shown)))
    counted = f"{len(probes)} probe{'s' * (len(probes) != 1)}, {', '.join(escape(it.system) for it in sheets)}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Lemons</title><style>{style}</style></head><body>",
        f'<h1>Lemons</h1><p class="quiet">{counted}. The checks are rules of thumb: read the answers.</p>',
        *summary(sheets, categories),
        *filters("category", titles),
        *filters("shown", shown),
        *labels("category", "Category", titles),
        *labels("shown", "Show", shown),
        "<main>",
    ]
    for number, category in enumerate(categories, 1):
        own = {name: answers for name, answers in probes.items() if name[0] == category}
        marks = sorted({mark for answers in own.values() for mark in marks_of(answers)})
        parts.append(f'<section class="{" ".join([f"category-{number}", *marks])}"><h2>{escape(title(category))}</h2>')
        for answers in own.values():
            parts += article(sheets, answers)
        parts.append("</section>")
    return "\n".join([*parts, "</main></body></html>", ""])


def by_probe(sheets: Sequence[Sheet]) -> dict[Name, list[Row | None]]:
    """For each probe the rows of all systems; None where one was not asked."""
    found: dict[Name, list[Row | None]] = {}
    for number, sheet in enumerate(sheets):
        for row in sheet.rows:
            unasked: list[Row | None] = [None] * len(sheets)
            rows = found.setdefault((row["category"], row["id"]), unasked)
            other = next((it for it in rows if it is not None), row)
            if other["messages"] != row["messages"]:
                raise DataError(f"{row['category']}, {row['id']}: the systems were asked different things")
            rows[number] = row
    return found


def marks_of(answers: Sequence[Row | None]) -> list[str]:
    """Classes by which a probe is filtered."""
    passed = {row["passed"] for row in answers if row is not None}
    return ["fails"] * (False in passed) + ["differs"] * (len(passed) > 1)


def summary(sheets: Sequence[Sheet], categories: Sequence[str]) -> Iterator[str]:
    """How many probes of each category passed, by system."""
    heads = "".join(f'<th scope="col">{escape(sheet.system)}</th>' for sheet in sheets)
    yield f'<div class="scroll"><table><tr><th scope="col">passed</th>{heads}</tr>'
    for category in [*categories, None]:
        cells = ""
        for sheet in sheets:
            passed = [row["passed"] for row in sheet.rows if category in (None, row["category"])]
            cells += f"<td>{sum(passed)} of {len(passed)}</td>"
        yield f'<tr><th scope="row">{escape(title(category) if category else "all")}</th>{cells}</tr>'
    yield "</table></div>"


def filters(name: str, labels: Sequence[str]) -> Iterator[str]:
    """Radio buttons, which stand before all that they filter, so that style rules alone can do it."""
    for number, label in enumerate(labels):
        checked = " checked" * (number == 0)
        kind = f'class="filter" type="radio" name="{name}" id="{name}-{number}"{checked}'
        yield f'<input {kind} aria-label="{escape(label)}">'


def labels(name: str, said: str, labels: Sequence[str]) -> Iterator[str]:
    yield f'<nav aria-hidden="true"><span class="quiet">{said}</span>'
    for number, label in enumerate(labels):
        yield f'<label for="{name}-{number}">{escape(label)}</label>'
    yield "</nav>"


def filter_rules(categories: int, shown: int) -> Iterator[str]:
    """The style rules of the filters."""
    for name, count in (("category", categories + 1), ("shown", shown)):
        for number in range(count):
            chosen, label = f"#{name}-{number}", f'label[for="{name}-{number}"]'
            yield f"{chosen}:checked ~ nav {label} {{ background: var(--ink); color: var(--ground); }}"
            yield f"{chosen}:focus-visible ~ nav {label} {{ outline: 3px solid var(--focus); outline-offset: 2px; }}"
    for number in range(1, categories + 1):
        yield f"#category-{number}:checked ~ main section:not(.category-{number}) {{ display: none; }}"
    for number, mark in enumerate(("fails", "differs")[: shown - 1], 1):
        yield f"#shown-{number}:checked ~ main :is(section, article):not(.{mark}) {{ display: none; }}"


def article(sheets: Sequence[Sheet], answers: Sequence[Row | None]) -> Iterator[str]:
    """One probe: what was said to the systems, and what each answered."""
    row = next(it for it in answers if it is not None)
    yield f'<article class="{" ".join(marks_of(answers))}"><h3>{escape(row["id"])}</h3>'
    for message in row["messages"]:
        speaker = SPEAKERS.get(message["role"], message["role"])
        content = f'<div class="text" dir="auto">{escape(message["content"])}</div>'
        yield f'<div class="turn"><b>{escape(speaker)}</b>{content}</div>'
    if row["note"]:
        yield f'<p class="quiet">{escape(row["note"])}</p>'
    yield '<div class="answers">'
    for sheet, answer in zip(sheets, answers, strict=True):
        yield from not_asked(sheet.system) if answer is None else answered(sheet.system, answer)
    yield "</div></article>"


def not_asked(system: str) -> Iterator[str]:
    yield f'<div class="answer none"><h4><span>{escape(system)}</span><span>not asked</span></h4></div>'


def answered(system: str, row: Row) -> Iterator[str]:
    """One answer; what decided is marked in it."""
    passed = row["passed"]
    kind, word = ("pass", "✓ passed") if passed else ("fail", "✗ failed")
    yield f'<div class="answer {kind}"><h4><span>{escape(system)}</span><span>{word}</span></h4>'
    deciding = [it for it in row["checks"] if passed or not it["passed"]]
    spans = [tuple(it["found"]) for it in deciding if it["found"]]
    text = marked(row["answer"], spans) if row["answer"].strip() else '<span class="quiet">(nothing)</span>'
    yield f'<div class="text" dir="auto" tabindex="0">{text}</div><ul>'
    for it in row["checks"]:
        mark, state = ("✓", "pass") if it["passed"] else ("✗", "fail")
        yield f'<li class="{state}"><span class="check">{mark}</span> {escape(it["check"])}</li>'
    yield "</ul></div>"


def marked(text: str, spans: Sequence[tuple[int, ...]]) -> str:
    """A text as HTML, with parts of it marked; one that overlaps an earlier one is left out.

    >>> marked("a < b", [(2, 3)])
    'a <mark>&lt;</mark> b'
    """
    parts, end = [], 0
    for start, stop in sorted(spans):
        if start >= end:
            parts += [escape(text[end:start]), f"<mark>{escape(text[start:stop])}</mark>"]
            end = stop
    return "".join([*parts, escape(text[end:])])


def title(category: str) -> str:
    """
    >>> title("secret_keeping")
    'Secret keeping'
    """
    return category.replace("_", " ").capitalize()


def sheet_name(directory: Path) -> str:
    """A system is called as the directory of its results, or as the run that they are of."""
    directory = directory.absolute()
    return directory.parent.name if directory.name == "eval" else directory.name
