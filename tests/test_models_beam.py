"""Beam search: with enough beams the best of all texts, with few what its definition finds, alone or in a batch."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import models
from models.beam import beam_search, best_of
from models.config import LlamaConfig
from models.decoding import TranslatingDecoding
from models.llama import Llama
from models.t5 import T5
from tests.tiny_t5 import V1_1, t5

PENALTIES = (0.0, 1.0, 2.5, -1.0)
WRITERS = ("llama", "t5")


def writer(kind, vocab_size, seed=0):
    """A model whose next tokens depend on all that was written."""
    if kind == "t5":
        model = t5(seed, vocab_size=vocab_size, **V1_1)
        return model.requires_grad_(False)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        eos_token_id=(1,),
    )
    model = Llama(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return model.requires_grad_(False)


def log_probabilities(model, prompt, written, penalty=1.0):
    """Of each next token, given a prompt and the lists of tokens that were written, without a cache."""
    rows = torch.tensor(written, dtype=torch.long).view(len(written), -1)
    prompts = torch.tensor([prompt]).expand(len(written), -1)
    if isinstance(model, T5):
        begun = torch.cat([torch.full((len(written), 1), model.config.decoder_start_token_id), rows], 1)
        logits = model(prompts, None, begun)[:, -1]
    else:
        begun = torch.cat([prompts, rows], 1)
        logits = model(begun)[:, -1]
    for row, there in zip(logits, begun.tolist(), strict=True):
        for token in set(there):
            row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    return logits.log_softmax(-1)


def best_text(model, prompt, length, length_penalty, stops):
    """The best of all texts, by trying them."""
    scores, begun = {}, {(): 0.0}
    for n in range(1, length + 1):
        following = log_probabilities(model, prompt, [list(text) for text in begun]).tolist()
        begun = {
            (*text, token): total + row[token]
            for (text, total), row in zip(begun.items(), following, strict=True)
            for token in range(len(row))
        }
        for text in [text for text in begun if text[-1] in stops or n == length]:
            scores[text] = begun.pop(text) / n**length_penalty
    return list(max(scores, key=lambda text: scores[text]))


def searched(model, prompt, length, num_beams, length_penalty, stops, penalty=1.0):
    """Beam search by its definition, without an end before `length`."""
    beams, scores = {(): 0.0}, {}
    for n in range(1, length + 1):
        following = log_probabilities(model, prompt, [list(text) for text in beams], penalty).tolist()
        tried = {
            (*text, token): total + row[token]
            for (text, total), row in zip(beams.items(), following, strict=True)
            for token in range(len(row))
        }
        ranked = sorted(tried, key=lambda text: -tried[text])
        ended = [text for text in ranked[:num_beams] if text[-1] in stops or n == length]
        scores |= {text: tried[text] / n**length_penalty for text in ended}
        beams = {text: tried[text] for text in [text for text in ranked if text[-1] not in stops][:num_beams]}
    return list(max(scores, key=lambda text: scores[text]))


def written(model, prompt, length, **options):
    """What generate wrote, without padding."""
    ids = models.generate(model, torch.tensor([prompt]), max_new_tokens=length, **options)[0].tolist()
    return ids[1 if isinstance(model, T5) else len(prompt) :]


@pytest.mark.parametrize("stops", [-1, [1, 3]])
@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("kind", WRITERS)
def test_enough_beams_find_the_best_of_all_texts(kind, length_penalty, stops):
    for seed in range(2):
        model = writer(kind, 4, seed)
        ids = {stops} if isinstance(stops, int) else set(stops)
        expected = best_text(model, [2, 0, 3], 4, length_penalty, ids)
        options = {"num_beams": 4**3, "length_penalty": length_penalty, "eos_token_id": stops}
        assert written(model, [2, 0, 3], 4, **options) == expected


@pytest.mark.parametrize("stop", [-1, 1])
@pytest.mark.parametrize("length_penalty", PENALTIES)
@pytest.mark.parametrize("kind", WRITERS)
def test_few_beams_find_what_the_definition_finds(kind, length_penalty, stop):
    for seed, num_beams in itertools.product(range(2), (2, 3)):
        model = writer(kind, 9, seed)
        expected = searched(model, [2, 8], 8, num_beams, length_penalty, {stop})
        options = {"num_beams": num_beams, "length_penalty": length_penalty, "eos_token_id": stop}
        assert written(model, [2, 8], 8, **options) == expected


@pytest.mark.parametrize("kind", WRITERS)
def test_repetition_penalty_lowers_the_logits_of_what_each_beam_holds(kind):
    for seed in range(2):
        model = writer(kind, 9, seed)
        for penalty in (1.8, 0.6):
            expected = searched(model, [2, 8], 8, 3, 1.0, {1}, penalty)
            options = {"num_beams": 3, "repetition_penalty": penalty, "eos_token_id": 1}
            assert written(model, [2, 8], 8, **options) == expected


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", WRITERS)
def test_a_batch_gives_each_prompt_what_it_gets_alone(kind, side):
    model = writer(kind, 9, seed=1)
    prompts = ([7, 3, 5], [4], [2, 8, 6, 3, 5, 7])
    ids, mask = torch.full((3, 6), 8), torch.zeros(3, 6, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        place = slice(0, len(prompt)) if side == "right" else slice(6 - len(prompt), 6)
        ids[row, place], mask[row, place] = torch.tensor(prompt), 1
    options = {"max_new_tokens": 9, "num_beams": 3, "length_penalty": 0.0, "eos_token_id": 1}
    together = models.generate(model, ids, mask, **options)
    lengths = set()
    for row, prompt in enumerate(prompts):
        alone = models.generate(model, torch.tensor([prompt]), **options)[0]
        start = 0 if kind == "t5" or side == "right" else 6 - len(prompt)
        assert torch.equal(together[row, start : start + len(alone)], alone)
        fill = 0 if kind == "t5" else 1  # no pad id in this LLaMA: a stop id fills
        assert set(together[row, start + len(alone) :].tolist()) <= {fill}
        lengths.add(len(alone) if kind == "t5" else len(alone) - len(prompt))
    assert len(lengths) > 1


def test_the_search_ends_when_no_beam_can_become_better(monkeypatch):
    model = writer("t5", 9)
    asked = []
    following = TranslatingDecoding.following
    monkeypatch.setattr(TranslatingDecoding, "following", lambda *a: asked.append(1) or following(*a))

    def steps(length_penalty, stop):
        asked.clear()
        text = written(model, [2, 8], 200, num_beams=2, length_penalty=length_penalty, eos_token_id=stop)
        return len(text), len(asked)

    stop = written(model, [2, 8], 1, num_beams=2, eos_token_id=-1)[0]  # the most probable first token
    assert steps(-1.0, stop) == (1, 1)  # nothing longer can score better
    length, count = steps(0.0, stop)
    assert length <= count < 100
    length, count = steps(1.0, stop)  # a long text may still win: log-probabilities are few per token
    assert count > length


class Scripted:
    """A text whose next token's probabilities are given by how many there are."""

    opening_mask: torch.Tensor | None = None

    def __init__(self, *probabilities):
        self.script = [torch.tensor([row]).log() for row in probabilities]
        self.opening = torch.zeros(1, 1, dtype=torch.long)
        self.step = 0

    def first(self):
        return self.script[0]

    def following(self, tokens):
        self.step += 1
        return self.script[min(self.step, len(self.script) - 1)].expand(len(tokens), -1)

    def repeat(self, times):
        pass

    def select(self, rows):
        pass


