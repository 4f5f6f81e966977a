"""Files: what is written reads back, and what does not fit together is refused by the key that does not."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from nf4 import QuantConfig, dequantize, from_state_dict, quantize, to_state_dict
from tests.strategies import configs, weights

STATE = "w.quant_state.bitsandbytes__nf4"


def example(double_quant=True, codebook="nf4", n=640):
    weight = torch.randn(n // 64, 64, generator=torch.Generator().manual_seed(0))
    return to_state_dict(quantize(weight, QuantConfig(codebook, double_quant=double_quant)), "w")


def blob(value):
    text = value if isinstance(value, bytes) else json.dumps(value).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def state_of(tensors, key=STATE):
    return json.loads(bytes(tensors[key].tolist()))


def with_state(double_quant=True, **changes):
    tensors = example(double_quant)
    return {**tensors, STATE: blob({**state_of(tensors), **changes})}


# Properties


@given(weight=weights(), config=configs())
def test_what_is_written_reads_back_the_same(weight, config):
    q = quantize(weight, config)
    back = from_state_dict(load(save(to_state_dict(q, "a.b.weight"))), "a.b.weight")
    assert (back.shape, back.dtype) == (q.shape, q.dtype)
    assert back.tensors().keys() == q.tensors().keys()
    for name, tensor in q.tensors().items():
        assert torch.equal(back.tensors()[name], tensor), name
    assert torch.equal(dequantize(back), dequantize(q))
    again = to_state_dict(back, "a.b.weight")
    assert all(torch.equal(again[key], tensor) for key, tensor in to_state_dict(q, "a.b.weight").items())


@given(dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]), double_quant=st.booleans())
def test_codes_seen_as_another_dtype_are_the_same_codes(dtype, double_quant):
    tensors = example(double_quant)
    seen = {**tensors, "w": tensors["w"].view(-1).view(dtype).view(-1, 1)}
    assert torch.equal(dequantize(from_state_dict(seen, "w")), dequantize(from_state_dict(tensors, "w")))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300)
@given(data=st.data(), double_quant=st.booleans())
def test_a_hostile_file_is_refused_or_decodes_in_its_own_size(data, double_quant):
    tensors = example(double_quant)
    key = data.draw(st.sampled_from(sorted(tensors)))
    match data.draw(st.sampled_from(["drop", "dtype", "length", "rank", "bytes", "field", "rename"])):
        case "drop":
            del tensors[key]
        case "dtype":
            dtype = data.draw(st.sampled_from([torch.uint8, torch.int8, torch.float16, torch.float32, torch.bool]))
            tensors[key] = tensors[key].to(dtype)
        case "length":
            tensors[key] = tensors[key].flatten()[: data.draw(st.integers(0, 20))]
        case "rank":
            tensors[key] = tensors[key].reshape(data.draw(st.sampled_from([(1, -1), (-1, 1), (1, 1, -1)])))
        case "bytes":
            raw = bytearray(tensors[key].contiguous().view(-1).view(torch.uint8).tolist())
            for _ in range(data.draw(st.integers(1, 4))):
                raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
            shape, dtype = tensors[key].shape, tensors[key].dtype
            tensors[key] = torch.frombuffer(raw, dtype=dtype).view(shape).clone()
        case "field":
            state = state_of(tensors)
            field = data.draw(st.sampled_from(sorted(state)))
            tensors[STATE] = blob({**state, field: data.draw(JSON_VALUES)})
        case "rename":
            tensors[data.draw(st.sampled_from(["w.other", "w.quant_state.nf4", "w"]))] = tensors.pop(key)
    try:
        q = from_state_dict(tensors, "w")
    except ValueError as error:
        refusal = str(error)
    else:
        refusal = None
        assert q.numel <= 1280
        assert not dequantize(q).isnan().any()
    assert refusal is None or refusal.startswith("w")


# The layout


@pytest.mark.parametrize(("double_quant", "size"), [(False, 79), (True, None)])
def test_the_state_is_the_json_that_bitsandbytes_writes(double_quant, size):
    q = quantize(torch.randn(128, 256), QuantConfig(double_quant=double_quant))
    text = bytes(to_state_dict(q, "w")[STATE].tolist()).decode()
    expected = '{"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [128, 256]'
    if double_quant:
        offset = q.tensors()["absmax_offset"].item()
        expected += f', "nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": {offset}'
    assert text == expected + "}"
    assert size is None or len(text) == size


def test_other_codebooks_do_not_claim_to_be_bitsandbytes():
    keys = set(example(codebook="int4"))
    assert "w.quant_state.int4" in keys
    assert not any("bitsandbytes" in key for key in keys)


def test_a_state_without_shape_is_a_flat_weight():
    q = from_state_dict(with_state(shape=None), "w")
    assert q.shape == (640,)


def test_names_that_only_begin_alike_do_not_disturb():
    tensors = {**example(), "w.bias"[:1] + "2": torch.zeros(1), "weight": torch.zeros(1)}
    assert from_state_dict(tensors, "w").shape == (10, 64)


# Refusals


@pytest.mark.parametrize("key", ["w", "w.absmax", "w.quant_map", "w.nested_quant_map"])
def test_a_missing_tensor_is_named(key):
    tensors = example()
    del tensors[key]
    with pytest.raises(ValueError, match=f"^{key}: missing"):
        from_state_dict(tensors, "w")


def test_a_tensor_too_many_is_named():
    with pytest.raises(ValueError, match=r"^w\.zeros: not a part of a stored weight"):
        from_state_dict({**example(), "w.zeros": torch.zeros(1)}, "w")


def test_nested_maps_without_nested_scales_are_refused():
    tensors = example()
    del tensors["w.nested_absmax"]
    with pytest.raises(ValueError, match="fields must be blocksize, dtype, quant_type, shape, but"):
        from_state_dict(tensors, "w")


@pytest.mark.parametrize("states", [0, 2])
def test_anything_but_one_state_is_refused(states):
    tensors = example()
    if states:
        tensors["w.quant_state.int4"] = tensors[STATE]
    else:
        del tensors[STATE]
    with pytest.raises(ValueError, match=r"^w: one w\.quant_state\.<data type> tells .* came"):
        from_state_dict(tensors, "w")


def test_an_unknown_data_type_is_refused():
    tensors = example()
    tensors["w.quant_state.bitsandbytes__nf5"] = tensors.pop(STATE)
    with pytest.raises(ValueError, match="bitsandbytes__nf5: not a data type that can be read"):
        from_state_dict(tensors, "w")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"not json", "not the JSON that tells"),
        (b"\xff\xfe", "not the JSON that tells"),
        (b"[" * 4000, "not the JSON that tells"),
        (b'{"shape": [1], "shape": [2]}', "a field comes twice"),
        (b"[1, 2]", "must be a JSON object, not list"),
        (b"{}", "fields must be"),
        (b" " * 5000, "up to 4096 bytes of JSON"),
    ],
)
def test_a_state_that_is_none_is_refused(text, problem):
    with pytest.raises(ValueError, match=f"^{STATE}: .*{problem}"):
        from_state_dict({**example(), STATE: blob(text)}, "w")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"quant_type": "fp4"}, "the key says nf4 but quant_type says 'fp4'"),
        ({"blocksize": 0}, "blocksize must be a whole number of at least 1, not 0"),
        ({"blocksize": -64}, "blocksize must be"),
        ({"blocksize": 64.0}, "blocksize must be"),
        ({"blocksize": True}, "blocksize must be"),
        ({"nested_blocksize": 10**30}, "nested_blocksize must be"),
        ({"dtype": "float64"}, "dtype must be one of float32, float16, bfloat16, not 'float64'"),
        ({"dtype": "__init__"}, "dtype must be one of"),
        ({"dtype": ["float32"]}, "dtype must be one of"),
        ({"nested_dtype": "float16"}, "nested_dtype must be float32"),
        ({"nested_offset": float("nan")}, "nested_offset must be a finite number"),
        ({"nested_offset": 1e39}, "nested_offset must be a finite number"),
        ({"nested_offset": "1"}, "nested_offset must be a finite number"),
        ({"shape": [10, -64]}, "shape must be a list of sizes"),
        ({"shape": [10, 64.0]}, "shape must be a list of sizes"),
        ({"shape": "10"}, "shape must be a list of sizes"),
        ({"shape": [0, 10**30]}, "shape must be a list of sizes"),
        ({"shape": [1] * 65 + [640]}, "shape must be a list of sizes"),
    ],
)
def test_an_impossible_field_is_named(changes, problem):
    with pytest.raises(ValueError, match=f"^{STATE}: .*{problem}"):
        from_state_dict(with_state(**changes), "w")


@pytest.mark.parametrize(
    ("key", "change", "problem"),
    [
        ("w", lambda t: t[:-1], r"codes of a weight of shape \(10, 64\) are 320 bytes, not 319"),
        ("w", lambda t: t.view(2, -1), "a column of bytes"),
        ("w", lambda t: t.to(torch.int32), "a column of bytes"),
        (
            "w.absmax",
            lambda t: t[:-1],
            r"must be torch.uint8 of shape \(10,\), not torch.uint8 of shape \(9,\)",
        ),
        ("w.absmax", lambda t: t.float(), "must be torch.uint8"),
        ("w.nested_absmax", lambda t: t.double(), "must be torch.float32"),
        ("w.nested_absmax", lambda t: t * torch.inf, "holds NaN or infinity"),
        ("w.nested_absmax", lambda t: t * 0 + 3.4e38, "decodes to scales beyond float32"),
        ("w.quant_map", lambda t: t.flip(0), "not the table of this data type"),
        ("w.quant_map", lambda t: t.half(), "not the table of this data type"),
        ("w.nested_quant_map", lambda t: t * 2, "not the table of this data type"),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(key, change, problem):
    tensors = with_state(nested_offset=3e38) if "beyond" in problem else example()
    with pytest.raises(ValueError, match=f"^{key}: .*{problem}"):
        from_state_dict({**tensors, key: change(tensors[key])}, "w")


def test_scales_that_are_no_numbers_are_refused():
    tensors = example(double_quant=False)
    tensors["w.absmax"][3] = torch.nan
    with pytest.raises(ValueError, match=r"^w\.absmax: holds NaN or infinity"):
        from_state_dict(tensors, "w")


@pytest.mark.parametrize(("codebook", "byte", "code"), [("int4", 0x1F, 15), ("int4", 0xF1, 15), ("int8", 255, 255)])
def test_codes_beyond_the_levels_are_refused(codebook, byte, code):
    tensors = example(codebook=codebook)
    tensors["w"][5] = byte
    with pytest.raises(ValueError, match=f"^w: holds the code {code}, but {codebook} has {code} levels"):
        from_state_dict(tensors, "w")
