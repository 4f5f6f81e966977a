"""One tournament counted: who stands where, and what may be wrong with that."""

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from eval.chatbot.agreement import Kappa, Net, Position, between_raters, first_position, net_wins
from eval.chatbot.elo import Elo, Matches, elo, matches_of
from eval.chatbot.ratings import RatingSet
from eval.chatbot.verdicts import UNPARSED
from eval.chatbot.votes import Verdict, items, majorities


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


def tournament(
    ratings: RatingSet, k: float, orderings: int, resamples: int, seed: int, by_majority: bool = True
) -> Tournament:
    """Count the verdicts of one folder and judge."""
    outcomes = majorities(ratings.verdicts) if by_majority else ratings.verdicts
    matches = matches_of(outcomes)
    several = any(len(votes) > 1 for votes in items(ratings.verdicts))
    return Tournament(
        ratings.label,
        ratings.judge,
        len(ratings.verdicts),
        len(matches.codes),
        sum(verdict.score == UNPARSED for verdict in ratings.verdicts),
        standings(matches, elo(matches, k, orderings, resamples, seed)),
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
