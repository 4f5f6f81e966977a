"""What a LLaMA checkpoint says about itself: config.json under the released field names.

Old files put `rope_theta` and `rope_scaling` at the top, new ones `rope_parameters`; both are read, and the
old form is written because every reader knows it. Fields that change the arithmetic are all here; one that
asks for arithmetic that is not (another activation, another rotary scaling) is refused, never ignored.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from models.config_fields import check_sizes, flag, real, size, table, token_id, token_ids, values_of, written_ids
from models.errors import CheckpointError


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pre-training."""

    rope_type: str
    """"linear" divides all frequencies by factor; "llama3" only those of long wavelength."""
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """Sizes and switches of a LLaMA-architecture decoder."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        check_sizes(self, SIZES)
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"config: {self.num_attention_heads} attention heads cannot share "
                f"{self.num_key_value_heads} key/value heads evenly"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"config: head_dim is {self.head_dim}; rotary positions need it even")

    @property
    def max_tokens(self) -> int:
        """The longest input."""
        return self.max_position_embeddings

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that any reader of released LLaMA checkpoints understands."""
        values = {name: value for name, value in asdict(self).items() if value is not None}
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_act": "silu",
            "rope_scaling": None,
            **values,
            "eos_token_id": written_ids(self.eos_token_id),
        }


SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def llama_config(raw: dict[str, Any], where: str) -> LlamaConfig:
    """Read the fields of a config.json; `where` names the file in errors."""
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    values = values_of(LlamaConfig, raw, needed, where)
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):
        raise CheckpointError(f"{where}: hidden_act is {raw['hidden_act']!r}; LLaMA's SwiGLU needs 'silu'")

    values.setdefault("num_key_value_heads", values["num_attention_heads"])
    for name in SIZES:
        if name in values:
            values[name] = size(values[name], f"{where}: {name}")
    if "head_dim" not in values:
        width, heads = values["hidden_size"], values["num_attention_heads"]
        if width % heads:
            raise CheckpointError(f"{where}: hidden_size {width} does not split into {heads} attention heads")
        values["head_dim"] = width // heads
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        if name in values:
            values[name] = flag(values[name], f"{where}: {name}")
    for name in ("bos_token_id", "pad_token_id"):
        if name in values:
            values[name] = token_id(values[name], f"{where}: {name}")
    values["eos_token_id"] = token_ids(raw.get("eos_token_id"), f"{where}: eos_token_id")
    if "rms_norm_eps" in values:
        values["rms_norm_eps"] = real(values["rms_norm_eps"], f"{where}: rms_norm_eps")

    rope = table(raw.get("rope_parameters"), f"{where}: rope_parameters")
    values["rope_theta"] = real(rope.get("rope_theta", raw.get("rope_theta") or 10000.0), f"{where}: rope_theta")
    scaling = rope or table(raw.get("rope_scaling"), f"{where}: rope_scaling")
    values["rope_scaling"] = rope_scaling(scaling, where)
    return LlamaConfig(**values)


def rope_scaling(raw: dict[str, Any], where: str) -> RopeScaling | None:
    """The scaling part of `rope_parameters` or `rope_scaling`; None for plain rotary positions."""
    kind = raw.get("rope_type", raw.get("type", "default"))
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise CheckpointError(f"{where}: rotary scaling {kind!r:.80} is not known; linear and llama3 are")
    values = {f.name: raw[f.name] for f in fields(RopeScaling) if f.name in raw and f.name != "rope_type"}
    for name in ("factor", "low_freq_factor", "high_freq_factor"):
        if name in values:
            values[name] = real(values[name], f"{where}: {name} of the rotary scaling")
    if values.get("factor", 0.0) < 1:
        raise CheckpointError(f"{where}: rotary scaling needs a factor of at least 1; it has {values.get('factor')!r}")
    if "original_max_position_embeddings" in values:
        original = values["original_max_position_embeddings"]
        values["original_max_position_embeddings"] = size(original, f"{where}: original_max_position_embeddings")
    scaling = RopeScaling(rope_type=kind, **values)
    if scaling.high_freq_factor <= scaling.low_freq_factor:
        raise CheckpointError(f"{where}: rotary scaling's high_freq_factor is not above its low_freq_factor")
    return scaling
