"""The planner against what is real: measured peaks, all blocks of a model, the paper's counts."""

from dataclasses import replace

import pytest
import torch

import kernels
import nf4
from kernels import dense
from models import ConfigError, LoraConfig
from models.architectures import build
from models.precision import ADAPTERS, QUANTIZED
from nf4 import QuantConfig
from train.optimizer import OptimizerConfig
from train.planner import simulation
from train.planner.gpus import GIB, MIB, gpu
from train.planner.jobs import with_classifier
from train.planner.layers import with_layers
from train.planner.ledger import Ledger
from train.planner.measure import allocated_at_once, measured_peak
from train.planner.paper import FIGURE_6, base_parameters, compared, linear_parameters, paper_plans
from train.planner.plan import GRADIENTS, LABELS, STATES, plan
from train.planner.simulation import computed, simulated
from train.planner.sizes import SIZES
from train.planner.step import Job
from train.planner.switches import fitting, switches

LLAMA = {
    **SIZES["smollm2-135m"], "num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 256,
    "num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 500,
}  # fmt: skip
T5 = {
    **SIZES["t5-v1.1-small"], "num_layers": 2, "num_decoder_layers": 2, "d_model": 64, "d_kv": 16, "d_ff": 128,
    "num_heads": 4, "vocab_size": 300,
}  # fmt: skip
ROBERTA = {
    **SIZES["roberta-base"], "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 128,
    "num_attention_heads": 4, "vocab_size": 300,
}  # fmt: skip
ADAPTER = LoraConfig(rank=8)
BASE = Job(raw=LLAMA, lora=ADAPTER, batch_size=4, max_len=128, dtype=torch.float32)
JOBS = {
    "NF4 with checkpointing": BASE,
    "NF4 in bfloat16": replace(BASE, dtype=torch.bfloat16, max_len=256),
    "16-bit LoRA with all activations kept": replace(BASE, quant=None, gradient_checkpointing=False),
    "states of 8 bits, one micro-batch": replace(BASE, optimizer=OptimizerConfig(name="adamw-8bit"), accumulation=1),
    "DoRA": replace(BASE, lora=replace(ADAPTER, dora=True)),
    "full fine-tuning": replace(BASE, quant=None, lora=None),
    "a T5": replace(BASE, raw=T5, target_len=64),
    "full fine-tuning of a RoBERTa": with_classifier(replace(BASE, raw=ROBERTA, quant=None, lora=None)),
}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", JOBS)
def test_a_plan_is_within_5_percent_of_what_the_allocator_counts(name):
    assert plan(JOBS[name], "cpu").total == pytest.approx(measured_peak(JOBS[name]), rel=0.05)


def toss(device):
    return torch.empty(10_000, device=device).bernoulli_(0.5)


def add_gradients(device):
    x = torch.ones(10_000, device=device, requires_grad=True)
    y = x * 2
    torch.autograd.backward([y * 3 + y * 4 + y * 5], [torch.ones(10_000, device=device)])


@pytest.mark.parametrize("work", [toss, add_gradients])
def test_what_is_taken_for_a_moment_alone_is_counted_as_the_allocator_counts_it(work):
    with simulated("cpu") as ledger:
        work(torch.device("meta"))
    planned = max(peak.total for peak in ledger.peaks.values())
    measured = allocated_at_once(lambda: torch.device("cpu"), work)
    assert planned == pytest.approx(measured, abs=64)  # the profiler's own mark is a tensor


@pytest.mark.parametrize("name", ["NF4 with checkpointing", "16-bit LoRA with all activations kept", "a T5"])
def test_few_blocks_extended_give_exactly_what_all_blocks_give(name):
    job = replace(JOBS[name], raw=with_layers(JOBS[name].raw, 5))
    short, long = plan(job, "cpu"), plan(job, "cpu", extend=False)
    assert short.total == long.total
    assert (short.base.nbytes, short.trained) == (long.base.nbytes, long.trained)
    assert [short.base[p.name].parameters for p in long.base] == [p.parameters for p in long.base]


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_plan_for_a_gpu_needs_no_gpu_and_extends_as_well(checkpointing):
    raw = with_layers(LLAMA, 5)
    job = replace(BASE, raw=raw, dtype=torch.bfloat16, max_len=512, gradient_checkpointing=checkpointing)
    short, long = plan(job, "cuda"), plan(job, "cuda", extend=False)
    assert short.total == pytest.approx(long.total, rel=1e-3)  # tables of launches are made once in a process


def test_parts_are_all_there_is_and_those_that_are_known_are_exact():
    planned = plan(BASE, "cpu")
    assert set(planned.parts) <= set(LABELS)
    adapters = sum(planned.base[ADAPTERS].nbytes.values())
    assert planned.parts[ADAPTERS] == planned.parts[GRADIENTS] == adapters == 4 * planned.trained
    assert planned.parts[STATES] == pytest.approx(2 * adapters, rel=0.3)  # room between small matrices
    assert planned.parts["codes"] + planned.parts["scales"] == sum(planned.base[QUANTIZED].nbytes.values())
    assert planned.total == sum(planned.parts.values())


