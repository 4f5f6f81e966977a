"""Comparing two models: a divergence by its definition, on probes that fit both."""

import pytest
import torch

import models
from models.compare import answers, compare, random_probe, text_probe
from tests import tiny
from tests.golden import GOLDEN

TIED = GOLDEN / "llama3-rope-tied"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny") / "model")


def test_a_divergence_is_that_of_its_definition():
    p, q = torch.randn(3, 5, 7), torch.randn(3, 5, 7)
    found = compare(p, q)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p.double()), torch.distributions.Categorical(logits=q.double())
    )
    assert found.positions == 15
    assert found.mean_kl == pytest.approx(expected.mean().item())
    assert found.max_kl == pytest.approx(expected.max().item())
    assert found.max_logit_difference == pytest.approx((p - q).abs().max().item())
    assert found.argmax_agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).float().mean().item())


def test_equal_logits_do_not_diverge_and_nan_never_passes():
    p = torch.randn(40, 9) * 30
    assert compare(p, p).max_kl == 0.0
    q = p.clone()
    q[3, 2] = float("nan")
    assert not compare(p, q).mean_kl <= 1e9
    assert compare(p, q).max_logit_difference == float("inf")


def test_answers_of_a_regression_diverge_by_half_their_squared_difference():
    assert compare(torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [4.0]])).mean_kl == pytest.approx(1.0)


def test_logits_of_other_shapes_are_not_compared():
    with pytest.raises(ValueError, match="cannot be compared"):
        compare(torch.zeros(2, 3), torch.zeros(2, 4))


def test_a_probe_is_the_same_for_a_seed_holds_no_padding_and_fits_the_model():
    model = models.load(TIED)
    model.config = type(model.config)(**{**vars(model.config), "pad_token_id": 5})
    probe = random_probe(model, seed=3)
    assert torch.equal(probe, random_probe(model, seed=3))
    assert not torch.equal(probe, random_probe(model, seed=4))
    assert not bool((probe == 5).any())
    assert model.max_tokens is not None
    assert probe.shape[1] <= model.max_tokens
    assert int(probe.max()) < model.config.vocab_size


def test_a_text_is_cut_into_whole_rows(model):
    loaded, tokenizer = models.load(model), models.load_tokenizer(model)
    text = "It is red and small. " * 40
    ids = tokenizer.encode(text)
    assert 256 < len(ids) < 512
    probe = text_probe(loaded, tokenizer, text)
    assert probe.shape[1] == 128
    assert probe.flatten().tolist() == ids[: len(ids) // 128 * 128]
    assert text_probe(loaded, tokenizer, "It is").tolist() == [tokenizer.encode("It is")]


def test_an_encoder_decoder_is_asked_to_write_what_it_reads():
    class Echo(models.Model):
        config = type("Config", (), {"decoder_start_token_id": 0})
        device = torch.device("cpu")

        def forward(self, ids, mask, decoder_ids):
            return torch.stack([ids, decoder_ids], -1).float()

    found = answers(Echo(), torch.tensor([[5, 6, 7]]))
    assert found.tolist() == [[[5, 0], [6, 5], [7, 6]]]
