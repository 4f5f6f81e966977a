"""How improbable a model finds each token of a text.

The logits of a whole batch are the largest tensor of an evaluation by far (tokens times vocabulary, in
float32); here they exist for a few hundred positions at a time.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from models import Llama

POSITIONS_AT_A_TIME = 512


@torch.inference_mode()
def token_losses(
    model: Llama, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None = None
) -> Float[Tensor, "B T-1"]:
    """Negative log-probability, in nats and float32, of every token but the first of its row."""
    B, T = input_ids.shape
    hidden = model.model(input_ids, attention_mask)[:, :-1].flatten(0, 1)  # (B (T - 1), D)
    targets = input_ids[:, 1:].flatten()
    losses = [
        F.cross_entropy(model.head(h).float(), target, reduction="none")
        for h, target in zip(hidden.split(POSITIONS_AT_A_TIME), targets.split(POSITIONS_AT_A_TIME), strict=True)
    ]
    return torch.cat(losses).view(B, T - 1)
