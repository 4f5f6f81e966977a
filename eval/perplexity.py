"""Perplexity of a text: the exponential of the mean negative log-probability of its tokens.

The number depends on how the text is cut, so every result carries the name of its protocol.

`windows`: the text is tokenized whole, without special tokens, and cut into windows of N tokens that do not
overlap; the first token of a window has nothing before it and is not scored. A rest shorter than a window
is left out, unless it is all there is.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eval.scoring import token_losses
from models import DataError, Model
from models.llama import causal


@dataclass(frozen=True)
class Perplexity:
    """A perplexity and what it was measured on. `stderr` treats windows as the independent samples."""

    perplexity: float
    mean_nll: float
    stderr: float | None
    tokens: int
    windows: int
    window: int
    protocol: str = "windows"


def perplexity(
    model: Model,
    ids: Sequence[int],
    window: int = 512,
    limit: int | None = None,
    batch_size: int = 4,
) -> Perplexity:
    """Perplexity of a tokenized text by the protocol `windows`; `limit` takes the first windows only."""
    model = causal(model, "perplexity")
    if window < 2:
        raise ValueError(f"window is {window}; at least 2 tokens are needed to score one")
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; at least one window is needed")
    if len(ids) < 2:
        raise DataError(f"perplexity: the text has {len(ids)} token(s); at least 2 are needed to score one")
    window = min(window, len(ids))
    count = min(len(ids) // window, limit or len(ids))
    table = torch.tensor(ids[: count * window], device=model.device).view(count, window)
    means = torch.cat([token_losses(model, rows).double().mean(dim=1).cpu() for rows in table.split(batch_size)])

    mean = means.mean().item()
    value = math.exp(mean) if mean < 700 else math.inf
    # The error of the mean carries over to its exponential by the derivative.
    stderr = value * means.std().item() / math.sqrt(count) if count > 1 else None
    return Perplexity(value, mean, stderr, count * (window - 1), count, window)