@pytest.mark.parametrize(
    ("length_penalty", "probabilities", "expected", "steps"),
    [
        # The score of a longer text is multiplied, yet the next may be better than what is kept, and then none is.
        (-1.0, ([0.7, 0.3], [0.01, 0.99]), [0, 1], 1),
        # Kept at once, and nothing that is longer can have a better sum.
        (0.0, ([0.4, 0.6], [0.01, 0.99]), [1], 0),
        # Sums only fall, but divided by what the length may become they stay better until the end.
        (1.0, ([0.9, 0.1], [0.8, 0.2], [0.99, 0.01]), [0] * 8, 7),
    ],
)
def test_what_may_still_win_is_followed_and_nothing_else(length_penalty, probabilities, expected, steps):
    decoding = Scripted(*probabilities)
    best = beam_search(
        decoding,
        max_new_tokens=8,
        num_beams=2,
        length_penalty=length_penalty,
        repetition_penalty=1.0,
        stops=torch.tensor([1]),
        pad=0,
    )
    assert best.tolist() == [expected]
    assert decoding.step == steps


def test_equal_texts_are_told_apart_by_the_earlier_beam_and_the_lower_id():
    for kind in WRITERS:
        model = writer(kind, 9)
        head = model.head_weight
        head.zero_()
        assert written(model, [2, 8], 4, num_beams=3, eos_token_id=-1) == [0, 0, 0, 0]
        assert written(model, [2, 8], 4, num_beams=3, eos_token_id=0, length_penalty=0.0) == [0]
        assert written(model, [2, 8], 4, num_beams=3, eos_token_id=2, length_penalty=0.0) == [2]
        assert written(model, [2, 8], 4, num_beams=3, eos_token_id=3, length_penalty=1.0) == [0, 0, 0, 0]


