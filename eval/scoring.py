"""How improbable a model finds each token of a text.

The logits of a whole batch would be the largest tensor of an evaluation by far (tokens times vocabulary);
`kernels.linear_cross_entropy` has them for a few hundred positions at a time.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

import kernels
from models import Llama


@torch.inference_mode()
def token_losses(
    model: Llama, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None = None
) -> Float[Tensor, "B T-1"]:
    """Negative log-probability, in nats and float32, of every token but the first of its row."""
    B, T = input_ids.shape
    hidden = model.model(input_ids, attention_mask)[:, :-1].flatten(0, 1)  # (B (T - 1), D)
    targets = input_ids[:, 1:].flatten()
    return kernels.linear_cross_entropy(hidden, model.head_weight, targets, reduction="none").view(B, T - 1)
