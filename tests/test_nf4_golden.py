"""Weights that bitsandbytes stored: ours are equal to the last bit, and its files are read and written back.

A selection of the cases ships with the tests. QLORA_GOLDEN may name a folder with all hundred.
"""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import kernels
from nf4 import (
    QuantConfig,
    codebook,
    dequantize,
    dynamic_map,
    error,
    from_state_dict,
    quantize,
    quantize_absmax,
    to_state_dict,
)

FOLDER = Path(os.environ.get("QLORA_GOLDEN") or Path(__file__).parent / "data" / "blockwise")
CASES = json.loads((FOLDER / "cases.json").read_text())


@pytest.fixture(scope="module")
def stored():
    return load_file(FOLDER / "cases.safetensors")


@pytest.mark.parametrize("case", CASES, ids=[case["case"] for case in CASES])
def test_a_weight_is_stored_as_bitsandbytes_stores_it(stored, case):
    def golden(part):
        return stored[f"{case['case']}.{part}"]

    config = QuantConfig(case["quant_type"], case["blocksize"], case["double_quant"], case["blocksize2"] or 256)
    q = quantize(golden("x"), config)
    assert list(q.shape) == case["shape"]
    assert str(q.dtype) == case["dtype"]
    assert torch.equal(q.packed, golden("packed"))
    assert torch.equal(kernels.quantize(golden("x"), config).packed, golden("packed"))
    assert torch.equal(codebook(config.codebook), golden("code"))
    if not config.double_quant:
        assert torch.equal(q.scales, golden("absmax"))
        assert torch.equal(dequantize(q), golden("dequantized"))
        return

    # What is stored decodes to the last bit; our own indices are the nearest, a given one may lie off.
    given = replace(q, absmax_codes=golden("absmax"), nested_absmax=golden("absmax2"), absmax_offset=golden("offset"))
    assert torch.equal(dequantize(given), golden("dequantized"))
    assert ulps(q.tensors()["absmax_offset"], golden("offset")) <= 1
    torch.testing.assert_close(q.tensors()["nested_absmax"], golden("absmax2"), rtol=1e-6, atol=0)
    absmax = quantize(golden("x"), replace(config, double_quant=False)).scales
    codes, nested_absmax, offset = quantize_absmax(absmax, config.nested_block_size)
    assert torch.equal(codes, q.tensors()["absmax_codes"])
    scale = nested_absmax.double().repeat_interleave(config.nested_block_size)[: len(absmax)]
    target = (absmax - offset).double() / scale
    distance = (target[:, None] - dynamic_map().double()).abs()
    assert torch.equal(distance.gather(1, codes.long()[:, None])[:, 0], distance.amin(dim=1))
    assert (codes.int() - golden("absmax").int()).abs().max() <= 2


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_layer_bitsandbytes_saved_is_read_and_written_back_byte_for_byte(name):
    tensors = load_file(FOLDER / f"linear-{name}.safetensors")
    q = from_state_dict(tensors, "layer.weight")
    assert q.config == QuantConfig(name)
    written = to_state_dict(q, "layer.weight")
    assert set(written) == {key for key in tensors if key.startswith("layer.weight")}
    for key, tensor in written.items():
        assert (tensor.dtype, tensor.shape) == (tensors[key].dtype, tensors[key].shape), key
        assert tensor.view(torch.uint8).equal(tensors[key].view(torch.uint8)), key

    torch.testing.assert_close(kernels.nf4_linear(tensors["x"], q, tensors["layer.bias"]), tensors["y"])
    assert error(tensors["full_weight"], q).relative < 0.15


@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_a_layer_quantized_here_is_the_one_bitsandbytes_saved(name):
    tensors = load_file(FOLDER / f"linear-{name}.safetensors")
    ours = to_state_dict(quantize(tensors["full_weight"], QuantConfig(name)), "layer.weight")
    for key in ("layer.weight", "layer.weight.quant_map", "layer.weight.nested_quant_map"):
        assert torch.equal(ours[key], tensors[key]), key
    key = "layer.weight.absmax"
    assert (ours[key].int() - tensors[key].int()).abs().max() <= 1


def ulps(a, b):
    return abs(int(a.view(torch.int32)) - int(b.view(torch.int32)))
