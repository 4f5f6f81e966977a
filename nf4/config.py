"""How a weight is to be stored: which levels, how many weights share a scale, how the scales are stored."""

from dataclasses import dataclass
from difflib import get_close_matches

from nf4.codebook import check_codebook

SCALES = ("absmax", "search")


@dataclass(frozen=True)
class QuantConfig:
    """How a weight is stored: its levels, its blocks, its scales."""

    codebook: str = "nf4"
    """Data type of a weight: nf4, nf2, nf3, nf8, int4, int8, fp4, fp4-e2m1 or fp4-e3m0."""
    block_size: int = 64
    """How many consecutive weights share one scale."""
    double_quant: bool = True
    """Store the scales in 8 bits, with scales of their own: 4.127 bits per weight where float32 takes 4.5."""
    nested_block_size: int = 256
    """How many consecutive scales share one second-level scale; bitsandbytes multiplies only with 256."""
    scale: str = "absmax"
    """How a block's scale is chosen: its largest magnitude (absmax) or the least squared error (search)."""

    def __post_init__(self) -> None:
        check_codebook(self.codebook)
        for name in ("block_size", "nested_block_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} counts weights or scales and must be a whole number >= 1, not {value!r}")
        if not isinstance(self.double_quant, bool):
            raise ValueError(f"double_quant must be true or false, not {self.double_quant!r}")
        if self.scale not in SCALES:
            close = get_close_matches(str(self.scale), SCALES, n=1, cutoff=0.3)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise ValueError(f"scale must be one of {', '.join(SCALES)}, not {self.scale!r}{hint}")