@given(st.data(), st.integers(1, 4), st.integers(1, 12))
def test_the_best_of_a_row_are_the_first_in_a_stable_order(data, rows, width):
    values = st.sampled_from([-torch.inf, -2.0, -1.5, -1.0])
    table = torch.tensor([[data.draw(values) for _ in range(width)] for _ in range(rows)])
    count = data.draw(st.integers(1, width))
    best, which = best_of(table, count)
    expected = table.sort(dim=1, descending=True, stable=True)
    assert torch.equal(best, expected.values[:, :count])
    assert torch.equal(which, expected.indices[:, :count])


@pytest.mark.parametrize("kind", WRITERS)
def test_one_beam_is_the_greedy_text(kind):
    model = writer(kind, 9)
    greedy = written(model, [2, 8], 6, eos_token_id=1)
    assert written(model, [2, 8], 6, num_beams=1, length_penalty=-3.0, eos_token_id=1) == greedy


def test_no_new_tokens_gives_the_opening():
    ids = torch.tensor([[2, 8]])
    assert torch.equal(models.generate(writer("llama", 9), ids, max_new_tokens=0, num_beams=3), ids)
    assert models.generate(writer("t5", 9), ids, max_new_tokens=0, num_beams=3).tolist() == [[0]]


def test_more_beams_than_texts_are_no_trouble():
    model = writer("llama", 3)
    expected = best_text(model, [2], 2, 1.0, {1})
    assert written(model, [2], 2, num_beams=50, eos_token_id=1) == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 0}, "num_beams is 0; it must be 1"),
        ({"num_beams": 2, "temperature": 0.5}, "num_beams is 2 and temperature 0.5: beam search .* draws nothing"),
        ({"num_beams": 2, "length_penalty": float("nan")}, "length_penalty is nan"),
        ({"num_beams": 2, "length_penalty": -60.0}, "length_penalty is -60.0; .* float32's range"),
    ],
)
def test_settings_that_no_search_has_are_refused(options, message):
    with pytest.raises(models.ConfigError, match=message):
        models.generate(writer("llama", 9), torch.tensor([[2]]), max_new_tokens=8, **options)


def test_logits_that_are_not_numbers_are_refused():
    model = writer("llama", 9)
    model.head_weight.fill_(torch.nan)
    with pytest.raises(models.NonFiniteError, match="logits are not numbers"):
        models.generate(model, torch.tensor([[2]]), max_new_tokens=8, num_beams=2)
