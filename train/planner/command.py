"""`qlora estimate`: where every byte of a training step would be, if that fits a GPU, and what would make it."""

from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from models import BitfitConfig, Ia3Config, LoraConfig, PrefixConfig
from models.device import pick_device, pick_dtype
from models.methods import MethodName
from models.parallel.shard import ShardConfig
from models.precision import TABLES
from nf4 import QuantConfig
from train.optimizer import OptimizerConfig
from train.planner.advice import more_devices
from train.planner.gpus import GIB, Gpu, gpu
from train.planner.jobs import job_of
from train.planner.paper import base_parameters, show_paper
from train.planner.plan import LABELS, Plan, plan
from train.planner.switches import devices_needed, fitting, switches
from train.planner.tables import sending, table, table_of_switches
from train.planner.traffic import Traffic

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
    method: MethodName = "lora"
    """What the adapters are: lora, ia3, bitfit or prefix; the table of that name has its settings."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    """The adapters, of LoRA."""
    ia3: Ia3Config = field(default_factory=Ia3Config)
    """The adapters, of IA3."""
    bitfit: BitfitConfig = field(default_factory=BitfitConfig)
    """The adapters, of BitFit."""
    prefix: PrefixConfig = field(default_factory=PrefixConfig)
    """The adapters, of prefix tuning."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """How they are moved; here only the kind of states counts."""
    nproc: int = 1
    """Processes with a device each; what is planned is one of them."""
    distributed: Literal["auto", "ddp", "fsdp"] = "auto"
    """With several processes: ddp gives each the whole model, fsdp a share of it; auto is ddp where `gpu` holds it."""
    fsdp: ShardConfig = field(default_factory=ShardConfig)
    """How a model is shared."""
    paper: bool = False
    """Put Figure 6 of the QLoRA paper beside our count of the four LLaMA models."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "accumulation", "max_len", "target_len", "nproc"):
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
    job = job_of(options, dtype, options.max_len, options.target_len, options.nproc)
    card = gpu(options.gpu) if options.gpu else None
    planned = plan(job, options.device)
    if options.distributed == "auto" and options.nproc > 1 and not (card and planned.fits(card)):
        planned = plan(replace(job, distributed="fsdp"), options.device)
    console.print(table(planned, card, title(options.model, planned)))
    if options.nproc > 1:
        console.print(sending(planned), markup=False)
    result: Result = {"model": options.model, **as_json(planned)}
    if card is not None:
        result |= judged(planned, card, console)
    return result


def title(model: str, planned: Plan) -> str:
    """The job in a line."""
    job, device = planned.job, "GPU" if planned.kind == "cuda" else "CPU"
    shape = f"{model}: {job.batch_size} x {job.max_len} tokens"
    if job.processes == 1:
        return f"{shape}, on a {device}"
    model_on_each = "has a share of the model" if job.shared else "has the whole model"
    return f"{shape}, on each of {job.processes} {device}s, which {model_on_each} ({job.distributed})"


def judged(planned: Plan, card: Gpu, console: "Console") -> Result:
    """Whether a plan fits, and if not, what would make it."""
    size = f"{card.nbytes / GIB:.0f} GiB of {card.name}" if not card.name.endswith("GB") else card.name
    takes = planned.takes(card)
    result: Result = {
        "gpu": card.name,
        "gpu_bytes": card.nbytes,
        "takes_bytes": takes,
        "fits": planned.fits(card),
    }
    if result["fits"]:
        states = planned.total - planned.needed
        whole = card.fits(planned.total, planned.job.processes)
        note = "" if not states else ", states and all" if whole else f"; {out(planned, card)} of states are paged out"
        console.print(f"[green]fits[/green]: {takes / GIB:.1f} GiB of {size}{note}")
        return result
    console.print(f"[red]does not fit[/red]: {takes / GIB:.1f} GiB of {size}")
    alone = switches(planned.job, planned.kind)
    steps, after = fitting(planned.job, card, planned.kind)
    console.print(table_of_switches(alone, card))
    flags = " ".join(step.flags for step in steps)
    if after is not None:
        console.print(f"fits with {flags}: {after.takes(card) / GIB:.1f} GiB", markup=False)
    else:
        console.print(f"nothing here makes it fit; with {flags or 'no change'} it comes nearest", markup=False)
    spread = devices_needed(planned.job, card)
    if spread is not None:
        each = f"{spread.takes(card) / GIB:.1f} GiB on each"
        console.print(f"as it is it fits on {more_devices(spread.job.processes)}: {each}", markup=False)
    result["switches"] = [
        {"flags": s.flags, "cost": s.cost, "takes_bytes": s.plan.takes(card), "fits": s.plan.fits(card)} for s in alone
    ]
    result["fitting"] = None if after is None else {"flags": flags, "takes_bytes": after.takes(card)}
    result["devices"] = None if spread is None else {"nproc": spread.job.processes, "takes_bytes": spread.takes(card)}
    return result


def out(planned: Plan, card: Gpu) -> str:
    return f"{(card.takes(planned.total, planned.job.processes) - card.nbytes) / GIB:.1f} GiB"


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
        "nproc": planned.job.processes,
        "distributed": planned.job.distributed if planned.job.processes > 1 else None,
        "host_parts": dict(planned.host),
        "traffic": traffic_as_json(planned.traffic),
        "layers": planned.job.raw.get("num_hidden_layers", planned.job.raw.get("num_layers")),
    }


def traffic_as_json(traffic: Traffic) -> Result:
    """What is sent in a step, in bytes."""
    sent = {"sent_in_round": traffic.sent_in_round, "sent": traffic.sent, "total": traffic.total}
    return asdict(traffic) | {"gathered": traffic.gathered} | sent
