"""Perplexity by definition, the same in any batching, and the held-out loss over the same labels as training."""

import math

import pytest
import torch

import models
from eval import perplexity
from eval.held_out import held_out_loss
from eval.scoring import token_losses
from tests.golden import DATA, GOLDEN


@pytest.fixture(scope="module")
def model():
    return models.load(GOLDEN / "llama-gqa", dtype=torch.float32)


def test_each_token_is_scored_by_the_logits_before_it(model, monkeypatch):
    ids = torch.randint(0, 128, (3, 10))
    expected = -model(ids).log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(token_losses(model, ids), expected)
    monkeypatch.setattr("kernels.chunked.CHUNK_BYTES", {"cpu": 1})  # 16 positions at a time
    torch.testing.assert_close(token_losses(model, ids), expected)


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_windows_do_not_overlap_and_their_first_token_is_not_scored(model, batch_size):
    ids = torch.randint(0, 128, (45,)).tolist()
    result = perplexity(model, ids, window=10, batch_size=batch_size)
    windows = [ids[i : i + 10] for i in (0, 10, 20, 30)]
    total = sum(token_losses(model, torch.tensor([w])).sum().item() for w in windows)
    assert result.perplexity == pytest.approx(math.exp(total / 36), rel=1e-5)
    assert (result.tokens, result.windows, result.window, result.protocol) == (36, 4, 10, "windows")
    assert perplexity(model, ids, window=10, limit=2).windows == 2


def test_a_text_shorter_than_a_window_is_one_window(model):
    assert perplexity(model, list(range(7)), window=100).tokens == 6


def test_a_trained_model_finds_its_own_story_likely():
    model = models.load(DATA / "stories260K", dtype=torch.float32)
    ids = models.generate(model, torch.tensor([[1]]), max_new_tokens=100, eos_token_id=-1)[0].tolist()
    shuffled = [ids[i] for i in torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))]
    assert perplexity(model, ids).perplexity < 3 < 50 < perplexity(model, shuffled).perplexity


def test_the_held_out_loss_weighs_every_label_alike(model):
    ids = torch.randint(0, 128, (4, 9))
    labels = ids.clone()
    labels[0, :7] = -100
    labels[3] = -100
    whole = {"input_ids": ids, "labels": labels}
    rows = [{key: value[i : i + 1] for key, value in whole.items()} for i in range(4)]
    model.train()
    assert held_out_loss(model, rows).loss == pytest.approx(model.loss(**whole).item(), rel=1e-5)
    assert held_out_loss(model, rows).tokens == 2 + 8 + 8
    assert model.training
    model.eval()


@pytest.mark.parametrize(
    ("ids", "kwargs", "message"),
    [
        ([1, 2, 3], {"window": 1}, "window is 1"),
        ([1, 2, 3], {"limit": 0}, "limit is 0"),
        ([1], {}, r"the text has 1 token\(s\)"),
    ],
)
def test_what_cannot_be_scored_is_refused(model, ids, kwargs, message):
    with pytest.raises(ValueError, match=message):
        perplexity(model, ids, **kwargs)
