"""Plans for several processes, against what two of them have, send, and take at most."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models import LoraConfig
from models.parallel import shares, world
from models.parallel.shard import ShardConfig
from tests.processes import together
from train.optimizer import OptimizerConfig
from train.planner.jobs import with_classifier
from train.planner.measure import measured_peak
from train.planner.plan import GRADIENTS, STATES, plan, run_through
from train.planner.simulation import own_workspaces
from train.planner.sizes import SIZES
from train.planner.step import Job, prepared
from train.planner.tables import base_labels

LLAMA = {
    **SIZES["smollm2-135m"], "num_hidden_layers": 3, "hidden_size": 96, "intermediate_size": 255,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 501,
}  # fmt: skip
ROBERTA = {
    **SIZES["roberta-base"], "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "vocab_size": 300,
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
    "full fine-tuning of a RoBERTa": with_classifier(replace(SHARED, raw=ROBERTA, quant=None, lora=None)),
    "whole models": replace(SHARED, distributed="ddp"),
}


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
    found: dict[str, Any] = {"peak": measured_peak(job)}
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
def test_what_a_process_has_is_planned_to_the_byte(measurements, name):
    planned, run = plan(JOBS[name], "cpu"), run_through(JOBS[name], "cpu")
    model = sum(planned.parts.get(label, 0) for label in base_labels())
    for found in measurements[name]:
        assert found["model"] == model
        assert found["gradients"] == run.segments["update",][GRADIENTS]
    assert measurements[name][0]["states"] == planned.parts[STATES]  # the first has the most rows


@pytest.mark.parametrize("name", JOBS)
def test_what_is_sent_is_planned_to_the_byte(measurements, name):
    traffic = plan(JOBS[name], "cpu").traffic
    for found in measurements[name]:
        assert found["sent"] == {
            "gathered": traffic.gathered, "reduced": traffic.reduced, "all_reduced": traffic.all_reduced,
        }  # fmt: skip


@pytest.mark.parametrize("name", JOBS)
def test_the_fullest_moment_is_planned_within_5_percent(measurements, name):
    planned = plan(JOBS[name], "cpu").total
    assert planned == pytest.approx(measurements[name][0]["peak"], rel=0.05)
