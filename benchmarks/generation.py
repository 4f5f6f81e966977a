"""Tokens a second of greedy decoding, and of reading the prompt: stored in 4 bits, dense, and on bitsandbytes.

One skeleton, `models.Llama` with its cache, and three kinds of linear layers in it: ours over NF4 with double
quantization, torch's over dense bfloat16, and bitsandbytes' Linear4bit. So what differs is the products alone. The
weights are random, the same in all, of SmolLM2-135M's sizes or those of a model that is named.

A new token for each of B texts cannot but read every linear layer and the head once, and the keys and values of what
was written before. That is the bound of the roofline: with one text it is the memory's, with many texts the matrix
units'. Letters: B texts, P prompt tokens, V vocabulary, D width.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

import kernels
import models
import nf4
from benchmarks.roofline import Limits, Work, all_placed
from benchmarks.targets import against
from benchmarks.timing import interleaved, stopwatch
from benchmarks.training import SMOLLM2, built, finished
from models.config import LlamaConfig, llama_config
from models.errors import ConfigError
from models.linear import AdaptableLinear, Linear, NF4Linear
from train.planner.jobs import described as described_model


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is written, and by what."""

    config: LlamaConfig = field(default_factory=lambda: SMOLLM2)
    device: str = "cpu"
    batches: tuple[int, ...] = (1, 8)
    """Texts that are written at once."""
    prompt: int = 32
    """Tokens of each prompt."""
    new: int = 32
    """Tokens that are written after the first, which reading the prompt gives."""


def measure(setting: Setting, repeats: int, limits: Limits | None = None) -> list[dict[str, Any]]:
    """Two rows for each batch: reading prompts and writing, in tokens a second of everyone who is here."""
    contestants = {name: built(setting.config, setting.device, make).eval() for name, make in layers().items()}
    sizes = {name: Sizes.of(contestants[name]) for name in ("ours", "dense")}
    sizes["bitsandbytes"] = sizes["ours"]  # has the same format; what it repacks on a CPU is 3 % more
    rows = []
    for batch in setting.batches:
        P, new = setting.prompt, setting.new
        generator = torch.Generator().manual_seed(3)
        ids = torch.randint(setting.config.vocab_size, (batch, P), generator=generator).to(setting.device)
        reading = medians(contestants, ids, 1, repeats, setting.device)
        both = medians(contestants, ids, 1 + new, repeats, setting.device)
        writing = {name: (both[name] - reading[name]) / new for name in contestants}
        for what, seconds, tokens, seen in (
            (f"read {batch} x {P}", reading, batch * P, P // 2),
            (f"write, batch {batch}", writing, batch, P + new // 2),
        ):
            works = {name: work(setting.config, sizes[name], tokens, batch, seen) for name in contestants}
            speeds = {f"{name}_tokens_s": tokens / took for name, took in seconds.items()}
            placed = all_placed(works, seconds, limits)
            rows.append({"case": what, **speeds, **against(seconds), "roofline": placed})
    return rows


def medians(
    contestants: Mapping[str, models.Llama], ids: Tensor, new: int, repeats: int, device: str
) -> dict[str, float]:
    """Seconds in which each writes `new` tokens after the prompts, none of which ends a text."""

    def writes(model: models.Llama) -> Callable[[], object]:
        return lambda: models.generate(model, ids, max_new_tokens=new, eos_token_id=-1)

    turns = {name: writes(model) for name, model in contestants.items()}
    times = interleaved(turns, repeats, lambda call: stopwatch(finished(call, device)))
    return {name: timing.median for name, timing in times.items()}


@dataclass(frozen=True)
class Sizes:
    """What there is of a model to go through."""

    weights: int
    """Of the linear layers of its blocks."""
    nbytes: int
    """Of all that is read for a token: an embedding that is not the head too is only looked up."""

    @classmethod
    def of(cls, model: models.Llama) -> "Sizes":
        linears = [m for m in model.modules() if isinstance(m, AdaptableLinear)]
        stored = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        apart = model.model.embed_tokens.weight.nbytes if model.lm_head is not None else 0
        return cls(sum(m.in_features * m.out_features for m in linears), stored - apart)


def work(config: LlamaConfig, sizes: Sizes, tokens: int, batch: int, seen: int) -> Work:
    """What a pass over so many new tokens of so many texts cannot but do, `seen` being there for each on average.

    The head is multiplied with the last token of each text only.
    """
    L, heads = config.num_hidden_layers, config.num_attention_heads * config.head_dim
    head = 2 * batch * config.vocab_size * config.hidden_size
    operations = 2 * tokens * sizes.weights + head + 4 * tokens * L * heads * seen
    cache = 4 * batch * seen * L * config.num_key_value_heads * config.head_dim
    return Work(operations, sizes.nbytes + cache)


Layer = Callable[[Tensor], nn.Module]


def layers() -> dict[str, Layer]:
    """How everyone who is here makes a layer of a dense weight."""
    found: dict[str, Layer] = {"ours": lambda weight: NF4Linear(kernels.quantize(weight, nf4.QuantConfig()))}
    if importlib.util.find_spec("bitsandbytes"):
        from benchmarks.peer import StoredLinear

        found["bitsandbytes"] = StoredLinear
    return found | {"dense": Linear.from_weight}


def sizes_of(model: str) -> LlamaConfig:
    """The sizes, without biases, of a LLaMA that is known by name, or of a checkpoint or a config.json."""
    found = described_model(model)
    if found.raw.get("model_type", "llama") != "llama":
        raise ConfigError(f"model: {model} is a {found.raw['model_type']}; what is measured here is a LLaMA's decoding")
    return replace(llama_config(dict(found.raw), found.where), attention_bias=False, mlp_bias=False)


def described(setting: Setting) -> dict[str, Any]:
    """What was measured, in words for the result."""
    return {**asdict(setting), "dtype": "bfloat16", "weights": "nf4, double quantization", "decoding": "greedy"}