def test_switches_move_what_they_are_for():
    kept = plan(replace(BASE, gradient_checkpointing=False), "cpu")
    assert plan(BASE, "cpu").total < kept.total
    paged = plan(replace(BASE, optimizer=OptimizerConfig(name="paged-adamw")), "cuda")
    plain = plan(BASE, "cuda")
    assert paged.needed == paged.total - paged.parts[STATES]
    assert (paged.total, plain.needed) == pytest.approx((plain.total, plain.total), rel=5e-3)
    whole = plan(replace(BASE, quant=QuantConfig(double_quant=False)), "cpu")
    assert whole.parts["scales"] > 3 * plan(BASE, "cpu").parts["scales"]


def test_planning_leaves_no_trace_in_what_is_computed_afterwards():
    weight = torch.randn(64, 128)
    x = torch.randn(30, 128)
    before = kernels.nf4_linear(x, nf4.quantize(weight))
    held = dict(dense.workspaces.__dict__.get("held", {}))
    attention = torch.nn.functional.scaled_dot_product_attention
    plan(BASE, "cuda")
    plan(BASE, "cpu")
    assert torch.equal(kernels.nf4_linear(x, kernels.quantize(weight)), before)
    assert dense.workspaces.__dict__.get("held", {}).keys() == held.keys()
    assert torch.nn.functional.scaled_dot_product_attention is attention


def test_a_text_longer_than_the_model_knows_is_refused():
    with pytest.raises(ConfigError, match="max_len is 9000, but the model knows 8192"):
        plan(replace(BASE, max_len=9000), "cpu")


# The ledger


def test_a_ledger_knows_the_fullest_moment_and_what_was_alive():
    ledger = Ledger(granularity=512)
    ledger.begin(("one",))
    first = torch.empty(100, dtype=torch.uint8)
    ledger.note(first)
    ledger.note(first.view(10, 10))  # the same storage
    assert ledger.total == 512
    ledger.label = "second"
    second = torch.empty(1024, dtype=torch.uint8)
    ledger.note(second)
    ledger.label = None
    del second
    assert ledger.total == 512
    ledger.enter(("two",))
    ledger.reach(100)
    ledger.settle()
    assert {segment: peak.total for segment, peak in ledger.peaks.items()} == {("one",): 1536, ("two",): 612}
    assert ledger.parts(("one",)) == {"second": 1024, "work of the moment": 512}


def test_a_storage_that_is_resized_leaves_moments_before_it_as_they_were():
    ledger = Ledger(granularity=512)
    ledger.label = "kept"
    kept = torch.empty(1024, dtype=torch.uint8)
    ledger.note(kept)
    ledger.begin(("one",))
    ledger.resize(kept, 0, "gathered")
    assert ledger.total == 0
    ledger.enter(("two",))
    ledger.resize(kept, 700, "gathered")
    ledger.resize(kept, 0, "gathered")
    ledger.settle()
    assert (ledger.parts(("one",)), ledger.parts(("two",))) == ({"kept": 1024}, {"gathered": 1024})
    del kept
    assert not ledger.live


def test_what_is_simulated_has_values_only_where_code_asks_for_them():
    with simulated("cpu") as ledger:
        ids = torch.tensor([[5, 7]]).to("meta")
        table = torch.empty(10, 4, device="meta")
        rows = torch.nn.functional.embedding(ids, table)
        assert ids.tolist() == [[5, 7]]
        assert rows.is_meta
        assert rows[ids > 5].shape == (1, 4)  # how many rows a mask leaves is a matter of values
        assert ledger.total >= rows.nbytes + table.nbytes
    assert computed(torch.ops.aten.add.Tensor, (torch.ones(2), 1), {}).tolist() == [2, 2]


# The paper


@pytest.fixture(scope="module")
def plans():
    return paper_plans()


def test_counts_of_parameters_are_those_of_the_released_models(plans):
    linears = {name: linear_parameters(planned) for name, planned in plans.items()}
    assert list(linears.values()) == [6_476_005_376, 12_687_769_600, 32_102_154_240, 64_760_053_760]
    others = [base_parameters(planned) - linears[name] for name, planned in plans.items()]
    assert others == [262_410_240, 328_094_720, 426_789_376, 525_606_912]
    assert [p.trained for p in plans.values()] == [159_907_840, 250_347_520, 487_587_840, 799_539_200]


