"""Plans for several processes, against what two of them have and send, and what one of several takes at most.

The fullest moment is measured in one process, whose collectives give it copies of its own share: threads that carry
tensors to others let go of them when they are given time, and on a busy machine that adds to any moment.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from models import LoraConfig
from models.parallel import shares, world
from models.parallel.shard import ShardConfig
from nf4 import QuantConfig
from tests.processes import together
from train.optimizer import OptimizerConfig
from train.planner.choose import choose
from train.planner.jobs import with_classifier
from train.planner.layers import with_layers
from train.planner.measure import measured_peak
from train.planner.plan import STATES
from train.planner.plan import plan as planned_anew
from train.planner.sharing import Sharing
from train.planner.simulation import own_workspaces, simulated
from train.planner.sizes import SIZES
from train.planner.step import Job, prepared
from train.planner.switches import plan
from train.planner.tables import base_labels
from train.planner.traffic import Traffic

LLAMA = {
    **SIZES["smollm2-135m"], "num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 255,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 501,
}  # fmt: skip
ROBERTA = {
    **SIZES["roberta-base"], "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "vocab_size": 300,
}  # fmt: skip
T5 = {
    **SIZES["t5-v1.1-small"], "num_layers": 2, "num_decoder_layers": 2, "d_model": 64, "d_kv": 16, "d_ff": 128,
    "num_heads": 4, "vocab_size": 301,
}  # fmt: skip
SHARED = Job(
    raw=LLAMA, lora=LoraConfig(rank=5), batch_size=1, max_len=24, accumulation=4, dtype=torch.float32, processes=2,
    distributed="fsdp",
)  # fmt: skip
MIXED = ShardConfig(mixed_precision=True)
JOBS = {
    "NF4 with checkpointing": SHARED,
    "one round": replace(SHARED, accumulation=2, optimizer=OptimizerConfig(name="adamw-8bit")),
    "mixed precision": replace(SHARED, dtype=torch.bfloat16, fsdp=MIXED),
    "16-bit LoRA with all activations kept": replace(SHARED, quant=None, gradient_checkpointing=False),
    "a T5": replace(SHARED, raw=T5, target_len=16),
    "full fine-tuning of a RoBERTa": with_classifier(replace(SHARED, raw=ROBERTA, quant=None, lora=None)),
    "whole models": replace(SHARED, distributed="ddp"),
}
FSDP = [name for name, job in JOBS.items() if job.shared]


class Collectives(TorchDispatchMode):
    """Bytes of the tensors that were gathered, scattered and summed, but for small numbers told on the CPU."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = {"gathered": 0, "reduced": 0, "all_reduced": 0}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func.namespace == "c10d":
            name = func._opname
            if name.startswith("_allgather_base"):
                self.nbytes["gathered"] += args[0].nbytes
            elif name.startswith("_reduce_scatter_base"):
                self.nbytes["reduced"] += args[1].nbytes
            elif name.startswith("allreduce_"):
                self.nbytes["all_reduced"] += sum(t.nbytes for t in args[0] if t.dtype != torch.float64)
            else:
                raise AssertionError(f"{func} is not counted")
        return func(*args, **(kwargs or {}))


def measure(jobs: list[Job]) -> list[dict[str, Any]]:
    with world.world("cpu", timeout=60):
        return [measured(job) for job in jobs]


def measured(job: Job) -> dict[str, Any]:
    torch.manual_seed(0)  # of all processes alike
    found: dict[str, Any] = {}
    with own_workspaces():
        stepper = prepared(job, torch.device("cpu"))
        parameters = [shares.local(p.detach()) for p in stepper.model.parameters()]
        found["model"] = sum(t.untyped_storage().nbytes() for t in [*parameters, *stepper.model.buffers()])
        for _ in range(2):  # in the second DistributedDataParallel orders its buckets anew
            stepper.step(1)

        def look(*_: Any) -> None:
            grads = {p.grad.untyped_storage() for p in stepper.passes.moved.values() if p.grad is not None}
            found["gradients"] = sum({storage.data_ptr(): storage.nbytes() for storage in grads}.values())

        stepper.optimizer.register_step_pre_hook(look)
        with Collectives() as collectives:
            stepper.step(job.rounds)
    return found | {"states": stepper.optimizer.state_bytes, "sent": collectives.nbytes}


@pytest.fixture(scope="module")
def measurements():
    return dict(zip(JOBS, zip(*together(measure, 2, list(JOBS.values())), strict=True), strict=True))


@pytest.mark.parametrize("name", JOBS)
def test_what_a_process_has_and_sends_is_planned_to_the_byte(measurements, name):
    planned = plan(JOBS[name], "cpu")
    traffic = planned.traffic
    for found in measurements[name]:
        assert found["model"] == sum(planned.parts.get(label, 0) for label in base_labels())
        assert found["gradients"] == traffic.reduced // 2 + traffic.all_reduced
        assert found["sent"] == {
            "gathered": traffic.gathered, "reduced": traffic.reduced, "all_reduced": traffic.all_reduced,
        }  # fmt: skip
    assert measurements[name][0]["states"] == planned.parts[STATES]  # the first has the most rows


# The fullest moment


