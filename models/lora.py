"""LoRA: which linear layers get an adapter, how large it is, and how it is attached, saved and merged."""

from dataclasses import dataclass, field


@dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear layers get an adapter, and how large it is."""

    rank: int = 64
    """Inner dimension r of A (r, in) and B (out, r)."""
    alpha: float = 16.0
    """The branch is scaled by alpha / rank (by alpha / sqrt(rank) with rslora)."""
    dropout: float = 0.1
    """Share of the branch's inputs set to zero in training; the base layer sees all of them."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Leaf names of the layers to adapt; "all-linear" is every linear layer but the head."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps the branch's size steady as the rank grows."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single layers, by leaf name or by the end of the dotted name."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of single layers, likewise."""
    dtype: str = "float32"
    """What the adapters are stored and updated in; they multiply in the model's compute dtype."""
