"""T5: an encoder that reads one text and a decoder that writes another, with relative positions.

A head of attention knows positions only by a learned number for each bucket of distances, which is added to its
scores: near distances have buckets of their own, far ones share. The numbers live in the first block of a stack and
serve all of its blocks. Scores are not divided by sqrt(C), which the released weights take into account.

Axes: B batch, T tokens of the encoder, U new tokens of the decoder, S tokens that are attended to, D width, H heads,
C channels per head, F feed-forward width, V vocabulary. Modules carry the names of the released checkpoints.
"""

import math
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import kernels
from models.cache import Cache, LayerCache
from models.errors import CheckpointError, ConfigError
from models.linear import Linear
from models.llama import RMSNorm
from models.model import Model, Stack
from models.recompute import last_product, recomputed
from models.t5_config import HEAD, T5Config, t5_config

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of the one embedding, in many files
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in old files; nothing reads it


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


class Blocks(Stack):
    """The encoder, or the decoder: blocks and the last norm, with one table of relative positions for all of them."""

    def __init__(self, config: T5Config, is_decoder: bool) -> None:
        super().__init__()
        self.config, self.is_decoder = config, is_decoder
        count = config.num_decoder_layers if is_decoder else config.num_layers
        self.block = nn.ModuleList(Block(config, is_decoder, has_positions=i == 0) for i in range(count))
        self.final_layer_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

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
        table = self.get_submodule("block.0.layer.0.SelfAttention.relative_attention_bias")
        assert isinstance(table, nn.Embedding)
        positions = torch.arange(total, device=table.weight.device)
        distances = positions[None, :] - positions[total - new :, None]  # (U, S), negative towards the beginning
        buckets = self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        bias = table(position_buckets(distances, *buckets, bidirectional=not self.is_decoder))  # (U, S, H)
        bias = bias.permute(2, 0, 1)[None]
        if present is not None:
            bias = bias.masked_fill(~present[:, None, None], lowest(bias.dtype))
        return bias.masked_fill(distances > 0, lowest(bias.dtype)) if self.is_decoder else bias


