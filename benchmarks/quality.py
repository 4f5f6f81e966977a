"""How well a model predicts texts under one set of weights or another, and how certain the difference is.

Every set is measured on the same windows of the same texts, so what a window is by nature hard or easy drops out of a
difference: its interval is taken over windows drawn again in pairs. A perplexity itself varies far more between
windows than what quantizing adds to it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from eval.data.texts import holds_documents, read_documents, read_text
from eval.scoring import token_losses
from models import DataError
from models.checkpoint import linear_weights
from models.llama import Llama
from models.tokenizer import Tokenizer

WINDOW = 512
BATCH = 4  # windows at once
DRAWS = 10_000


@dataclass(frozen=True)
class Corpus:
    """A text in windows of tokens that do not overlap."""

    name: str
    windows: Int[Tensor, "windows tokens"]


def corpus(name: str, path: str | Path, tokenizer: Tokenizer, limit: int | None = None, window: int = WINDOW) -> Corpus:
    """The first windows of a file of text, or of its documents with blank lines between them."""
    path = Path(path)
    text = "\n\n".join(read_documents(path)) if holds_documents(path) else read_text(path)
    ids = tokenizer.encode(text)
    count = min(len(ids) // window, limit or len(ids))
    if count < 2:
        raise DataError(f"data: {path}: has {len(ids)} tokens; an interval takes two windows of {window} at least")
    return Corpus(name, torch.tensor(ids[: count * window]).view(count, window))


def window_losses(model: Llama, corpus: Corpus) -> Float[np.ndarray, " windows"]:
    """Mean negative log-probability of the tokens of each window but its first, in nats."""
    batches = corpus.windows.split(BATCH)
    return torch.cat([token_losses(model, rows.to(model.device)).double().mean(1).cpu() for rows in batches]).numpy()


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def estimate(statistic: Callable[..., np.ndarray], *losses: Float[np.ndarray, " windows"], seed: int = 0) -> Estimate:
    """A statistic of the mean losses of several sets of weights, with a bootstrap over windows, the same in each.

    >>> a = np.array([3.0, 3.2, 2.8])
    >>> more = estimate(lambda a, b: np.exp(b) - np.exp(a), a, a + 0.1)
    >>> round(more.value, 3), more.low < more.value < more.high
    (2.112, True)
    """
    count = len(losses[0])
    counts = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=DRAWS) / count
    found = statistic(*(counts @ each for each in losses))
    low, high = np.quantile(found, (0.025, 0.975))
    return Estimate(float(statistic(*(each.mean() for each in losses))), float(low), float(high))


def perplexity(losses: Float[np.ndarray, " windows"]) -> Estimate:
    return estimate(np.exp, losses)


def added(losses: Float[np.ndarray, " windows"], dense: Float[np.ndarray, " windows"]) -> Estimate:
    """By how much the perplexity is higher than that of the dense weights."""
    return estimate(lambda mean, plain: np.exp(mean) - np.exp(plain), losses, dense)


def share_added(
    losses: Float[np.ndarray, " windows"],
    reference: Float[np.ndarray, " windows"],
    dense: Float[np.ndarray, " windows"],
) -> Estimate:
    """What is added to the perplexity, as a share of what the reference adds."""
    return estimate(lambda a, b, d: (np.exp(a) - np.exp(d)) / (np.exp(b) - np.exp(d)), losses, reference, dense)


class Weights:
    """The dense weights of a model's linear layers, to be replaced by what is left of them and put back."""

    def __init__(self, model: Llama) -> None:
        self.layers = {name: layer for name, layer in linear_weights(model).items() if not layer.in_head}
        self.dense = {name: layer.weight.detach().clone() for name, layer in self.layers.items()}

    @torch.no_grad()
    def put(self, values: Mapping[str, Float[Tensor, "N K"]]) -> None:
        """Let the model compute with these."""
        for name, value in values.items():
            self.layers[name].weight.copy_(value)

    def change(self, change: Callable[[Float[Tensor, "N K"]], Float[Tensor, "N K"]]) -> None:
        """Let the model compute with what a function makes of every dense weight."""
        for name, weight in self.dense.items():
            self.put({name: change(weight)})

    def restore(self) -> None:
        self.put(self.dense)
