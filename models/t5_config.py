"""What a T5 checkpoint says about itself: config.json under the released field names.

One architecture has had two forms. v1.0 has a feed-forward of ReLU and reads its logits off the embedding, which
the decoder's output is scaled for. v1.1, and all that was trained on from it (LM-adapted T5, Flan-T5), has a
gated GELU and a head of its own. Files leave out what had no choice when they were written: a field that is absent
means v1.0. A field that asks for other arithmetic is refused, never ignored.
"""

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from models.config_fields import check_sizes, finite, flag, number, size, token_ids, values_of, written_ids
from models.errors import CheckpointError

ACTIVATIONS = {"relu": "relu", "gated-gelu": "gelu_new"}  # feed_forward_proj, and what newer files add in dense_act_fn
HEAD = "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class T5Config:
    """Sizes and switches of a T5 encoder and decoder."""

    vocab_size: int
    d_model: int
    d_kv: int
    d_ff: int
    num_layers: int
    num_decoder_layers: int
    num_heads: int
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    dropout_rate: float = 0.1
    layer_norm_epsilon: float = 1e-6
    feed_forward_proj: str = "relu"
    tie_word_embeddings: bool = True
    """Are logits read off the embedding?"""
    scale_decoder_outputs: bool = True
    """Is the decoder's output divided by sqrt(d_model) before the head?"""
    pad_token_id: int = 0
    eos_token_id: tuple[int, ...] = (1,)
    decoder_start_token_id: int = 0
    """What stands before the first token that the decoder writes."""

    def __post_init__(self) -> None:
        check_sizes(self, SIZES)
        if self.feed_forward_proj not in ACTIVATIONS:
            raise CheckpointError(
                f"config: feed_forward_proj is {self.feed_forward_proj!r}; {' and '.join(ACTIVATIONS)} are known"
            )
        buckets, distance = self.relative_attention_num_buckets, self.relative_attention_max_distance
        if buckets < 4 or distance <= buckets // 2:
            raise CheckpointError(
                f"config: relative_attention_num_buckets is {buckets} and relative_attention_max_distance {distance}; "
                "at least 4 buckets and a distance above half their number are needed"
            )
        if not 0 <= self.dropout_rate < 1:
            raise CheckpointError(f"config: dropout_rate is {self.dropout_rate}; it must be at least 0 and below 1")
        if not self.layer_norm_epsilon > 0:
            raise CheckpointError(f"config: layer_norm_epsilon is {self.layer_norm_epsilon}; it must be above 0")
        for name in ("pad_token_id", "decoder_start_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise CheckpointError(f"config: {name} is {getattr(self, name)}, outside of {self.vocab_size} tokens")

    @property
    def max_tokens(self) -> None:
        """Positions are relative, so that nothing but memory limits an input."""
        return None

    @property
    def gated(self) -> bool:
        """Is the feed-forward a product of two projections?"""
        return self.feed_forward_proj.startswith("gated-")

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that any reader of released T5 checkpoints understands."""
        return {
            "architectures": ["T5ForConditionalGeneration"],
            "model_type": "t5",
            "is_encoder_decoder": True,
            "dense_act_fn": ACTIVATIONS[self.feed_forward_proj],
            "is_gated_act": self.gated,
            **asdict(self),
            "eos_token_id": written_ids(self.eos_token_id),
        }


SIZES = ("vocab_size", "d_model", "d_kv", "d_ff", "num_layers", "num_decoder_layers", "num_heads")
COUNTS = (*SIZES, "relative_attention_num_buckets", "relative_attention_max_distance")


def t5_config(raw: dict[str, Any], where: str, tensors: Collection[str] = ()) -> T5Config:
    """Read the fields of a config.json; `where` names the file in errors, `tensors` are those of the checkpoint."""
    values = values_of(T5Config, raw, [name for name in SIZES if name != "num_decoder_layers"], where)
    values.setdefault("num_decoder_layers", values["num_layers"])
    values["decoder_start_token_id"] = values.get("decoder_start_token_id", values.get("pad_token_id", 0))
    for name in (*COUNTS, "pad_token_id", "decoder_start_token_id"):
        if name in values:
            read = size if name in SIZES else number
            values[name] = read(values[name], f"{where}: {name}")
    for name in ("dropout_rate", "layer_norm_epsilon"):
        if name in values:
            values[name] = finite(values[name], f"{where}: {name}")
    values["eos_token_id"] = token_ids(raw.get("eos_token_id", 1), f"{where}: eos_token_id")

    # The newest files say "tied" of every model and tell v1.1 by its unscaled output; whether it has a head of its
    # own is then seen from the tensors.
    tied = flag(values.get("tie_word_embeddings", True), f"{where}: tie_word_embeddings")
    scaled = flag(values.get("scale_decoder_outputs", tied), f"{where}: scale_decoder_outputs")
    values["scale_decoder_outputs"] = scaled
    values["tie_word_embeddings"] = tied and (scaled or HEAD not in tensors)

    projection = values.get("feed_forward_proj", "relu")
    if not isinstance(projection, str):
        raise CheckpointError(f"{where}: feed_forward_proj is {projection!r:.80}; a name is needed")
    for name, ours in (
        ("is_encoder_decoder", True),
        ("is_decoder", False),
        ("tie_encoder_decoder", False),
        ("dense_act_fn", ACTIVATIONS.get(projection)),
        ("is_gated_act", projection.startswith("gated-")),
    ):
        if projection in ACTIVATIONS and raw.get(name) not in (None, ours):
            raise CheckpointError(f"{where}: {name} is {raw[name]!r}; only a T5 with {ours!r} can be loaded here")
    return T5Config(**values)
