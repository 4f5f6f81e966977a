"""A plan: what there is at the fullest moment of a step, by what it is for.

The step that is planned is the real one, run without memory (`simulation`). A large model has many blocks alike, and
with each more every segment of the step has the same bytes more at its fullest moment: what is stored of a block, what
is trained in it, and what it keeps for backward. So a model is run with three blocks and with four, and what a fourth
adds is added for every other: exactly what all of them would give, in a tenth of the time. Segments are told by their
place: before, in or after the first block, the second, the last. In those between them a step takes no more than in
one of these.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from kernels import dense
from models.linear import NF4Linear
from models.lora_config import LoraConfig
from models.precision import ADAPTERS, Parts, part_of, parts_in_memory
from train.optimizer import PAGED, make_optimizer
from train.planner.gpus import Gpu
from train.planner.layers import layers_of, with_layers
from train.planner.ledger import KEPT, WORK, Ledger, Segment
from train.planner.segments import described, follow, place_of
from train.planner.sharing import GRADIENTS, SENT, SharedPasses, Sharing
from train.planner.simulation import DECODED, LOGITS, simulated
from train.planner.step import Job, Stepper, prepared, steps_taken
from train.planner.traffic import Traffic
from train.planner.units import GATHERED

FEW = 3  # blocks of the smaller of two models
CODES, SCALES = "codes", "scales"
TRAINED = "trained whole"
STATES = "optimizer states"
BUCKETS = "buckets"
LABELS = {  # in this order, with what a person reads
    CODES: "base: codes",
    SCALES: "base: scales of the codes",
    "block linears": "base: linears of the blocks",
    "biases": "base: biases",
    "embeddings": "base: embeddings",
    "norms": "base: norms",
    "head": "base: head",
    ADAPTERS: "adapters",
    TRAINED: "trained whole beside the adapters",
    GRADIENTS: "gradients",
    STATES: "optimizer states",
    BUCKETS: "copies of gradients to be summed",
    GATHERED: "weights put together from shares",
    SENT: "buffers of what is sent",
    KEPT: "activations kept for backward",
    WORK: "work of the moment",
    LOGITS: "logits, a chunk at a time",
    DECODED: "weights decoded for a product",
}


@dataclass(frozen=True)
class Plan:
    """Where the bytes of a step are when there are most; with several processes, of the one that has the most."""

    job: Job
    kind: str
    """Of the device: "cpu" or "cuda"."""
    parts: Mapping[str, int]
    """Bytes by what they are for, at the fullest moment: keys of LABELS."""
    moment: str
    """When that is."""
    base: Parts
    """The model as it is stored, adapters included."""
    trained: int
    """How many numbers are trained."""
    managed: bool
    """Whether the optimizer's states are in managed memory, which the driver evicts where room is needed."""
    host: Mapping[str, int]
    """Bytes that a process has in the CPU's memory instead, by what they are for."""
    traffic: Traffic
    """What processes send each other in a step."""

    @property
    def total(self) -> int:
        """All tensors of that moment."""
        return sum(self.parts.values())

    @property
    def needed(self) -> int:
        """What must be on the device: all but what can be paged out."""
        return self.total - (self.parts[STATES] if self.managed else 0)

    def takes(self, gpu: Gpu) -> int:
        """What a process takes of its GPU at least."""
        return gpu.takes(self.needed, self.job.processes)

    def fits(self, gpu: Gpu) -> bool:
        return self.takes(gpu) <= gpu.nbytes


def plan(job: Job, kind: str = "cuda", extend: bool = True) -> Plan:
    """Plan a step on a kind of device, a "cpu" or "cuda"; without `extend` every block is run through."""
    counts = layers_of(job.raw)
    count = counts[0] if counts else 0
    patterned = isinstance(job.lora, LoraConfig) and (job.lora.rank_pattern or job.lora.alpha_pattern)
    alike = not patterned and len(set(counts)) == 1
    if not (extend and alike and count > FEW + 1):
        run = run_through(job, kind)
    else:
        small, large = (run_through(replace(job, raw=with_layers(job.raw, n)), kind) for n in (FEW, FEW + 1))
        run = extended(small, large, count - FEW)
    segment = max(run.segments, key=lambda segment: run.segments[segment].total())
    managed = kind == "cuda" and job.optimizer.name in PAGED and STATES not in run.host
    parts, moment = run.segments[segment], described(segment)
    return Plan(job, kind, parts, moment, run.base, run.trained, managed, run.host, run.traffic)


