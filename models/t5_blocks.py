"""The blocks of T5's encoder and decoder.

The numbers for relative positions live in the first block of a stack and serve all of its blocks. Scores are not
divided by sqrt(C), which the released weights take into account.

Axes: B batch, T tokens of the encoder, U new tokens of the decoder, S tokens that are attended to, D width, H heads,
C channels per head, F feed-forward width. Modules carry the names of the released checkpoints.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor, nn

from models.cache import Cache, LayerCache
from models.linear import Linear
from models.llama import RMSNorm
from models.model import Stack
from models.parallel.shares import home
from models.recompute import last_product, recomputed
from models.relative import lowest, padding_bias, position_buckets
from models.t5_config import T5Config


class Attention(nn.Module):
    """Attention of one text to itself or to another."""

    def __init__(self, config: T5Config, has_positions: bool = False) -> None:
        super().__init__()
        D, H, C = config.d_model, config.num_heads, config.d_kv
        self.head_dim, self.dropout = C, config.dropout_rate
        self.q, self.k, self.v = Linear(D, H * C), Linear(D, H * C), Linear(D, H * C)
        self.o = Linear(H * C, D)
        if has_positions:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, H)

    def keys_and_values(
        self, states: Float[Tensor, "B S D"]
    ) -> tuple[Float[Tensor, "B H S C"], Float[Tensor, "B H S C"]]:
        return self.heads(self.k(states)), self.heads(self.v(states))

    def forward(
        self,
        x: Float[Tensor, "B U D"],
        keys: Float[Tensor, "B H S C"],
        values: Float[Tensor, "B H S C"],
        bias: Float[Tensor, "b h u S"] | None,
    ) -> Float[Tensor, "B U D"]:
        """`bias` is added to the scores; its first three axes are those of the scores, or 1."""
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(self.heads(self.q(x)), keys, values, bias, dropout, scale=1.0)
        return self.o(y.transpose(1, 2).reshape(*x.shape[:2], -1))

    def heads(self, x: Float[Tensor, "B S HC"]) -> Float[Tensor, "B H S C"]:
        return x.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)


class FeedForward(nn.Module):
    """wo(relu(wi(x))), or in v1.1 wo(gelu(wi_0(x)) * wi_1(x)) with the tanh form of GELU."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        D, inner = config.d_model, config.d_ff
        self.gated, self.dropout = config.gated, config.dropout_rate
        if self.gated:
            self.wi_0, self.wi_1 = Linear(D, inner), Linear(D, inner)
        else:
            self.wi = Linear(D, inner)
        self.wo = Linear(inner, D)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        if self.gated:
            h = F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x)  # (B, T, F)
        else:
            h = F.relu(self.wi(x))
        h = F.dropout(h, self.dropout, self.training)
        with last_product():
            return self.wo(h)


