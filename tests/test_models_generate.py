"""Generation: rows of a batch do not see each other, and sampling draws from what it says."""

import pytest
import torch

import models
from models.config import LlamaConfig
from models.model import Model
from models.sampling import Sampling, choose
from tests.golden import GOLDEN
from tests.tiny_t5 import V1_1, t5


@pytest.fixture(scope="module")
def model():
    return models.load(GOLDEN / "llama-gqa", dtype=torch.float32)


PROMPTS = ([7, 3, 90], [4], [11, 12, 13, 14, 15, 16])


def batch(side):
    width = max(map(len, PROMPTS))
    ids, mask = torch.full((3, width), 5), torch.zeros(3, width, dtype=torch.long)
    for row, prompt in enumerate(PROMPTS):
        place = slice(0, len(prompt)) if side == "right" else slice(width - len(prompt), width)
        ids[row, place] = torch.tensor(prompt)
        mask[row, place] = 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_gives_each_prompt_what_it_gets_alone(model, side):
    ids, mask = batch(side)
    together = models.generate(model, ids, mask, max_new_tokens=9, eos_token_id=-1)
    for row, prompt in enumerate(PROMPTS):
        alone = models.generate(model, torch.tensor([prompt]), max_new_tokens=9, eos_token_id=-1)[0]
        start = 0 if side == "right" else 6 - len(prompt)
        assert torch.equal(together[row, start : start + len(alone)], alone)


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_t5_writes_for_each_text_what_it_writes_for_it_alone(side):
    ids, mask = batch(side)
    model = t5(vocab_size=128, **V1_1)
    together = models.generate(model, ids, mask, max_new_tokens=9, eos_token_id=-1)
    assert together.shape == (3, 10)
    for row, prompt in zip(together, PROMPTS, strict=True):
        alone = models.generate(model, torch.tensor([prompt]), max_new_tokens=9, eos_token_id=-1)[0]
        assert torch.equal(row, alone)


@pytest.mark.parametrize("penalty", [1.0, 1.6])
def test_a_t5_takes_the_best_token_each_time_after_its_start_token(penalty):
    model = t5(vocab_size=128, decoder_start_token_id=3, **V1_1)
    ids = torch.tensor([PROMPTS[0]])
    written = [3]
    for _ in range(9):
        logits = model(ids, None, torch.tensor([written]))[0, -1]
        for token in set(written):
            logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
        written.append(int(logits.argmax()))
    found = models.generate(model, ids, max_new_tokens=9, repetition_penalty=penalty, eos_token_id=-1)
    assert found[0].tolist() == written


def test_a_t5_that_has_stopped_is_padded_with_its_pad_id():
    model = t5(vocab_size=128, pad_token_id=7, **V1_1)
    ids, mask = batch("right")
    free = models.generate(model, ids, mask, max_new_tokens=9, eos_token_id=-1)
    stop = int(free[0, 1])
    assert any(stop not in row for row in free[:, 1:].tolist())
    ended = models.generate(model, ids, mask, max_new_tokens=9, eos_token_id=stop)
    assert ended[0].tolist() == [0, stop, *[7] * 8]


def test_a_stream_gives_the_columns_of_the_text():
    for model, opening in ((t5(vocab_size=128, **V1_1), 1), (models.load(GOLDEN / "llama-gqa"), 3)):
        ids = torch.tensor([PROMPTS[0]])
        columns = list(models.stream(model, ids, max_new_tokens=5, eos_token_id=-1))
        text = models.generate(model, ids, max_new_tokens=5, eos_token_id=-1)
        assert torch.equal(torch.stack(columns, dim=1), text[:, opening:])


def test_what_was_generated_can_be_trained_on(model):
    ids = models.generate(model, torch.tensor([PROMPTS[0]]), max_new_tokens=0)
    model.loss(input_ids=ids, labels=ids).backward()  # inference tensors cannot be saved for backward


def test_a_stopped_row_is_padded_on_the_right(model):
    ids, mask = batch("right")
    free = models.generate(model, ids, mask, max_new_tokens=9, eos_token_id=-1)
    stop = int(free[0, 5])  # the third new token of the first row
    ended = models.generate(model, ids, mask, max_new_tokens=9, eos_token_id=stop)
    first = free[0, 3:].tolist().index(stop) + 3
    assert ended[0, : first + 1].tolist() == free[0, : first + 1].tolist()
    assert set(ended[0, first + 1 :].tolist()) <= {stop}  # no pad id in this checkpoint: a stop id fills


def test_generation_ends_when_every_row_has_stopped(model):
    prompt = torch.tensor([PROMPTS[0]])
    free = models.generate(model, prompt, max_new_tokens=9, eos_token_id=-1)
    stop = int(free[0, 3])
    assert models.generate(model, prompt, max_new_tokens=9, eos_token_id=[stop]).shape == (1, 4)


def test_no_new_tokens_gives_the_prompt(model):
    prompt = torch.tensor([PROMPTS[0]])
    assert torch.equal(models.generate(model, prompt, max_new_tokens=0), prompt)
    ids, mask = batch("right")
    assert torch.equal(models.generate(model, ids, mask, max_new_tokens=0), ids)
    assert models.generate(t5(), torch.tensor([[3]]), max_new_tokens=0).tolist() == [[0]]