class T5(Model):
    """Encoder and decoder over one embedding, with a head that may be the embedding itself."""

    task_type = "SEQ_2_SEQ_LM"

    def __init__(self, config: T5Config) -> None:
        super().__init__()
        self.config: T5Config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = Blocks(config, is_decoder=False)
        self.decoder = Blocks(config, is_decoder=True)
        head = not config.tie_word_embeddings
        self.lm_head = nn.Linear(config.d_model, config.vocab_size, bias=False) if head else None

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        decoder_input_ids: Int[Tensor, "B U"] | None = None,
        decoder_attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "B U V"]:
        """Logits of the token that follows each of the decoder's, given the text that the encoder reads."""
        if decoder_input_ids is None:
            raise ValueError(
                "a T5 needs decoder_input_ids: what its decoder has written so far, "
                f"beginning with id {self.config.decoder_start_token_id}; encode() runs the encoder alone"
            )
        encoded = self.encode(input_ids, attention_mask)
        return self.head(self.decode(decoder_input_ids, encoded, attention_mask, decoder_attention_mask))

    def encode(self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None = None) -> Float[Tensor, "B T D"]:
        """The encoder's output; padding may stand on either side."""
        self.check_dtype(self.dtype)
        return self.encoder(self.shared(input_ids), tokens_present(attention_mask, input_ids.shape, "attention_mask"))

    def decode(
        self,
        decoder_input_ids: Int[Tensor, "B U"],
        encoded: Float[Tensor, "texts T D"] | None,
        attention_mask: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "B U D"]:
        """The decoder's output; `attention_mask` is the encoder's. A cache knows `encoded` already."""
        self.check_dtype(self.dtype)
        B, U = decoder_input_ids.shape
        if encoded is not None and encoded.shape[0] != B:
            raise ValueError(f"the decoder has {B} texts to write but the encoder has read {encoded.shape[0]}")
        past = cache.length if cache is not None else 0
        present = tokens_present(decoder_attention_mask, (B, past + U), "decoder_attention_mask")
        read = None if attention_mask is None else attention_mask.to(torch.bool)
        return self.decoder(self.shared(decoder_input_ids), present, encoded, read, cache)

    def head(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Logits from the decoder's output."""
        return F.linear(self.scaled(hidden), self.head_weight)

    def scaled(self, hidden: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """The decoder's output as the head takes it: the embedding is too large to be a head for it."""
        return hidden * self.config.d_model**-0.5 if self.config.scale_decoder_outputs else hidden

    @property
    def head_weight(self) -> Float[Tensor, "V D"]:
        """One row for each token that may come next."""
        return self.shared.weight if self.lm_head is None else self.lm_head.weight

    def loss(
        self,
        *,
        input_ids: Int[Tensor, "B T"],
        labels: Int[Tensor, "texts U"],
        attention_mask: Tensor | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy, in float32, of each label given the text and the labels before it; -100 is not scored.

        Only the positions that are scored go through the head, some at a time, as in LLaMA.
        """
        scored = labels != -100  # (B, U)
        if not bool(scored.any()):
            raise ValueError("no label to score: every one is -100")
        encoded = self.encode(input_ids, attention_mask)
        hidden = self.decode(self.shifted(labels), encoded, attention_mask)[scored]  # (labels, D)
        return kernels.linear_cross_entropy(self.scaled(hidden), self.head_weight, labels[scored])

    def shifted(self, labels: Int[Tensor, "B U"]) -> Int[Tensor, "B U"]:
        """What the decoder has before it when it predicts each label: the start token and the labels before."""
        before = F.pad(labels[:, :-1], (1, 0), value=self.config.decoder_start_token_id)
        return before.masked_fill(before == -100, self.config.pad_token_id)

    @property
    def embedding(self) -> nn.Embedding:
        return self.shared

    def parameter_named(self, name: str) -> str | None:
        if name == UNUSED:
            return None
        tied = name == HEAD and self.lm_head is None
        return "shared.weight" if tied or name in COPIES else name

    def check_dtype(self, dtype: torch.dtype) -> None:
        if dtype == torch.float16:
            raise ConfigError(
                "a T5 cannot be computed in float16: activations of its feed-forward pass 65504, the largest number "
                "of float16, and become infinite; use bfloat16 or float32"
            )

    def new_cache(self, encoded: Float[Tensor, "B T D"], max_length: int) -> Cache:
        """Keys and values of the encoder's output in every layer, and room for those of `max_length` tokens."""
        config, cross = self.config, []
        for layer in self.decoder.modules():
            if isinstance(layer, CrossAttentionLayer):
                cross.append(LayerCache.of(*layer.EncDecAttention.keys_and_values(encoded)))
        shape = (encoded.shape[0], config.num_heads, max_length, config.d_kv)
        return Cache([LayerCache(shape, self.dtype, self.device) for _ in cross], cross)


def build_t5(raw: dict[str, Any], where: str, tensors: Collection[str], head: str | None, num_labels: int | None) -> T5:
    """The model of a config.json; it has a language-model head and no other."""
    others = [name for name in tensors if name.startswith(("classification_head.", "classifier.", "qa_outputs."))]
    if others:
        raise CheckpointError(f"{where}: a T5 with another head ({others[0]}); only one that writes text can be loaded")
    if raw.get("is_encoder_decoder") is False or (tensors and not any(n.startswith("decoder.block.") for n in tensors)):
        raise CheckpointError(f"{where}: an encoder of T5 without a decoder; only a whole T5 can be loaded")
    if head not in (None, "lm") or num_labels is not None:
        raise ValueError(f"{where}: a T5 checkpoint has a language-model head; head={head!r} does not fit")
    return T5(t5_config(raw, where, tensors))


def position_buckets(
    distances: Int[Tensor, "U S"], num_buckets: int, max_distance: int, bidirectional: bool
) -> Int[Tensor, "U S"]:
    """The bucket of each distance from a token to one that it attends to, negative where that stands before it.

    Half of the buckets hold one distance each; the logarithm spreads those up to `max_distance` over the others, and
    the last one has all beyond. The encoder spends half of them all on what comes after. Buckets are made in float32
    and on the CPU, as distances lie exactly on their borders: another logarithm would put some into the next one.
    """
    sides = 2 if bidirectional else 1
    count = num_buckets // sides
    single = count // 2
    steps = torch.arange(single, max_distance, device="cpu").float() / single
    shared = single + (steps.log() / math.log(max_distance / single) * (count - single)).long()
    bucket_of = torch.cat([torch.arange(single, device="cpu"), shared, torch.tensor([count], device="cpu")])
    bucket_of = bucket_of.clamp(max=count - 1).to(distances.device)

    far = distances.abs() if bidirectional else (-distances).clamp(min=0)
    after = count * (distances > 0) if bidirectional else 0
    return bucket_of[far.clamp(max=max_distance)] + after


def tokens_present(mask: Tensor | None, shape: tuple[int, ...], name: str) -> Bool[Tensor, "B S"] | None:
    if mask is not None and mask.shape != shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; the tokens it is for need {tuple(shape)}")
    return None if mask is None else mask.to(torch.bool)


def padding_bias(present: Bool[Tensor, "B T"], dtype: torch.dtype) -> Float[Tensor, "B 1 1 T"]:
    """Nothing for the scores of tokens that are there, and what hides them for padding."""
    return torch.zeros_like(present, dtype=dtype).masked_fill(~present, lowest(dtype))[:, None, None]


def lowest(dtype: torch.dtype) -> float:
    """A score that no softmax gives weight to.

    It is finite, so that a row that may see nothing is a mean and not NaN, and far enough from the largest number
    for a kernel to multiply it by log2(e).
    """
    return torch.finfo(dtype).min / 2
