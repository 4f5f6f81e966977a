"""The C operators on every instruction set that this machine has: bit for bit what the definitions compute."""

import ctypes
import math
import platform
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import kernels
import nf4
from kernels import cpu, cpu_build, reference
from nf4 import QuantConfig
from tests.strategies import weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FOUR_BITS = ("nf4", "fp4", "int4", "fp4-e2m1", "fp4-e3m0")
# "native" is what a user gets; the others are the code paths of older CPUs, which this machine may also run.
TARGETS = {"native": "-march=native", "avx2": "-march=x86-64-v3", "portable": "-march=x86-64"}


@pytest.fixture(scope="module", params=TARGETS)
def operators(request, tmp_path_factory):
    """Every function of `cpu`, for one instruction set after the other."""
    if request.param == "avx2" and not cpu_build.capabilities().get("avx2"):
        pytest.skip("this CPU has no AVX2")
    flags = TARGETS[request.param] if platform.machine() == "x86_64" else "-O2"
    path = cpu_build.build(((flags, "-fopenmp"),), tmp_path_factory.mktemp("operators"))
    built = cpu_build.declared(ctypes.CDLL(str(path)))
    patch = pytest.MonkeyPatch()
    patch.setattr(cpu, "library", lambda: built)
    yield cpu
    patch.undo()


def equal(one, other):
    """Equal bits, except that any NaN equals any other."""
    return torch.equal(one.isnan(), other.isnan()) and torch.equal(one.nan_to_num(), other.nan_to_num())


@settings(max_examples=60)
@given(
    weight=weights(),
    codebook=st.sampled_from(FOUR_BITS),
    block_size=st.sampled_from([2, 6, 16, 32, 64, 100, 128, 256, 4096]),
    double_quant=st.booleans(),
    nested=st.sampled_from([1, 5, 256]),
)
def test_codes_and_scales_are_the_definitions(operators, weight, codebook, block_size, double_quant, nested):
    config = QuantConfig(codebook, block_size, double_quant, nested)
    assert operators.accepts_weight(weight, config)
    ours, theirs = operators.quantize(weight, config).tensors(), nf4.quantize(weight, config).tensors()
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def test_a_partial_block_is_divided_and_a_whole_one_multiplied(operators):
    levels = nf4.codebook("nf4")
    values = torch.cat([torch.ones(1), (levels[:-1] + levels[1:]) / 2])  # halfway, where the last bit decides
    config, differ = QuantConfig(block_size=16, double_quant=False), 0
    for scale in torch.rand(200, generator=torch.Generator().manual_seed(0)) + 0.5:
        whole, partial = values * scale, (values * scale)[:15]
        ours = [operators.quantize(weight, config).packed for weight in (whole, partial)]
        assert torch.equal(ours[0], nf4.quantize(whole, config).packed)
        assert torch.equal(ours[1], nf4.quantize(partial, config).packed)
        differ += int(not torch.equal(ours[0][:7], ours[1][:7]))
    assert differ > 10


