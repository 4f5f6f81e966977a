"""`qlora tournament PATH...`: ratings of chatbots, counted.

Verdicts become a tournament for every folder and judge: Elo ratings, net wins, what the order of answers does and
how far raters agree; and where several tournaments share systems, how far their rankings agree. Scores out of ten
become percentages of a reference system.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, UseAppendAction

from eval.chatbot.agreement import (
    Kappa,
    Net,
    Position,
    between_kinds,
    between_raters,
    constant,
    first_position,
    kendall_tau,
    median_rank,
    net_wins,
    spearman_rho,
)
from eval.chatbot.elo import Elo, Matches, elo, matches_of
from eval.chatbot.ratings import Ratings, RatingSet, Verdict, items, majorities, read_ratings
from eval.chatbot.relative import shares
from eval.chatbot.systems import Names, parse_aliases
from eval.chatbot.verdicts import UNPARSED
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
    alias: Annotated[tuple[str, ...], UseAppendAction] = ()
    """NAME=SHORT: what to call a system; may be given several times."""
    pool: bool = False
    """Ratings by one judge belong together though they lie in several folders."""
    out: str | None = None
    """Write the tables (.md, .csv), everything as .json, and plots (.png, .svg) to this folder."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        if not 0 < self.k < 1e6:
            raise ValueError(f"k is {self.k}; it must be a number above 0")
        for name, least in (("orderings", 1), ("resamples", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least {least}")


@dataclass(frozen=True)
class Standing:
    """One system in a tournament."""

    rank: int
    system: str
    rating: float
    order_half: float
    low: float
    high: float
    matches: int
    wins: int
    losses: int
    ties: int


@dataclass(frozen=True)
class Tournament:
    """The verdicts of one folder and judge, counted."""

    label: str
    judge: str
    votes: int
    matches: int
    unparsed: int
    standings: list[Standing]
    """The best system first."""
    net: dict[tuple[str, str], Net]
    position: Position
    raters: Kappa | None
    """Agreement of several votes on one item; None where there is one each."""
    raters_untied: Kappa | None
    """The same over the items on which nobody voted for a tie."""
    outcomes: list[Verdict]
    """What the matches were made from."""

    def ratings(self) -> dict[str, float]:
        return {each.system: each.rating for each in self.standings}


def command(options: TournamentOptions, console: "Console") -> dict[str, Any]:
    from eval.chatbot.tournament_report import print_report, write_report

    if not options.paths:
        raise ConfigError("there are no ratings; name files or folders of them")
    if options.out is not None and Path(options.out).exists() and not Path(options.out).is_dir():
        raise ConfigError(f"out: {options.out} is no folder")
    aliases = parse_aliases(options.alias)
    read = read_ratings(options.paths, aliases, pool=options.pool)
    tournaments, warnings = [], [*read.warnings]
    for each in read.sets:
        if each.verdicts:
            tournaments.append(tournament(each, options))
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
    print_report(report, console)
    if options.out is not None:
        files = write_report(report, Path(options.out))
        console.print(f"wrote {len(files)} files to {options.out}", markup=False)
    return report


def tournament(ratings: RatingSet, options: TournamentOptions) -> Tournament:
    """Count the verdicts of one folder and judge."""
    outcomes = majorities(ratings.verdicts) if options.majority else ratings.verdicts
    matches = matches_of(outcomes)
    several = any(len(votes) > 1 for votes in items(ratings.verdicts))
    return Tournament(
        ratings.label,
        ratings.judge,
        len(ratings.verdicts),
        len(matches.codes),
        sum(verdict.score == UNPARSED for verdict in ratings.verdicts),
        standings(matches, elo(matches, options.k, options.orderings, options.resamples, options.seed)),
        net_wins(outcomes),
        first_position(ratings.verdicts),
        between_raters(ratings.verdicts) if several else None,
        between_raters(ratings.verdicts, ties=False) if several else None,
        outcomes,
    )


def standings(matches: Matches, ratings: Elo) -> list[Standing]:
    """The systems by rating; equal ratings share a rank."""
    counts: Counter[tuple[int, float]] = Counter()
    for code, count in Counter(matches.codes.tolist()).items():
        outcome = float(matches.outcome[code])
        counts[int(matches.first[code]), outcome] += count
        counts[int(matches.second[code]), 1 - outcome] += count
    found = []
    for place, system in enumerate(ratings.systems):
        wins, losses, ties = (counts[place, outcome] for outcome in (1.0, 0.0, 0.5))
        rating = ratings.rating[place]
        rank = 1 + sum(other > rating for other in ratings.rating)
        interval = ratings.order_half[place], ratings.low[place], ratings.high[place]
        found.append(Standing(rank, system, rating, *interval, wins + losses + ties, wins, losses, ties))
    return sorted(found, key=lambda each: (each.rank, each.system))


def doubts(found: Tournament) -> list[str]:
    """What makes a tournament's numbers worth little."""
    said = []
    if not found.position.first + found.position.second:
        said.append("has no decided verdict; every rating is the starting one")
    apart = unconnected(found)
    if len(apart) > 1 and found.matches:
        groups = " | ".join(", ".join(sorted(group)) for group in apart)
        said.append(f"falls into groups that never met, so that ratings compare only within each: {groups}")
    if found.raters is not None and not found.raters.defined:
        said.append(f"all votes are alike, so that kappa is not defined; it is given as {found.raters.kappa:g}")
    return [f"{found.label}: {each}" for each in said]


def unconnected(found: Tournament) -> list[set[str]]:
    """The systems in groups, each of which met within itself only."""
    groups = [{each.system} for each in found.standings]
    for outcome in found.outcomes:
        if outcome.score != UNPARSED:
            met = [group for group in groups if group & {outcome.first, outcome.second}]
            if len(met) > 1:
                groups = [group for group in groups if group not in met] + [set().union(*met)]
    return groups


def median_ranks(tournaments: Sequence[Tournament]) -> dict[str, float]:
    """Each system's median rank over the tournaments that it is in, the best first; none of a single tournament."""
    if len(tournaments) < 2:
        return {}
    ranks: dict[str, list[int]] = {}
    for each in tournaments:
        for standing in each.standings:
            ranks.setdefault(standing.system, []).append(standing.rank)
    medians = {system: float(median_rank(places)) for system, places in ranks.items()}
    return dict(sorted(medians.items(), key=lambda item: (item[1], item[0])))


def between(tournaments: Sequence[Tournament], warnings: list[str]) -> list[dict[str, Any]]:
    """How far each two tournaments agree: on the ranking of their common systems, and on their common items.

    Since a system that all agree on can make the whole correlation, there is one without each system as well.
    """
    found = []
    for one, other in combinations(tournaments, 2):
        x, y = one.ratings(), other.ratings()
        common = sorted(x.keys() & y.keys())
        entry: dict[str, Any] = {"one": one.label, "other": other.label, "systems": common}
        if len(common) > 2:
            entry |= correlations(x, y, common)
            if constant([x[name] for name in common]) or constant([y[name] for name in common]):
                warnings.append(
                    f"{one.label} and {other.label}: a ranking is constant; its correlations are given as 0"
                )
            if len(common) > 3:
                entry["without"] = {out: correlations(x, y, [n for n in common if n != out]) for out in common}
        kappa = between_kinds(majorities(one.outcomes), majorities(other.outcomes))
        if kappa.items:
            entry["kappa"] = asdict(kappa)
            if not kappa.defined:
                warnings.append(f"{one.label} and {other.label}: all verdicts are alike; kappa is given as 1")
        if len(common) > 2 or kappa.items:
            found.append(entry)
    return found


def correlations(x: dict[str, float], y: dict[str, float], systems: Sequence[str]) -> dict[str, float]:
    values = [x[name] for name in systems], [y[name] for name in systems]
    return {"kendall_tau": kendall_tau(*values), "spearman_rho": spearman_rho(*values)}


def relative(
    read: Ratings, options: TournamentOptions, aliases: dict[str, str], warnings: list[str]
) -> dict[str, list[dict[str, Any]]]:
    """Percentages of the reference, for each folder and judge."""
    reference = Names(aliases)(options.reference) if options.reference else None
    found = {}
    for each in read.sets:
        if each.grades:
            counted, said = shares(each.grades, reference, options.resamples, options.seed)
            found[each.label] = [asdict(share) for share in counted]
            warnings += [f"{each.label}: {warning}" for warning in said]
    return found


def described(found: Tournament) -> dict[str, Any]:
    """A tournament as JSON has it."""
    return {
        "judge": found.judge,
        "votes": found.votes,
        "matches": found.matches,
        "unparsed": found.unparsed,
        "standings": [asdict(each) for each in found.standings],
        "net": [
            {"system": system, "against": against, **asdict(net), "net": net.net}
            for (system, against), net in sorted(found.net.items())
        ],
        "position": asdict(found.position),
        "raters": asdict(found.raters) if found.raters else None,
        "raters_untied": asdict(found.raters_untied) if found.raters_untied else None,
    }
