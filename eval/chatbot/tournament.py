"""`qlora tournament PATH...`: ratings of chatbots, counted.

Verdicts become a tournament for every folder and judge: Elo ratings, net wins, what the order of answers does and
how far raters agree; and where several tournaments share systems, how far their rankings agree. Scores out of ten
become percentages of a reference system.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction

from eval.chatbot.ratings import Ratings, read_ratings
from eval.chatbot.relative import USUAL, shares
from eval.chatbot.systems import Names, parse_aliases
from eval.chatbot.tournament_comparison import between, median_ranks
from eval.chatbot.tournament_standings import described, doubts, tournament
from models.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class TournamentOptions:
    """Turn ratings of chatbots into Elo ratings, percentages of a reference system, and statistics of agreement."""

    paths: Positional[tuple[str, ...]]
    """Files of ratings (.jsonl of a judge, .sqlite of people), and folders of them."""
    k: float = 4.0
    """How many points a match is worth at most."""
    orderings: int = 10_000
    """Random orders of the matches to average over."""
    resamples: int = 1000
    """Resampled sets of questions, for intervals."""
    seed: int = 0
    """Of both."""
    majority: bool = True
    """Several votes on one pair of answers are one match, by majority; else each is one."""
    reference: str | None = None
    """The system that percentages are of; by default the one that all relative ratings have in common."""
    answers: Annotated[tuple[str, ...], UseAppendAction] = ()
    """A file of a system's answers, whose ids say which answers are its; may be given several times."""
    alias: Annotated[tuple[str, ...], UseAppendAction] = ()
    """NAME=SHORT: what to call a system; may be given several times."""
    pool: bool = False
    """Ratings by one judge belong together though they lie in several folders."""
    out: str | None = None
    """Write the tables (.md, .csv), everything as .json, and plots (.png, .svg) to this folder."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        if not 0 < self.k <= 1000:
            raise ValueError(f"k is {self.k}; it must be above 0, and at most 1000")
        for name, least in (("orderings", 1), ("resamples", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


def command(options: TournamentOptions, console: "Console") -> dict[str, Any]:
    from eval.chatbot.tournament_report import print_report, write_report

    if not options.paths:
        raise ConfigError("there are no ratings; name files or folders of them")
    if options.out is not None and Path(options.out).exists() and not Path(options.out).is_dir():
        raise ConfigError(f"out: {options.out} is no folder")
    aliases = parse_aliases(options.alias)
    read = read_ratings(options.paths, aliases, options.answers, options.pool)
    numbers = options.k, options.orderings, options.resamples, options.seed
    tournaments, warnings = [], [*read.warnings]
    for each in read.sets:
        if each.verdicts:
            tournaments.append(tournament(each, *numbers, options.majority))
            warnings += doubts(tournaments[-1])
    report = {
        "settings": asdict(options),
        "systems": read.names,
        "tournaments": {each.label: described(each) for each in tournaments},
        "median_ranks": median_ranks(tournaments),
        "between": between(tournaments, warnings),
        "relative": relative(read, options, aliases, warnings),
        "unparsed": read.unparsed,
        "differing": read.differing,
        "turned": read.turned,
        "warnings": warnings,
    }
    files = [] if options.out is None else write_report(report, Path(options.out))
    print_report(report, console)
    if files:
        console.print(f"wrote {len(files)} files to {options.out}", markup=False)
    return report


def relative(
    read: Ratings, options: TournamentOptions, aliases: dict[str, str], warnings: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Percentages of the reference, for each folder and judge."""
    names = Names(aliases)
    reference = names(options.reference) if options.reference else None
    found = {}
    for each in read.sets:
        if each.grades:
            counted, said = shares(each.grades, reference, options.resamples, options.seed, names(USUAL))
            found[each.label] = [asdict(share) for share in counted]
            warnings += [f"{each.label}: {warning}" for warning in said]
    return found
