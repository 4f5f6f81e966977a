"""T5 answers what the reference implementation answered, from every form of its files, and what algebra demands."""

import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import models
import nf4
from models.linear import NF4Linear
from models.model import Stack
from models.relative import padding_bias, position_buckets
from models.t5_config import t5_config
from tests.golden import GOLDEN
from tests.judge import poisoned_memory
from tests.tiny_t5 import V1_1, t5

CASES = ("t5-v1_0", "t5-v1_1")
SHARED, HEAD = "shared.weight", "lm_head.weight"
COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"


@pytest.fixture(params=CASES)
def case(request):
    return models.load(GOLDEN / request.param, dtype=torch.float32), load_file(
        GOLDEN / request.param / "io.safetensors"
    )


@pytest.fixture(params=[{}, V1_1], ids=["v1.0", "v1.1"])
def small(request):
    return t5(**request.param)


def texts(seed=0):
    """Two texts to read and two to write."""
    torch.manual_seed(seed)
    return torch.randint(2, 37, (2, 9)), torch.randint(2, 37, (2, 6))


# The reference implementation


def test_encoder_logits_loss_and_gradients_are_the_reference_implementations(case):
    model, io = case
    ids, mask, labels = io["input_ids"], io["attention_mask"], io["labels"]
    torch.testing.assert_close(model.encode(ids, mask), io["encoder"], atol=1e-4, rtol=0)
    torch.testing.assert_close(model(ids, mask, model.shifted(labels)), io["logits"], atol=1e-4, rtol=0)

    loss = model.loss(input_ids=ids, attention_mask=mask, labels=labels)
    torch.testing.assert_close(loss, io["loss"], atol=1e-4, rtol=0)
    loss.backward()
    gradients = {key.removeprefix("grad."): g for key, g in io.items() if key.startswith("grad.")}
    assert gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient, atol=1e-4, rtol=0)


def test_greedy_and_beam_search_texts_are_the_reference_implementations(case):
    model, io = case
    for name, num_beams in (("greedy", 1), ("beam3", 3)):
        ids = models.generate(
            model, io["input_ids"], io["attention_mask"], max_new_tokens=10, num_beams=num_beams, eos_token_id=-1
        )
        assert torch.equal(ids, io[name])


# Positions


@given(st.integers(4, 64), st.integers(1, 200), st.booleans())
def test_near_distances_have_buckets_of_their_own_and_far_ones_share_by_their_logarithm(buckets, more, bidirectional):
    max_distance = buckets // 2 + more
    count = buckets // 2 if bidirectional else buckets
    single = count // 2
    distances = torch.arange(-300, 301)[None]
    found = position_buckets(distances, buckets, max_distance, bidirectional)[0].tolist()
    for distance, bucket in zip(distances[0].tolist(), found, strict=True):
        if bidirectional and distance > 0:
            bucket -= count
        far = abs(distance) if bidirectional else max(0, -distance)
        if far < single:
            assert bucket == far
        elif far >= max_distance:
            assert bucket == count - 1
        else:
            place = single + math.log(far / single) / math.log(max_distance / single) * (count - single)
            assert min(math.floor(place - 1e-4), count - 1) <= bucket <= min(math.floor(place + 1e-4), count - 1)


def test_the_released_buckets_are_as_published():
    found = position_buckets(torch.tensor([[0, -7, -8, -15, -16, -127, -128, 1, 8, 500]]), 32, 128, True)
    assert found[0].tolist() == [0, 7, 8, 9, 10, 15, 15, 17, 24, 31]
    found = position_buckets(torch.tensor([[5, 0, -15, -16, -18, -19, -113, -5000]]), 32, 128, False)
    assert found[0].tolist() == [0, 0, 15, 16, 16, 17, 31, 31]


def test_the_encoder_tells_before_from_after_and_the_decoder_has_all_buckets_for_before(small):
    distances = torch.arange(15)[None, :] - torch.arange(15)[:, None]
    for stack, bidirectional in ((small.encoder, True), (small.decoder, False)):
        weight = stack.block[0].layer[0].SelfAttention.relative_attention_bias.weight
        expected = weight[position_buckets(distances, 8, 12, bidirectional)].permute(2, 0, 1)
        there = torch.ones(15, 15, dtype=torch.bool) if bidirectional else distances <= 0
        assert torch.equal(stack.bias(15, 15, None)[0][:, there], expected[:, there])
        assert torch.equal(stack.bias(2, 15, None), stack.bias(15, 15, None)[:, :, -2:])


