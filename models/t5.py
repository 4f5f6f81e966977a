"""T5: an encoder that reads one text and a decoder that writes another.

Axes: B batch, T tokens of the encoder, U tokens of the decoder, D width, V vocabulary. Modules carry the names of the
released checkpoints; their blocks are in `models/t5_blocks.py`.
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

import kernels
from models.cache import Cache, LayerCache
from models.errors import CheckpointError, ConfigError
from models.model import Model
from models.packed import refuse_packed
from models.t5_blocks import Block, Blocks
from models.t5_config import HEAD, T5Config, t5_config

COPIES = ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight")  # of the one embedding, in many files
UNUSED = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"  # in old files; nothing reads it


class T5(Model):
    """Encoder and decoder over one embedding, with a head that may be the embedding itself."""

    task_type = "SEQ_2_SEQ_LM"
    entries = ("loss", "encode", "decode", "new_cache")
    always_dense = ("wo",)

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
        config = self.config
        cross = []
        for block in self.decoder.block:
            assert isinstance(block, Block)
            cross.append(LayerCache.of(*block.keys_and_values(encoded)))
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


def tokens_present(mask: Tensor | None, shape: tuple[int, ...], name: str) -> Bool[Tensor, "B S"] | None:
    """Which tokens are there, by an attention mask of that shape."""
    if mask is not None and mask.shape != shape:
        raise ValueError(f"{name} has shape {tuple(mask.shape)}; the tokens it is for need {tuple(shape)}")
    refuse_packed(mask, "a T5")
    return None if mask is None else mask.to(torch.bool)