def test_65b_fits_one_gpu_of_48_gb_as_in_the_paper(plans):
    rows = {str(row["model"]): row for row in compared(plans)}
    assert [round(float(row["weights"])) for row in rows.values()] == [3687, 6868, 16607, 32863]
    for name, row in rows.items():
        theirs = FIGURE_6[name]
        assert row["total"] == pytest.approx(theirs.total, rel=0.1)
        assert float(row["optimizer"]) == pytest.approx(8 * plans[name].trained / MIB, rel=1e-3)
        assert theirs.optimizer == 4 * theirs.adapters
    assert rows["llama-65b"]["full_16_bit_GB"] == pytest.approx(783.4, abs=0.1)  # "more than 780 GB"
    card = gpu("48GB")
    assert card.fits(plans["llama-65b"].total)
    assert not gpu("24GB").fits(plans["llama-33b"].total)  # "33B does not quite fit into 24 GB;
    assert gpu("24GB").fits(plans["llama-33b"].needed)  # paged optimizers needed"


def test_named_sizes_have_the_parameters_that_their_papers_count():
    counts = {
        "roberta-base": 125e6, "roberta-large": 355e6, "t5-small": 60e6, "t5-base": 220e6, "t5-large": 770e6,
        "t5-3b": 2.8e9, "t5-11b": 11e9, "t5-v1.1-xxl": 11e9, "smollm2-135m": 135e6,
    }  # fmt: skip
    for name, count in counts.items():
        labels = 2 if name.startswith("roberta") else None
        with torch.device("meta"):
            model = build(SIZES[name], name, (), "classification" if labels else None, labels)
        assert sum(p.numel() for p in model.parameters()) == pytest.approx(count, rel=0.05), name


# What would make it fit


def test_the_cheapest_changes_that_make_a_step_fit_are_found():
    job = replace(BASE, quant=None, gradient_checkpointing=False, batch_size=8, max_len=512)
    alone = switches(job, "cpu")
    assert all(switch.plan.total < plan(job, "cpu").total for switch in alone if switch.flags != "--quantize")
    least = next(switch for switch in alone if switch.flags == "--gradient-checkpointing").plan.needed
    card = replace(gpu("1"), nbytes=gpu("1").takes(least))
    steps, after = fitting(job, card, "cpu")
    assert after is not None
    assert card.fits(after.needed)
    assert not card.fits(plan(job, "cpu").needed)
    assert [step.flags for step in steps] == [
        "--batch-size 4 --accumulation 32"
    ]  # before checkpointing, which costs more
    assert steps[-1].plan.total == after.total


def test_a_change_that_a_later_one_makes_needless_is_left_out():
    raw = {**LLAMA, "num_hidden_layers": 12}
    lion = OptimizerConfig(name="lion")  # whose states are not to be had in 8 bits
    job = replace(BASE, raw=raw, quant=None, optimizer=lion, batch_size=2, max_len=32)
    small = plan(replace(job, quant=QuantConfig()), "cpu").needed
    steps, after = fitting(job, replace(gpu("1"), nbytes=gpu("1").takes(small)), "cpu")
    assert after is not None
    assert [step.flags for step in steps] == ["--quantize"]  # and not the smaller batch that was tried before


def test_where_nothing_helps_there_is_no_plan():
    steps, after = fitting(BASE, replace(gpu("1"), nbytes=1000), "cpu")
    assert after is None
    assert [step.flags for step in steps]


@pytest.mark.parametrize(("text", "size"), [("48GB", 48), ("24", 24), ("23.5 GiB", 23.5), ("A100-80GB", 80)])
def test_a_gpu_is_a_size_or_a_name(text, size):
    assert gpu(text).nbytes == size * GIB


def test_an_unknown_gpu_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"gpu: 'rtx3090' is neither a size .* did you mean rtx-3090"):
        gpu("rtx3090")
    with pytest.raises(ConfigError, match="neither a size"):
        gpu("0GB")


def test_shapes_that_are_remembered_are_those_that_torch_gives():
    aten, x = torch.ops.aten, torch.empty(4, 6, device="meta", dtype=torch.bfloat16)
    asked = [
        (aten.mul.Tensor, (x, 2)), (aten.mul.Tensor, (x.t(), 2)), (aten.mul.Tensor, (x.bool(), 1)),
        (aten.mul.Tensor, (x.bool(), 1.0)), (aten.mul.Tensor, (x.bool(), True)), (aten.add_.Tensor, (x, x)),
        (aten._unsafe_view.default, (x, [24])), (aten.view.default, (x, [3, 8])), (aten.mm.default, (x, x.t())),
        (aten.sum.dim_IntList, (x, [0])), (aten.sum.dim_IntList, (x, [1])), (aten.sum.default, (x,)),
    ]  # fmt: skip
    for func, args in asked * 2:
        expected, found = func(*args), simulation.shaped(func, args, {})
        for of in (torch.Tensor.size, torch.Tensor.stride, lambda t: t.dtype):
            assert of(found) == of(expected), (func, args)
        shares = [t.untyped_storage()._cdata == x.untyped_storage()._cdata for t in (found, expected)]
        assert shares[0] == shares[1], (func, args)
    assert {key[0] for key in simulation.known} >= {aten.mul.Tensor, aten.add_.Tensor, aten.mm.default}
