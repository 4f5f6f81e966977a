"""AdamW, AdamW with states of 8 bits, and Lion: the algorithms, and the definition's bits in C and in Triton."""

import ctypes
import shutil
from fractions import Fraction
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import adamw, adamw8, cpu_build, cpu_updates, dispatch, dynamic_buckets, lion, tensor_lists, updates
from kernels.updates import STATE_BLOCK, AdamWNumbers, LionNumbers
from nf4 import dequantize_dynamic, dynamic_map, quantize_dynamic
from tests.judge import errs_at_most_twice
from tests.on_gpu import over_lists

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TRITON = SimpleNamespace(
    adamw=over_lists(adamw.adamw), adamw_8bit=over_lists(adamw8.adamw_8bit), lion=over_lists(lion.lion)
)
FORMS: Any = {"definition": updates, "c": cpu_updates, "triton": TRITON}
OPERATORS = ("adamw", "adamw_8bit", "lion")
every_form = pytest.mark.parametrize("form", FORMS)
every_operator = pytest.mark.parametrize("operator", OPERATORS)


class Case:
    """Parameters and states, before the first step, of one operator."""

    def __init__(self, operator, params):
        self.operator, self.params = operator, [p.clone() for p in params]
        sizes = [len(p) for p in params]
        if operator == "adamw_8bit":
            pairs = [[quantize_dynamic(torch.zeros(n), STATE_BLOCK, signed) for n in sizes] for signed in (True, False)]
            self.states = [[pair[i] for pair in kind] for kind in pairs for i in (0, 1)]
        else:
            self.states = [[torch.zeros(n) for n in sizes] for _ in range(2 if operator == "adamw" else 1)]

    def step(self, form, grads, numbers):
        with np.errstate(all="ignore"):  # the interpreter warns of infinities and NaN
            getattr(FORMS[form], self.operator)(self.params, grads, *self.states, numbers)
        return self

    def decoded(self, state=0):
        """The first or second state of each tensor, in float32."""
        if self.operator != "adamw_8bit":
            return self.states[state]
        codes, absmaxes = self.states[2 * state : 2 * state + 2]
        return [dequantize_dynamic(c, a, STATE_BLOCK, state == 0) for c, a in zip(codes, absmaxes, strict=True)]

    def tensors(self):
        return [tensor for tensors in (self.params, *self.states) for tensor in tensors]


def numbers_for(operator, step=1, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, decay=0.01) -> Any:
    if operator == "lion":
        return LionNumbers(betas[0], betas[1], lr, 1 - lr * decay)
    return AdamWNumbers.of(step, lr, betas, eps, decay)


def assert_same(ours, theirs):
    for i, (our, their) in enumerate(zip(ours.tensors(), theirs.tensors(), strict=True)):
        assert our.dtype == their.dtype
        assert torch.equal(our.isnan(), their.isnan()), i
        assert torch.equal(our[~our.isnan()], their[~their.isnan()]), i


def normals(sizes, seed=0, dtype=torch.float32, scale=1.0):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(n, generator=generator) * scale).to(dtype) for n in sizes]


# The algorithms