class Settled(TorchDispatchMode):
    """Gives the sums of a process that is alone among others that only seem to be there: what it has itself."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        done = func(*args, **(kwargs or {}))
        if func.namespace == "c10d" and func._opname.startswith("_reduce_scatter_base"):
            args[0].copy_(args[1][: args[0].numel()])
        return done


@contextmanager
def seeming(processes: int) -> Iterator[None]:
    """A time in which this process is the first of several, of which there are no others."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=processes, store=FakeStore())
    try:
        with Settled():
            yield
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(("name", "processes"), [*((name, 2) for name in FSDP), ("NF4 with checkpointing", 3)])
def test_the_fullest_moment_is_planned_within_5_percent(monkeypatch, name, processes):
    monkeypatch.setattr(Sharing, "carry", lambda *_: None)  # what gloo takes, which is not there
    job = replace(JOBS[name], processes=processes, accumulation=JOBS[name].rounds * processes)
    with seeming(processes):
        measured = measured_peak(job)
        planned = planned_anew(job, "cpu")  # in which they do not count
    assert planned.total == pytest.approx(measured, rel=0.05)


def test_few_blocks_extended_give_what_all_blocks_give():
    job = replace(SHARED, raw=with_layers(LLAMA, 5), processes=3, fsdp=ShardConfig(cpu_offload=True))
    short, long = planned_anew(job, "cuda"), planned_anew(job, "cuda", extend=False)
    assert (short.traffic, short.host) == (long.traffic, long.host)
    assert short.total == pytest.approx(long.total, rel=5e-3)  # tables of launches are made once in a process


def test_offload_leaves_a_gpu_buffers_and_what_is_on_its_way():
    on_gpu = planned_anew(SHARED, "cuda")
    job = replace(SHARED, fsdp=ShardConfig(cpu_offload=True), optimizer=OptimizerConfig(name="paged-adamw"))
    offloaded = planned_anew(job, "cuda")
    moved = {label: n for label, n in on_gpu.parts.items() if label in base_labels() and n}
    moved["scales"] -= offloaded.parts["scales"]
    assert {label: n for label, n in offloaded.host.items() if label not in ("gradients", STATES)} == moved
    assert offloaded.host[STATES] == pytest.approx(on_gpu.parts[STATES], rel=1e-3)
    assert offloaded.needed == offloaded.total < on_gpu.total  # nothing is left to be paged
    assert offloaded.traffic == on_gpu.traffic
    assert planned_anew(replace(SHARED, fsdp=ShardConfig(cpu_offload=True)), "cpu").host == {}


def test_shares_that_come_from_the_cpu_are_copied_before_they_are_sent():
    job = replace(SHARED, fsdp=ShardConfig(cpu_offload=True))
    with simulated("cuda") as ledger:
        sharing = Sharing(ledger, prepared(job, torch.device("meta")).model, job, "cuda")
        ledger.begin(("start",))
        before = ledger.total
        sharing.send_for(sharing.root, "forward")
        buffer = sharing.root.buffer
        assert buffer is not None
        assert ledger.total - before == pytest.approx(buffer.nbytes, abs=512)
        assert ledger.peaks["start",].total - before == pytest.approx(1.5 * buffer.nbytes, abs=512)


# What is sent


def test_of_a_collective_a_process_sends_all_but_its_own_part():
    traffic = Traffic(processes=4, rounds=3, forward=400, backward=200, reduced=80, all_reduced=0)
    assert traffic.sent_in_round == 450
    assert traffic.sent == 3 * 450 + 60
    assert traffic.total == 4 * traffic.sent
    assert Traffic(processes=2, all_reduced=100).sent == 100  # half of it to be summed, half of it summed
    assert Traffic().sent == 0


# Whether a model is shared


def ask(rooms: list[list[int]], settings: list[dict[str, Any]]) -> list[str]:
    """What each process chooses for each of the settings, where it has the room that is said for it."""
    with world.world("cpu", timeout=60):
        return [chosen(room[world.rank()], setting) for room, setting in zip(rooms, settings, strict=True)]


def chosen(room: int, setting: dict[str, Any]) -> str:
    with patch("train.planner.choose.available", lambda _: room):
        return choose(config(**setting), 24, torch.device("cpu"))


def config(**settings: Any) -> SimpleNamespace:
    """What a choice looks at."""
    given: dict[str, Any] = {
        "distributed": "auto", "dtype": "float32", "model": "smollm2-135m", "quant": QuantConfig(), "quantize": True,
        "lora": LoraConfig(rank=5), "gradient_checkpointing": True, "optimizer": OptimizerConfig(), "batch_size": 1,
        "accumulation": 4, "fsdp": ShardConfig(), "data": SimpleNamespace(target_max_len=None),
    }  # fmt: skip
    return SimpleNamespace(**given | settings)


def test_the_process_with_the_least_room_decides_for_all():
    much, little = 2**40, 2**20
    rooms = [[much, little], [much, much], [much, little], [much, little]]
    settings = [{}, {}, {"distributed": "ddp"}, {"distributed": "fsdp"}]
    assert together(ask, 2, rooms, settings) == [["fsdp", "ddp", "ddp", "fsdp"]] * 2


def test_alone_there_is_nothing_to_choose():
    assert choose(config(), 24, torch.device("cpu")) == "auto"