@dataclass(frozen=True)
class Run:
    """What one simulation gives: the bytes of each segment's fullest moment, by what they are for."""

    segments: dict[Segment, Counter[str]]
    base: Parts
    trained: int
    host: Counter[str]
    traffic: Traffic


def run_through(job: Job, kind: str) -> Run:
    """Simulate a step."""
    name = job.optimizer.name
    if name in PAGED:  # the same states, in memory that only a real device has
        unpaged: Any = name.removeprefix("paged-")
        job = replace(job, optimizer=replace(job.optimizer, name=unpaged, allow_oversubscription=False))
    with simulated(kind) as ledger:
        stepper = prepared(job, torch.device("meta"))
        model, parameters = stepper.model, stepper.passes.parameters
        label_model(ledger, stepper)
        follow(ledger, model)
        base = parts_in_memory(model)
        trained = sum(p.numel() for p in parameters.values())
        sharing, buckets = None, 0
        if job.shared:
            sharing = Sharing(ledger, model, job, kind)
            stepper.passes = SharedPasses(model, sharing)
            stepper.optimizer = make_optimizer(stepper.passes.moved, job.optimizer)
        elif job.processes > 1:  # DistributedDataParallel sums gradients in memory of its own
            buckets = sum(p.nbytes for p in parameters.values())
            copies = torch.empty(buckets, dtype=torch.uint8, device="meta")
            ledger.relabel([copies], BUCKETS)
        stepper.optimizer.register_step_pre_hook(lambda *_: ledger.enter(("update",)))

        def begin() -> None:
            store = stepper.optimizer.store
            assert store is not None
            states = store.memory.tensor(0, (1,), torch.uint8)
            ledger.relabel([states], STATES)
            if sharing is not None:
                sharing.begin(states)
            ledger.begin(("start",))

        steps_taken(stepper, begin)
        ledger.settle()
        ledger.relabel(dense.workspaces.__dict__.get("held", {}).values(), DECODED)
        count = min(layers_of(job.raw), default=0)
        segments: dict[Segment, Counter[str]] = {}
        for segment in ledger.peaks:
            placed = place_of(segment, count)
            parts = ledger.parts(segment)
            if placed not in segments or parts.total() > segments[placed].total():
                segments[placed] = parts
        if sharing is not None:
            return Run(segments, base, trained, sharing.host, sharing.traffic(job.rounds))
        return Run(segments, base, trained, Counter(), Traffic(job.processes, job.rounds, all_reduced=buckets))


def label_model(ledger: Ledger, stepper: Stepper) -> None:
    """Say what each tensor of the model is."""
    model = stepper.model
    for name, parameter in model.named_parameters():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, NF4Linear) and not name.endswith(".bias"):
            label = SCALES if name.endswith("absmax_codes") else CODES
        else:
            label = part_of(model, name)
            if parameter.requires_grad and label != ADAPTERS and stepper.job.lora is not None:
                label = TRAINED
        ledger.relabel([parameter], label)
    ledger.relabel(model.buffers(), SCALES)
    for parameter in stepper.passes.parameters.values():
        parameter.register_post_accumulate_grad_hook(
            lambda p: ledger.relabel([] if p.grad is None else [p.grad], GRADIENTS)
        )


def extended(small: Run, large: Run, more: int) -> Run:
    """What as many more blocks as the smaller run has would give, each adding what the larger one's does."""
    segments = {
        segment: Counter({label: line(parts[label], large.segments[segment][label], more) for label in LABELS})
        for segment, parts in small.segments.items()
    }
    base = Parts()
    for name, part in base.by_name.items():
        one, other = small.base[name], large.base[name]
        part.tensors = line(one.tensors, other.tensors, more)
        part.parameters = line(one.parameters, other.parameters, more)
        part.nbytes = {kind: line(one.nbytes[kind], other.nbytes[kind], more) for kind in one.nbytes}
    host = Counter({label: line(small.host[label], large.host[label], more) for label in large.host})
    one, other = asdict(small.traffic), asdict(large.traffic)
    traffic = Traffic(**{name: line(one[name], other[name], more) for name in one})
    return Run(segments, base, line(small.trained, large.trained, more), host, traffic)


def line(one: int, other: int, more: int) -> int:
    return one + (other - one) * more
