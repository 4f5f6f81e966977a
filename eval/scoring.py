"""How improbable a model finds each token of a text.

The logits of a whole batch would be the largest tensor of an evaluation by far (tokens times vocabulary); they are
had for a few hundred positions at a time, and only where a token is scored.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

import kernels
from models import T5, Llama, NonFiniteError

POSITIONS = 256  # whose logits are held at once


@torch.inference_mode()
def token_losses(
    model: Llama, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None = None
) -> Float[Tensor, "B T-1"]:
    """Negative log-probability, in nats and float32, of every token but the first of its row."""
    B, T = input_ids.shape
    hidden = model.hidden(input_ids, attention_mask)[:, :-1].flatten(0, 1)  # (B (T - 1), D)
    targets = input_ids[:, 1:].flatten()
    return kernels.linear_cross_entropy(hidden, model.head_weight, targets, reduction="none").view(B, T - 1)


@torch.inference_mode()
def token_log_probabilities(
    model: Llama | T5,
    hidden: Float[Tensor, "B T D"],
    places: Sequence[tuple[int, int]],
    targets: Sequence[int],
) -> tuple[Float[Tensor, " tokens"], Bool[Tensor, " tokens"]]:
    """Log-probability in nats of each target at its place (row, position), on the CPU; and is it the most probable one.

    Several targets may share a place; its logits are computed once.
    """
    unique = list(dict.fromkeys(places))
    number = {place: i for i, place in enumerate(unique)}
    rows, columns = torch.tensor(unique, device=hidden.device).T
    chosen = hidden[rows, columns]  # (places, D)
    where = torch.tensor([number[place] for place in places], device=hidden.device)
    wanted = torch.tensor(targets, device=hidden.device)
    values = torch.empty(len(targets), device=hidden.device)
    greedy = torch.empty(len(targets), dtype=torch.bool, device=hidden.device)
    for begin in range(0, len(unique), POSITIONS):
        logits = model.head(chosen[begin : begin + POSITIONS]).float()  # (POSITIONS, V)
        inside = ((where >= begin) & (where < begin + POSITIONS)).nonzero()[:, 0]
        place, target = where[inside] - begin, wanted[inside]
        values[inside] = logits.log_softmax(dim=-1)[place, target]
        greedy[inside] = logits.argmax(dim=-1)[place] == target
    refuse_nan(values)
    return values.cpu(), greedy.cpu()


def refuse_nan(values: Float[Tensor, "..."]) -> None:
    """A model whose logits are no numbers is refused: its answers would still be sorted and counted."""
    if bool(values.isnan().any()):
        raise NonFiniteError("some of the model's logits are no numbers; is its dtype too narrow?")
