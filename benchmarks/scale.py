"""QLoRA of LLaMA on several GPUs, on paper: what each GPU has, what is sent, and whether sending hides behind products.

Nothing is measured here: memory and traffic are the planner's (`train/planner`), for the paper's fine-tuning (NF4 with
double quantization, adapters of rank 64 on all linear layers, one text of 512 tokens at a time, checkpointing, paged
AdamW) in steps of 16 micro-batches. The times are bounds from datasheets:

- A micro-batch takes, for each token, six operations a weight of the base (its product forward, again when the block is
  computed again, and the gradient of what went in; the base has no gradient), eight a number of the adapters and four a
  weight of the head; attention itself is left out, one in a hundred at 512 tokens. A GPU is said to do `ATTAINED` of
  its datasheet's dense 16-bit operations.
- Sending takes at least its bytes over the link's datasheet speed in one direction; every GPU sends as much as it gets.
  With offload the shares come from the CPU as well, over the same link where that is PCIe.

FSDP2 asks for a block's weights while another is computed. So where the bytes take less time than the products, sending
can hide; where they take more, it cannot.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from models.parallel.shard import ShardConfig
from models.precision import ADAPTERS, QUANTIZED
from train.planner.gpus import GIB, GPUS, Gpu, gpu
from train.planner.jobs import paper_job
from train.planner.paper import FIGURE_6
from train.planner.plan import CODES, GRADIENTS, KEPT, LABELS, STATES, Plan
from train.planner.sharing import GATHERED, SENT
from train.planner.step import Job
from train.planner.switches import plan

MODELS = tuple(FIGURE_6)
PROCESSES = (1, 2, 4, 8)
ATTAINED = 0.4
GB = 1e9  # of links; memory is told in GiB

WAYS: Mapping[str, Mapping[str, Any]] = {
    "ddp": {"distributed": "ddp"},
    "fsdp": {"distributed": "fsdp"},
    "fsdp, CPU offload": {"distributed": "fsdp", "fsdp": ShardConfig(cpu_offload=True)},
}


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind and how they are joined, by their vendor's datasheets."""

    tflops: float
    """Dense operations in bfloat16 with sums in float32, 10^12 in a second."""
    link: float
    """GB/s from one GPU to the others, in one direction."""
    host: float | None = None
    """GB/s from the CPU's memory; None: over the same link."""


MACHINES = {
    "RTX 3090, PCIe 4.0 x16": Machine(71, 31.5),  # NVIDIA's GA102 whitepaper; 16 lanes at 16 GT/s
    "RTX 4090, PCIe 4.0 x16": Machine(165, 31.5),  # Ada whitepaper
    "A100 SXM, NVLink 3": Machine(312, 300, 31.5),  # A100 datasheet: 600 GB/s in both directions together
    "H100 SXM, NVLink 4": Machine(989, 450, 63.0),  # H100 datasheet: 900 GB/s in both directions together; PCIe 5.0
}

GROUPS = {  # what is drawn as one
    "base": tuple(LABELS)[tuple(LABELS).index(CODES) : tuple(LABELS).index(ADAPTERS)],
    "adapters": (ADAPTERS,),
    "optimizer states (pageable)": (STATES,),
    "gradients": (GRADIENTS, "buckets"),
    "weights put together, buffers": (GATHERED, SENT),
    "activations and work": tuple(LABELS)[tuple(LABELS).index(KEPT) :],
}


def measure(models: tuple[str, ...] = MODELS) -> list[dict[str, Any]]:
    """A row for each model, number of GPUs and way of sharing."""
    return [row(name, way, planned) for name in models for way, planned in plans(paper_job(name))]


def plans(job: Job) -> Iterator[tuple[str, Plan]]:
    """The plan of a job on every number of GPUs, in every way."""
    for processes in PROCESSES:
        for way, settings in WAYS.items() if processes > 1 else (("alone", {}),):
            yield way, plan(replace(job, processes=processes, **settings), "cuda")


