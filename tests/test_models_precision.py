"""What stays in 16 bits: every parameter belongs to a part, and bytes are counted as they are stored."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import models
import nf4
from models.checkpoint import matched, open_checkpoint, skeleton
from models.linear import Linear, NF4Linear
from models.precision import (
    ADAPTERS,
    PARTS,
    QUANTIZED,
    TABLES,
    part_of,
    parts_in_memory,
    parts_on_disk,
    plain_name,
    short,
    statement,
    statement_on_disk,
)
from tests.golden import GOLDEN, LAYOUTS, layout
from train.footprint import footprint

SOURCES = ("llama-gqa", "llama3-rope-tied", "llama-headdim-bias", "t5-v1_1", "roberta-mlm", "roberta-classify")
FORMATS = (None, nf4.QuantConfig(), nf4.QuantConfig(codebook="nf3", block_size=32, double_quant=False))


def on_disk(path):
    raw, reader, where = open_checkpoint(path)
    model = skeleton(raw, where, reader)
    return parts_on_disk(model, matched(model, reader))


@pytest.mark.parametrize("quant", FORMATS)
@pytest.mark.parametrize("source", SOURCES)
def test_parts_add_up_to_the_model(source, quant):
    dense = models.load(GOLDEN / source)
    model = models.load(GOLDEN / source, quant)
    parts = parts_in_memory(model)
    assert parts.parameters == sum(p.numel() for p in dense.parameters())
    stored = list(model.parameters()) + list(model.buffers())
    assert parts.nbytes == sum(t.nbytes for t in stored)
    assert {part.name for part in parts} <= PARTS.keys()


@pytest.mark.parametrize("quant", FORMATS[1:])
def test_the_bits_of_quantized_layers_are_those_of_their_format(quant):
    model = models.load(GOLDEN / "llama-gqa", quant)
    layers = [m.quantized for m in model.modules() if isinstance(m, NF4Linear)]
    expected = 8 * sum(q.nbytes for q in layers) / sum(q.numel for q in layers)
    assert parts_in_memory(model)[QUANTIZED].bits_per_weight == pytest.approx(expected)


def test_only_the_linear_layers_of_blocks_are_in_4_bits():
    parts = {part.name: part for part in parts_in_memory(models.load(GOLDEN / "llama-headdim-bias", nf4.QuantConfig()))}
    assert parts.keys() == {QUANTIZED, "biases", "embeddings", "norms", "head"}
    assert set(parts[QUANTIZED].nbytes) == {"nf4 codes", "scales"}
    assert all(set(part.nbytes) == {"bfloat16"} for name, part in parts.items() if name != QUANTIZED)
    assert parts[QUANTIZED].tensors == 14


def test_modules_are_told_by_their_class():
    class FancyNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2))

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.positions = nn.Embedding(3, 2)
            self.norm, self.other = FancyNorm(), nn.LayerNorm(2)
            self.dense = Linear(2, 2, bias=True)
            self.pooler = Linear(2, 2, in_head=True)
            self.out = nn.Linear(2, 2)
            self.bias = nn.Parameter(torch.zeros(2))

    found = {name: part_of(Whole(), name) for name, _ in Whole().named_parameters()}
    assert found == {
        "positions.weight": "embeddings",
        "norm.weight": "norms",
        "other.weight": "norms",
        "other.bias": "norms",
        "dense.weight": "block linears",
        "dense.bias": "biases",
        "pooler.weight": "head",
        "out.weight": "head",
        "out.bias": "head",
        "bias": "head",
    }


def test_a_parameter_that_is_trained_in_a_wider_dtype_keeps_its_name_and_its_part():
    model = models.load(GOLDEN / "llama-gqa")
    parametrize.register_parametrization(model.get_submodule("model.embed_tokens"), "weight", nn.Identity())
    renamed = next(name for name, _ in model.named_parameters() if "parametrizations" in name)
    assert plain_name(renamed) == "model.embed_tokens.weight"
    assert part_of(model, renamed) == "embeddings"


@pytest.mark.parametrize("quant", FORMATS)
def test_a_saved_model_takes_on_disk_what_it_takes_in_memory(quant, tmp_path):
    model = models.load(GOLDEN / "llama-headdim-bias", quant)
    models.save(model, tmp_path / "m")
    here, there = parts_in_memory(model), on_disk(tmp_path / "m")
    assert here.parameters == there.parameters
    for part in here:
        other = there[part.name]
        assert (part.tensors, part.parameters) == (other.tensors, other.parameters)
        nbytes = {kind: count for kind, count in other.nbytes.items() if kind != TABLES}
        if quant is not None and quant.double_quant and part.name == QUANTIZED:
            nbytes["scales"] += 4 * part.tensors  # the offset is text in a file
        assert nbytes == part.nbytes
        assert other.bits_per_weight == pytest.approx(part.bits_per_weight, rel=1e-2)  # without the tables


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_takes_four_bytes_a_parameter(name, tmp_path):
    path = layout(name, tmp_path)
    parts = on_disk(path)
    assert parts.parameters == sum(p.numel() for p in models.load(path).parameters())
    assert parts.nbytes == 4 * parts.parameters


def test_the_footprint_of_training_is_made_of_the_same_counts():
    model = models.load(GOLDEN / "llama-gqa", nf4.QuantConfig())
    models.attach_lora(model, models.LoraConfig(rank=4))
    parts, found = parts_in_memory(model), footprint(model, state_bytes=1000, managed_bytes=600)
    assert found.quantized == sum(parts[QUANTIZED].nbytes.values())
    assert found.adapters == sum(parts[ADAPTERS].nbytes.values()) == found.gradients
    assert (found.optimizer, found.managed) == (400, 600)
    assert found.quantized + found.rest + found.adapters == parts.nbytes


def test_the_statement_names_each_part_its_storage_and_the_reason():
    model = models.load(GOLDEN / "llama-gqa", nf4.QuantConfig(block_size=32))
    models.attach_lora(model, models.LoraConfig(rank=4))
    lines = statement(parts_in_memory(model)).splitlines()
    assert [line.partition(":")[0] for line in lines] == [QUANTIZED, "embeddings", "norms", "head", ADAPTERS]
    bits = parts_in_memory(model)[QUANTIZED].bits_per_weight
    assert lines[0].startswith(f"quantized linears: 98.3 k weights in nf4, {bits:.3f} bits each; ")
    assert lines[1].startswith("embeddings: 8.2 k weights in bfloat16; ")
    assert lines[4].startswith("adapters: ")
    assert "float32" in lines[4]
    assert all(line.endswith(PARTS[line.partition(":")[0]]) for line in lines)


def test_a_checkpoint_is_stated_like_the_model_that_it_was_saved_from(tmp_path):
    model = models.load(GOLDEN / "llama-gqa", nf4.QuantConfig())
    models.save(model, tmp_path / "m")
    stored = statement_on_disk(tmp_path / "m").splitlines()
    assert [line.split(";")[0] for line in stored[1:]] == [
        line.split(";")[0] for line in statement(parts_in_memory(model)).splitlines()[1:]
    ]


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999"), (1000, "1.0 k"), (106_168_320, "106.2 M"), (7e9, "7.0 G")]
)
def test_counts_are_short(count, text):
    assert short(int(count)) == text
