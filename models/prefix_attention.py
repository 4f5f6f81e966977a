"""Attention behind a prefix: keys and values that no token stands for and that every token sees.

They are the same for each row of a batch and lie before the text's own, cached or not. Axes: B batch, H query heads,
K key/value heads, T new tokens, S tokens of the text so far, P of the prefix, C channels per head.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor


def attend_behind(
    prefix: Float[Tensor, "2 K P C"],
    q: Float[Tensor, "B H T C"],
    k: Float[Tensor, "B K S C"],
    v: Float[Tensor, "B K S C"],
    mask: Bool[Tensor, "B 1 T S"] | None,
) -> Float[Tensor, "B H T C"]:
    """Attention of the last T tokens of S to the prefix and to what `mask` shows; None is plain causal order."""
    B, T, S, P = q.shape[0], q.shape[2], k.shape[2], prefix.shape[2]
    k, v = (torch.cat([part.expand(B, -1, -1, -1), own], dim=2) for part, own in zip(prefix, (k, v), strict=True))
    if mask is None:
        seen = torch.ones(T, P + S, dtype=torch.bool, device=q.device).tril(P + S - T)
    else:
        seen = F.pad(mask, (P, 0), value=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)
