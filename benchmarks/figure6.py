"""The paper's Figure 6: where the memory of a fine-tuning goes, from 7B to 65B, beside its own figures.

LLaMA in NF4 with adapters of rank 64 on all linear layers, one text of 512 tokens, gradient checkpointing, AdamW. Ours
are bytes of tensors at the fullest moment of a step, as the planner has them: the step itself, run without memory
(`train/planner`). What was printed differs from that part by part, and each difference is said with a reason that is
computed, not guessed at where it can be. For small models that fit here, real steps are measured beside the plan.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import load
from benchmarks.tables import show
from models import LoraConfig
from models.precision import ADAPTERS
from nf4 import QuantConfig
from train.footprint import footprint
from train.optimizer import OptimizerConfig
from train.planner.gpus import GIB, MIB, Gpu, gpu
from train.planner.jobs import paper_job
from train.planner.measure import measured_peak
from train.planner.paper import FIGURE_6
from train.planner.plan import CODES, GRADIENTS, LABELS, SCALES, STATES, Plan
from train.planner.sizes import SIZES
from train.planner.step import Job, prepared, steps_taken
from train.planner.switches import plan

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

PARTS = ("model", "adapters", "gradients", "optimizer", "activations")
RANK = 64
TOKENS = 512
CARDS = ("24GB", "48GB")
SAYS = {"whole": "fits", "paged": "fits with states paged out", "not": "does not fit"}
CHANGES = {  # of the paper's job, and what they are called
    "NF4+DQ": {},
    "NF4": {"double_quant": False},
    "NF4+DQ, 16-bit adapters": {"narrow": True},
    "NF4, 16-bit adapters": {"double_quant": False, "narrow": True},
}


@dataclass(frozen=True)
class Small:
    """A model of which steps can be taken here."""

    name: str
    raw: Mapping[str, Any]


SMALL = (
    Small("SmolLM2-135M", SIZES["smollm2-135m"]),
    Small("random LLaMA, 668 M", load.RANDOM.to_dict()),
)


def measure(device: str, small: tuple[Small, ...] = SMALL, names: tuple[str, ...] = tuple(FIGURE_6)) -> dict[str, Any]:
    """The planned rows of the LLaMA models, the paper's beside them, and small models planned and measured."""
    return {
        "rows": [row(name, ways(name)) for name in names],
        "measured": [measured(each, device) for each in small],
    }


def ways(name: str) -> dict[str, Plan]:
    """A model's plan in each way of storing weights and adapters."""
    return {way: plan(changed(name, **changes), "cuda") for way, changes in CHANGES.items()}


def changed(name: str, double_quant: bool = True, narrow: bool = False) -> Job:
    job = paper_job(name, double_quant)
    assert job.lora is not None
    return replace(job, lora=replace(job.lora, dtype="bfloat16")) if narrow else job


def row(name: str, plans: Mapping[str, Plan]) -> dict[str, Any]:
    """One model: the paper's parts, ours in every way, what explains the differences, and which GPUs hold it."""
    theirs = FIGURE_6[name]
    left = theirs.total * GIB / MIB - theirs.model - 2 * theirs.adapters - theirs.optimizer
    return {
        "model": name,
        "paper_MiB": {
            "model": theirs.model,
            "adapters": theirs.adapters,
            "gradients": theirs.adapters,  # the paper has no figure of its own: a 16-bit gradient for each number
            "optimizer": theirs.optimizer,
            "activations": left,  # what remains of its total
        },
        "paper_total_GiB": theirs.total,
        "ours_MiB": {way: parts(planned) for way, planned in plans.items()},
        "total_GiB": {way: planned.total / GIB for way, planned in plans.items()},
        "not_pageable_GiB": {way: planned.needed / GIB for way, planned in plans.items()},
        "explained": explained(name, plans),
        "fits": {way: {card: fitting(planned, gpu(card)) for card in CARDS} for way, planned in plans.items()},
    }


def fitting(planned: Plan, card: Gpu) -> str:
    """How a GPU holds a step, context and fragments included: a key of `SAYS`."""
    return "whole" if card.fits(planned.total) else "paged" if planned.fits(card) else "not"


def parts(planned: Plan) -> dict[str, float]:
    """A plan's parts as the figure has them, MiB. Gradients of inputs are among the activations."""
    labels = tuple(LABELS)
    base = labels[labels.index(CODES) : labels.index(ADAPTERS)]
    told = {"model": base, "adapters": (ADAPTERS,), "gradients": (GRADIENTS,), "optimizer": (STATES,)}
    found = {part: sum(planned.parts.get(label, 0) for label in of) / MIB for part, of in told.items()}
    return found | {"activations": planned.total / MIB - sum(found.values())}