def row(name: str, way: str, planned: Plan) -> dict[str, Any]:
    """What is told of one plan: bytes, and seconds on each machine."""
    traffic = planned.traffic
    return {
        "model": name,
        "gpus": planned.job.processes,
        "way": way,
        "parts": {label: n for label, n in planned.parts.items() if n},
        "tensors_bytes": planned.total,
        "not_pageable_bytes": planned.needed,
        "host_bytes": sum(planned.host.values()),
        "smallest_gpu_GB": smallest(planned),
        "traffic": asdict(traffic),
        "sent_in_round_bytes": traffic.sent_in_round,
        "sent_in_step_bytes": traffic.sent,
        "times": {machine: times(planned, machine) for machine in MACHINES} if planned.job.processes > 1 else {},
    }


def smallest(planned: Plan) -> int | None:
    """The size of the smallest GPU known here that holds it, states paged out where they can be; None for none."""
    sizes = sorted(set(GPUS.values()))
    return next((size for size in sizes if planned.fits(Gpu(f"{size} GB", int(size * GIB)))), None)


def operations(planned: Plan) -> int:
    """Floating-point operations of a micro-batch."""
    job, base = planned.job, planned.base
    head = base["head"].parameters or base["embeddings"].parameters
    return job.batch_size * job.max_len * (6 * base[QUANTIZED].parameters + 8 * planned.trained + 4 * head)


def times(planned: Plan, name: str) -> dict[str, float]:
    """Seconds of a micro-batch on a machine: its products, what is sent meanwhile; and of the gradients of a step."""
    machine, traffic = MACHINES[name], planned.traffic
    sending = traffic.sent_in_round / (machine.link * GB)
    if planned.job.fsdp.cpu_offload:
        brought = (traffic.forward + traffic.backward) / traffic.processes / ((machine.host or machine.link) * GB)
        sending = sending + brought if machine.host is None else max(sending, brought)
    gradients = traffic.part(traffic.reduced + 2 * traffic.all_reduced) / (machine.link * GB)
    return {
        "products": operations(planned) / (ATTAINED * machine.tflops * 1e12),
        "sending": sending,
        "gradients_in_step": gradients,
    }


def two_small_gpus() -> list[dict[str, Any]]:
    """Does 65B fit two GPUs of 24 GB, and with what? (Answer.AI's fsdp_qlora showed 70B there, with offload.)"""
    job = replace(paper_job("llama-65b"), processes=2, distributed="fsdp")
    assert job.lora is not None
    narrow = replace(job, lora=replace(job.lora, dtype="bfloat16"))
    card, found = gpu("24GB"), []
    for change, tried in {
        "--distributed fsdp": job,
        "--distributed fsdp --lora.dtype bfloat16": narrow,
        "--distributed fsdp --fsdp.cpu-offload": replace(job, fsdp=ShardConfig(cpu_offload=True)),
    }.items():
        planned = plan(tried, "cuda")
        told = {"with": change, "takes_bytes": planned.takes(card), "fits": planned.fits(card)}
        found.append(
            told | {"all_tensors_bytes": card.takes(planned.total, 2), "host_bytes": sum(planned.host.values())}
        )
    return found


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Memory of each GPU by what it is for, a panel for each model, against the number of GPUs."""
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in rows))
    figure = Figure(figsize=(3.2 * len(models), 4.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        bars = [row for row in rows if row["model"] == name and row["way"] != "ddp"]
        bars.sort(key=lambda row: ("offload" in row["way"], row["gpus"]))
        places = [i + 0.6 * ("offload" in row["way"]) for i, row in enumerate(bars)]
        bottom = [0.0] * len(bars)
        for group, labels in GROUPS.items():
            heights = [sum(row["parts"].get(label, 0) for label in labels) / GIB for row in bars]
            axes.bar(places, heights, bottom=bottom, label=group, width=0.8)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        for size in (24, 48, 80):
            if size < 1.3 * max(bottom):
                axes.axhline(size, color="0.5", linewidth=0.8, linestyle="--")
        axes.set_xticks(places, [str(row["gpus"]) for row in bars])
        axes.set(title=name, xlabel="GPUs: shared by FSDP | and CPU offload")
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("tensors on each GPU, GiB")
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(target, dpi=120)
