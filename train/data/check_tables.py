"""What `qlora data check` found, as a person reads it."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from eval.data.records import printable

if TYPE_CHECKING:
    from rich.console import Console

BAR = 12  # characters of the longest bar
PARTS = ("prompt", "response", "whole")


def show(report: dict[str, Any], console: "Console") -> None:
    """Print a report."""
    for line in facts(report):
        console.print(Text(printable(line)), soft_wrap=True)
    if report["checked"]:
        console.print(lengths(report))
        console.print(histogram(report))
    if "labels" in report:
        console.print(labels(report["labels"]))
    for line in findings(report):
        console.print(Text(printable(line)), soft_wrap=True)
    for problem in report["problems"]:
        console.print(Text(printable(f"problem: {problem}"), "red"), soft_wrap=True)


def facts(report: dict[str, Any]) -> list[str]:
    lines = [f"{report['path']}: {report['format']} ({report['why']})"]
    lines += [f"  {file['name']}  {file['bytes']:,} bytes  sha256 {file['sha256']}" for file in report["files"]]
    some = f", of which {report['checked']} are looked at" if report["checked"] < report["examples"] else ""
    lines.append(f"{report['records']:,} records, {report['examples']:,} examples{some}")
    if report["unit"] == "characters":
        lines.append("without --tokenizer only the structure is checked, and lengths are in characters")
    return lines


def lengths(report: dict[str, Any]) -> Table:
    table = Table("part", title=f"lengths in {report['unit']}")
    columns = ("median", "p90", "p99", "longest")
    for name in columns:
        table.add_column(name, justify="right")
    for part in PARTS:
        table.add_row(part, *(f"{report[part][name]:,}" for name in columns))
    return table


def histogram(report: dict[str, Any]) -> Table:
    """A row for each doubling of the length, a bar for each part."""
    rows: dict[tuple[int, int], dict[str, int]] = {}
    for part in PARTS:
        for low, high, count in report[part]["histogram"]:
            rows.setdefault((low, high), {})[part] = count
    most = max((count for row in rows.values() for count in row.values()), default=1)
    table = Table(report["unit"], *PARTS)
    table.columns[0].justify = "right"
    for (low, high), row in sorted(rows.items()):
        table.add_row(f"{low}-{high}" if high > low else str(low), *(bar(row.get(part, 0), most) for part in PARTS))
    return table


def bar(count: int, most: int) -> str:
    return f"{'█' * max(1, round(BAR * count / most))} {count:,}" if count else ""


def labels(found: dict[str, int]) -> Table:
    table, total = Table("class", "name", "examples", "share"), sum(found.values())
    for number, (name, count) in enumerate(found.items()):
        table.add_row(str(number), Text(printable(name)), f"{count:,}", f"{count / max(1, total):.1%}")
    return table


def findings(report: dict[str, Any]) -> list[str]:
    """What is to be known beside the lengths, a sentence each."""
    lines = [f"passed over: {it['count']:,} {it['reason']} (first: {it['first']})" for it in report["passed_over"]]
    if "scores" in report:
        lines.append("scores from {lowest:g} to {highest:g}, mean {mean:.3g}".format(**report["scores"]))
    if "dropped" in report:
        lines += dropped(report["dropped"])
        lines.append(f"cut: {report['cut_prompts']:,} prompts, {report['cut_responses']:,} responses")
        if report["task"] in ("classification", "regression"):
            return [*lines, *repeated(report)]
        lines.append(f"learned: {report['label_tokens']:,} tokens, {report['label_share']:.1%} of all")
        end = report["end_of_text"]
        ids = " or ".join(f"{name} ({number})" for name, number in end["ids"].items())
        lines.append(f"end of text: {ids} is learned in {end['examples']:,} examples, {end['share']:.1%}")
        pad = "no id of its own" if end["pad_id"] is None else f"id {end['pad_id']}"
        lines.append(f"padding: {pad}; it {end['padding']}, and never learned")
    return [*lines, *repeated(report)]


def repeated(report: dict[str, Any]) -> list[str]:
    kinds = (("duplicates", "examples that repeat an earlier one"), ("empty_prompts", "empty prompts"))
    return [
        f"{what}: {report[name]['count']:,} ({places(report[name])})" for name, what in kinds if report[name]["count"]
    ]


def dropped(found: dict[str, Any]) -> list[str]:
    if not found["count"]:
        return ["dropped: none"]
    more = [f"  and {found['count'] - len(found['first']):,} more"] if found["count"] > len(found["first"]) else []
    listed = [f"  {where}: {found['reason']}" for where in found["first"]]
    return [f"dropped: {found['count']:,}", *listed, *more]


def places(found: dict[str, Any]) -> str:
    return ", ".join(Path(where).name for where in found["first"]) + (
        ", ..." if found["count"] > len(found["first"]) else ""
    )