def explained(name: str, plans: Mapping[str, Plan]) -> dict[str, float]:
    """How far the paper's own way of counting goes to its figures: MiB.

    The model: scales without double quantization and an embedding and head in 32 bits would give `model`, which leaves
    `model_unexplained` of the difference. Adapters: 18 h numbers of rank 64 in each of L blocks, in 16 bits, are its
    figure to the last digit, where the seven matrices have `adapter_numbers` instead; states are 8 bytes for each.
    """
    raw, theirs, ours = SIZES[name], FIGURE_6[name], plans["NF4+DQ"]
    plain, h, L = plans["NF4"], raw["hidden_size"], raw["num_hidden_layers"]
    scales = (plain.parts[SCALES] - ours.parts[SCALES]) / MIB
    wide = 2 * 2 * raw["vocab_size"] * h / MIB  # two more bytes for each number of the embedding and of the head
    model = parts(ours)["model"]
    counted = 18 * h * RANK * L
    return {
        "model_difference": theirs.model - model,
        "no_double_quantization": scales,
        "wide_embedding_and_head": wide,
        "model": model + scales + wide,
        "model_unexplained": theirs.model - model - scales - wide,
        "model_share_explained": (scales + wide) / (theirs.model - model),
        "adapters_18hL64": 2 * counted / MIB,
        "adapter_numbers": ours.base[ADAPTERS].parameters,
        "adapter_numbers_over_18hL64": ours.base[ADAPTERS].parameters / counted,
        "optimizer_8_bytes_of_18hL64": 8 * counted / MIB,
    }


def measured(small: Small, device: str) -> dict[str, Any]:
    """A small model as the paper would train it: planned, and the bytes that real steps take."""
    job = Job(
        raw=small.raw,
        where=small.name,
        quant=QuantConfig(),
        lora=LoraConfig(rank=RANK, dropout=0.1),
        optimizer=OptimizerConfig(name="paged-adamw"),
        max_len=TOKENS,
    )
    planned = plan(job, torch.device(device).type)
    stepper = prepared(job, torch.device(device))
    steps_taken(stepper)
    found = footprint(stepper.model, stepper.optimizer.state_bytes, stepper.optimizer.managed_bytes)
    del stepper
    peak = measured_peak(job, device)
    stay = found.quantized + found.rest + found.adapters + found.gradients + found.optimizer
    real = {
        "model": (found.quantized + found.rest) / MIB,
        "adapters": found.adapters / MIB,
        "gradients": found.gradients / MIB,
        "optimizer": (found.optimizer + found.managed) / MIB,
        "activations": (peak - stay) / MIB,
    }
    return {
        "model": small.name,
        "planned_MiB": parts(planned),
        "measured_MiB": real,
        "planned_total_MiB": planned.total / MIB,
        "measured_total_MiB": (peak + found.managed) / MIB,
    }


def show_figure(found: Mapping[str, Any], console: "Console") -> None:
    """The figure as tables: parts, totals, what explains the paper's, what fits, and what is measured."""
    for each in found["rows"]:
        ways = {"paper": each["paper_MiB"], **each["ours_MiB"]}
        totals = {"paper": each["paper_total_GiB"], **each["total_GiB"]}
        console.print(f"{each['model']}, 1 x {TOKENS} tokens, rank {RANK}: MiB, and GiB in all")
        rows = [values | {"GiB": totals[way]} for way, values in ways.items()]
        show(console, list(ways), rows, [*PARTS, "GiB"])
        why = each["explained"]
        console.print(
            f"  its model is {why['model_difference']:,.0f} MiB larger than ours: scales without double quantization "
            f"are {why['no_double_quantization']:,.0f} of them, a 32-bit embedding and head "
            f"{why['wide_embedding_and_head']:,.0f}, and {why['model_unexplained']:,.0f} are not explained"
        )
        fits = each["fits"]["NF4+DQ"]
        console.print("  NF4+DQ: " + ", ".join(f"{card}: {SAYS[verdict]}" for card, verdict in fits.items()))
    console.print("a step as the paper takes it, with small models: planned and measured MiB")
    for each in found["measured"]:
        rows = [each[f"{how}_MiB"] | {"all": each[f"{how}_total_MiB"]} for how in ("planned", "measured")]
        show(console, [f"{each['model']}, {how}" for how in ("planned", "measured")], rows, [*PARTS, "all"])


def draw(rows: list[dict[str, Any]], target: Path) -> "Figure":
    """Stacked bars: for each model the paper's, and ours in every way."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.5, 4.8), layout="constrained")
    axes = figure.subplots()
    bars = [
        (5.6 * i + j, label, values)
        for i, row in enumerate(rows)
        for j, (label, values) in enumerate({"paper": row["paper_MiB"], **row["ours_MiB"]}.items())
    ]
    bottom = [0.0] * len(bars)
    for part in PARTS:
        heights = [values[part] * MIB / GIB for _, _, values in bars]
        axes.bar([place for place, _, _ in bars], heights, bottom=bottom, width=0.8, label=part)
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    for (place, _, _), height in zip(bars, bottom, strict=True):
        axes.text(place, height + 0.4, f"{height:.1f}", ha="center", fontsize=7)
    for size in (24, 48):
        if size < 1.15 * max(bottom):
            axes.axhline(size, color="0.5", linewidth=0.8, linestyle="--")
            axes.text(-0.6, size * 1.01, f"{size} GB", fontsize=7, color="0.4")
    axes.set_xticks([place for place, _, _ in bars], [label for _, label, _ in bars], rotation=90, fontsize=7)
    for i, row in enumerate(rows):
        axes.text(5.6 * i + 2, max(bottom) * 1.1, row["model"], ha="center", fontsize=9)
    axes.set(ylabel="GiB of tensors, 1 x 512 tokens", ylim=(0, max(bottom) * 1.18))
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=8)
    figure.savefig(target, dpi=120)
    return figure
