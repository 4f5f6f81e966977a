"""The paper's own count of memory beside ours: Figure 6 of Dettmers et al. 2023 (arXiv:2305.14314).

LLaMA in NF4 with adapters of rank 64, one text of 512 tokens, gradient checkpointing, paged AdamW.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from models.precision import ADAPTERS, QUANTIZED
from train.planner.gpus import GIB, MIB, gpu
from train.planner.jobs import paper_job
from train.planner.plan import KEPT, STATES, Plan, plan

if TYPE_CHECKING:
    from rich.console import Console

BYTES_OF_FULL_16_BIT = 12  # for a parameter: weight and gradient in bfloat16, two moments of Adam in float32


@dataclass(frozen=True)
class Row:
    """What Figure 6 says of one model; totals in GB, all else in MiB."""

    total: float
    model: float
    adapters: float
    optimizer: float


FIGURE_6 = {
    "llama-7b": Row(6.9, 5046, 288, 1152),
    "llama-13b": Row(11.3, 8476, 450, 1800),
    "llama-33b": Row(24.7, 19302, 877.5, 3510),
    "llama-65b": Row(45.0, 37074, 1440, 5760),
}

DIFFERENCES = (
    "Why they differ. The model: ours are the codes, the scales and a 16-bit rest, no more; the paper's figure is "
    "nearest to scales without double quantization, embedding and head in 32 bits, and some 0.3 to 0.6 GiB beside. "
    "Adapters: the paper counts 18 h 64 L numbers in 16 bits, all seven matrices of a block have 6 % more, and ours "
    "are in float32 (--lora.dtype bfloat16 halves them). Optimizer: 8 bytes for each of these numbers in both."
)


def compared(plans: dict[str, Plan]) -> list[dict[str, float | str]]:
    """A row for each model: the paper's figures and ours, in MiB, totals in GiB."""
    rows = []
    for name, theirs in FIGURE_6.items():
        ours = plans[name]
        adapters = ours.base[ADAPTERS]
        rows.append(
            {
                "model": name,
                "paper_total": theirs.total,
                "total": round(ours.total / GIB, 2),
                "paper_model": theirs.model,
                "weights": round((ours.base.nbytes - sum(adapters.nbytes.values())) / MIB, 2),
                "paper_adapters": theirs.adapters,
                "adapters": round(sum(adapters.nbytes.values()) / MIB, 2),
                "adapters_16_bit": round(2 * adapters.parameters / MIB, 2),
                "paper_optimizer": theirs.optimizer,
                "optimizer": round(ours.parts[STATES] / MIB, 2),
                "activations": round(ours.parts[KEPT] / MIB, 2),
                "full_16_bit_GB": round(BYTES_OF_FULL_16_BIT * base_parameters(ours) / 1e9, 1),
            }
        )
    return rows


def paper_plans(double_quant: bool = True) -> dict[str, Plan]:
    """A plan of each of the four, as the paper trains them."""
    return {name: plan(paper_job(name, double_quant)) for name in FIGURE_6}


def base_parameters(plan: Plan) -> int:
    """How many numbers the model itself has."""
    return plan.base.parameters - plan.base[ADAPTERS].parameters


def linear_parameters(plan: Plan) -> int:
    """Those of them in quantized layers."""
    return plan.base[QUANTIZED].parameters


def show_paper(console: "Console") -> dict[str, Any]:
    """The four LLaMA models as the paper trains them, beside its figures."""
    from rich.table import Table

    plans, plain = paper_plans(), paper_plans(double_quant=False)
    rows = compared(plans)
    made = Table(title="QLoRA's Figure 6, and ours: MiB, totals in GiB", title_justify="left")
    for column in ("", *FIGURE_6):
        made.add_column(column, justify="right" if column else "left")

    def add(text: str, key: str, form: str) -> None:
        made.add_row(text, *(form.format(row[key]) for row in rows))

    for text, key, form in (
        ("total, paper", "paper_total", "{:.1f}"),
        ("total, ours", "total", "{:.1f}"),
        ("model, paper", "paper_model", "{:,.0f}"),
        ("model, ours", "weights", "{:,.0f}"),
        ("adapters, paper", "paper_adapters", "{:,.1f}"),
        ("adapters, ours (float32)", "adapters", "{:,.1f}"),
        ("the same in 16 bits", "adapters_16_bit", "{:,.1f}"),
        ("optimizer, paper", "paper_optimizer", "{:,.0f}"),
        ("optimizer, ours", "optimizer", "{:,.0f}"),
        ("full 16-bit fine-tuning, GB", "full_16_bit_GB", "{:,.0f}"),
    ):
        add(text, key, form)
    without = [f"{plain[name].total / GIB:.1f}" for name in FIGURE_6]
    made.add_row("total without double quantization", *without)
    must = [f"{plans[name].needed / GIB:.1f}" for name in FIGURE_6]
    made.add_row("what cannot be paged out", *must)
    console.print(made)
    console.print(DIFFERENCES, markup=False)
    card = gpu("48GB")
    fits = {name: card.fits(planned.total) for name, planned in plans.items()}
    without_dq = card.fits(plain["llama-65b"].total)
    verdict = "fits" if fits["llama-65b"] else "does not fit"
    paged = "" if without_dq else " only with some states paged out" if card.fits(plain["llama-65b"].needed) else " not"
    console.print(f"llama-65b {verdict} one GPU of 48 GB, states and all; without double quantization it does{paged}")
    return {"rows": rows, "fits_48GB": fits, "fits_48GB_without_double_quantization": without_dq}
