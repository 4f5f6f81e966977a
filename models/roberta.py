"""RoBERTa: an encoder of post-norm blocks with learned positions, and a head that fills masks or labels texts.

Axes: B batch, T tokens, D width, H heads, C channels per head, F feed-forward width, V vocabulary. Modules carry
the names of the released checkpoints, so loading is a plain copy (`models/roberta_layout.py` has the exceptions).
"""

from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn

from models.linear import Linear
from models.model import Model, Stack
from models.packed import refuse_packed
from models.recompute import recomputed
from models.roberta_config import RobertaConfig, roberta_config
from models.roberta_heads import ClassificationHead, MaskedHead
from models.roberta_layout import parameter_for, with_head


class Embeddings(nn.Module):
    """Word, position and (there being one kind of text) the first token type, added and normed."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        D, pad = config.hidden_size, config.pad_token_id
        self.word_embeddings = nn.Embedding(config.vocab_size, D, padding_idx=pad)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, D, padding_idx=pad)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, D)
        self.LayerNorm = nn.LayerNorm(D, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"]) -> Float[Tensor, "B T D"]:
        x = self.word_embeddings(input_ids) + self.token_type_embeddings.weight[0]
        return self.dropout(self.LayerNorm(x + self.position_embeddings(positions)))


class SelfAttention(nn.Module):
    """Every token attends to every token that `mask` shows."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        D = config.hidden_size
        self.heads, self.dropout = config.num_attention_heads, config.attention_probs_dropout_prob
        self.query, self.key, self.value = (Linear(D, D, bias=True) for _ in range(3))

    def forward(self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B 1 1 T"] | None) -> Float[Tensor, "B T D"]:
        B, T, D = x.shape
        q, k, v = (
            layer(x).view(B, T, self.heads, -1).transpose(1, 2)  # (B, H, T, C)
            for layer in (self.query, self.key, self.value)
        )
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return y.transpose(1, 2).reshape(B, T, D)


class Output(nn.Module):
    """What ends each half of a block: a linear layer, then the norm of the sum with what came into the half."""

    def __init__(self, config: RobertaConfig, in_features: int) -> None:
        super().__init__()
        self.dense = Linear(in_features, config.hidden_size, bias=True)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, y: Float[Tensor, "B T inner"], x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T D"]:
        return self.LayerNorm(self.dropout(self.dense(y)) + x)


class Attention(nn.Module):
    """The first half of a block; the released name of what attends is `self`."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.self = SelfAttention(config)
        self.output = Output(config, config.hidden_size)

    def forward(self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B 1 1 T"] | None) -> Float[Tensor, "B T D"]:
        return self.output(self.self(x, mask), x)


class Intermediate(nn.Module):
    """gelu(W x + b), with the exact GELU."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.intermediate_size, bias=True)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T F"]:
        return F.gelu(self.dense(x))


class Block(nn.Module):
    """Attention, then feed-forward."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.intermediate = Intermediate(config)
        self.output = Output(config, config.intermediate_size)

    def forward(self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B 1 1 T"] | None) -> Float[Tensor, "B T D"]:
        x = self.attention(x, mask)
        return self.output(self.intermediate(x), x)


class Blocks(Stack):
    """All blocks: what the released names call `encoder`."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layer

    def forward(self, x: Float[Tensor, "B T D"], mask: Bool[Tensor, "B 1 1 T"] | None) -> Float[Tensor, "B T D"]:
        for layer in self.layer:
            again = self.gradient_checkpointing and torch.is_grad_enabled()
            x = recomputed(layer, x, mask) if again else layer(x, mask)
        return x


