"""LLaMA: a decoder of pre-norm blocks with rotary grouped-query attention and SwiGLU.

Axes: B batch, T tokens, S tokens seen so far (cached and new), P tokens of a prefix, D width, H query heads,
K key/value heads, C channels per head, V vocabulary. Modules carry the names of the released checkpoints, so loading
is a plain copy.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import kernels
from models.cache import Cache, LayerCache, attend_to_all
from models.config import LlamaConfig, llama_config
from models.errors import ConfigError
from models.linear import Linear
from models.model import Model, Stack
from models.packed import Pieces, attend, is_packed, positions_and_pieces
from models.prefix_attention import attend_behind
from models.recompute import last_product, recomputed
from models.rope import rotary_table


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + eps) * weight, with the statistics in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return kernels.rms_norm(x, self.weight, self.eps)


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, C, bias = config.hidden_size, config.head_dim, config.attention_bias
        self.head_dim = C
        self.q_proj = Linear(D, config.num_attention_heads * C, bias)
        self.k_proj = Linear(D, config.num_key_value_heads * C, bias)
        self.v_proj = Linear(D, config.num_key_value_heads * C, bias)
        self.o_proj = Linear(config.num_attention_heads * C, D, bias)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        cos: Float[Tensor, "B 1 T half"],
        sin: Float[Tensor, "B 1 T half"],
        mask: Bool[Tensor, "B 1 T S"] | Pieces | None,
        cache: LayerCache | None = None,
        prefix: Float[Tensor, "2 K P C"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        """`mask` says what may be attended to: within the pieces of packed rows, or in plain causal order (None)."""
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, C)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, C)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, C)
        q, k = kernels.rotate(q, cos, sin), kernels.rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, K, S, C)

        if isinstance(mask, Pieces):
            y = attend(q, k, v, mask, prefix)
        elif prefix is not None:
            y = attend_behind(prefix, q, k, v, mask)
        elif mask is None and T > 1:
            y = kernels.attention(q, k, v)
        elif T == 1:
            y = attend_to_all(q, k, v, mask)
        else:
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, -1))


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        D, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(D, inner, bias)
        self.up_proj = Linear(D, inner, bias)
        self.down_proj = Linear(inner, D, bias)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        h = kernels.swiglu(self.gate_proj(x), self.up_proj(x))  # (B, T, F)
        with last_product():
            return self.down_proj(h)


class Block(nn.Module):
    """Attention and feed-forward, each added to the stream after a norm of its input."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        cos: Float[Tensor, "B 1 T half"],
        sin: Float[Tensor, "B 1 T half"],
        mask: Bool[Tensor, "B 1 T S"] | Pieces | None,
        cache: LayerCache | None = None,
        prefix: Float[Tensor, "2 K P C"] | None = None,
    ) -> Float[Tensor, "B T D"]:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache, prefix)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(Stack):
    """Embedding, blocks and the last norm: what the released names call `model`."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.prompt_embeddings: nn.Parameter | None
        self.register_parameter("prompt_embeddings", None)  # where `models/prefix.py` puts one

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T D"]:
        """`attention_mask` covers cached and new tokens alike, (B, S). It may number the texts of packed rows."""
        past = cache.length if cache is not None else None
        positions, mask = positions_and_mask(input_ids, attention_mask, past)
        x = self.embed_tokens(input_ids)
        prefixes = self.prefixes(x.dtype)
        if prefixes is not None:
            positions = positions + prefixes.shape[3]
        cos, sin = rotary_table(positions, self.config)

        for i, layer in enumerate(self.layers):
            layer_cache = cache.layers[i] if cache is not None else None
            prefix = None if prefixes is None else prefixes[i]
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x = recomputed(layer, x, cos, sin, mask, None, prefix)
            else:
                x = layer(x, cos, sin, mask, layer_cache, prefix)
        if cache is not None:
            cache.length += input_ids.shape[1]
        return self.norm(x)

    def prefixes(self, dtype: torch.dtype) -> Float[Tensor, "layers 2 K P C"] | None:
        """Keys and values that come before the text in each layer, if there is a prefix."""
        if self.prompt_embeddings is None:
            return None
        c = self.config
        sizes = (-1, c.num_hidden_layers, 2, c.num_key_value_heads, c.head_dim)
        return self.prompt_embeddings.to(dtype).view(sizes).permute(1, 2, 3, 0, 4)


class Llama(Model):
    """The decoder with its language-model head, which may be the embedding itself."""

    task_type = "CAUSAL_LM"
    entries = ("loss", "hidden")

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config: LlamaConfig = config
        self.model = Decoder(config)
        head = not config.tie_word_embeddings
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False) if head else None

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B T V"]:
        """Logits of the next token at every position."""
        return self.head(self.model(input_ids, attention_mask, cache))

    def hidden(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None = None, cache: Cache | None = None
    ) -> Float[Tensor, "B T D"]:
        """The decoder's output, which `head` makes logits of."""
        return self.model(input_ids, attention_mask, cache)

    def head(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Logits from the decoder's output."""
        return F.linear(hidden, self.head_weight)

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """One row for each token that may come next."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def loss(
        self,
        *,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy, in float32, of each label given the tokens before it; -100 is not scored.

        Only the positions that are scored go through the head, some at a time: with a large vocabulary the
        logits of a batch would be most of the memory of a small model.
        """
        if input_ids.shape != labels.shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)} but input_ids {tuple(input_ids.shape)}; they must agree"
            )
        hidden = self.model(input_ids, attention_mask)[:, :-1]
        targets = labels[:, 1:]
        scored = targets != -100  # (B, T - 1)
        hidden = hidden[scored]  # (labels, D)
        if hidden.shape[0] == 0:
            raise ValueError("no label to score: every one is -100, or stands at the start of its row")
        return kernels.linear_cross_entropy(hidden, self.head_weight, targets[scored])

    @staticmethod
    def label_count(labels: Int[Tensor, "B T"]) -> int:
        """How many labels `loss` averages over: the first token of a row has nothing before it."""
        return int((labels[:, 1:] != -100).sum())

    @property
    def embedding(self) -> nn.Embedding:
        return self.model.embed_tokens

    def parameter_named(self, name: str) -> str | None:
        if name.endswith("rotary_emb.inv_freq"):  # a table that old files carry; it follows from the config
            return None
        tied = name == "lm_head.weight" and self.lm_head is None
        return "model.embed_tokens.weight" if tied else name

    def new_cache(self, batch_size: int, max_length: int) -> Cache:
        """Room for the keys and values of `max_length` tokens in every layer."""
        shape = (batch_size, self.config.num_key_value_heads, max_length, self.config.head_dim)
        return Cache([LayerCache(shape, self.dtype, self.device) for _ in self.model.layers])


