"""Blocks and codes: what rounding to the nearest level promises, published vectors, and what is refused."""

import hashlib
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import nf4.blockwise
from nf4 import CODEBOOKS, QuantConfig, code_bits, codebook, dequantize, quantize
from nf4.codebook import ascending, zero_code
from nf4.packing import pack, unpack, unpack_table
from tests.strategies import block_sizes, codebooks, configs, weights


def plain(codebook="nf4", block_size=64):
    return QuantConfig(codebook, block_size, double_quant=False)


def digest(tensor):
    return hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()[:16]


def nibbles(q):
    return "".join(f"{byte:02x}" for byte in q.packed.tolist())


# Properties


@given(weight=weights(), config=configs())
def test_any_weight_comes_back_in_its_shape_and_dtype_and_finite(weight, config):
    q = quantize(weight, config)
    back = dequantize(q)
    assert (back.shape, back.dtype) == (weight.shape, weight.dtype)
    assert back.isfinite().all()
    assert q.packed.numel() == math.ceil(weight.numel() * code_bits(config.codebook) / 8)
    assert dequantize(q, torch.float64).dtype == torch.float64


@given(weight=weights(), name=codebooks, block_size=block_sizes)
def test_no_weight_moves_further_than_half_the_widest_gap_of_its_block(weight, name, block_size):
    back = dequantize(quantize(weight, plain(name, block_size)), torch.float32)
    moved = (weight.float() - back).abs().flatten()
    absmax = [block.abs().max().float() for block in weight.flatten().split(block_size) if len(block)]
    widest = ascending(name)[0].diff().max()
    for block, largest in zip(moved.split(block_size), absmax, strict=False):
        assert (block <= widest / 2 * largest * (1 + 1e-5)).all()


@given(weight=weights(dtypes=(torch.float32,)), name=codebooks, block_size=block_sizes)
def test_no_other_level_of_the_block_is_nearer(weight, name, block_size):
    q = quantize(weight, plain(name, block_size))
    back, flat = dequantize(q).flatten(), weight.flatten()
    scale = q.scales.repeat_interleave(block_size)[: len(flat)]
    choices = codebook(name) * scale[:, None]
    best = (flat[:, None] - choices).abs().amin(dim=1) if len(flat) else flat
    assert ((flat - back).abs() <= best + 1e-6 * scale).all()


@given(weight=weights(), name=codebooks, block_size=block_sizes)
def test_quantizing_twice_changes_nothing(weight, name, block_size):
    once = dequantize(quantize(weight, plain(name, block_size)), torch.float32)
    twice = dequantize(quantize(once, plain(name, block_size)), torch.float32)
    assert torch.equal(once, twice)


@given(weight=weights(dtypes=(torch.float32, torch.bfloat16)), config=configs(), exponent=st.integers(-20, 20))
def test_a_power_of_two_scales_through_and_leaves_the_codes(weight, config, exponent):
    q, scaled = quantize(weight, config), quantize(weight * 2.0**exponent, config)
    partial = weight.numel() % config.block_size
    # bitsandbytes' absmax of a last block of zeros does not scale
    assume(not partial or weight.flatten()[-partial:].any())
    assert torch.equal(q.packed, scaled.packed)
    assert torch.equal(dequantize(q) * 2.0**exponent, dequantize(scaled))


@given(weight=weights(), name=codebooks, block_size=block_sizes)
def test_no_weight_changes_its_sign(weight, name, block_size):
    back = dequantize(quantize(weight, plain(name, block_size)), torch.float32)
    assert (back * weight.float().sign() >= 0).all()


@given(weight=weights(), block_size=block_sizes)
@pytest.mark.parametrize("name", ["int4", "int8", "fp4-e2m1", "fp4-e3m0"])
def test_a_symmetric_codebook_negates_but_for_ties(name, weight, block_size):
    back = dequantize(quantize(weight, plain(name, block_size)), torch.float32).flatten()
    other = dequantize(quantize(-weight, plain(name, block_size)), torch.float32).flatten()
    flat = weight.float().flatten()
    as_far = ((flat - back).abs() - (flat + other).abs()).abs() <= 1e-6 * flat.abs()
    assert ((back == -other) | as_far).all()


@given(seed=st.integers(0, 1000), name=codebooks, block_size=block_sizes)
def test_blocks_know_nothing_of_each_other(seed, name, block_size):
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(9, block_size, generator=generator)
    order = torch.randperm(9, generator=generator)
    for config in (plain(name, block_size), QuantConfig(name, block_size, False, scale="search")):
        back = dequantize(quantize(blocks, config))
        assert torch.equal(dequantize(quantize(blocks[order], config)), back[order])


@given(weight=weights(), name=codebooks, block_size=block_sizes, scale=st.sampled_from(["absmax", "search"]))
def test_within_a_block_order_is_kept(weight, name, block_size, scale):
    back = dequantize(quantize(weight, QuantConfig(name, block_size, False, scale=scale)))
    for before, after in zip(weight.flatten().split(block_size), back.flatten().split(block_size), strict=True):
        assert (after[before.argsort()].diff() >= 0).all()


