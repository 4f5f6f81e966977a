"""How the next token is chosen from its logits: the most probable one, or a draw from the best of them.

Letters: B rows, P tokens that are there, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its logits."""

    temperature: float = 0.0
    """0 takes the most probable token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Sample among the k most probable only; 0 for all."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach p (nucleus sampling)."""
    repetition_penalty: float = 1.0
    """Divide the logit of a token that is already there (multiply, where negative)."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")


def choose(
    logits: Float[Tensor, "B V"],
    sampling: Sampling,
    seen: Bool[Tensor, "B V"] | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
) -> Int[Tensor, " B"]:
    """The next token of every row; with a generator for each row, each has draws of its own."""
    logits = penalized(logits, sampling.repetition_penalty, seen)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        # The token that crosses p still belongs to the nucleus: drop those with p reached before them.
        drop = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(drop.gather(1, order.argsort(dim=-1)), -torch.inf)
    probabilities = logits.softmax(dim=-1)
    if isinstance(generator, Sequence):
        return draw(probabilities, generator)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]


def draw(probabilities: Float[Tensor, "B V"], generators: Sequence[torch.Generator]) -> Int[Tensor, " B"]:
    """A token of every row by one number from the row's own generator, so that no row's draw depends on another's.

    The generators are the CPU's: a seed stands for the same numbers on every device.
    """
    numbers = [torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators]
    reached = probabilities.double().cumsum(dim=-1)
    wanted = torch.stack(numbers).to(reached.device) * reached[:, -1:]  # (B, 1)
    return torch.searchsorted(reached, wanted, right=True)[:, 0].clamp(max=probabilities.shape[1] - 1)


def penalized(logits: Float[Tensor, "B V"], penalty: float, seen: Bool[Tensor, "B V"] | None) -> Float[Tensor, "B V"]:
    """Logits with those of tokens that are already there lowered."""
    if seen is None:
        return logits
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def seen_tokens(ids: Int[Tensor, "B P"], mask: Tensor | None, vocab_size: int) -> Bool[Tensor, "B V"]:
    """The tokens that each row holds, padding aside."""
    seen = torch.zeros(ids.shape[0], vocab_size, dtype=torch.long, device=ids.device)
    present = torch.ones_like(ids) if mask is None else mask.to(ids.dtype)
    return seen.scatter_add_(1, ids, present) > 0
