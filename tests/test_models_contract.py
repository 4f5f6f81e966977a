"""What every architecture promises, whatever is inside: the same claims, one model of each kind after the other."""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import models
import nf4
from models.linear import Linear, NF4Linear
from tests.golden import GOLDEN


@dataclass(frozen=True)
class Kind:
    """One architecture with one head: a checkpoint, how it is called, and what its labels look like."""

    name: str
    decodes: bool
    logits: Callable[[models.Model, Tensor, Tensor | None], Tensor]
    labels: Callable[[Tensor], Tensor]
    per_token: bool = True
    """Has every input token logits of its own?"""

    def load(self, quant: nf4.QuantConfig | None = None, dtype: torch.dtype = torch.float32) -> models.Model:
        return models.load(GOLDEN / self.name, quant, dtype)


DECODED = torch.tensor([[0, 17, 90, 4, 55]])  # what T5's decoder has written so far


def plain(model: models.Model, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, mask)


def with_decoder(model: models.Model, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(ids, mask, DECODED.expand(len(ids), -1))


KINDS = (
    Kind("llama-gqa", True, plain, lambda ids: ids),
    Kind("t5-v1_0", True, with_decoder, lambda ids: ids[:, :6], per_token=False),
    Kind("t5-v1_1", True, with_decoder, lambda ids: ids[:, :6], per_token=False),
    Kind("roberta-mlm", False, plain, lambda ids: ids),
    Kind("roberta-classify", False, plain, lambda ids: torch.arange(len(ids)) % 3, per_token=False),
)
every_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
every_decoder = pytest.mark.parametrize("kind", [k for k in KINDS if k.decodes], ids=lambda kind: kind.name)


def prompts(rows: int = 3, length: int = 9) -> Tensor:
    """Ids that are no model's special tokens."""
    return torch.randint(5, 128, (rows, length), generator=torch.Generator().manual_seed(3))


def batch(kind: Kind, rows: int = 3) -> dict[str, Tensor]:
    ids = prompts(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": kind.labels(ids)}


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# Forward


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_have_the_models_dtype_and_one_number_for_each_choice(kind, dtype):
    model, ids = kind.load(dtype=dtype), prompts()
    logits = kind.logits(model, ids, None)
    assert logits.dtype == model.dtype == dtype
    tokens = {"roberta-classify": (3, 3)}.get(kind.name, (3, ids.shape[1] if kind.per_token else 5, 128))
    assert logits.shape == tokens
    assert logits.isfinite().all()


@every_kind
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_that_is_there(kind, side):
    model, ids = kind.load(), prompts()
    pads = torch.full((3, 4), model.config.pad_token_id or 0)
    order = slice(None) if side == "right" else slice(None, None, -1)
    padded = torch.cat((ids, pads)[order], dim=1)
    mask = torch.cat((torch.ones_like(ids), torch.zeros_like(pads))[order], dim=1)
    found = kind.logits(model, padded, mask)
    if kind.per_token:
        found = found[:, :9] if side == "right" else found[:, 4:]
    close(found, kind.logits(model, ids, None))
    assert kind.logits(model, padded, mask).isfinite().all()


@every_kind
def test_a_row_of_a_batch_gets_what_it_gets_alone(kind):
    model, ids = kind.load(), prompts()
    together = kind.logits(model, ids, None)
    for row, alone in zip(ids.split(1), together.split(1), strict=True):
        close(kind.logits(model, row, None), alone)


@every_kind
def test_the_loss_is_the_mean_over_the_labels_that_count(kind):
    model, whole = kind.load(), batch(kind)
    labels = whole["labels"].clone()
    labels[0] = -100
    counted = model.label_count(labels)
    rows = [{key: value[row : row + 1] for key, value in whole.items()} for row in (1, 2)]
    losses = [model.loss(**row) * model.label_count(row["labels"]) for row in rows]
    assert counted == sum(model.label_count(row["labels"]) for row in rows) < model.label_count(whole["labels"])
    close(model.loss(**{**whole, "labels": labels}), sum(losses) / counted)
    with pytest.raises(ValueError, match="no label to score"):
        model.loss(**{**whole, "labels": torch.full_like(labels, -100)})


@every_kind
def test_checkpointed_gradients_are_the_same(kind):
    model = kind.load().train()
    gradients = []
    for checkpointed in (False, True):
        model.gradient_checkpointing = checkpointed
        assert model.gradient_checkpointing == checkpointed
        model.loss(**batch(kind)).backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        model.zero_grad()
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        close(gradients[1][name], gradient)


# Files


@every_kind
@pytest.mark.parametrize("quant", [None, nf4.QuantConfig(), nf4.QuantConfig(codebook="fp4", double_quant=False)])
def test_what_is_saved_is_loaded_again(kind, quant, tmp_path):
    model = kind.load(quant=quant)
    models.save(model, tmp_path / "saved")
    again = models.load(tmp_path / "saved", dtype=torch.float32)
    assert type(again) is type(model)
    assert again.config == model.config
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert torch.equal(kind.logits(again, prompts(), None), kind.logits(model, prompts(), None))


# Four bits


@every_kind
def test_four_bits_store_the_linear_layers_of_the_blocks_and_nothing_else(kind):
    dense, quantized = kind.load(), kind.load(quant=nf4.QuantConfig())
    in_blocks = {name for name, m in dense.named_modules() if isinstance(m, Linear) and not m.in_head}
    assert {name for name, module in quantized.named_modules() if isinstance(module, NF4Linear)} == in_blocks
    assert all(part not in name for name in in_blocks for part in ("head", "classifier", "embed", "norm", "shared"))
    weights = dict(dense.named_parameters())
    for name, parameter in quantized.named_parameters():
        if parameter.dtype != torch.uint8:
            assert torch.equal(parameter, weights[name])


@every_kind
def test_a_quantized_model_is_the_dense_model_of_the_decoded_weights(kind):
    quantized, dense = kind.load(quant=nf4.QuantConfig()), kind.load()
    for name, module in quantized.named_modules():
        if isinstance(module, NF4Linear):
            dense.get_submodule(name).weight.data.copy_(module.dense_weight())
    close(kind.logits(quantized, prompts(), None), kind.logits(dense, prompts(), None))


# Adapters


@every_kind
@pytest.mark.parametrize("options", [{}, {"dora": True}, {"rslora": True}], ids=["lora", "dora", "rslora"])
def test_a_new_adapter_changes_no_answer(kind, options):
    model = kind.load(quant=nf4.QuantConfig())
    before = kind.logits(model, prompts(), None)
    models.attach_lora(model, models.LoraConfig(rank=4, **options))
    close(kind.logits(model, prompts(), None), before)


@every_kind
@pytest.mark.parametrize("quant", [None, nf4.QuantConfig()], ids=["dense", "nf4"])
@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["lora", "dora"])
def test_one_training_step_changes_only_the_adapters(kind, quant, options):
    model = kind.load(quant=quant)
    models.attach_lora(model, models.LoraConfig(rank=4, dropout=0.1, **options))
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained
    assert all(".lora_" in name for name in trained)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(2):  # A has no gradient as long as B is zero
        model.loss(**batch(kind)).backward()
        optimizer.step()
        optimizer.zero_grad()
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == trained


@every_kind
@pytest.mark.parametrize("options", [{}, {"dora": True}], ids=["lora", "dora"])
def test_an_adapter_survives_the_disk_and_the_merge(kind, options, tmp_path):
    model = kind.load(quant=nf4.QuantConfig())
    models.attach_lora(model, models.LoraConfig(rank=4, **options))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.05) if ".lora_B" in name else parameter.data.mul_(1.01)
    expected = kind.logits(model, prompts(), None)
    models.save_adapter(model, tmp_path)

    other = kind.load(quant=nf4.QuantConfig())
    assert not torch.allclose(kind.logits(other, prompts(), None), expected, atol=1e-3)
    models.load_adapter(other, tmp_path)
    close(kind.logits(other, prompts(), None), expected)
    models.merge_adapter(other)
    torch.testing.assert_close(kind.logits(other, prompts(), None), expected, atol=1e-4, rtol=1e-3)


