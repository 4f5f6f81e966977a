"""The paper's own count of memory beside ours: Figure 6 of Dettmers et al. 2023 (arXiv:2305.14314).

LLaMA in NF4 with adapters of rank 64, one text of 512 tokens, gradient checkpointing, paged AdamW.
"""

from dataclasses import dataclass

from models.precision import ADAPTERS, QUANTIZED
from train.planner.gpus import GIB, MIB
from train.planner.jobs import paper_job
from train.planner.plan import KEPT, STATES, Plan, plan

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
    "Adapters: the paper counts 18 h 64 L numbers in 16 bits, all seven matrices of a block have 11 % more, and ours "
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