def test_a_seed_fixes_sampling(model):
    prompt = torch.tensor([PROMPTS[0]])
    draw = lambda seed: models.generate(  # noqa: E731
        model, prompt, max_new_tokens=20, temperature=1.5, eos_token_id=-1, seed=seed
    )
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_a_row_with_a_seed_of_its_own_is_drawn_as_it_is_alone(model):
    ids, mask = batch("left")
    how = {"max_new_tokens": 12, "sampling": Sampling(temperature=1.5, top_p=0.9), "eos_token_id": -1}
    together = torch.stack(list(models.stream(model, ids, mask, seed=[3, 4, 3], **how)), dim=1)
    for row, prompt, seed in zip(together, PROMPTS, [3, 4, 3], strict=True):
        alone = torch.stack(list(models.stream(model, torch.tensor([prompt]), seed=[seed], **how)), dim=1)
        assert torch.equal(row, alone[0])
    other = torch.stack(list(models.stream(model, ids, mask, seed=[3, 5, 3], **how)), dim=1)
    assert torch.equal(other[::2], together[::2])
    assert not torch.equal(other[1], together[1])
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        next(models.stream(model, ids, mask, seed=[1, 2], **how))


def test_rows_with_seeds_of_their_own_draw_from_the_distribution():
    logits = torch.tensor([[1.0, -torch.inf, 0.0, -1.0, -torch.inf]]).expand(4000, -1)
    generators = [torch.Generator().manual_seed(seed) for seed in range(4000)]
    found = choose(logits, Sampling(temperature=1.0), None, generators).bincount(minlength=5) / 4000
    torch.testing.assert_close(found, logits[0].softmax(0), atol=0.03, rtol=0)
    assert found[1] == found[4] == 0


def drawn(sampling, logits, n=4000, seen=None):
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([logits]).expand(n, -1)
    seen = None if seen is None else torch.tensor([seen]).expand(n, -1)
    return choose(rows, sampling, seen, generator).bincount(minlength=len(logits)) / n


def test_temperature_one_draws_from_the_models_distribution():
    logits = [1.0, 0.0, -1.0]
    expected = torch.tensor(logits).softmax(0)
    torch.testing.assert_close(drawn(Sampling(temperature=1.0), logits), expected, atol=0.03, rtol=0)


def test_top_k_keeps_the_k_best_and_top_p_the_nucleus():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().tolist()
    assert drawn(Sampling(temperature=1.0, top_k=2), logits)[2:].sum() == 0
    nucleus = drawn(Sampling(temperature=1.0, top_p=0.6), logits)
    assert nucleus[2:].sum() == 0  # .5 does not reach .6, .5 + .3 does
    torch.testing.assert_close(nucleus[0], torch.tensor(0.625), atol=0.03, rtol=0)
    assert drawn(Sampling(temperature=1.0, top_p=0.4), logits)[0] == 1


def test_repetition_penalty_lowers_what_is_there_already():
    seen = [True, False, True]
    assert drawn(Sampling(repetition_penalty=2.0), [1.0, 0.6, -1.0], 1, seen).argmax() == 1
    assert drawn(Sampling(repetition_penalty=2.0), [-0.5, -0.9, -3.0], 1, seen).argmax() == 1


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"max_new_tokens": -1}, "max_new_tokens is -1"),
        ({"max_new_tokens": 1, "temperature": -0.1}, "temperature is -0.1"),
        ({"max_new_tokens": 1, "top_p": 0.0}, "top_p is 0.0"),
        ({"max_new_tokens": 1, "top_k": -2}, "top_k is -2"),
        ({"max_new_tokens": 1, "repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"max_new_tokens": 1, "attention_mask": torch.ones(1, 2)}, r"attention_mask has shape \(1, 2\)"),
        ({"max_new_tokens": 1, "attention_mask": torch.zeros(1, 3)}, "its prompt is empty"),
    ],
)
def test_bad_requests_are_refused(model, kwargs, message):
    with pytest.raises(ValueError, match=message):
        models.generate(model, torch.tensor([PROMPTS[0]]), **kwargs)


def test_ids_outside_the_vocabulary_are_refused(model):
    with pytest.raises(ValueError, match="ids reach from 0 to 128; the model knows 0 to 127"):
        models.generate(model, torch.tensor([[0, 128]]), max_new_tokens=1)


def test_a_model_that_cannot_write_is_refused():
    class Reader(Model):
        config = LlamaConfig(
            vocab_size=128,
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=8,
        )

    for count, num_beams in ((1, 1), (1, 2), (0, 1)):
        with pytest.raises(models.ConfigError, match="Reader cannot generate: it reads a text and has no decoder"):
            models.generate(Reader(), torch.tensor([[5]]), max_new_tokens=count, num_beams=num_beams)
    with pytest.raises(models.ConfigError, match="Reader cannot generate"):
        next(models.stream(Reader(), torch.tensor([[5]]), max_new_tokens=1))
