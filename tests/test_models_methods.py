"""IA3, BitFit and prefixes: where they start, what they train, and what becomes of it on disk and in the weights."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file

import kernels.ops
import models
import nf4
from models.attachment import adapted_layers, attached
from models.linear import NF4Linear
from models.model import Stack
from models.peft_methods import peft_config
from models.whole import trained_parameters
from tests.golden import GOLDEN

NF4 = nf4.QuantConfig()
LLAMA, T5, ROBERTA = "llama-gqa", "t5-v1_1", "roberta-classify"
IDS = (torch.arange(3, 27).view(2, 12) * 7) % 90 + 3
TEXT = (5, 17, 40, 8, 61)
LABELS = {LLAMA: IDS, T5: IDS[:, :6], ROBERTA: torch.tensor([1, 0])}
IA3, BITFIT = models.Ia3Config(), models.BitfitConfig()
PREFIX = models.PrefixConfig(num_virtual_tokens=5, init_ids=TEXT)
CASES = [(LLAMA, IA3), (T5, IA3), (ROBERTA, IA3), (LLAMA, BITFIT), (T5, BITFIT), (ROBERTA, BITFIT), (LLAMA, PREFIX)]
EACH = pytest.mark.parametrize(("name", "config"), CASES, ids=lambda x: x if isinstance(x, str) else type(x).__name__)


def base(name=LLAMA, quant=None):
    return models.load(GOLDEN / name, quant, dtype=torch.float32)


def logits(model, ids=IDS, mask=None):
    return model(ids, mask, ids[:, :4]) if isinstance(model, models.T5) else model(ids, mask)


def move(model, size=0.05):
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in trained_parameters(model).values():
            parameter.add_(torch.randn_like(parameter) * size)


def with_adapter(name, config, quant=None):
    model = base(name, quant)
    models.attach(model, config)
    move(model)
    return model


def stored(model):
    return {name: (p.detach().clone(), p.requires_grad) for name, p in model.named_parameters()}


# The start


@pytest.mark.parametrize("quant", [None, NF4])
@EACH
@torch.no_grad()  # with gradients torch takes another kernel for T5's attention
def test_training_starts_from_the_base_exactly_and_detaching_gives_it_back(name, config, quant):
    model = base(name, quant)
    model.get_parameter(next(iter(trained_parameters(model)))).requires_grad_(False)
    before, expected, told = stored(model), logits(model), model.config
    models.attach(model, config)
    if config is not PREFIX:
        assert torch.equal(logits(model), expected)
    move(model)
    assert not torch.equal(logits(model), expected)
    models.detach(model)
    after = stored(model)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n][0], before[n][0]) and after[n][1] == before[n][1] for n in before)
    assert model.config == told
    assert attached(model) is None


@pytest.mark.parametrize("side", ["left", "right", None])
def test_a_prefix_made_of_a_text_is_that_text_before_every_input(side):
    model, plain = base(), base()
    models.attach(model, PREFIX)
    text = torch.tensor(TEXT).expand(2, -1)
    mask = torch.ones_like(IDS)
    if side is not None:
        mask[1, slice(0, 4) if side == "left" else slice(8, None)] = 0
    there = mask.bool()
    whole = plain(torch.cat([text, IDS], dim=1), torch.cat([torch.ones_like(text), mask], dim=1))[:, len(TEXT) :]
    torch.testing.assert_close(model(IDS, mask)[there], whole[there], atol=2e-5, rtol=0)
    loss = model.loss(input_ids=IDS, attention_mask=mask, labels=IDS.masked_fill(~there, -100))
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("num_beams", [1, 3])
def test_what_is_written_behind_a_prefix_is_what_would_follow_its_text(num_beams):
    model, plain = base(), base()
    models.attach(model, PREFIX)
    mask = torch.ones_like(IDS)
    mask[0, 9:] = 0
    how = {"max_new_tokens": 6, "num_beams": num_beams, "eos_token_id": -1}
    written = models.generate(model, IDS, mask, **how)
    for row, length, prompt in zip(written, (9, 12), IDS, strict=True):
        alone = models.generate(plain, torch.cat([torch.tensor(TEXT), prompt[:length]])[None], **how)
        assert row[length : length + 6].tolist() == alone[0, len(TEXT) + length :].tolist()


@pytest.mark.parametrize("numbers", [[1] * 5 + [2] * 4 + [0] * 3, [1, 1, 1, 2, 2, 1, 1, 2, 2, 0, 0, 0]])
def test_texts_of_a_packed_row_each_stand_behind_the_prefix(numbers):
    model = base()
    models.attach(model, PREFIX)
    packed = torch.tensor([numbers])
    found = model(IDS[:1], packed)[0]
    for number in (1, 2):
        own = packed[0] == number
        torch.testing.assert_close(found[own], model(IDS[:1, own])[0], atol=2e-5, rtol=0)


def test_a_prefix_is_laid_out_as_peft_reads_it(tmp_path):
    model = with_adapter(LLAMA, PREFIX)
    models.save_adapter(model, tmp_path)
    tensors, raw = (
        load_file(tmp_path / "adapter_model.safetensors"),
        json.loads((tmp_path / "adapter_config.json").read_text()),
    )
    c = model.config
    assert {k: v.shape for k, v in tensors.items()} == {
        "prompt_embeddings": (5, c.num_hidden_layers * 2 * raw["token_dim"])
    }
    # peft/peft_model.py, get_prompt: past_key_values of one row
    heads, width = raw["num_attention_heads"], raw["token_dim"] // raw["num_attention_heads"]
    past = tensors["prompt_embeddings"].view(1, 5, raw["num_layers"] * 2, heads, width).permute(2, 0, 3, 1, 4).split(2)
    assert isinstance(model, models.Llama)
    own = model.model.prefixes(torch.float32)
    assert own is not None
    assert (raw["peft_type"], raw["num_virtual_tokens"], raw["prefix_projection"]) == ("PREFIX_TUNING", 5, False)
    assert all(torch.equal(own[i], pair[:, 0]) for i, pair in enumerate(past))


def test_without_a_text_a_prefix_is_random_tokens_by_torchs_seed_or_random_numbers():
    found = []
    for seed, init in ((1, "tokens"), (1, "tokens"), (2, "tokens"), (1, "normal")):
        model = base()
        torch.manual_seed(seed)
        models.attach(model, models.PrefixConfig(num_virtual_tokens=300, init=init))
        found.append(trained_parameters(model)["model.prompt_embeddings"].detach())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert found[3].std() == pytest.approx(0.02, rel=0.05)


# What is trained


@EACH
def test_gradients_are_those_of_finite_differences_with_blocks_kept_or_computed_again(name, config):
    found = []
    for again in (False, True):
        model = with_adapter(name, config, NF4)
        model.gradient_checkpointing = again
        given = {"input_ids": IDS, "labels": LABELS[name]}
        model.loss(**given).backward()
        parameters = trained_parameters(model)
        assert all(p.grad is not None for p in parameters.values())
        found.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    for one, other in zip(found[0].values(), found[1].values(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)
    torch.manual_seed(1)
    direction = {n: torch.randn_like(p) for n, p in parameters.items()}
    losses = []
    for step in (2e-3, -2e-3):
        with torch.no_grad():
            for n, p in parameters.items():
                p.add_(direction[n], alpha=step)
            losses.append(model.loss(**given).item())
            for n, p in parameters.items():
                p.sub_(direction[n], alpha=step)
    slope = sum(float((direction[n] * g).sum()) for n, g in found[1].items())
    assert (losses[0] - losses[1]) / 4e-3 == pytest.approx(slope, rel=0.02, abs=5e-4)


@pytest.mark.parametrize("on_input", [False, True])
def test_a_scaled_layers_gradients_are_those_of_the_dense_formula(on_input):
    torch.manual_seed(0)
    bias = torch.nn.Parameter(torch.randn(24))
    layer = NF4Linear(nf4.quantize(torch.randn(24, 64)), bias)
    shape = (1, 64) if on_input else (24, 1)
    layer.ia3_l, layer.ia3_on_input = torch.nn.Parameter(torch.rand(shape) + 0.5), on_input
    x, dy = torch.randn(3, 5, 64, requires_grad=True), torch.randn(3, 5, 24)
    y = layer(x)
    ours = torch.autograd.grad(y, (x, layer.ia3_l, bias), dy)
    W, vector = layer.dense_weight(), layer.ia3_l.flatten()
    expected = (x * vector) @ W.T + bias if on_input else vector * (x @ W.T + bias)
    torch.testing.assert_close(y, expected)
    for one, other in zip(ours, torch.autograd.grad(expected, (x, layer.ia3_l, bias), dy), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@EACH
def test_as_many_numbers_are_trained_as_the_formula_says(name, config):
    model = base(name)
    stacks = [stack for stack in model.modules() if isinstance(stack, Stack)]
    biases = sum(p.numel() for stack in stacks for n, p in stack.named_parameters() if n.endswith("bias"))
    c = model.config.to_dict()
    models.attach(model, config)
    count = sum(p.numel() for p in trained_parameters(model).values())
    if name == LLAMA:
        width, kv = c["hidden_size"], c["num_key_value_heads"] * c["head_dim"]
        queries, inner = c["num_attention_heads"] * c["head_dim"], c["intermediate_size"]
        expected = {IA3: 2 * kv + inner, BITFIT: queries + 2 * kv + 2 * width + 2 * inner, PREFIX: 5 * 2 * kv}[config]
        assert count == c["num_hidden_layers"] * expected
    elif name == T5:
        heads, blocks = c["num_heads"] * c["d_kv"], c["num_layers"] + c["num_decoder_layers"]
        attentions = blocks + c["num_decoder_layers"]
        ia3 = 2 * heads * attentions + c["d_ff"] * blocks
        bitfit = (3 * heads + c["d_model"]) * attentions + (2 * c["d_ff"] + c["d_model"]) * blocks
        assert count == {IA3: ia3, BITFIT: bitfit}[config]
    else:
        ia3 = c["num_hidden_layers"] * (2 * c["hidden_size"] + c["intermediate_size"])
        assert count == {IA3: ia3, BITFIT: biases}[config]
        assert biases > 0


@pytest.mark.parametrize("config", [IA3, BITFIT, PREFIX])
def test_no_weight_is_decoded_more_often_than_lora_decodes_it(config, monkeypatch):
    def products(config):
        model = base(LLAMA, NF4).train()
        models.attach(model, config)
        model.gradient_checkpointing = True
        calls = []
        form = kernels.ops.form
        monkeypatch.setattr(kernels.ops, "form", lambda name, *given: calls.append(name) or form(name, *given))
        model.loss(input_ids=IDS, labels=IDS).backward()
        monkeypatch.undo()
        return len(calls)

    layers = sum(isinstance(m, NF4Linear) for m in base(LLAMA, NF4).modules())
    blocks = base().config.num_hidden_layers
    # forward, again in the backward pass but for a block's last product, and the gradient, which the first layers'
    # inputs do not need
    assert 2 * layers <= products(config) <= 3 * layers - blocks


# On disk


@pytest.mark.parametrize("quant", [None, NF4])
@EACH
def test_a_saved_adapter_comes_back(tmp_path, name, config, quant):
    model = with_adapter(name, config, quant)
    models.save_adapter(model, tmp_path)
    again = base(name, quant)
    models.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))
    assert peft_config(again) == peft_config(model)
    assert trained_parameters(again).keys() == trained_parameters(model).keys()


def test_ia3_has_pefts_names_and_shapes(tmp_path):
    models.save_adapter(with_adapter(LLAMA, IA3), tmp_path)
    shapes = {n: tuple(t.shape) for n, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    layer, c = "base_model.model.model.layers.1", base().config
    assert shapes[f"{layer}.self_attn.k_proj.ia3_l"] == (c.num_key_value_heads * c.head_dim, 1)
    assert shapes[f"{layer}.mlp.down_proj.ia3_l"] == (1, c.intermediate_size)
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["peft_type"] == "IA3"
    assert raw["target_modules"] == ["down_proj", "k_proj", "v_proj"]
    assert raw["feedforward_modules"] == ["down_proj"]


def test_pefts_own_names_for_robertas_output_layers_scale_both_on_their_inputs(tmp_path):
    config = models.Ia3Config(target_modules=("key", "value", "output.dense"), feedforward_modules=("output.dense",))
    model = with_adapter(ROBERTA, config)
    assert sum(n.endswith("attention.output.dense.ia3_l") for n in trained_parameters(model)) == 2
    models.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text())
    path.write_text(
        json.dumps(raw | {"target_modules": ["key", "value", "output.dense"], "feedforward_modules": ["output.dense"]})
    )
    again = base(ROBERTA)
    models.load_adapter(again, tmp_path)
    assert torch.equal(logits(again), logits(model))


# In the weights


@pytest.mark.parametrize("quant", [None, NF4])
@EACH
def test_merged_it_is_the_same_model_or_refused(tmp_path, name, config, quant):
    model = with_adapter(name, config, quant)
    expected = logits(model)
    with pytest.raises(ValueError, match="adapter"):
        models.save(model, tmp_path / "not")
    if config is PREFIX or (name, config) == (T5, BITFIT):
        before = stored(model)
        with pytest.raises(
            models.ConfigError, match="cannot be merged" if config is PREFIX else "no place for the .* biases"
        ):
            models.merge_adapter(model)
        assert all(torch.equal(p, before[n][0]) for n, p in model.named_parameters())
        return
    models.merge_adapter(model)
    torch.testing.assert_close(logits(model), expected, atol=2e-5, rtol=1e-4)
    models.save(model, tmp_path / "out")
    again = models.load(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(again), expected, atol=2e-5, rtol=1e-4)
    if name == LLAMA and config is BITFIT:
        raw = json.loads((tmp_path / "out" / "config.json").read_text())
        assert raw["attention_bias"] is raw["mlp_bias"] is True


def test_merging_does_not_move_a_bias_that_is_scaled_on_its_inputs():
    model = with_adapter(ROBERTA, IA3)
    before = {}
    for name, m in adapted_layers(model):
        assert m.bias is not None
        assert m.ia3_l is not None
        before[name] = m.bias.detach().clone(), m.ia3_on_input, m.ia3_l.detach().flatten()
    assert len(before) == 6
    models.merge_adapter(model)
    for name, (bias, on_input, vector) in before.items():
        assert torch.equal(model.get_parameter(f"{name}.bias"), bias if on_input else bias * vector)


# Refusals


@pytest.mark.parametrize(
    ("name", "make", "message"),
    [
        (T5, lambda: PREFIX, "a T5 takes none here"),
        (ROBERTA, lambda: PREFIX, "a Roberta takes none here"),
        (LLAMA, lambda: models.PrefixConfig(init_text="Be brief."), "init_text needs init_ids"),
        (LLAMA, lambda: models.PrefixConfig(init_ids=(3, 10**6)), "init_ids has 1000000"),
        (LLAMA, lambda: models.PrefixConfig(num_virtual_tokens=0), "at least 1"),
        (LLAMA, lambda: models.PrefixConfig(init="token"), "choose from tokens, normal; did you mean 'tokens'"),
        (LLAMA, lambda: models.PrefixConfig(init="normal", init_text="a"), "a text is for init = tokens"),
        (LLAMA, lambda: models.Ia3Config(target_modules=("wq",)), "no layer is called wq; this model has down_proj"),
        (LLAMA, lambda: models.Ia3Config(target_modules=()), "target_modules is empty"),
        (LLAMA, lambda: models.Ia3Config(target_modules=("(",)), "not a regular expression"),
        (LLAMA, lambda: models.BitfitConfig(dtype="int8"), "bitfit: dtype is 'int8'"),
    ],
)
def test_what_cannot_be_attached_is_refused_and_changes_nothing(name, make, message):
    model = base(name)
    before = stored(model)
    with pytest.raises(ValueError, match=message):
        models.attach(model, make())
    after = stored(model)
    assert after.keys() == before.keys()
    assert all(after[n][1] == before[n][1] for n in before)
    assert attached(model) is None


@pytest.mark.parametrize("first", [IA3, BITFIT, PREFIX, models.LoraConfig(rank=2)])
def test_a_second_adapter_is_refused(first):
    model = base()
    models.attach(model, first)
    for second in (IA3, BITFIT, PREFIX, models.LoraConfig()):
        with pytest.raises(ValueError, match="already has adapters"):
            models.attach(model, second)


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        (PREFIX, {"num_virtual_tokens": 6}, r"is \[5, \d+\], expected \[6, \d+\]"),
        (PREFIX, {"num_virtual_tokens": "5"}, "num_virtual_tokens is '5'"),
        (PREFIX, {"prefix_projection": True}, "prefix_projection is True"),
        (IA3, {"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        (IA3, {"target_modules": ["nothing"]}, "names no layer of this model"),
        (IA3, {"feedforward_modules": ["v_proj"]}, "expected"),
        (IA3, {"feedforward_modules": ["(a*)*"]}, "not a pattern that is tried here"),
        (BITFIT, {"modules_to_save": ["norm"]}, "lacks model"),
        (BITFIT, {"peft_type": "VERA"}, "what can be read is LORA, IA3, BITFIT, PREFIX_TUNING"),
    ],
)
def test_an_adapter_file_that_does_not_fit_is_refused_and_leaves_the_model_alone(tmp_path, config, change, message):
    models.save_adapter(with_adapter(LLAMA, config), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    model = base()
    before = logits(model)
    with pytest.raises(models.CheckpointError, match=message):
        models.load_adapter(model, tmp_path)
    assert attached(model) is None
    assert torch.equal(logits(model), before)
    shutil.rmtree(tmp_path)


def test_outputs_that_end_a_block_are_scaled_alike_where_blocks_are_computed_again():
    found = []
    for again in (False, True):
        config = models.Ia3Config(target_modules=("down_proj",), feedforward_modules=())
        model = with_adapter(LLAMA, config, NF4)
        model.gradient_checkpointing = again
        model.loss(input_ids=IDS, labels=IDS).backward()
        found.append([p.grad for p in trained_parameters(model).values()])
    assert len(found[0]) == base().config.num_hidden_layers
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("name", [LLAMA, ROBERTA])
def test_biases_of_a_16_bit_model_are_learned_in_float32_and_taken_off_or_rounded(name):
    model = models.load(GOLDEN / name, NF4, dtype=torch.bfloat16)
    before = {n: (p.shape, p.dtype) for n, p in model.named_parameters()}
    models.attach(model, BITFIT)
    assert {p.dtype for p in trained_parameters(model).values()} == {torch.float32}
    models.detach(model)
    assert {n: (p.shape, p.dtype) for n, p in model.named_parameters()} == before
    models.attach(model, BITFIT)
    models.merge_adapter(model)
    biases = {n: p.dtype for n, p in model.named_parameters() if n.endswith("bias")}
    assert set(biases.values()) == {torch.bfloat16}