@given(seed=st.integers(0, 1000), name=codebooks, block_size=block_sizes, exponent=st.integers(-9, 9))
def test_what_the_levels_can_say_is_said_exactly(seed, name, block_size, exponent):
    generator = torch.Generator().manual_seed(seed)
    levels = codebook(name)
    weight = levels[torch.randint(len(levels), (5, block_size), generator=generator)]
    weight[:, 0] = 1
    weight = weight * 2.0**exponent
    for scale in ("absmax", "search"):
        assert torch.equal(dequantize(quantize(weight, QuantConfig(name, block_size, False, 256, scale))), weight)


@given(config=configs(), seed=st.integers(0, 1000))
def test_zero_blocks_are_exactly_zero_under_any_scale(config, seed):
    weight = torch.randn(7, config.block_size + 1, generator=torch.Generator().manual_seed(seed))
    flat = weight.view(-1)
    flat[2 * config.block_size : 4 * config.block_size] = 0
    flat[len(flat) // config.block_size * config.block_size :] = 0
    back = dequantize(quantize(weight, config)).flatten()
    assert (back[2 * config.block_size : 4 * config.block_size] == 0).all()
    assert (back[len(flat) // config.block_size * config.block_size :] == 0).all()


@settings(max_examples=20)
@given(weight=weights(), config=configs(), chunk=st.sampled_from([8, 64, 120, 1 << 20]))
def test_the_size_of_a_chunk_does_not_show(weight, config, chunk):
    whole = quantize(weight, config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nf4.blockwise, "CHUNK", chunk)
        patch.setattr("nf4.search.CHUNK", chunk)
        pieces = quantize(weight, config)
        assert torch.equal(dequantize(pieces), dequantize(whole))
    assert torch.equal(pieces.packed, whole.packed)
    assert torch.equal(pieces.scales, whole.scales)


@given(bits=st.sampled_from([2, 3, 4, 8]), n=st.integers(1, 100), seed=st.integers(0, 1000))
def test_unpacking_undoes_packing_and_the_stream_is_big_endian(bits, n, seed):
    name = f"nf{bits}"
    codes = torch.randint(2**bits, (n,), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)
    packed = pack(codes, bits, zero_code(name))
    levels = unpack(packed, unpack_table(name, packed.device), bits)
    assert torch.equal(levels[:n], codebook(name)[codes.int()])
    stream = "".join(f"{byte:08b}" for byte in packed.tolist())
    assert stream.startswith("".join(f"{code:0{bits}b}" for code in codes.tolist()))


# Published numbers

X1 = (torch.arange(64) - 31.5) / 32
X2 = (torch.arange(75) - 37.25) / 16
GV1 = "00000111111112222233344445556667788899aaabbbccccddddeeeeeeefffff"
GV2 = "0000001111111112222223333444455555666778899aabbbcccdddeeeeeeffffeeeeeffffff7"
GV3 = "bbbbbbaaaaaaaadddddccccffeeee99911166667744445555522222222333333"


@pytest.mark.parametrize(
    ("x", "config", "codes", "absmax", "sha256"),
    [
        (X1, plain(), GV1, [0.984375], "2153eccfdccdb07b"),
        (X2, plain(block_size=32), GV2, [2.328125, 1.609375, 2.296875], "c95949c0816cef71"),
        (X1, plain("fp4"), GV3, [0.984375], "28fe41ef1f0d5aa4"),
    ],
    ids=["nf4", "odd, partial block", "fp4"],
)
def test_published_vectors_are_met_to_the_last_bit(x, config, codes, absmax, sha256):
    q = quantize(x, config)
    assert nibbles(q) == codes
    assert q.scales.tolist() == absmax
    assert digest(dequantize(q)) == sha256


def test_the_published_nested_vector_is_met_to_the_last_bit():
    i = torch.arange(19_200)
    block = i // 64
    q = quantize(((i % 64) - 31.5) / 31.5 * (1 + (block % 37) / 16))
    assert digest(q.packed) == "46946d5f0427c084"
    assert q.tensors()["absmax_offset"].item() == pytest.approx(2.11124992, rel=1e-7)
    assert q.tensors()["nested_absmax"].tolist() == pytest.approx([1.13875008] * 2, rel=1e-7)
    assert digest(q.tensors()["absmax_codes"]) == "dbc1bb244644a65a"
    assert digest(dequantize(q)) == "0e5b7ba1c1d7fca6"


@pytest.mark.parametrize(
    ("name", "block_size", "mean", "std", "relative", "relative_std"),
    [
        ("nf4", 64, 0.072798, 0.000074, 0.203339, 0.000340),
        ("nf4", 4096, 0.092547, 0.000360, 0.262473, 0.000999),
        ("fp4", 64, 0.096543, 0.000111, 0.260125, 0.000379),
        ("fp4", 4096, 0.129536, 0.000612, 0.337169, 0.001239),
    ],
)
def test_the_error_on_normal_weights_is_the_published_one(name, block_size, mean, std, relative, relative_std):
    weight = torch.randn(1024, 1024, generator=torch.Generator().manual_seed(0))
    moved = (weight - dequantize(quantize(weight, plain(name, block_size)))).abs()
    assert abs(moved.mean() - mean) < 7 * std
    assert abs((moved / weight.abs().clamp_min(1e-8)).mean() - relative) < 7 * relative_std


def test_bits_per_weight_are_the_papers():
    weight = torch.randn(1024, 1024)
    assert quantize(weight, plain()).bits_per_weight == 4.5
    assert quantize(weight).bits_per_weight == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-4)
    assert quantize(torch.zeros(0)).bits_per_weight == 0


@pytest.mark.parametrize("name", CODEBOOKS)
def test_bits_per_weight_count_the_bits_of_a_code(name):
    assert quantize(torch.randn(64, 64), plain(name)).bits_per_weight == code_bits(name) + 0.5


@pytest.mark.parametrize("partial", [False, True])
def test_whole_blocks_take_the_reciprocal_and_a_partial_one_divides(partial):
    levels = codebook("nf4")
    midpoints = (levels[:-1] + levels[1:]) / 2
    # One largest weight, and others within some ulps of every boundary.
    weight = torch.cat([torch.tensor([0.7]), *(midpoints * 0.7 * (1 + k * 2.0**-24) for k in range(-4, 5))])
    scaled = weight / 0.7 if partial else weight * (1 / torch.tensor(0.7))
    codes = (scaled[:, None] > midpoints).sum(dim=1)
    assert not torch.equal(codes, ((weight * (1 / 0.7) if partial else weight / 0.7)[:, None] > midpoints).sum(1))
    q = quantize(weight, plain(block_size=len(weight) + partial))
    assert torch.equal(dequantize(q), levels[codes] * 0.7)


@pytest.mark.parametrize("name", ["int4", "int8"])
def test_a_code_that_no_level_has_decodes_to_nan(name):
    q = quantize(torch.ones(64), plain(name))
    q.packed[3] = 0xFF
    assert dequantize(q).isnan().sum() == 8 // code_bits(name)


def test_a_last_block_of_zeros_has_bitsandbytes_smallest_absmax():
    q = quantize(torch.cat([torch.ones(64), torch.zeros(3)]), plain())
    assert q.scales.tolist() == [1, torch.tensor(1e-38).item()]
    assert nibbles(q)[-4:] == "7777"


def test_a_weight_that_is_a_view_or_wants_gradients_is_quantized_by_value():
    weight = torch.randn(20, 30, requires_grad=True)
    q = quantize(weight.T)
    assert torch.equal(q.packed, quantize(weight.detach().T.contiguous()).packed)
    assert not dequantize(q).requires_grad


def test_moving_a_weight_keeps_what_it_stands_for():
    q = quantize(torch.randn(20, 30))
    assert torch.equal(dequantize(q.to("cpu")), dequantize(q))
    assert q.to("meta").device.type == "meta"


@pytest.mark.parametrize("largest", [3e38, 1e-40, 5e-45])
def test_the_ends_of_float32_survive(largest):
    weight = torch.tensor([largest, -largest, 0.0, largest / 2])
    for scale in ("absmax", "search"):
        back = dequantize(quantize(weight, QuantConfig(double_quant=False, scale=scale)))
        assert back.isfinite().all()
        assert (back - weight).abs().max() <= largest


# Refusals


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8])
def test_other_dtypes_are_refused(dtype):
    with pytest.raises(ValueError, match=f"q_proj must be float32, float16 or bfloat16.* {dtype}"):
        quantize(torch.ones(4, dtype=dtype), name="q_proj")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_that_is_no_number_is_refused_by_name_and_place(value, dtype):
    weight = torch.zeros(3, 50, 7, dtype=dtype)
    weight[1, 40, 5] = value
    weight[2, 0, 0] = math.nan
    with pytest.raises(ValueError, match=rf"layers.3.q_proj is {value} at index \(1, 40, 5\)"):
        quantize(weight, name="layers.3.q_proj")


def test_a_scalar_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match=r"weight is nan at index \(\)"):
        quantize(torch.tensor(math.nan))


def test_scales_too_large_for_their_mean_are_refused():
    with pytest.raises(ValueError, match="overflow it: store this weight with double_quant=False"):
        quantize(torch.full((128,), 3e38))


@pytest.mark.parametrize("field", ["block_size", "nested_block_size"])
@pytest.mark.parametrize("value", [0, -64, True])
def test_block_sizes_that_count_nothing_are_refused(field, value):
    with pytest.raises(ValueError, match=f"{field} counts weights or scales .* not {value}"):
        QuantConfig(**{field: value})


def test_unknown_settings_are_refused_with_what_was_meant():
    with pytest.raises(ValueError, match="did you mean 'search'"):
        QuantConfig(scale="serach")
    with pytest.raises(ValueError, match="did you mean 'nf4'"):
        QuantConfig(codebook="nf44")


def test_parts_that_do_not_belong_together_are_refused():
    from dataclasses import replace

    q = quantize(torch.randn(8, 64), plain())
    with pytest.raises(ValueError, match="has 260 bytes of 4-bit codes and 9 scales, but 256 bytes"):
        dequantize(replace(q, shape=(8, 65)))