class Layer(nn.Module):
    """A part of a block: its result is added to the stream, after a norm of its input."""

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)
        self.dropout = config.dropout_rate

    def added(self, x: Float[Tensor, "B T D"], change: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return x + F.dropout(change, self.dropout, self.training)


class SelfAttentionLayer(Layer):
    def __init__(self, config: T5Config, has_positions: bool) -> None:
        super().__init__(config)
        self.SelfAttention = Attention(config, has_positions)

    def forward(
        self, x: Float[Tensor, "B T D"], bias: Float[Tensor, "b H T S"], cache: LayerCache | None = None
    ) -> Float[Tensor, "B T D"]:
        h = self.layer_norm(x)
        keys, values = self.SelfAttention.keys_and_values(h)
        if cache is not None:
            keys, values = cache.append(keys, values)
        return self.added(x, self.SelfAttention(h, keys, values, bias))


class CrossAttentionLayer(Layer):
    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.EncDecAttention = Attention(config)

    def forward(
        self,
        x: Float[Tensor, "B U D"],
        encoded: Float[Tensor, "B T D"] | None,
        bias: Float[Tensor, "B 1 1 T"] | None,
        cache: LayerCache | None = None,
    ) -> Float[Tensor, "B U D"]:
        """`cache` holds the keys and values of `encoded`, which is then not needed."""
        if cache is None:
            assert encoded is not None
            keys, values = self.EncDecAttention.keys_and_values(encoded)
        else:
            keys, values = cache.keys, cache.values
        return self.added(x, self.EncDecAttention(self.layer_norm(x), keys, values, bias))


class FeedForwardLayer(Layer):
    def __init__(self, config: T5Config) -> None:
        super().__init__(config)
        self.DenseReluDense = FeedForward(config)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.added(x, self.DenseReluDense(self.layer_norm(x)))


class Block(nn.Module):
    """Self-attention, in the decoder attention to the encoder's output, and feed-forward."""

    entries: tuple[str, ...] = ("keys_and_values",)
    """Methods that are called from outside, beside forward."""

    def __init__(self, config: T5Config, is_decoder: bool, has_positions: bool) -> None:
        super().__init__()
        cross = [CrossAttentionLayer(config)] if is_decoder else []
        self.layer = nn.ModuleList([SelfAttentionLayer(config, has_positions), *cross, FeedForwardLayer(config)])

    def forward(
        self,
        x: Float[Tensor, "B U D"],
        bias: Float[Tensor, "b H U S"],
        encoded: Float[Tensor, "B T D"] | None = None,
        encoded_bias: Float[Tensor, "B 1 1 T"] | None = None,
        cache: LayerCache | None = None,
        cross: LayerCache | None = None,
    ) -> Float[Tensor, "B U D"]:
        x = self.layer[0](x, bias, cache)
        if len(self.layer) == 3:
            x = self.layer[1](x, encoded, encoded_bias, cross)
        return self.layer[-1](x)

    def keys_and_values(
        self, encoded: Float[Tensor, "B T D"]
    ) -> tuple[Float[Tensor, "B H T C"], Float[Tensor, "B H T C"]]:
        """What the attention to the encoder's output reads of it: the same for every token that is written."""
        reading = self.layer[1]
        assert isinstance(reading, CrossAttentionLayer)
        return reading.EncDecAttention.keys_and_values(encoded)


class Blocks(Stack):
    """The encoder, or the decoder: blocks and the last norm, with one table of relative positions for all of them."""

    def __init__(self, config: T5Config, is_decoder: bool) -> None:
        super().__init__()
        self.config, self.is_decoder = config, is_decoder
        count = config.num_decoder_layers if is_decoder else config.num_layers
        self.block = nn.ModuleList(Block(config, is_decoder, has_positions=i == 0) for i in range(count))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.block

    @property
    def common(self) -> tuple[nn.Module, ...]:
        return (self.positions,)

    @property
    def positions(self) -> nn.Module:
        """The table of numbers for relative positions."""
        return self.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias")

    def forward(
        self,
        x: Float[Tensor, "B U D"],
        present: Bool[Tensor, "B S"] | None = None,
        encoded: Float[Tensor, "B T D"] | None = None,
        encoded_present: Bool[Tensor, "B T"] | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B U D"]:
        """`present` covers cached and new tokens alike."""
        past = cache.length if cache is not None else 0
        dropout = self.config.dropout_rate
        bias = self.bias(x.shape[1], past + x.shape[1], present)
        encoded_bias = None if encoded_present is None else padding_bias(encoded_present, x.dtype)

        x = F.dropout(x, dropout, self.training)
        for i, block in enumerate(self.block):
            if cache is not None:
                x = block(x, bias, encoded, encoded_bias, cache.layers[i], cache.cross[i])
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                x = recomputed(block, x, bias, encoded, encoded_bias)
            else:
                x = block(x, bias, encoded, encoded_bias)
        if cache is not None:
            cache.length += x.shape[1]
        return F.dropout(self.final_layer_norm(x), dropout, self.training)

    def bias(self, new: int, total: int, present: Bool[Tensor, "B S"] | None) -> Float[Tensor, "b H U S"]:
        """What the scores of the `new` last of `total` tokens are raised by: for its distance, or to be unseen."""
        table = self.positions
        positions = torch.arange(total, device=home(next(table.parameters())))
        distances = positions[None, :] - positions[total - new :, None]  # (U, S), negative towards the beginning
        buckets = self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        bias = table(position_buckets(distances, *buckets, bidirectional=not self.is_decoder))  # (U, S, H)
        bias = bias.permute(2, 0, 1)[None]
        if present is not None:
            bias = bias.masked_fill(~present[:, None, None], lowest(bias.dtype))
        return bias.masked_fill(distances > 0, lowest(bias.dtype)) if self.is_decoder else bias
