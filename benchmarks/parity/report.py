"""What a comparison came to: each kind's score, its differences from both references, and what they say.

The margin within which two kinds count as equal is fixed beforehand: a tenth of what 16-bit LoRA gains over the model
as it was. Where that gain itself cannot be told from nothing, there is nothing to compare.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from benchmarks.parity.crossed import crossed, verdict
from benchmarks.parity.kinds import FULL, LORA
from benchmarks.parity.tasks import Task
from benchmarks.quality import Estimate
from train.sweep.report import interval

if TYPE_CHECKING:
    from rich.console import Console

MARGIN = 0.1
REFERENCES = {LORA: "vs_lora", FULL: "vs_full"}
NOT_LEARNED = "nothing learned to compare"


def compare(task: Task, scores: Mapping[str, Sequence[Sequence[float]]], before: Sequence[float]) -> dict[str, Any]:
    """A row for each kind: its mean over seeds with its interval, and its differences, paired by seed and question.

    `scores` has a list of scores of questions for every seed of a kind; `before` the scores of the model as it was.
    """
    found = {kind: np.array(each) for kind, each in scores.items()}
    gain = crossed(found[LORA] - np.array(before))
    learned = gain.high < 0 if task.less_is_better else gain.low > 0
    margin = MARGIN * abs(gain.value)
    rows = [
        {"kind": kind, **summary(each), **differences(task, found, kind, margin if learned else None)}
        for kind, each in found.items()
    ]
    return {
        "before": float(np.mean(before)),
        "gain": numbers(gain),
        "margin": margin if learned else None,
        "rows": rows,
    }


def summary(scores: Float[np.ndarray, "seeds questions"]) -> dict[str, Any]:
    """Mean over seeds, half of its 95 % interval (Student's t), and each seed's own."""
    seeds = scores.mean(axis=1).tolist()
    found = interval(seeds)
    return {"mean": found.mean, "half": found.half, "seeds": seeds}


def differences(
    task: Task, found: Mapping[str, Float[np.ndarray, "seeds questions"]], kind: str, margin: float | None
) -> dict[str, Any]:
    """How far a kind is from each reference, and what that says."""
    rows: dict[str, Any] = {}
    for reference, name in REFERENCES.items():
        if kind != reference:
            difference = crossed(found[kind] - found[reference])
            said = NOT_LEARNED if margin is None else verdict(difference, margin, task.less_is_better)
            rows[name] = {**numbers(difference), "verdict": said}
    return rows


def numbers(estimate: Estimate) -> dict[str, float]:
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high}


# For people


def show(console: "Console", results: Mapping[str, Mapping[str, Any]]) -> None:
    """The paper's table, kinds by tasks, and one of differences for each task."""
    from rich.table import Table

    kinds = list(dict.fromkeys(row["kind"] for result in results.values() for row in result["rows"]))
    table = Table("", *(f"{name} ({result['measure']})" for name, result in results.items()))
    table.add_row("as it was", *(scored(result, result["before"]) for result in results.values()))
    for kind in kinds:
        rows = [next((row for row in result["rows"] if row["kind"] == kind), None) for result in results.values()]
        cells = [
            "" if row is None else scored(result, row["mean"], row["half"])
            for row, result in zip(rows, results.values(), strict=True)
        ]
        table.add_row(kind, *cells)
    console.print("Means over seeds ± half of the 95 % interval over seeds")
    console.print(table)
    for name, result in results.items():
        margin = "none" if result["margin"] is None else f"{scaled(result, result['margin']):.3g}"
        console.print(f"{name}: differences with 95 % intervals over seeds and questions; margin {margin}")
        table = Table("", "from 16-bit LoRA", "", "from full 16-bit", "")
        for row in result["rows"]:
            table.add_row(row["kind"], *(text for key in REFERENCES.values() for text in told(result, row.get(key))))
        console.print(table)


def scaled(result: Mapping[str, Any], value: float) -> float:
    """Accuracies are told in percent."""
    return 100 * value if result["measure"] == "accuracy" else value


def scored(result: Mapping[str, Any], mean: float, half: float | None = None) -> str:
    digits = 1 if result["measure"] == "accuracy" else 4
    shown = f"{scaled(result, mean):.{digits}f}"
    return shown if half is None else f"{shown} ± {scaled(result, half):.{digits}f}"


def told(result: Mapping[str, Any], difference: Mapping[str, Any] | None) -> tuple[str, str]:
    """A difference as text, and its verdict."""
    if difference is None:
        return "", ""
    digits = 1 if result["measure"] == "accuracy" else 4
    value, low, high = (f"{scaled(result, difference[key]):+.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} \\[{low}, {high}]", difference["verdict"]


def draw(results: Mapping[str, Mapping[str, Any]], target: Path) -> None:
    """Each kind's difference from 16-bit LoRA with its interval, a panel for each task, and the margin as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.4 * len(results) + 1.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    kinds = list(dict.fromkeys(row["kind"] for result in results.values() for row in result["rows"]))
    for axes, (name, result) in zip(panels, results.items(), strict=True):
        by_kind = {row["kind"]: row for row in result["rows"]}
        axes.axvline(0, color="0.4", linewidth=0.8)
        if result["margin"] is not None:
            margin = scaled(result, result["margin"])
            axes.axvspan(-margin, margin, color="0.9", label="margin: a tenth of LoRA's gain")
        for place, kind in enumerate(kinds):
            difference = by_kind.get(kind, {}).get(REFERENCES[LORA])
            if difference is not None:
                value, low, high = (scaled(result, difference[key]) for key in ("value", "low", "high"))
                axes.errorbar(value, place, xerr=[[value - low], [high - value]], color="C0", marker="o", capsize=3)
        unit = "points of accuracy" if result["measure"] == "accuracy" else "nats per token; less is better"
        score = scored(result, by_kind[LORA]["mean"])
        axes.set(title=f"{name}\n16-bit LoRA {score}, untuned {scored(result, result['before'])}", xlabel=unit)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(kinds)), kinds)
    panels[0].invert_yaxis()
    handles, labels = panels[0].get_legend_handles_labels()
    figure.suptitle("Difference from 16-bit LoRA, 95 % intervals over seeds and questions")
    if handles:
        figure.legend(handles, labels, loc="outside lower center", frameon=False)
    figure.savefig(target, dpi=120)
