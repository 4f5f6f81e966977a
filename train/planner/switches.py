"""Which switch would make a step fit, from the one that costs least: tried, not estimated.

What costs nothing comes first, then what costs time, then what costs precision, then what changes what is trained.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from models import LoraConfig
from models.methods import METHODS
from nf4 import QuantConfig
from train.planner.gpus import Gpu
from train.planner.plan import Plan
from train.planner.plan import plan as planned_anew
from train.planner.step import Job


@dataclass(frozen=True)
class Switch:
    """A change of settings, and what it gives."""

    flags: str
    """As they are typed."""
    cost: str
    plan: Plan


PLANS: dict[str, Plan] = {}


def plan(job: Job, kind: str) -> Plan:
    """The plan of a job; one that is asked for again, as while changes are tried, is made once."""
    key = repr((job, kind))
    if key not in PLANS:
        PLANS[key] = planned_anew(job, kind)
    return PLANS[key]


Change = Callable[[Job], tuple[Job, str] | None]


def switches(job: Job, kind: str) -> list[Switch]:
    """What each change that is left would give for itself, from the cheapest."""
    return [Switch(flags, cost, plan(changed, kind)) for changed, flags, cost in changes(job, kind)]


def fitting(job: Job, gpu: Gpu, kind: str = "cuda") -> tuple[list[Switch], Plan | None]:
    """Changes from the cheapest on, until the step fits, and its plan; all that help and no plan if it never does."""
    numbers: list[int] = []
    current = plan(job, kind)
    for number in range(len(CHANGES)):
        while not current.fits(gpu):
            changed = change(current.job, number, kind)
            tried = None if changed is None else plan(changed[0], kind)
            if tried is None or tried.needed >= current.needed:
                break
            numbers.append(number)
            current = tried
    if not current.fits(gpu):
        return made(job, numbers, kind), None
    for number in reversed(numbers[:-1]):  # a later change may have made an earlier one needless
        fewer = numbers.copy()
        fewer.remove(number)
        without = changed_by(job, fewer, kind)
        if without is not None and plan(without, kind).fits(gpu):
            numbers, current = fewer, plan(without, kind)
    return made(job, numbers, kind), current


def made(job: Job, numbers: list[int], kind: str) -> list[Switch]:
    """The changes of these numbers, one after the other; those that are made again are told as one."""
    told: dict[int, Switch] = {}
    for position, number in enumerate(numbers):
        before = changed_by(job, numbers[:position], kind)
        assert before is not None
        changed = change(before, number, kind)
        assert changed is not None
        told[number] = Switch(changed[1], CHANGES[number][1], plan(changed[0], kind))
    return list(told.values())


def changed_by(job: Job, numbers: list[int], kind: str) -> Job | None:
    """The job after the changes of these numbers; None if one of them needs another that is not there."""
    for number in numbers:
        changed = change(job, number, kind)
        if changed is None:
            return None
        job = changed[0]
    return job


def changes(job: Job, kind: str) -> Iterator[tuple[Job, str, str]]:
    for number, (_, cost) in enumerate(CHANGES):
        changed = change(job, number, kind)
        if changed is not None:
            yield (*changed, cost)


def change(job: Job, number: int, kind: str) -> tuple[Job, str] | None:
    if kind == "cpu" and CHANGES[number][0] in (paged_states, offloaded):  # there is no other memory
        return None
    return CHANGES[number][0](job)


MORE = (2, 4, 8)


def devices_needed(job: Job, gpu: Gpu, kind: str = "cuda") -> Plan | None:
    """The same step shared by rows on as few devices of this kind as hold it; None if eight do not, or are none more.

    No other setting is changed.
    """
    for processes in MORE:
        if processes > job.processes:
            spread = plan(replace(job, processes=processes, distributed="fsdp"), kind)
            if spread.fits(gpu):
                return spread
    return None


# The changes


def double_quant(job: Job) -> tuple[Job, str] | None:
    if job.quant is None or job.quant.double_quant:
        return None
    return replace(job, quant=replace(job.quant, double_quant=True)), "--quant.double-quant"


def paged_states(job: Job) -> tuple[Job, str] | None:
    name: Any = f"paged-{job.optimizer.name}"
    if job.optimizer.name not in ("adamw", "adamw-8bit"):
        return None
    return replace(job, optimizer=replace(job.optimizer, name=name)), f"--optimizer.name {name}"


def smaller_batch(job: Job) -> tuple[Job, str] | None:
    if job.batch_size == 1:
        return None
    size = -(-job.batch_size // 2)
    accumulation = -(-job.accumulation * job.batch_size // size)
    changed = replace(job, batch_size=size, accumulation=accumulation)
    return changed, f"--batch-size {size} --accumulation {accumulation}"


def checkpointing(job: Job) -> tuple[Job, str] | None:
    if job.gradient_checkpointing:
        return None
    return replace(job, gradient_checkpointing=True), "--gradient-checkpointing"


def eight_bit_states(job: Job) -> tuple[Job, str] | None:
    if not job.optimizer.name.endswith("adamw"):
        return None
    name: Any = f"{job.optimizer.name}-8bit"
    return replace(job, optimizer=replace(job.optimizer, name=name)), f"--optimizer.name {name}"


def narrow_adapters(job: Job) -> tuple[Job, str] | None:
    if job.lora is None or job.lora.dtype == "bfloat16" or job.dtype != torch.bfloat16:
        return None
    method = METHODS[type(job.lora)].name
    return replace(job, lora=replace(job.lora, dtype="bfloat16")), f"--{method}.dtype bfloat16"


def adapters(job: Job) -> tuple[Job, str] | None:
    return None if job.lora is not None else (replace(job, lora=LoraConfig()), "--adapters")


def shared(job: Job) -> tuple[Job, str] | None:
    if job.processes == 1 or job.shared:
        return None
    return replace(job, distributed="fsdp"), "--distributed fsdp"


def offloaded(job: Job) -> tuple[Job, str] | None:
    if not job.shared or job.fsdp.cpu_offload:
        return None
    return replace(job, fsdp=replace(job.fsdp, cpu_offload=True)), "--fsdp.cpu-offload"


def quantized(job: Job) -> tuple[Job, str] | None:
    if job.quant is not None or job.lora is None:
        return None
    return replace(job, quant=QuantConfig()), "--quantize"


def shorter(job: Job) -> tuple[Job, str] | None:
    if job.max_len <= 64:
        return None
    return replace(job, max_len=job.max_len // 2, target_len=-(-job.target_len // 2)), f"--max-len {job.max_len // 2}"


CHANGES: tuple[tuple[Change, str], ...] = (
    (double_quant, "nothing: 0.37 bits less for a weight"),
    (paged_states, "nothing while there is room; else a copy at each step"),
    (smaller_batch, "a little time; the same training"),
    (shared, "weights are sent around in every micro-batch"),
    (checkpointing, "a third more time"),
    (offloaded, "weights come from the CPU in every micro-batch"),
    (eight_bit_states, "states rounded to 8 bits"),
    (narrow_adapters, "small updates of the adapters are rounded away"),
    (adapters, "adapters are trained, and not every weight"),
    (quantized, "a base in 4 bits"),
    (shorter, "longer texts are cut"),
)
