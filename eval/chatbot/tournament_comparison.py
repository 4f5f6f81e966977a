"""Several tournaments beside each other: ranks over all of them, and how far each two agree."""

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from eval.chatbot.agreement import between_kinds, constant, kendall_tau, median_rank, spearman_rho
from eval.chatbot.tournament_standings import Tournament
from eval.chatbot.votes import majorities


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