class Encoder(nn.Module):
    """Embeddings and blocks: what the released names call `roberta`."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = Blocks(config)

    def forward(
        self, input_ids: Int[Tensor, "B T"], positions: Int[Tensor, "B T"], mask: Bool[Tensor, "B 1 1 T"] | None
    ) -> Float[Tensor, "B T D"]:
        return self.encoder(self.embeddings(input_ids, positions), mask)


class Roberta(Model):
    """The encoder with one head: masked language model, classification or regression."""

    heads = ("lm_head.decoder",)
    entries = ("loss", "hidden")

    def __init__(self, config: RobertaConfig, fresh_head: bool = False) -> None:
        super().__init__()
        self.config: RobertaConfig = config
        self.fresh_head = fresh_head
        self.task_type = None if config.problem_type is None else "SEQ_CLS"
        self.roberta = Encoder(config)
        self.lm_head = MaskedHead(config) if config.problem_type is None else None
        self.classifier = ClassificationHead(config) if config.problem_type is not None else None

    def forward(
        self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None = None
    ) -> Float[Tensor, "B T V"] | Float[Tensor, "B labels"]:
        """Logits of the token at every position, or of a text's classes."""
        if self.lm_head is not None:
            return self.lm_head(self.hidden(input_ids, attention_mask), self.embedding.weight)
        assert self.classifier is not None
        return self.classifier(self.first(input_ids, attention_mask))

    def hidden(self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None) -> Float[Tensor, "B T D"]:
        """The encoder's output."""
        self.check(input_ids, attention_mask)
        positions, mask = positions_and_mask(input_ids, attention_mask, self.config.pad_token_id)
        return self.roberta(input_ids, positions, mask)

    def first(self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None) -> Float[Tensor, "B D"]:
        """The encoder's output at the first token that is there, wherever the padding is."""
        hidden = self.hidden(input_ids, attention_mask)
        there = present(input_ids, attention_mask, self.config.pad_token_id)
        return hidden[torch.arange(len(hidden), device=hidden.device), there.int().argmax(dim=1)]

    def loss(
        self, *, input_ids: Int[Tensor, "B T"], labels: Shaped[Tensor, "..."], attention_mask: Tensor | None = None
    ) -> Float[Tensor, ""]:
        """Mean over the labels that are not -100, in float32.

        With a masked head labels are (B, T), the tokens behind the masks where they stand, and the loss is
        cross-entropy. Otherwise they are (B,): classes, with cross-entropy, or numbers, with the squared error.
        """
        shape = tuple(input_ids.shape if self.lm_head is not None else input_ids.shape[:1])
        if labels.shape != shape:
            raise ValueError(
                f"labels have shape {tuple(labels.shape)}, but this head needs one for each "
                f"{'token' if self.lm_head is not None else 'text'}: {shape}"
            )
        scored = labels != -100
        if not bool(scored.any()):
            raise ValueError("no label to score: every one is -100")
        if self.lm_head is not None:
            hidden = self.hidden(input_ids, attention_mask)[scored]
            return self.lm_head.loss(hidden, self.embedding.weight, labels[scored])
        assert self.classifier is not None
        return self.classifier.loss(self.first(input_ids, attention_mask)[scored], labels[scored])

    def check(self, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None) -> None:
        """Refuse what a table has no row for, and a mask of another shape or meaning."""
        length, V = input_ids.shape[1], self.config.vocab_size
        longest = self.config.max_tokens
        if length > longest:
            raise ValueError(
                f"a text of {length} tokens is longer than the {longest} that this model has positions for; "
                f"cut it with encode(text, max_length={longest})"
            )
        outside = input_ids[(input_ids < 0) | (input_ids >= V)]
        if outside.numel():
            raise ValueError(
                f"id {int(outside[0])} is outside the vocabulary of {V} tokens; is the tokenizer this one's?"
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but input_ids {tuple(input_ids.shape)}; "
                "they must agree"
            )
        refuse_packed(attention_mask, "RoBERTa")

    @property
    def embedding(self) -> nn.Embedding:
        return self.roberta.embeddings.word_embeddings

    def parameter_named(self, name: str) -> str | None:
        return parameter_for(name, "lm_head" if self.lm_head is not None else "classifier")

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        if not self.fresh_head or not name.startswith("classifier."):
            return None
        zeros = torch.zeros(shape)
        return zeros if name.endswith(".bias") else nn.init.normal_(zeros, std=self.config.initializer_range)


def build_roberta(
    raw: dict[str, Any], where: str, tensors: Collection[str], head: str | None, num_labels: int | None
) -> Roberta:
    """The model of a config.json, with the head that is asked for or else the one that the tensors are of."""
    config, fresh = with_head(roberta_config(raw, where), where, tensors, head, num_labels)
    return Roberta(config, fresh)


def present(input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None, pad: int) -> Bool[Tensor, "B T"]:
    """Which tokens are there: neither masked nor padding."""
    there = input_ids != pad
    return there if attention_mask is None else there & attention_mask.to(torch.bool)


def positions_and_mask(
    input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None, pad: int
) -> tuple[Int[Tensor, "B T"], Bool[Tensor, "B 1 1 T"] | None]:
    """Rows of the position table, and what may be attended to (None: everything).

    Positions start behind the padding's own row and count the tokens that are there, so padding on the left shifts
    nothing. What is attended to is what `attention_mask` says; without one, all but the padding. In a row of
    nothing everything is attended to: its answer has no meaning, but it is a number.
    """
    there = present(input_ids, attention_mask, pad)
    positions = there.long().cumsum(dim=1) * there + pad
    seen = there if attention_mask is None else attention_mask.to(torch.bool)
    if bool(seen.all()):
        return positions, None
    return positions, (seen | ~seen.any(dim=1, keepdim=True))[:, None, None]