def build_llama(
    raw: dict[str, Any], where: str, tensors: Collection[str], head: str | None, num_labels: int | None
) -> Llama:
    """The model of a config.json; it has a language-model head and no other."""
    if head not in (None, "lm") or num_labels is not None:
        raise ValueError(f"{where}: a LLaMA checkpoint has a language-model head; head={head!r} does not fit")
    return Llama(llama_config(raw, where))


def causal(model: Model, task: str) -> Llama:
    """The model as a LLaMA, for a task that only a decoder of one text can do."""
    if not isinstance(model, Llama):
        raise ConfigError(f"{task} needs a causal language model (LLaMA), but this one is {type(model).__name__}")
    return model


def positions_and_mask(
    input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None, cached: int | None
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B 1 T S"] | Pieces | None]:
    """Rotary positions of the new tokens, and what each may attend to (None: plain causal order).

    `cached` tokens stand before the new ones; None says that there is no cache. Positions count the tokens that
    are there, so padding on the left shifts nothing. Causal order alone already hides padding on the right from
    every real token; only packed rows, other padding, or several new tokens after cached ones, need an explicit
    mask. A padding token may see itself: a row of nothing is NaN.
    """
    B, T = input_ids.shape
    past = cached or 0
    S = past + T
    if attention_mask is None:
        positions = torch.arange(past, S, device=input_ids.device).expand(B, T)
        if past == 0 or T == 1:
            return positions, None
        present = torch.ones(B, S, dtype=torch.bool, device=input_ids.device)
    else:
        if attention_mask.shape != (B, S):
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)}; "
                f"{B} rows of {S} tokens (cached and new) need ({B}, {S})"
            )
        # Not asked of each generated token, which would wait for the device; the prompt before it was.
        if (past == 0 or T > 1) and is_packed(attention_mask):
            if cached is not None:
                raise ValueError("attention_mask numbers several texts in a row; a cache takes one text a row")
            return positions_and_pieces(attention_mask)
        present = attention_mask.to(torch.bool)
        positions = (present.long().cumsum(dim=1) - 1).clamp_min(0)[:, past:]
        if past == 0 and bool((present[:, 1:] <= present[:, :-1]).all()) and bool(present[:, 0].all()):
            return positions, None

    diagonal = S - T
    causal = torch.ones(T, S, dtype=torch.bool, device=input_ids.device).tril(diagonal)
    return positions, ((causal & present[:, None]) | causal.triu(diagonal))[:, None]