@settings(max_examples=60)
@given(
    weight=weights(),
    codebook=st.sampled_from(FOUR_BITS),
    block_size=st.sampled_from([1, 3, 32, 33, 64, 100, 256, 4096]),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
)
def test_weights_come_back_as_the_definition_gives_them(operators, weight, codebook, block_size, double_quant, dtype):
    q = nf4.quantize(weight, QuantConfig(codebook, block_size, double_quant))
    expected = nf4.dequantize(q, dtype)
    assert torch.equal(operators.dequantize(q, dtype), expected)
    out = torch.full(q.shape, math.nan, dtype=dtype)
    assert operators.dequantize(q, dtype, out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_decodes_under_scales_of_every_size(operators, dtype):
    """Subnormal numbers, infinities and codes without a level among them."""
    scales = torch.tensor([0.0, 1e-45, 3e-42, 1e-38, 6e-8, 1e-4, 1.0, 65519.0, 65520.0, 3e38, math.inf])
    for codebook in FOUR_BITS:
        packed = torch.arange(256, dtype=torch.uint8).repeat(len(scales))
        config = QuantConfig(codebook, 512, double_quant=False)
        q = nf4.QuantizedTensor(packed, scales, None, None, None, (512 * len(scales),), dtype, config)
        assert equal(operators.dequantize(q), nf4.dequantize(q))


def test_every_float16_and_bfloat16_is_read_and_rounded_as_torch_does(operators):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    for dtype in (torch.float16, torch.bfloat16):
        values = every.view(dtype)
        values = values[values.isfinite()]
        kept = operators.drop(values, 1e-6, 0)  # the threshold is 0: all stay, times 1.000001
        assert torch.equal(kept, reference.drop(values, 1e-6, 0))
        largest = operators.block_absmax(values, 1)
        assert torch.equal(largest, values.float().abs())


@settings(max_examples=15)
@given(weight=weights(), codebook=st.sampled_from(FOUR_BITS), block_size=st.sampled_from([2, 32, 64, 600]))
def test_the_search_fits_a_block_as_well_as_the_definition(operators, weight, codebook, block_size):
    config = QuantConfig(codebook, block_size, double_quant=False, scale="search")
    absmax = QuantConfig(codebook, block_size, double_quant=False)
    assume(weight.numel())
    ours, theirs, plain = operators.quantize(weight, config), nf4.quantize(weight, config), nf4.quantize(weight, absmax)
    flat = weight.reshape(-1)
    errors = [
        cpu_errors.sum().item()
        for cpu_errors in (operators.squared_errors(flat, q.scales, config) for q in (ours, theirs, plain))
    ]
    assert errors[0] <= errors[1] * 1.02 + 1e-30  # sums are taken in another order, so near equals may differ
    assert errors[0] <= errors[2] * (1 + 1e-9)
    torch.testing.assert_close(
        operators.squared_errors(flat, theirs.scales, config),
        nf4.search.squared_errors(flat, theirs.scales, config),
        rtol=1e-6,
        atol=1e-30,
    )


def test_the_search_gains_on_a_million_weights_what_the_definition_gains():
    weight = torch.randn(2**18, generator=torch.Generator().manual_seed(0))
    for double_quant in (False, True):
        config = QuantConfig(double_quant=double_quant, scale="search")
        ours, theirs = (nf4.error(weight, quantize(weight, config)).mse for quantize in (cpu.quantize, nf4.quantize))
        assert ours == pytest.approx(theirs, rel=1e-4)


@settings(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, cpu.FEW), st.integers(1, 30), st.sampled_from([32, 64, 96, 160, 512])),
    block_size=st.sampled_from([32, 64, 128, 256]),
    codebook=st.sampled_from(["nf4", "fp4", "int4"]),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    branch=st.booleans(),
)
def test_a_few_tokens_are_multiplied_as_well_as_torch_does(
    operators, sizes, block_size, codebook, double_quant, dtype, branch
):
    M, N, K = sizes
    generator = torch.Generator().manual_seed(M * N * K)
    q = nf4.quantize(torch.randn(N, K, generator=generator), QuantConfig(codebook, block_size, double_quant))
    x = torch.randn(M, K, generator=generator).to(dtype)
    bias = torch.randn(N, generator=generator).to(dtype)
    xa = torch.randn(M, 3, generator=generator).to(dtype) if branch else None
    lora_b = torch.randn(N, 3, generator=generator) if branch else None
    assert operators.accepts_product(x, q)
    exact = reference.matmul(x.double(), q, bias, xa, lora_b, 0.7)
    ours, torchs = operators.matmul(x, q, bias, xa, lora_b, 0.7), reference.matmul(x, q, bias, xa, lora_b, 0.7)
    assert ours.dtype == dtype
    scale = torch.finfo(dtype).eps * exact.norm()
    assert (ours.double() - exact).norm() <= 2 * (torchs.double() - exact).norm() + scale


@settings(max_examples=30)
@given(
    sizes=st.tuples(
        st.integers(cpu.PANELS + 1, cpu.MANY), st.integers(1, 70), st.sampled_from([32, 96, 512, 544, 1024, 1120])
    ),
    block_size=st.sampled_from([32, 64, 1024]),
    codebook=st.sampled_from(["nf4", "fp4", "int4"]),
    double_quant=st.booleans(),
    bias=st.booleans(),
    strided=st.booleans(),
)
def test_panels_are_multiplied_as_well_as_torch_does(
    operators, sizes, block_size, codebook, double_quant, bias, strided
):
    M, N, K = sizes
    generator = torch.Generator().manual_seed(M * N * K)
    q = nf4.quantize(torch.randn(N, K, generator=generator), QuantConfig(codebook, block_size, double_quant))
    x = torch.randn(M, 2 * K, generator=generator).bfloat16()
    x = x[:, ::2] if strided else x[:, :K]
    added = torch.randn(N, generator=generator) if bias else None
    wanted = (M <= cpu.FEW or operators.has_panels(x.dtype)) and cpu.unit(q) % 32 == 0
    assert operators.accepts_product(x, q) == wanted
    if wanted:
        exact = reference.matmul(x.double(), q, added)
        ours, torchs = operators.matmul(x, q, added), reference.matmul(x, q, added)
        scale = torch.finfo(x.dtype).eps * exact.norm()
        assert (ours.double() - exact).norm() <= (torchs.double() - exact).norm() + 0.1 * scale


