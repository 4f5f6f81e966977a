"""Beam search: the most probable text, as far as keeping the best few at every step finds it.

Each prompt has `num_beams` rows. In every step all tokens are tried after all of them; the best that go on are the
next beams. A text that ends is kept if it is among the best `num_beams` of its step, and the best kept one is what
comes back: kept texts are ranked by the sum of their tokens' log-probabilities over length^length_penalty, where the
length counts what was written, the stop token too. Log-probabilities are negative, so a positive penalty favours long
texts. The search for a prompt ends when no beam can become better than the best kept text, whatever it writes.

Letters: B prompts, k beams of each, R = B k rows, n tokens written, V vocabulary.
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.decoding import Decoding
from models.errors import ConfigError, NonFiniteError
from models.sampling import penalized, seen_tokens


def beam_search(
    decoding: Decoding,
    *,
    max_new_tokens: int,
    num_beams: int,
    length_penalty: float,
    repetition_penalty: float,
    stops: Int[Tensor, " stops"],
    pad: int,
) -> Int[Tensor, "B n"]:
    """The best text found for each prompt, padded on the right.

    Equal scores go to the earlier beam and the lower id, and to the text that ended first. Repetition penalty lowers
    the logits from which log-probabilities are made. Cut at `max_new_tokens`, a text counts as it is.
    """
    if max_new_tokens == 0:
        return decoding.opening[:, :0]
    logits = decoding.first()
    B, V = logits.shape
    decoding.repeat(num_beams)
    logits = logits.repeat_interleave(num_beams, dim=0)
    first_row = torch.arange(B, device=logits.device)[:, None] * num_beams
    seen = None
    if repetition_penalty != 1.0:
        seen = seen_tokens(decoding.opening, decoding.opening_mask, V).repeat_interleave(num_beams, dim=0)

    stops = stops[stops < V]
    sums = logits.new_full((B, num_beams), -torch.inf)
    sums[:, 0] = 0  # the beams of a prompt are one until they differ
    texts = stops.new_empty(B, num_beams, 0)
    best = logits.new_full((B,), -torch.inf)
    best_texts = stops.new_full((B, max_new_tokens), pad)
    lengths = stops.new_zeros(B)
    for n in range(1, max_new_tokens + 1):
        log_probabilities = penalized(logits, repetition_penalty, seen).log_softmax(dim=-1)
        candidates = (sums[:, :, None] + log_probabilities.view(B, num_beams, V)).flatten(1)  # (B, k V)

        values, which = best_of(candidates, num_beams)
        ended = torch.isin(which % V, stops) | (n == max_new_tokens)
        scores, place = (values / n**length_penalty).masked_fill(~ended, -torch.inf).max(dim=1)
        better = scores > best
        best = torch.where(better, scores, best)
        lengths = torch.where(better, n, lengths)
        best_texts[better, :n] = with_token(texts, which.gather(1, place[:, None]), V)[better, 0]  # longer than before
        if n == max_new_tokens:
            break

        candidates.view(B, num_beams, V)[:, :, stops] = -torch.inf
        sums, which = best_of(candidates, num_beams)
        reach = max_new_tokens if length_penalty > 0 else n + 1  # the length at which a sum can score best
        if bool((best >= sums[:, 0] / reach**length_penalty).all()):
            break
        texts = with_token(texts, which, V)
        rows, tokens = (first_row + which // V).flatten(), texts[:, :, -1].flatten()
        decoding.select(rows)
        if seen is not None:
            seen = seen[rows].scatter(1, tokens[:, None], True)
        logits = decoding.following(tokens)
    return best_texts[:, : int(lengths.max())]


def best_of(candidates: Float[Tensor, "B N"], count: int) -> tuple[Float[Tensor, "B count"], Int[Tensor, "B count"]]:
    """The highest of each row and where they stand, in falling order; of equal ones the first."""
    least = candidates.topk(count, dim=1).values[:, -1:]
    kept, tied = candidates > least, candidates == least
    kept = kept | (tied & (tied.cumsum(dim=1) <= count - kept.sum(dim=1, keepdim=True)))
    which = kept.nonzero()[:, 1]
    if len(which) != len(candidates) * count:
        raise NonFiniteError("beam search: the model's logits are not numbers, so no token can be ranked")
    which = which.view(-1, count)
    values, order = candidates.gather(1, which).sort(dim=1, descending=True, stable=True)
    return values, which.gather(1, order)


def with_token(
    texts: Int[Tensor, "B k before"], which: Int[Tensor, "B some"], vocab_size: int
) -> Int[Tensor, "B some n"]:
    """The texts that candidates stand for: those of their beams, each with one more token."""
    beams = (which // vocab_size)[:, :, None].expand(-1, -1, texts.shape[2])
    return torch.cat([texts.gather(1, beams), (which % vocab_size)[:, :, None]], dim=2)


def check_beams(num_beams: int, length_penalty: float, temperature: float, max_new_tokens: int) -> None:
    """Refuse settings that no search has."""
    if num_beams < 1:
        raise ConfigError(f"num_beams is {num_beams}; it must be 1 (no search) or more")
    if num_beams > 1 and temperature > 0:
        raise ConfigError(
            f"num_beams is {num_beams} and temperature {temperature}: beam search looks for the most probable text "
            "and draws nothing; set temperature to 0, or num_beams to 1"
        )
    if not abs(length_penalty) * math.log(max(2, max_new_tokens)) < 80:  # e^80 is near float32's largest number
        raise ConfigError(f"length_penalty is {length_penalty}; length^length_penalty would leave float32's range")