def test_adamw_follows_torchs_over_200_steps_within_the_rounding_of_float32():
    (start,) = normals([500])
    case = Case("adamw", [start])
    theirs = [torch.nn.Parameter(start.to(dtype)) for dtype in (torch.float32, torch.float64)]
    options: Any = {"lr": 3e-3, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    optimizers = [torch.optim.AdamW([p], **options) for p in theirs]
    for step in range(1, 201):
        grads = normals([500], seed=step, scale=0.1 + step % 7)
        case.step("definition", grads, [AdamWNumbers.of(step, *options.values())])
        for p, optimizer in zip(theirs, optimizers, strict=True):
            p.grad = grads[0].to(p.dtype)
            optimizer.step()
    torchs, exact = (p.detach() for p in theirs)
    assert errs_at_most_twice(case.params[0], torchs, exact)
    assert (case.params[0] - exact).abs().max() <= 200 * 2.0**-24 * exact.abs().max()  # a rounding a step
    for state, name in enumerate(("exp_avg", "exp_avg_sq")):
        expected = optimizers[1].state[theirs[1]][name]
        torch.testing.assert_close(case.states[state][0].double(), expected, rtol=2e-5, atol=1e-6)


def test_lion_is_the_published_algorithm():
    """Algorithm 2 of arXiv:2302.06675, line by line, in float64."""
    beta1, beta2, lr, decay = 0.9, 0.99, 0.01, 0.3
    (start,) = normals([400])
    case = Case("lion", [start])
    theta, m = start.double(), torch.zeros(400).double()
    for step in range(100):
        (g,) = normals([400], seed=step)
        g[step % 50 :: 50] = 0
        case.step("definition", [g], [LionNumbers(beta1, beta2, lr, 1 - lr * decay)])
        c = beta1 * m + (1 - beta1) * g.double()
        theta = theta - lr * (torch.sign(c) + decay * theta)
        m = beta2 * m + (1 - beta2) * g.double()
    assert (case.params[0] - theta).abs().max() <= 100 * 2.0**-24 * theta.abs().max()  # a rounding a step
    torch.testing.assert_close(case.states[0][0].double(), m, rtol=1e-6, atol=1e-7)


@every_form
@every_operator
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_parameter_without_gradient_and_decay_never_moves(form, operator, dtype):
    start = normals([1, 300, 1024], dtype=dtype)
    case = Case(operator, start)
    for step in range(1, 4):
        case.step(form, [torch.zeros_like(p) for p in start], [numbers_for(operator, step, decay=0.0)] * 3)
    assert_same(case, Case(operator, start))


@every_form
@every_operator
def test_decay_alone_shrinks_every_parameter(form, operator):
    start = normals([300])
    case = Case(operator, start).step(form, [torch.zeros(300)], [numbers_for(operator, lr=0.5, decay=0.5)])
    assert torch.equal(case.params[0], start[0] * 0.75)


@every_form
@every_operator
def test_cutting_at_multiples_of_256_changes_no_bit(form, operator):
    whole, grads = normals([1500]), normals([1500], seed=1)
    cuts = [256, 768, 476]
    together, apart = Case(operator, whole), Case(operator, whole[0].split(cuts))
    for step in (1, 2):
        numbers = numbers_for(operator, step)
        together.step(form, grads, [numbers])
        apart.step(form, [g.clone() for g in grads[0].split(cuts)], [numbers] * 3)
    joined = [torch.cat(tensors) for tensors in (apart.params, *apart.states)]
    assert all(torch.equal(a, b) for a, b in zip(joined, together.tensors(), strict=True))


@pytest.mark.parametrize(
    ("dtype", "largest", "largest_ratio"), [(torch.float32, 6e-5, 6e-4), (torch.bfloat16, 1.7e-4, 1.6e-3)]
)
@pytest.mark.parametrize("form", ["definition", "c"])
def test_states_of_8_bits_stay_as_near_to_torchs_as_bitsandbytes_asks_of_itself(form, dtype, largest, largest_ratio):
    """The figures of its test_optimizer8bit: 50 steps, and after each both sides go on from the same numbers."""
    n = 32 * 1024
    start = normals([n], dtype=dtype, scale=0.1)
    case, theirs = Case("adamw_8bit", start), torch.nn.Parameter(start[0].float())
    optimizer = torch.optim.AdamW([theirs], lr=1e-3, weight_decay=0.01)
    for step in range(1, 51):
        grads = normals([n], seed=step, dtype=dtype, scale=0.01)
        theirs.grad = grads[0].float()
        optimizer.step()
        case.step(form, grads, [numbers_for("adamw_8bit", step)])
        for state, name in enumerate(("exp_avg", "exp_avg_sq")):
            (ours,), torchs = case.decoded(state), optimizer.state[theirs][name]
            assert (~torch.isclose(torchs, ours, atol=3e-3, rtol=1e-3)).sum() < 20
            torchs.copy_(ours)
        error = (theirs.detach() - case.params[0].float()).abs()
        assert error.mean() < largest
        assert (error / (theirs.detach().abs() + 1e-9)).mean() < largest_ratio
        with torch.no_grad():
            theirs.copy_(theirs.to(dtype).float())
            case.params[0].copy_(theirs)


def nearest(value, absmax, entries):
    """The code of the exact nearest entry; of two the lower one."""
    value, absmax = Fraction(value), Fraction(absmax)
    return min(range(256), key=lambda code: abs(value - entries[code] * absmax))


@every_form
@pytest.mark.parametrize("absmax", [0.7, 1e-44, 3.3e38])
def test_every_code_is_that_of_the_exact_nearest_entry(form, absmax):
    """Without memory (beta = 0) a state is the gradient, or its square, so that gradients choose what is encoded."""
    entries = dynamic_map().double()
    middle = ((entries[:-1] + entries[1:]) / 2 * absmax).float()
    around = [middle, middle.nextafter(torch.tensor(4e38)), middle.nextafter(torch.tensor(-4e38))]
    values = torch.stack(around).clamp(-absmax, absmax)  # (3, 255)
    blocks = torch.cat([values, torch.full((3, 1), absmax)], dim=1).view(
        -1
    )  # each is full, so that its last one is absmax
    case = Case("adamw_8bit", [torch.zeros(len(blocks))])
    case.step(form, [blocks], [numbers_for("adamw_8bit", betas=(0.0, 0.0))])
    exact = [Fraction(entry) for entry in entries.tolist()]
    (codes,), (scales,), *_ = case.states
    assert scales.unique().tolist() == [torch.tensor(absmax).item()]
    assert codes.tolist() == [nearest(value, scales[0].item(), exact) for value in blocks.tolist()]


@every_form
def test_unsigned_codes_change_at_the_midpoints_too(form):
    entries = dynamic_map(False).double()
    middle = ((entries[:-1] + entries[1:]) / 2).float()
    roots = middle.sqrt()
    grads = torch.cat([roots, torch.ones(1), roots.nextafter(torch.tensor(2.0)), torch.ones(1)])
    case = Case("adamw_8bit", [torch.zeros(512)]).step(form, [grads], [numbers_for("adamw_8bit", betas=(0.0, 0.0))])
    exact = [Fraction(entry) for entry in entries.tolist()]
    assert case.states[2][0].tolist() == [nearest(value, 1.0, exact) for value in (grads * grads).tolist()]


@pytest.mark.parametrize("signed", [True, False])
def test_every_ratio_has_its_code_in_its_bucket_or_one_above(signed):
    below, midpoints = dynamic_buckets.bucket_tables(torch.device("cpu"), signed)
    ratios = torch.cat([midpoints[:-1], *normals([5000]), torch.zeros(1)]).float().clamp(0 if not signed else -1, 1)
    exact = (ratios.double()[:, None] > midpoints).sum(1)
    for computed in (ratios, ratios * (1 - 2.0**-22), ratios * (1 + 2.0**-22)):
        bucket = ((computed.view(torch.int32) & 0x7FFFFFFF) >> dynamic_buckets.SHIFT) - dynamic_buckets.LOWEST
        bucket = bucket.clamp(0, dynamic_buckets.BUCKETS - 1) + dynamic_buckets.BUCKETS * (ratios < 0)
        found = below[bucket].long()
        assert torch.equal(found + (ratios.double() > midpoints[found]).long(), exact)


# The definition's bits


@st.composite
def gradients(draw, sizes):
    """Of any magnitude, with zeros, subnormal numbers, and some that are not finite."""
    kind, dtype = (
        draw(st.sampled_from(["normal", "wide", "sparse", "subnormal", "not finite"])),
        draw(st.sampled_from(DTYPES)),
    )
    grads = normals(
        sizes, draw(st.integers(0, 2**20)), scale=10.0 ** draw(st.sampled_from([-30, -18, -3, 0, 4, 17, 30]))
    )
    for g in grads:
        if kind == "wide":
            g *= 10.0 ** torch.linspace(-20, 2, len(g))
        elif kind == "sparse":
            g[torch.arange(len(g)) % 5 != 3] = 0
        elif kind == "subnormal":
            g.copy_(torch.linspace(-30, 30, len(g)).round() * 2.0**-149)
        elif kind == "not finite" and len(g):
            g[len(g) // 2 :: 97] = draw(st.sampled_from([float("inf"), float("-inf"), float("nan")]))
    return [g.to(dtype) for g in grads]


sizes_of_lists = st.lists(st.sampled_from([0, 1, 2, 31, 255, 256, 257, 511, 1000, 1024, 1300]), max_size=5)


@every_operator
@pytest.mark.parametrize("form", ["c", "triton"])
@settings(max_examples=25)
@given(data=st.data(), sizes=sizes_of_lists, dtypes=st.lists(st.sampled_from(DTYPES), min_size=5, max_size=5))
def test_every_bit_is_the_definitions(form, operator, data, sizes, dtypes):
    start = [p.to(dtype) for p, dtype in zip(normals(sizes), dtypes[: len(sizes)], strict=True)]
    ours, theirs = Case(operator, start), Case(operator, start)
    rates = st.sampled_from([1e-3, 0.1])
    for step in (1, 2, 30):
        grads = data.draw(gradients(sizes))
        numbers = [
            numbers_for(operator, step, data.draw(rates), data.draw(st.sampled_from([(0.9, 0.999), (0.5, 0.6)])))
            for _ in sizes
        ]
        assert_same(ours.step(form, grads, numbers), theirs.step("definition", grads, numbers))


@every_operator
@pytest.mark.parametrize("form", ["c", "triton"])
def test_a_gradient_that_is_not_finite_spoils_its_block_alone(form, operator):
    start, (grad,) = normals([5 * 256 - 3]), normals([5 * 256 - 3], seed=1)
    for block, value in enumerate([float("nan"), float("inf"), -float("inf"), 0.0]):
        grad[256 * block : 256 * block + 200 : 70] = value
    ours, theirs = (Case(operator, start) for _ in range(2))
    for step in (1, 2):
        numbers = [numbers_for(operator, step)]
        assert_same(ours.step(form, [grad], numbers), theirs.step("definition", [grad], numbers))
    assert ours.decoded()[0][: 3 * 256 : 70].isfinite().logical_not().any()
    assert ours.decoded()[0][3 * 256 :].isfinite().all()
    assert ours.params[0][3 * 256 :].isfinite().all()


@every_operator
@pytest.mark.parametrize("form", ["c", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_long_tensors_meet_without_a_gap(form, operator, dtype):
    sizes = [5000, 1, 9216, 0, 2048]
    ours, theirs = (Case(operator, normals(sizes, dtype=dtype)) for _ in range(2))
    for step in (1, 2):
        grads = normals(sizes, seed=step, dtype=dtype)
        numbers = [numbers_for(operator, step, lr=0.01 * (i + 1)) for i in range(5)]
        assert_same(ours.step(form, grads, numbers), theirs.step("definition", grads, numbers))


@every_operator
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_any_number_of_threads_gives_the_same(operator, threads, monkeypatch):
    monkeypatch.setattr(cpu_updates, "threads", lambda: threads)
    sizes = [700, 3, 0, 2000, 256]
    ours, theirs = (Case(operator, normals(sizes)) for _ in range(2))
    grads, numbers = normals(sizes, seed=1), [numbers_for(operator)] * 5
    assert_same(ours.step("c", grads, numbers), theirs.step("definition", grads, numbers))


@pytest.fixture(scope="module", params=["", "-mavx2 -mfma -mf16c"])
def another_cpu(request, tmp_path_factory):
    """The operators as a CPU would have them that knows less than this one may."""
    if request.param and not cpu_build.capabilities().get("avx2"):
        pytest.skip("this CPU has no AVX2")
    folder = tmp_path_factory.mktemp("updates")
    for name in ("common.h", "updates.c"):
        shutil.copy(cpu_build.SOURCES / name, folder)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(cpu_build, "SOURCES", folder)
        patched.setattr(cpu_build, "SIGNATURES", {name: cpu_build.SIGNATURES[name] for name in OPERATORS})
        path = cpu_build.build((tuple(request.param.split()),), folder)
        return cpu_build.declared(ctypes.CDLL(str(path)))


@every_operator
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_cpu_with_fewer_instructions_computes_the_same_bits(operator, dtype, another_cpu, monkeypatch):
    monkeypatch.setattr(cpu_updates, "loaded", lambda: another_cpu)
    sizes = [300, 1024]
    ours, theirs = (Case(operator, normals(sizes, dtype=dtype)) for _ in range(2))
    for step in (1, 2):
        grads, numbers = normals(sizes, seed=step, dtype=dtype), [numbers_for(operator, step)] * 2
        assert_same(ours.step("c", grads, numbers), theirs.step("definition", grads, numbers))


@every_operator
@pytest.mark.parametrize("form", ["c", "triton"])
@pytest.mark.parametrize("offset", [1, 4])
def test_tensors_may_lie_anywhere_in_memory(form, operator, offset):
    start, grads, numbers = normals([1300]), normals([1300 + offset], seed=1), [numbers_for(operator)]
    ours, theirs = (Case(operator, start) for _ in range(2))
    shifted = [g[offset:] for g in grads]
    assert_same(ours.step(form, shifted, numbers), theirs.step("definition", shifted, numbers))
    (group,) = tensor_lists.grouped(
        start, shifted, {"exp_avgs": ours.states[0]} if operator != "adamw_8bit" else {}, numbers
    )
    assert group.aligned == (offset == 4)


@every_operator
@pytest.mark.parametrize("form", ["c", "triton"])
def test_a_model_of_hundreds_of_small_tensors_of_mixed_dtypes(form, operator):
    sizes = [1 + 7 * i % 90 for i in range(100)]
    start = [p.to(DTYPES[i % 3]) for i, p in enumerate(normals(sizes))]
    grads = [g.to(DTYPES[i % 2]) for i, g in enumerate(normals(sizes, seed=1))]
    ours, theirs = (Case(operator, start) for _ in range(2))
    numbers = [numbers_for(operator)] * 100
    assert_same(ours.step(form, grads, numbers), theirs.step("definition", grads, numbers))


@settings(max_examples=50)
@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=6).map(tuple), tile=st.sampled_from([256, 1024]))
def test_programs_cover_every_tensor_once(sizes, tile):
    rows, within = tensor_lists.tiles(sizes, tile, torch.device("cpu"))
    assert rows.dtype == within.dtype == torch.int32
    expected = [(row, first) for row, size in enumerate(sizes) for first in range(-(-size // tile))]
    assert list(zip(rows.tolist(), within.tolist(), strict=True)) == expected


@every_form
@every_operator
def test_a_backward_that_needs_the_parameter_of_before_is_an_error(form, operator):
    parameter = torch.nn.Parameter(torch.ones(300))
    loss = parameter.square().sum()
    case = Case(operator, [parameter.detach()])
    case.params = [parameter.detach()]
    case.step(form, normals([300]), [numbers_for(operator)])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_form
@every_operator
def test_parameters_made_in_inference_mode_are_updated_too(form, operator):
    with torch.inference_mode():
        ours, theirs = Case(operator, normals([300])), Case(operator, normals([300]))
        grads, numbers = normals([300], seed=1), [numbers_for(operator)]
        assert_same(ours.step(form, grads, numbers), theirs.step("definition", grads, numbers))


@pytest.mark.parametrize("form", ["c", "triton"])
def test_what_is_past_the_end_of_a_tensor_counts_for_no_scale(form):
    """The largest entry of a partial block goes back to zero, and its scale is that of what is left."""
    grad = torch.full((100,), 1e-3)
    ours, theirs = (Case("adamw_8bit", normals([100])) for _ in range(2))
    for largest in (1.0, -0.5):
        grad[0] = largest
        numbers = [numbers_for("adamw_8bit", betas=(0.5, 0.5))]
        assert_same(ours.step(form, [grad], numbers), theirs.step("definition", [grad], numbers))
    assert ours.states[1][0].item() < 1e-2


def test_empty_tensors_take_no_row_and_no_launch():
    empty, numbers = normals([0]), [numbers_for("lion")]
    assert tensor_lists.grouped(empty, empty, {"exp_avgs": empty}, numbers) == []
    (group,) = tensor_lists.grouped(normals([0, 3]), normals([0, 3]), {"exp_avgs": normals([0, 3])}, numbers * 2)
    assert group.sizes == [3]


# Where they run, and what is refused


@every_operator
def test_lists_on_a_cpu_are_updated_in_c_and_other_dtypes_by_the_definition(operator):
    cpu, floats, doubles = torch.device("cpu"), normals([3]), normals([3], dtype=torch.float64)
    assert dispatch.form(operator, cpu, floats, floats) is getattr(cpu_updates, operator)
    assert dispatch.form(operator, cpu, [], []) is getattr(cpu_updates, operator)
    for lists in ((doubles, floats), (floats, doubles), (floats + doubles, floats + floats)):
        assert dispatch.form(operator, cpu, *lists) is getattr(updates, operator)


@every_operator
def test_a_gpus_forms_take_lists(operator):
    (row,) = [row for row in dispatch.gpu_rows() if row.operator == operator]
    ours, theirs = (Case(operator, normals([300])) for _ in range(2))
    assert row.accepts(ours.params, ours.params)
    grads, numbers = normals([300], seed=1), [numbers_for(operator)]
    over_lists(row.form)(ours.params, grads, *ours.states, numbers)
    assert_same(ours, theirs.step("definition", grads, numbers))
    row.form([], [], *([] for _ in ours.states), [])  # nothing is on no device


def short(p, g, m):
    return [p], [g[:-1]], [m], "grads[0] must be 8 contiguous elements of torch.float32 on"


def strided(p, g, m):
    return [p], [torch.zeros(16)[::2]], [m], "not 8 strided ones"


def half_state(p, g, m):
    return [p], [g], [m.half()], r"exp_avgs[0] must be 8 contiguous elements of torch.float32"


def elsewhere(p, g, m):
    return [p], [g.to("meta")], [m], "not 8 contiguous ones of torch.float32 on meta"


def on_two_devices(p, g, m):
    return [p, p.to("meta")], [g, g.to("meta")], [m, m.to("meta")], "params[1] must be 8 contiguous elements"


def few(p, g, m):
    return [p, p.clone()], [g], [m, m.clone()], "lists of one length: 2 params, but 1 grads"


def strided_parameter(p, g, m):
    return [torch.zeros(16)[::2]], [g], [m], "params[0] must be 8 contiguous"


@pytest.mark.parametrize("form", ["c", "triton"])
@pytest.mark.parametrize("wrong", [short, strided, half_state, elsewhere, on_two_devices, few, strided_parameter])
def test_what_would_be_written_past_its_end_is_refused(form, wrong):
    params, grads, states, message = wrong(*(torch.zeros(8) for _ in range(3)))
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        FORMS[form].lion(params, grads, states, [numbers_for("lion")] * len(params))
    assert message in str(refusal.value)


@pytest.mark.parametrize("form", ["c", "triton"])
@pytest.mark.parametrize(("index", "message"), [(0, "exp_avgs[0] must be 300"), (1, "exp_avg_absmaxes[0] must be 2")])
def test_codes_and_their_scales_have_sizes_of_their_own(form, index, message):
    case = Case("adamw_8bit", normals([300]))
    case.states[index] = [case.states[index][0][:-1]]
    with pytest.raises(ValueError) as refusal:  # noqa: PT011
        case.step(form, normals([300]), [numbers_for("adamw_8bit")])
    assert message in str(refusal.value)


def test_what_is_shipped_has_names_of_its_own():
    names = [each.name for module in (adamw, adamw8, lion) for each in module.shipped()]
    assert len(names) == len(set(names)) == 12
