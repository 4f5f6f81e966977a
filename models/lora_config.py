"""What an adapter is to be: its rank and scale, the layers that get one, how it starts, what is trained beside it."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch

ADAPTER_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
INITS = ("default", "pissa", "loftq")


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
    """Leaf names of the layers to adapt, or ends of dotted names; "all-linear" is every linear layer but the head.
    A single text may be a regular expression of such an end."""
    dora: bool = False
    """Learn the length of each row of the weight apart from its direction (DoRA)."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank), which keeps the branch's size steady as the rank grows."""
    init: str = "default"
    """How adapters start: default (A random, B zero, the base as it is), pissa (the weight's largest singular
    vectors) or loftq (what quantizing loses). The last two change the base, and need the weights in 16 bits."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single layers, by leaf name or by the end of the dotted name; the longest key that fits wins."""
    alpha_pattern: dict[str, float] = field(default_factory=dict)
    """Alphas of single layers, likewise."""
    modules_to_save: tuple[str, ...] = ()
    """Modules that are trained whole and saved with the adapters, such as a fresh classifier."""
    dtype: str = "float32"
    """What the adapters are stored and updated in; they multiply in the model's compute dtype."""

    def __post_init__(self) -> None:
        for where, rank in {"rank": self.rank, **self.rank_pattern}.items():
            if not isinstance(rank, int) or rank < 1:
                raise ValueError(f"lora: {where} is {rank}; a rank is a whole number of at least 1")
        for where, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not math.isfinite(alpha):
                raise ValueError(f"lora: {where} is {alpha}; an alpha is a finite number")
            if self.init != "default" and alpha <= 0:
                raise ValueError(f"lora: {where} is {alpha}; init={self.init!r} needs an alpha above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"lora: dropout is {self.dropout}; it must be at least 0 and below 1")
        check_choice("lora: init", self.init, INITS)
        check_dtype("lora", self.dtype)
        if not self.target_modules:
            raise ValueError("lora: target_modules is empty; name layers, or give 'all-linear'")
        patterns = [("rank_pattern", key) for key in self.rank_pattern]
        patterns += [("alpha_pattern", key) for key in self.alpha_pattern]
        patterns += [("target_modules", self.target_modules)] if isinstance(self.target_modules, str) else []
        for where, key in patterns:
            try:
                re.compile(key)
            except re.error as error:
                raise ValueError(f"lora: {where}: {key!r} is not a regular expression ({error})") from error

    def size(self, name: str) -> tuple[int, float]:
        """Rank and scaling of the adapter of the layer that is called `name`."""
        rank = int(matching(self.rank_pattern, name, self.rank))
        alpha = matching(self.alpha_pattern, name, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)

    def targets(self, name: str, in_head: bool = False) -> bool:
        """Does the layer of that name get an adapter? One in a head has to be named."""
        if self.target_modules == "all-linear":
            return not in_head
        if isinstance(self.target_modules, str):
            return fits(self.target_modules, name)
        return any(ends_with(name, target) for target in self.target_modules)


def check_dtype(method: str, dtype: str) -> None:
    """Refuse a dtype that adapters are not stored in."""
    check_choice(f"{method}: dtype", dtype, tuple(ADAPTER_DTYPES))


def check_choice(where: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        close = get_close_matches(value, choices, n=1, cutoff=0.4)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{where} is {value!r}; choose from {', '.join(choices)}{hint}")


def matching(pattern: Mapping[str, float], name: str, default: float) -> float:
    """The value of the longest key that fits the layer's name; of equally long ones, the first."""
    keys = [key for key in pattern if fits(key, name)]
    return pattern[max(keys, key=len)] if keys else default


def fits(key: str, name: str) -> bool:
    """Is the key a layer's leaf name or the end of its dotted name? It may be a pattern, as PEFT allows."""
    return re.fullmatch(rf"(.*\.)?({key})", name) is not None


def ends_with(name: str, end: str) -> bool:
    """Is `end` the dotted name or some of its last parts, letter for letter?"""
    return name == end or name.endswith(f".{end}")
