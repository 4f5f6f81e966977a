"""What a RoBERTa checkpoint says about itself: config.json under the released field names.

Fields that change the arithmetic are all here; one that asks for arithmetic that is not (another activation,
relative positions, a decoder) is refused, never ignored. `problem_type` is what a classification head learns, and
None says that the model fills masks instead: in files the field is often absent, and the head decides.
"""

from dataclasses import asdict, dataclass
from typing import Any

from models.config_fields import (
    check_sizes,
    finite,
    number,
    real,
    short,
    size,
    token_ids,
    values_of,
    written_ids,
)
from models.errors import CheckpointError

MOST_LABELS = 2**20
CLASSIFICATION, REGRESSION = "single_label_classification", "regression"


@dataclass(frozen=True, kw_only=True)
class RobertaConfig:
    """Sizes and switches of a RoBERTa encoder and its head. What is not in a file is as the format defines it."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    max_position_embeddings: int = 512
    """Rows of the position table: the first pad_token_id + 1 of them are never a token's position."""
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    classifier_dropout: float | None = None
    """Before both layers of the classification head; None: as hidden_dropout_prob."""
    bos_token_id: int | None = 0
    eos_token_id: tuple[int, ...] = (2,)
    pad_token_id: int = 1
    problem_type: str | None = None
    labels: tuple[str, ...] = ()
    """What the classes are called, in the order of the logits."""

    def __post_init__(self) -> None:
        check_sizes(self, SIZES)
        if self.hidden_size % self.num_attention_heads:
            raise CheckpointError(
                f"config: hidden_size {self.hidden_size} does not split into {self.num_attention_heads} heads"
            )
        if not 0 <= self.pad_token_id < self.vocab_size:
            raise CheckpointError(f"config: pad_token_id {self.pad_token_id} is no row of {self.vocab_size} tokens")
        if self.max_position_embeddings < self.pad_token_id + 2:
            raise CheckpointError(
                f"config: max_position_embeddings is {self.max_position_embeddings}, but the first token's position is "
                f"pad_token_id + 1 = {self.pad_token_id + 1}"
            )
        for name in RATES:
            rate = getattr(self, name)
            if rate is not None and not 0 <= rate < 1:
                raise CheckpointError(f"config: {name} is {rate}; it must be at least 0 and below 1")

    @property
    def max_tokens(self) -> int:
        """The longest input, special tokens included."""
        return self.max_position_embeddings - self.pad_token_id - 1

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that any reader of released RoBERTa checkpoints understands."""
        values = {key: value for key, value in asdict(self).items() if value is not None and key != "labels"}
        task = "MaskedLM" if self.problem_type is None else "SequenceClassification"
        if self.labels:
            values["id2label"] = {str(i): label for i, label in enumerate(self.labels)}
            values["label2id"] = {label: i for i, label in enumerate(self.labels)}
        return {
            "architectures": [f"RobertaFor{task}"],
            "model_type": "roberta",
            "hidden_act": "gelu",
            "position_embedding_type": "absolute",
            "tie_word_embeddings": True,
            **values,
            "eos_token_id": written_ids(self.eos_token_id),
        }


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "max_position_embeddings",
    "type_vocab_size",
)
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
REALS = (*RATES, "layer_norm_eps", "initializer_range")

# Fields with one value that can be computed here; absent means this value.
FIXED = {
    "hidden_act": "gelu",
    "position_embedding_type": "absolute",
    "is_decoder": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def roberta_config(raw: dict[str, Any], where: str) -> RobertaConfig:
    """Read the fields of a config.json; `where` names the file in errors."""
    for key, only in FIXED.items():
        if raw.get(key, only) != only:
            raise CheckpointError(f"{where}: {key} is {raw[key]!r}; RoBERTa is computed with {only!r} only")
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = values_of(RobertaConfig, raw, needed, where)
    for name in (*SIZES, "pad_token_id", "bos_token_id"):
        if name in values:
            read = size if name in SIZES else number
            values[name] = read(values[name], f"{where}: {name}")
    for name in REALS:
        if name in values:
            read = real if name == "layer_norm_eps" else finite
            values[name] = read(values[name], f"{where}: {name}")
    values["eos_token_id"] = token_ids(raw.get("eos_token_id", 2), f"{where}: eos_token_id")
    if not isinstance(values.get("problem_type", ""), str):
        raise CheckpointError(f"{where}: problem_type is {values['problem_type']!r}; a name is needed")
    values["labels"] = label_names(raw, where)
    return RobertaConfig(**values)


def label_names(raw: dict[str, Any], where: str) -> tuple[str, ...]:
    """Names of the classes from `id2label`; a `num_labels` that says otherwise wins, as it does for other readers."""
    table = raw.get("id2label") or {}
    if not isinstance(table, dict) or set(table) != {str(i) for i in range(len(table))}:
        raise CheckpointError(f"{where}: id2label is {table!r:.80}; a name for each of 0, 1, 2, ... is needed")
    count = raw.get("num_labels")
    if count is not None and number(count, f"{where}: num_labels") != len(table):
        if not 0 <= count <= MOST_LABELS:  # each gets a name
            raise CheckpointError(f"{where}: num_labels is {short(count)}; at most {MOST_LABELS} can be told apart")
        return numbered_labels(count)
    return tuple(str(table[str(i)]) for i in range(len(table)))


def numbered_labels(count: int) -> tuple[str, ...]:
    """Names for classes that have none."""
    return tuple(f"LABEL_{i}" for i in range(count))
