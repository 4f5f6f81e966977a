"""How far two models are apart: the logits of both for the same tokens.

Letters: B rows, T tokens, V vocabulary or labels.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.errors import DataError
from models.model import Model
from models.tokenizer import Tokenizer

ROWS, TOKENS = 4, 128  # of a probe: enough positions for a mean, a few seconds on a CPU
CHUNK = 16  # positions that are compared at once: float64 copies of a large vocabulary's logits add up


@dataclass(frozen=True)
class Comparison:
    """What the second model gives where the first is taken for the truth."""

    positions: int
    max_logit_difference: float
    mean_kl: float
    """Kullback-Leibler divergence of the second's distribution from the first's, in nats per position."""
    max_kl: float
    argmax_agreement: float
    """Share of positions where both have the same most likely answer."""


@torch.no_grad()
def compare(first: Float[Tensor, "*rows V"], second: Float[Tensor, "..."]) -> Comparison:
    """Compare logits position by position, in float64.

    A single number for each row is a regression's answer: it counts as the mean of a normal distribution of variance
    one, whose divergence is half the squared difference.
    """
    if first.shape != second.shape:
        raise ValueError(f"logits of shape {tuple(first.shape)} and {tuple(second.shape)} cannot be compared")
    V = first.shape[-1]
    divergences, largest, agreed = [], 0.0, 0
    for p, q in zip(first.reshape(-1, V).split(CHUNK), second.reshape(-1, V).split(CHUNK), strict=True):
        p, q = p.double(), q.double()
        difference = p - q
        if V == 1:
            divergences.append(difference[:, 0].square() / 2)
        else:
            log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
            divergences.append((log_p.exp() * (log_p - log_q)).sum(-1))
        largest = max(largest, float(difference.abs().nan_to_num(nan=torch.inf).max()))
        agreed += int((p.argmax(-1) == q.argmax(-1)).sum())
    kl = torch.cat(divergences).clamp_min(0)  # rounding can leave a zero at -1e-17; NaN stays
    return Comparison(len(kl), largest, float(kl.mean()), float(kl.max()), agreed / len(kl))


@torch.no_grad()
def answers(model: Model, input_ids: Int[Tensor, "B T"]) -> Float[Tensor, "... V"]:
    """The model's logits in float32 on the CPU, row after row. An encoder-decoder is asked to write what it reads."""
    start = getattr(model.config, "decoder_start_token_id", None)
    logits = []
    for row in input_ids.to(model.device).split(1):
        decoded = () if start is None else (None, torch.cat([torch.full_like(row[:, :1], start), row[:, :-1]], dim=1))
        logits.append(model(row, *decoded).float().cpu())
    return torch.cat(logits)


def random_probe(model: Model, seed: int = 0) -> Int[Tensor, "B T"]:
    """Token ids drawn evenly from the whole vocabulary but padding, the same for every run of one seed."""
    ids = torch.arange(model.config.vocab_size)
    ids = ids[ids != (-1 if model.config.pad_token_id is None else model.config.pad_token_id)]
    drawn = torch.randint(0, len(ids), (ROWS, width(model)), generator=torch.Generator().manual_seed(seed))
    return ids[drawn]


def text_probe(model: Model, tokenizer: Tokenizer, text: str) -> Int[Tensor, "B T"]:
    """The first tokens of a text, in rows of equal length."""
    ids = tokenizer.encode(text)[: ROWS * width(model)]
    if not ids:
        raise DataError("the text to compare on is empty")
    T = min(width(model), len(ids))
    return torch.tensor(ids[: len(ids) // T * T]).view(-1, T)


def width(model: Model) -> int:
    return TOKENS if model.max_tokens is None else min(TOKENS, model.max_tokens)
