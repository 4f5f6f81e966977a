"""`qlora estimate`: where every byte of a training step would be, if that fits a GPU, and what would make it."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import torch

from models import LoraConfig
from models.device import pick_device, pick_dtype
from models.precision import TABLES
from nf4 import QuantConfig
from train.optimizer import OptimizerConfig
from train.planner.gpus import GIB, MIB, Gpu, gpu
from train.planner.jobs import job_of
from train.planner.paper import DIFFERENCES, FIGURE_6, base_parameters, compared, paper_plans
from train.planner.plan import LABELS, STATES, Plan, plan
from train.planner.switches import Switch, fitting, switches

if TYPE_CHECKING:
    from rich.console import Console

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class EstimateOptions:
    """Plan a training step's memory, before anything is downloaded or allocated."""

    model: str = "llama-65b"
    """A name (llama-7b ... t5-11b, roberta-large, smollm2-135m), a config.json, or a checkpoint as in `qlora train`."""
    gpu: str | None = None
    """What it should fit: a size (48GB, 24) or a name (a100-80gb, rtx-3090, h100)."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Which device's way of computing is planned; it need not be here."""
    batch_size: int = 1
    """Examples in a micro-batch."""
    accumulation: int = 16
    """Micro-batches in a step of the optimizer."""
    max_len: int = 512
    """Tokens of an example; of the source where a model reads one text and writes another."""
    target_len: int = 128
    """Tokens that such a model writes."""
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"
    """What the model computes in; auto is bfloat16 on a GPU, and as `qlora train` would choose on this CPU."""
    quantize: bool = True
    """Store the base's linear layers in few bits; without it this is plain LoRA."""
    adapters: bool = True
    """Train adapters on a frozen base; without them every weight is trained, in float32, and none is quantized."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass instead of keeping them."""
    quant: QuantConfig = field(default_factory=QuantConfig)
    """How the base is stored."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How they are moved; here only the kind of states counts."""
    paper: bool = False
    """Put Figure 6 of the QLoRA paper beside our count of the four LLaMA models."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "max_len", "target_len"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not self.adapters and self.quantize:
            raise ValueError("adapters is off, so every weight is trained, which codes cannot be: add --no-quantize")
        if self.gpu is not None:
            gpu(self.gpu)
            if self.device != "cuda":
                raise ValueError("gpu is for plans of a GPU; leave device at cuda")


def command(options: EstimateOptions, console: "Console") -> Result:
    if options.paper:
        return show_paper(console)
    auto = options.dtype == "auto" and options.device == "cuda"
    dtype = torch.bfloat16 if auto else pick_dtype(options.dtype, pick_device("cpu"))
    job = job_of(options, dtype, options.max_len, options.target_len)
    card = gpu(options.gpu) if options.gpu else None
    planned = plan(job, options.device)
    console.print(table(planned, card, title(options)))
    result: Result = {"model": options.model, **as_json(planned)}
    if card is not None:
        result |= judged(planned, card, console)
    return result


def title(options: EstimateOptions) -> str:
    shape = f"{options.batch_size} x {options.max_len} tokens"
    return f"{options.model}: {shape}, on a {'GPU' if options.device == 'cuda' else 'CPU'}"


def table(planned: Plan, card: Gpu | None, name: str) -> Any:
    """Every part of the plan, a line each."""
    from rich.table import Table

    made = Table("", "numbers", "stored as", "MiB", title=name, title_justify="left")
    for column in made.columns[1:]:
        column.justify = "right"
    for part in planned.base:
        kinds = {kind: nbytes for kind, nbytes in part.nbytes.items() if kind != TABLES}
        for i, (kind, nbytes) in enumerate(kinds.items()):
            made.add_row(part.name if i == 0 else "", f"{part.parameters:,}" if i == 0 else "", kind, mib(nbytes))
    made.add_section()
    shown = {label: planned.parts[label] for label in LABELS if planned.parts[label]}
    stored = sum(sum(part.nbytes.values()) for part in planned.base)
    made.add_row("model and adapters", f"{planned.base.parameters:,}", "", mib(stored))
    for label, text in LABELS.items():
        if label in shown and label not in base_labels():
            paged = " (pageable)" if label == STATES and planned.managed else ""
            made.add_row(text + paged, "", "", mib(shown[label]))
    made.add_section()
    made.add_row(f"all tensors {planned.moment}", "", "", mib(planned.total))
    if planned.managed:
        made.add_row("what cannot be paged out", "", "", mib(planned.needed))
    if card is not None:
        own = card.takes(planned.needed) - planned.needed
        made.add_row("CUDA context and fragments", "", "", mib(own))
    return made


def base_labels() -> tuple[str, ...]:
    """What `base` in a plan counts already."""
    return tuple(LABELS)[: tuple(LABELS).index("gradients")]


def mib(nbytes: int) -> str:
    return f"{nbytes / MIB:,.1f}"


def judged(planned: Plan, card: Gpu, console: "Console") -> Result:
    """Whether a plan fits, and if not, what would make it."""
    size = f"{card.nbytes / GIB:.0f} GiB of {card.name}" if not card.name.endswith("GB") else card.name
    takes = card.takes(planned.needed)
    result: Result = {
        "gpu": card.name,
        "gpu_bytes": card.nbytes,
        "takes_bytes": takes,
        "fits": card.fits(planned.needed),
    }
    if result["fits"]:
        states = planned.total - planned.needed
        whole = card.fits(planned.total)
        note = "" if not states else ", states and all" if whole else f"; {out(planned, card)} of states are paged out"
        console.print(f"[green]fits[/green]: {takes / GIB:.1f} GiB of {size}{note}")
        return result
    console.print(f"[red]does not fit[/red]: {takes / GIB:.1f} GiB of {size}")
    alone = switches(planned.job, planned.kind)
    steps, after = fitting(planned.job, card, planned.kind)
    console.print(table_of_switches(alone, card))
    flags = " ".join(step.flags for step in steps)
    if after is not None:
        console.print(f"fits with {flags}: {card.takes(after.needed) / GIB:.1f} GiB", markup=False)
    else:
        console.print(f"nothing here makes it fit; with {flags or 'no change'} it comes nearest", markup=False)
    result["switches"] = [
        {"flags": s.flags, "cost": s.cost, "takes_bytes": card.takes(s.plan.needed), "fits": card.fits(s.plan.needed)}
        for s in alone
    ]
    result["fitting"] = None if after is None else {"flags": flags, "takes_bytes": card.takes(after.needed)}
    return result


def out(planned: Plan, card: Gpu) -> str:
    return f"{(card.takes(planned.total) - card.nbytes) / GIB:.1f} GiB"


def table_of_switches(alone: list[Switch], card: Gpu) -> Any:
    from rich.table import Table

    made = Table("each for itself", "costs", "GiB", "", title="What would save memory", title_justify="left")
    for switch in alone:
        takes = card.takes(switch.plan.needed)
        made.add_row(switch.flags, switch.cost, f"{takes / GIB:.1f}", "fits" if takes <= card.nbytes else "")
    return made


def as_json(planned: Plan) -> Result:
    """A plan for scripts."""
    return {
        "device": planned.kind,
        "parameters": base_parameters(planned),
        "trained": planned.trained,
        "base": {
            part.name: {"parameters": part.parameters, "nbytes": {k: n for k, n in part.nbytes.items() if k != TABLES}}
            for part in planned.base
        },
        "parts": {label: planned.parts[label] for label in LABELS if planned.parts[label]},
        "moment": planned.moment,
        "peak_bytes": planned.total,
        "pageable_bytes": planned.total - planned.needed,
        "layers": planned.job.raw.get("num_hidden_layers", planned.job.raw.get("num_layers")),
    }


def show_paper(console: "Console") -> Result:
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
