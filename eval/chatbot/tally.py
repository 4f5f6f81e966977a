"""What a judge's ratings come to, for each ordered pair of systems: wins, ties and losses of the one shown first."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.chatbot.judging import PairFile, unparsed
from eval.chatbot.verdicts import FIRST, SECOND

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Tally:
    """One file in numbers."""

    first: str
    second: str
    file: str
    ratings: int
    wins: int
    """Of the first."""
    ties: int
    losses: int
    unparsed: int
    first_score: float | None = None
    """Mean score out of ten, of relative ratings that say something."""
    second_score: float | None = None


def tally(pair: PairFile) -> Tally:
    """Count the ratings of a file; of two scores out of ten the larger one wins."""
    rows = list(pair.rated())
    decided = [row["score"] for row in rows if not unparsed(row)]
    scored = [it for it in decided if isinstance(it, list)]
    wins = sum(it[0] > it[1] if isinstance(it, list) else it == FIRST for it in decided)
    losses = sum(it[0] < it[1] if isinstance(it, list) else it == SECOND for it in decided)
    return Tally(
        first=pair.first.system,
        second=pair.second.system,
        file=str(pair.path),
        ratings=len(rows),
        wins=wins,
        ties=len(decided) - wins - losses,
        losses=losses,
        unparsed=len(rows) - len(decided),
        first_score=sum(it[0] for it in scored) / len(scored) if scored else None,
        second_score=sum(it[1] for it in scored) / len(scored) if scored else None,
    )


def print_table(tallies: Sequence[Tally], console: "Console") -> None:
    """A row for each ordered pair."""
    from rich.table import Table
    from rich.text import Text

    relative = any(it.first_score is not None for it in tallies)
    table = Table(box=None, pad_edge=False)
    for name in ("shown first", "shown second"):
        table.add_column(name, overflow="fold")
    for name in ("first wins", "ties", "second wins", "unparsed", *(("mean scores",) if relative else ())):
        table.add_column(name, justify="right")
    for it in tallies:
        cells: list[Any] = [Text(it.first), Text(it.second)]
        cells += [str(count) for count in (it.wins, it.ties, it.losses, it.unparsed)]
        if relative:
            known = it.first_score is not None and it.second_score is not None
            cells.append(f"{it.first_score:.2f} : {it.second_score:.2f}" if known else "-")
        table.add_row(*cells)
    console.print(table)