def test_only_the_first_block_has_positions_and_all_blocks_use_them(small):
    names = [name for name, _ in small.named_parameters() if "relative_attention_bias" in name]
    assert names == [
        f"{s}.block.0.layer.0.SelfAttention.relative_attention_bias.weight" for s in ("encoder", "decoder")
    ]
    ids, _ = texts()
    moved = ids.roll(1, dims=1)
    for block in small.encoder.block[:1]:  # the first block passes its input on: positions reach the second
        for name, parameter in block.named_parameters():
            if name.endswith((".o.weight", ".wo.weight")):
                torch.nn.init.zeros_(parameter)
    assert not torch.allclose(small.encode(moved), small.encode(ids).roll(1, dims=1), atol=1e-3)


# Masks


def test_padding_of_the_text_that_is_read_changes_nothing(small):
    ids, written = texts()
    alone = small(ids, None, written)
    pads = torch.randint(0, 37, (2, 4))
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pads)
    right = small(torch.cat([ids, pads], 1), torch.cat([ones, zeros], 1), written)
    left = small(torch.cat([pads, ids], 1), torch.cat([zeros, ones], 1), written)
    torch.testing.assert_close(right, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left, alone, atol=1e-4, rtol=1e-4)


def test_padding_of_the_text_that_is_written_changes_nothing(small):
    ids, written = texts()
    alone = small(ids, None, written)
    pads = torch.randint(0, 37, (2, 4))
    ones, zeros = torch.ones_like(written), torch.zeros_like(pads)
    right = small(ids, None, torch.cat([written, pads], 1), torch.cat([ones, zeros], 1))[:, :6]
    left = small(ids, None, torch.cat([pads, written], 1), torch.cat([zeros, ones], 1))[:, 4:]
    torch.testing.assert_close(right, alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(left, alone, atol=1e-4, rtol=1e-4)


def test_no_token_depends_on_one_that_is_written_later(small):
    ids, written = texts()
    other = written.clone()
    other[:, 4:] = (other[:, 4:] + 1) % 37
    before, after = small(ids, None, written), small(ids, None, other)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4:], after[:, 4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_any_token_gives_numbers(small, dtype):
    ids, written = texts()
    mask = torch.ones_like(ids)
    mask[0] = 0
    model = small.to(dtype)
    assert model(ids, mask, written, torch.zeros_like(written)).isfinite().all()
    loss = model.loss(input_ids=ids, attention_mask=mask, labels=written)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_hides_a_token_is_a_number_in_every_kernel(dtype):
    hidden = padding_bias(torch.tensor([[True, False]]), dtype)[0, 0, 0]
    assert hidden[0] == 0
    assert hidden[1] < -1e30
    assert (hidden * 1.4427).isfinite().all()  # where exp(x) is computed as 2^(x log2(e))


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_a_cache_changes_nothing(small, cut):
    ids, written = texts()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache = small.new_cache(small.encode(ids, mask), 6)
    parts = [small.decode(part, None, mask, cache=cache) for part in (written[:, :cut], written[:, cut:])]
    torch.testing.assert_close(small.head(torch.cat(parts, 1)), small(ids, mask, written), atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="the cache has room for 6 tokens; 7 do not fit"):
        small.decode(written[:, :1], None, mask, cache=cache)


# Training


def test_the_loss_is_the_mean_over_the_labels_it_counts(small):
    ids, labels = texts()
    labels[0, 2:] = -100
    labels[1, 0] = -100
    before = torch.tensor([[0, labels[0, 0], labels[0, 1], 0, 0, 0], [0, 0, *labels[1, 1:-1]]])
    assert torch.equal(small.shifted(labels), before)
    scores = small(ids, None, before).log_softmax(-1)
    scored = labels != -100
    expected = -scores.gather(2, labels.clamp(min=0)[..., None])[..., 0][scored].mean()
    torch.testing.assert_close(small.loss(input_ids=ids, labels=labels), expected)
    assert small.label_count(labels) == int(scored.sum()) == 2 + 5


def test_the_start_token_and_the_pad_id_are_the_configs():
    model = t5(decoder_start_token_id=5, pad_token_id=7)
    assert model.shifted(torch.tensor([[11, -100, 12, 13]])).tolist() == [[5, 11, 7, 12]]


def gradients(model, checkpointing):
    ids, labels = texts()
    model.zero_grad()
    model.gradient_checkpointing = checkpointing
    torch.manual_seed(3)
    model.loss(input_ids=ids, labels=labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("training", [False, True])
def test_checkpointed_gradients_are_the_same(small, training, monkeypatch):
    small.train(training)
    plain = gradients(small, False)
    recomputed = []
    original = models.t5_blocks.recomputed
    monkeypatch.setattr(models.t5_blocks, "recomputed", lambda *a: recomputed.append(1) or original(*a))
    checkpointed = gradients(small, True)
    assert len(recomputed) == 2 + 3
    assert [type(m) for m in small.modules() if isinstance(m, Stack)] == [models.t5_blocks.Blocks] * 2
    for name, gradient in plain.items():
        assert torch.equal(gradient, checkpointed[name]), name


def test_checkpointed_gradients_of_adapters_over_4_bits_are_the_same(small, tmp_path):
    models.save(small, tmp_path / "model")
    model = models.load(tmp_path / "model", nf4.QuantConfig(), dtype=torch.float32)
    models.attach_lora(model, models.LoraConfig(rank=2, dropout=0.3))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.train()
    with poisoned_memory():
        plain, checkpointed = gradients(model, False), gradients(model, True)
    assert len(plain) == 2 * sum(isinstance(m, NF4Linear) for m in model.modules())
    for name, gradient in plain.items():
        assert gradient.isfinite().all()
        assert torch.equal(gradient, checkpointed[name]), name


def test_dropout_is_for_training_only():
    ids, written = texts()
    model = t5(dropout_rate=0.4)
    expected = model(ids, None, written)
    model.train()
    assert not torch.equal(model(ids, None, written), model(ids, None, written))
    model.eval()
    assert torch.equal(model(ids, None, written), expected)
    undropped = t5(dropout_rate=0.0).train()
    torch.testing.assert_close(undropped(ids, None, written), expected)


# Files


def rewritten(directory, change, case="t5-v1_0", config=None, bin_file=False):
    """A golden case with other tensors in its file."""
    tensors = load_file(GOLDEN / case / "model.safetensors")
    raw = json.loads((GOLDEN / case / "config.json").read_text())
    change(tensors)
    (directory / "config.json").write_text(json.dumps({**raw, **(config or {})}))
    if bin_file:
        torch.save(tensors, directory / "pytorch_model.bin")
    else:
        save_file({name: t.clone() for name, t in tensors.items()}, directory / "model.safetensors")
    return directory


def copies(*names, drop=False):
    def change(tensors):
        tensors |= dict.fromkeys(names, tensors[SHARED])
        if drop:
            del tensors[SHARED]

    return change


@pytest.mark.parametrize("bin_file", [False, True])
@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("t5-v1_0", copies(*COPIES, HEAD)),
        ("t5-v1_0", copies(COPIES[0], drop=True)),
        ("t5-v1_0", copies(COPIES[1], HEAD, drop=True)),
        ("t5-v1_0", copies(HEAD, drop=True)),
        ("t5-v1_1", copies(*COPIES)),
        ("t5-v1_1", copies(COPIES[1], drop=True)),
        ("t5-v1_0", lambda t: t.update({UNUSED: torch.zeros(32, 4)})),
    ],
)
def test_copies_of_the_embedding_may_be_there_or_take_its_place(case, change, bin_file, tmp_path):
    model = models.load(rewritten(tmp_path, change, case, bin_file=bin_file), dtype=torch.float32)
    expected = dict(models.load(GOLDEN / case, dtype=torch.float32).named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("quant", [None, nf4.QuantConfig()])
@pytest.mark.parametrize("name", CASES)
def test_a_saved_model_comes_back_with_identical_logits(name, quant, tmp_path):
    model = models.load(GOLDEN / name, quant, dtype=torch.float32)
    models.save(model, tmp_path / "saved", shard_bytes=100_000)
    assert (tmp_path / "saved" / "model.safetensors.index.json").exists()
    again = models.load(tmp_path / "saved", dtype=torch.float32)
    ids, written = texts()
    assert torch.equal(again(ids, None, written), model(ids, None, written))
    assert again.config == model.config


def test_the_linear_layers_of_blocks_are_quantized_and_nothing_else_is():
    model = models.load(GOLDEN / "t5-v1_1", nf4.QuantConfig())
    layers = {name for name, m in model.named_modules() if isinstance(m, NF4Linear)}
    parts = ("q", "k", "v", "o", "wi_0", "wi_1", "wo")
    assert len(layers) == 2 * 7 + 2 * 11
    assert {name.rpartition(".")[2] for name in layers} == set(parts)
    left = {n for n, p in model.named_parameters() if p.dtype == torch.bfloat16}
    assert {SHARED, HEAD, "decoder.final_layer_norm.weight"} < left
    assert not left & {f"{name}.weight" for name in layers}


def test_an_adapter_comes_back_and_trains_what_it_should(tmp_path):
    config = models.LoraConfig(rank=3, target_modules=("q", "v"), dropout=0.0)
    model = models.load(GOLDEN / "t5-v1_0", nf4.QuantConfig(), dtype=torch.float32)
    models.attach_lora(model, config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    ids, written = texts()
    model.loss(input_ids=ids, labels=written).backward()
    trained = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert len(trained) == (2 + 2 * 2) * 2 * 2
    assert all("lora_" in name and bool(gradient.any()) for name, gradient in trained.items())

    models.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == "SEQ_2_SEQ_LM"
    again = models.load(GOLDEN / "t5-v1_0", nf4.QuantConfig(), dtype=torch.float32)
    models.load_adapter(again, tmp_path)
    assert torch.equal(again(ids, None, written), model(ids, None, written))


# Configs


def raw_config(name):
    return json.loads((GOLDEN / name / "config.json").read_text())


@pytest.mark.parametrize("name", CASES)
def test_a_config_survives_being_written(name):
    config = t5_config(raw_config(name), "config.json")
    assert t5_config(config.to_dict(), "written") == config


def test_what_an_old_config_leaves_out_means_v1_0():
    old = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_heads")
    raw = raw_config("t5-v1_0")
    config = t5_config({name: raw[name] for name in old} | {"pad_token_id": 3}, "config.json")
    assert config.num_decoder_layers == raw["num_layers"]
    assert (config.relative_attention_num_buckets, config.relative_attention_max_distance) == (32, 128)
    assert (config.feed_forward_proj, config.tie_word_embeddings, config.scale_decoder_outputs) == ("relu", True, True)
    assert (config.layer_norm_epsilon, config.dropout_rate) == (1e-6, 0.1)
    assert (config.pad_token_id, config.decoder_start_token_id, config.eos_token_id) == (3, 3, (1,))


def test_files_that_call_every_model_tied_tell_v1_1_by_its_unscaled_output(tmp_path):
    new = {"tie_word_embeddings": True, "scale_decoder_outputs": False}
    model = models.load(rewritten(tmp_path, lambda t: None, "t5-v1_1", new), dtype=torch.float32)
    ids, written = texts()
    expected = models.load(GOLDEN / "t5-v1_1", dtype=torch.float32)
    assert torch.equal(model(ids, None, written), expected(ids, None, written))
    assert model.config == expected.config

    del (tensors := load_file(tmp_path / "model.safetensors"))[HEAD]  # the same config of a model without its own head
    save_file(tensors, tmp_path / "model.safetensors")
    model = models.load(tmp_path, dtype=torch.float32)
    assert isinstance(model, models.T5)
    hidden = model.decode(written, model.encode(ids))
    torch.testing.assert_close(model(ids, None, written), hidden @ model.shared.weight.T)
    assert t5_config(model.config.to_dict(), "written") == model.config


def test_there_is_no_longest_input():
    assert t5().max_tokens is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_kv": None}, "config.json: lacks d_kv"),
        ({"num_decoder_layers": 0}, "num_decoder_layers is 0"),
        ({"num_heads": 2.0}, "num_heads is 2.0; a whole number"),
        ({"dropout_rate": "0.1"}, "dropout_rate is '0.1'; a number"),
        ({"dropout_rate": 1.0}, "dropout_rate is 1.0"),
        ({"layer_norm_epsilon": 0}, "layer_norm_epsilon is 0"),
        ({"feed_forward_proj": "gated-silu"}, "feed_forward_proj is 'gated-silu'; relu and gated-gelu"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn is 'gelu'; only a T5 with 'relu'"),
        ({"is_gated_act": True}, "is_gated_act is True"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"tie_encoder_decoder": True}, "tie_encoder_decoder is True"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; true or false"),
        ({"relative_attention_num_buckets": 2}, "relative_attention_num_buckets is 2"),
        ({"relative_attention_max_distance": 16}, "relative_attention_max_distance 16"),
        ({"pad_token_id": 128}, "pad_token_id is 128, outside of 128 tokens"),
        ({"decoder_start_token_id": -1}, "decoder_start_token_id is -1"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'; a whole number"),
    ],
)
def test_a_config_that_asks_for_other_arithmetic_is_refused(change, message):
    with pytest.raises(models.CheckpointError, match=message):
        t5_config({**raw_config("t5-v1_0"), **change}, "config.json")


# Refusals


def test_an_encoder_alone_is_refused(tmp_path):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("decoder.")]:
            del tensors[name]

    with pytest.raises(models.CheckpointError, match="an encoder of T5 without a decoder"):
        models.load(rewritten(tmp_path, change))
    with pytest.raises(models.CheckpointError, match="an encoder of T5 without a decoder"):
        models.load(rewritten(tmp_path, lambda t: None, config={"is_encoder_decoder": False}))


@pytest.mark.parametrize("head", ["classification_head.dense.weight", "classifier.weight", "qa_outputs.weight"])
def test_another_head_is_refused(head, tmp_path):
    with pytest.raises(models.CheckpointError, match=rf"a T5 with another head \({head}\)"):
        models.load(rewritten(tmp_path, lambda t: t.update({head: torch.zeros(2, 64)})))


def test_a_head_that_the_checkpoint_lacks_is_refused():
    with pytest.raises(ValueError, match="head='classification' does not fit"):
        models.load(GOLDEN / "t5-v1_0", head="classification", num_labels=2)


def test_float16_is_refused_when_loading_and_when_computing():
    with pytest.raises(models.ConfigError, match=r"float16: .* pass 65504.*; use bfloat16 or float32"):
        models.load(GOLDEN / "t5-v1_0", dtype=torch.float16)
    for quant in (None, nf4.QuantConfig()):
        model = models.load(GOLDEN / "t5-v1_0", quant).half()
        ids, written = texts()
        with pytest.raises(models.ConfigError, match="use bfloat16 or float32"):
            model(ids, None, written)
        with pytest.raises(models.ConfigError, match="use bfloat16 or float32"):
            models.generate(model, ids, max_new_tokens=1)


def test_bfloat16_is_close_to_float32(case):
    model, io = case
    logits = model.bfloat16()(io["input_ids"], io["attention_mask"], model.shifted(io["labels"])).float()
    assert (logits - io["logits"]).norm() < 0.03 * io["logits"].norm()


def test_calls_that_cannot_be_answered_are_refused(small):
    ids, written = texts()
    with pytest.raises(ValueError, match=r"needs decoder_input_ids: .* beginning with id 0"):
        small(ids)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 3\); .* need \(2, 9\)"):
        small(ids, torch.ones(2, 3), written)
    with pytest.raises(ValueError, match=r"decoder_attention_mask has shape \(2, 3\); .* need \(2, 6\)"):
        small(ids, None, written, torch.ones(2, 3))
    with pytest.raises(ValueError, match="the decoder has 1 texts to write but the encoder has read 2"):
        small.loss(input_ids=ids, labels=written[:1])
    with pytest.raises(ValueError, match="no label to score"):
        small.loss(input_ids=ids, labels=torch.full_like(written, -100))