@settings(max_examples=40)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3).map(tuple),
    dropout=st.sampled_from([1e-6, 0.05, 0.1, 0.5, 0.999999]),
    seed=st.integers(0, 2**63 - 1),
    dtype=st.sampled_from(DTYPES),
)
def test_dropout_keeps_what_the_definition_keeps(operators, shape, dropout, seed, dtype):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed % 1000)).to(dtype)
    assert torch.equal(operators.drop(x, dropout, seed), reference.drop(x, dropout, seed))
    place = torch.device("cpu")
    mask = reference.dropout_mask(shape, dropout, seed, place)
    assert torch.equal(operators.dropout_mask(shape, dropout, seed, place), mask)


def test_what_c_does_not_take_is_left_to_the_definition():
    weight = torch.randn(8, 96)
    assert not cpu.accepts_weight(weight, QuantConfig("nf3"))
    assert not cpu.accepts_weight(weight, QuantConfig(block_size=7))
    q = nf4.quantize(weight, QuantConfig(block_size=40))
    assert cpu.accepts_stored(q)
    assert not cpu.accepts_product(torch.randn(1, 96), q)  # blocks cross rows every 8 inputs
    assert not cpu.accepts_product(torch.randn(1, 96).double(), nf4.quantize(weight))
    assert not cpu.accepts_product(torch.randn(cpu.FEW + 1, 96), nf4.quantize(weight))
    assert not cpu.accepts_product(torch.randn(cpu.MANY + 1, 96).bfloat16(), nf4.quantize(weight))
    assert not cpu.accepts_stored(nf4.quantize(weight, QuantConfig("int8")))


@pytest.mark.parametrize("double_quant", [False, True])
def test_codes_or_scales_too_few_for_the_shape_are_refused_before_c_reads_them(double_quant):
    q = nf4.quantize(torch.randn(4, 64), QuantConfig(double_quant=double_quant))
    short, few = replace(q, packed=q.packed[:-1]), replace(q, shape=(5, 64))
    for bad in (short, few):
        with pytest.raises(ValueError, match=r"a weight of shape \(\d, 64\) has"):
            cpu.dequantize(bad)
        with pytest.raises(ValueError, match=r"a weight of shape \(\d, 64\) has"):
            kernels.nf4_linear(torch.randn(1, 64), bad)


def test_a_build_is_kept_and_told_apart_by_sources_and_flags(tmp_path):
    first = cpu_build.build((("-O1",),), tmp_path)
    made = first.stat().st_mtime_ns
    assert cpu_build.build((("-O1",),), tmp_path) == first
    assert first.stat().st_mtime_ns == made
    assert cpu_build.build((("-O2",),), tmp_path) != first
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".so", ".so"]  # nothing half-made is left


def test_flags_that_the_compiler_refuses_are_left_out(tmp_path):
    assert cpu_build.build((("-march=no-such-cpu",), ()), tmp_path) == cpu_build.build(((),), tmp_path)


def test_a_failed_build_says_what_the_compiler_said(tmp_path, monkeypatch):
    (tmp_path / "broken.c").write_text("int f( {")
    monkeypatch.setattr(cpu_build, "SOURCES", tmp_path)
    with pytest.raises(RuntimeError, match=r"failed: .*broken\.c"):
        cpu_build.build(cache=tmp_path / "cache")


@pytest.mark.parametrize("environment", [{"QLORA_CPU": "torch"}, {"PATH": "", "CC": ""}])
def test_without_c_everything_runs_in_plain_torch_and_says_so_once(environment, tmp_path):
    code = (
        "import torch, kernels, nf4\n"
        "w = torch.randn(8, 64)\n"
        "q = kernels.quantize(w)\n"
        "assert torch.equal(kernels.dequantize(q), nf4.dequantize(nf4.quantize(w)))\n"
        "print(kernels.nf4_linear(torch.ones(1, 64), q).shape)\n"
    )
    variables = {"XDG_CACHE_HOME": str(tmp_path), "HOME": str(tmp_path), **environment}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout == "torch.Size([1, 8])\n"
    told = [line for line in done.stderr.splitlines() if "no C operators" in line]
    assert len(told) == ("PATH" in environment)


def test_an_unknown_choice_of_operators_is_refused(monkeypatch):
    monkeypatch.setenv("QLORA_CPU", "fortran")
    with pytest.raises(ValueError, match="must be c or torch, not 'fortran'"):
        cpu_build.library.__wrapped__()
