"""A tournament's report for people: tables on the console, and in a folder as Markdown and CSV, with plots.

A table is made once, from the report that `--json` prints. The console and Markdown round its numbers, CSV has all
digits.
"""

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.data.records import printable
from models.errors import WriteError
from models.files import write_whole

if TYPE_CHECKING:
    from rich.console import Console

Report = dict[str, Any]


@dataclass(frozen=True)
class Table:
    """Rows of values under columns, each of which has a format for people."""

    name: str
    """Of its CSV file."""
    title: str
    columns: dict[str, str]
    """Heading and format; an empty format is for text."""
    rows: list[list[Any]]
    numbered: bool = False
    """Whether the columns behind the first are the rows again: a console has no room for their names, only numbers."""

    def texts(self) -> list[list[str]]:
        """The cells as people see them; what there is none of is a dash."""
        formats = self.columns.values()
        return [
            ["–" if cell is None else format(cell, spec) for cell, spec in zip(row, formats, strict=True)]
            for row in self.rows
        ]

    def markdown(self) -> str:
        rows = [list(self.columns), ["---:" if spec else ":---" for spec in self.columns.values()], *self.texts()]
        lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
        return "\n".join([f"## {self.title}", "", *lines, ""])

    def csv(self) -> str:
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(self.columns)
        writer.writerows(self.rows)
        return text.getvalue()

    def rich(self) -> Any:
        from rich.box import SIMPLE_HEAD
        from rich.table import Table as Drawn
        from rich.text import Text

        drawn = Drawn(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for place, (heading, spec) in enumerate(self.columns.items()):
            name = str(place) if self.numbered and place else heading
            drawn.add_column(Text(name), justify="right" if spec else "left", no_wrap=heading == "System")
        for place, row in enumerate(self.texts(), 1):
            first = f"{place:>2}  {row[0]}" if self.numbered else row[0]
            drawn.add_row(*map(Text, (first, *row[1:])))
        return drawn


# The tables


def tables(report: Report) -> list[Table]:
    """All tables of a report."""
    found, parts = [], slugs(report)
    for label, each in report["tournaments"].items():
        found.append(standings_table(label, each, report["settings"], f"elo-{parts[label]}"))
        found.append(net_table(label, each, f"net-wins-{parts[label]}"))
    if len(report["tournaments"]) > 1:
        found.append(ranks_table(report))
    for label, shares in report["relative"].items():
        if shares:
            found.append(relative_table(label, shares, f"relative-{parts[label]}"))
    if report["tournaments"]:
        found.append(agreement_table(report))
    return found


def standings_table(label: str, found: Report, settings: Report, name: str) -> Table:
    columns = {
        "Rank": "d",
        "System": "",
        "Elo": ".1f",
        "± order": ".2f",
        "2.5 %": ".0f",
        "97.5 %": ".0f",
        "Wins": "d",
        "Losses": "d",
        "Ties": "d",
    }
    keys = ("rank", "system", "rating", "order_half", "low", "high", "wins", "losses", "ties")
    title = f"{label}: Elo from {found['matches']:,} matches, K = {settings['k']:g}, {settings['orderings']:,} orders"
    return Table(name, title, columns, [[row[key] for key in keys] for row in found["standings"]])


def net_table(label: str, found: Report, name: str) -> Table:
    """Table 12: the row's wins less its losses, by question."""
    order = [each["system"] for each in found["standings"]]
    net = {(each["system"], each["against"]): each["net"] for each in found["net"]}
    rows = [[system, *(net.get((system, other)) for other in order)] for system in order]
    title = f"{label}: net wins of the row against the column, by question"
    return Table(name, title, {"System": "", **dict.fromkeys(order, "+.2f")}, rows, numbered=True)


def ranks_table(report: Report) -> Table:
    """Table 7: ratings and ranks beside each other."""
    labels = list(report["tournaments"])
    places = [
        {row["system"]: f"{row['rating']:.0f} / {row['rank']}" for row in report["tournaments"][label]["standings"]}
        for label in labels
    ]
    rows = [[system, *(each.get(system) for each in places), m] for system, m in report["median_ranks"].items()]
    columns = {"System": "", **dict.fromkeys(labels, ""), "Median rank": "g"}
    return Table("ranks", "Elo / rank", columns, rows)


def relative_table(label: str, shares: Sequence[Report], name: str) -> Table:
    """Table 6: percentages of the reference."""
    reference = shares[0]["reference"]
    columns = {
        "System": "",
        f"{reference} first": ".1f",
        "System first": ".1f",
        "Mean": ".1f",
        "± paper": ".1f",
        "2.5 %": ".1f",
        "97.5 %": ".1f",
        "Questions": "d",
    }
    keys = ("system", "reference_first", "system_first", "mean", "half", "low", "high", "questions")
    rows = [[share[key] for key in keys] for share in shares]
    return Table(name, f"{label}: score in percent of {reference}", columns, rows)


def agreement_table(report: Report) -> Table:
    """Every statistic of agreement on a line of its own."""
    rows: list[list[Any]] = []
    for label, each in report["tournaments"].items():
        position = each["position"]
        rows.append([label, "first answer wins, of decided", position["share"], position["first"] + position["second"]])
        rows.append([label, "same winner in both orders", position["agreement"], position["both"]])
        for key, what in (("raters", "Fleiss kappa of votes"), ("raters_untied", "Fleiss kappa of votes, no ties")):
            if each[key]:
                rows.append([label, what, each[key]["kappa"], each[key]["items"]])
    for each in report["between"]:
        pair = f"{each['one']} / {each['other']}"
        if "kendall_tau" in each:
            rows.append([pair, "Kendall tau of ratings", each["kendall_tau"], len(each["systems"])])
            rows.append([pair, "Spearman rho of ratings", each["spearman_rho"], len(each["systems"])])
        if "kappa" in each:
            rows.append([pair, "Fleiss kappa of verdicts", each["kappa"]["kappa"], each["kappa"]["items"]])
            rows.append([pair, "share of equal verdicts", each["kappa"]["observed"], each["kappa"]["items"]])
    return Table("agreement", "Agreement", {"Ratings": "", "Statistic": "", "Value": ".3f", "Of": "d"}, rows)


def slugs(report: Report) -> dict[str, str]:
    """Each label as part of a file's name, different ones for different labels."""
    found: dict[str, str] = {}
    for label in {**report["tournaments"], **report["relative"]}:
        slug = re.sub(r"[^\w.-]+", "-", label).strip("-.")[-80:] or "ratings"
        while slug in found.values():
            slug += "+"
        found[label] = slug
    return found


# Where they go


def remarks(report: Report) -> list[str]:
    """What is to be said in sentences."""
    said = []
    unparsed = report["unparsed"]
    if unparsed:
        lost = sum(each["stored"] in (-1, [-1, -1]) for each in unparsed)
        plural = "reply was" if len(unparsed) == 1 else "replies were"
        said.append(
            f"{len(unparsed)} {plural} not parsed: {lost} of them have no score and are left out, "
            f"{len(unparsed) - lost} take the stored one (they are listed under unparsed in --json)"
        )
    if report["differing"]:
        said.append(f"{len(report['differing'])} replies say otherwise than their stored score, which counts")
    if report["turned"]:
        said.append(
            f"{len(report['turned'])} files have their answers in the other order than their names say, "
            "as the answers' ids show; they were read by the ids"
        )
    return said + [f"warning: {each}" for each in report["warnings"]]


def print_report(report: Report, console: "Console") -> None:
    for table in tables(report):
        console.print(table.title, style="bold", markup=False)
        console.print(table.rich())
    for remark in remarks(report):
        console.print(printable(remark), markup=False)


def write_report(report: Report, folder: Path) -> list[Path]:
    """Write `tournament.json`, `tournament.md`, a CSV file a table, and plots; give their paths."""
    from eval.chatbot.tournament_plots import plot_report

    found = tables(report)
    parts = ["# Tournament\n", *(table.markdown() for table in found)]
    if said := remarks(report):
        parts.append("\n".join(f"- {printable(remark)}" for remark in said) + "\n")
    files = {
        "tournament.json": json.dumps(report, indent=1, allow_nan=False) + "\n",
        "tournament.md": "\n".join(parts),
        **{f"{table.name}.csv": table.csv() for table in found},
    }
    try:
        for name, content in files.items():
            write_whole(folder / name, content)
        return [folder / name for name in files] + plot_report(report, folder)
    except OSError as error:
        raise WriteError(f"out: {folder} cannot be written to: {error.strerror or error}") from error