# Generation


@every_decoder
def test_a_cache_changes_no_token(kind):
    """Each greedy token is the most probable one after everything before it, computed without any cache."""
    model, ids = kind.load(), prompts()
    written = models.generate(model, ids, max_new_tokens=7, eos_token_id=-1)
    start = ids if kind.name.startswith("llama") else ids.new_full((3, 1), 0)
    assert torch.equal(written[:, : start.shape[1]], start)
    for end in range(start.shape[1], written.shape[1]):
        seen = written[:, :end]
        logits = model(seen) if kind.name.startswith("llama") else model(ids, None, seen)
        assert torch.equal(written[:, end], logits[:, -1].argmax(dim=-1))


@every_decoder
@pytest.mark.parametrize("num_beams", [1, 3])
def test_generation_stops_and_fills_up_with_padding(kind, num_beams):
    model, ids = kind.load(), prompts(rows=2)
    options = {"max_new_tokens": 8, "num_beams": num_beams}
    free = models.generate(model, ids, eos_token_id=-1, **options)
    start = free.shape[1] - 8
    stop = int(free[0, start + 2])
    ended = models.generate(model, ids[:1], eos_token_id=stop, **options)
    assert ended.shape[1] <= free.shape[1]
    if num_beams == 1:
        first = free[0, start:].tolist().index(stop)
        assert torch.equal(ended[0], free[0, : start + first + 1])
    both = models.generate(model, ids, eos_token_id=stop, **options)
    assert torch.equal(both[:1, : ended.shape[1]], ended)
    pad = stop if model.config.pad_token_id is None else model.config.pad_token_id
    assert (both[0, ended.shape[1] :] == pad).all()


@pytest.mark.parametrize("name", ["roberta-mlm", "roberta-classify"])
def test_an_encoder_writes_nothing(name):
    model = models.load(GOLDEN / name, dtype=torch.float32)
    with pytest.raises(ValueError, match="no decoder to write one"):
        models.generate(model, prompts(), max_new_tokens=2)
