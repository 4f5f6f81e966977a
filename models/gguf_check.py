"""A GGUF read back and compared with the model that it was made from: the file, not the intention, is what counts.

Sizes must be equal, every weight within the rounding of its type, the logits of a probe batch close, the token ids
of probe texts the same. What our own reader takes for a weight is not proof of another's, but a wrong row order,
a lost scaling or a shifted vocabulary shows here and not in a chat three tools later.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from models.checkpoint import load, open_checkpoint
from models.compare import answers, compare, random_probe
from models.config import LlamaConfig, RopeScaling, llama_config
from models.errors import CheckpointError
from models.gguf_vocabulary import stop_ids
from models.gguf_writer import weight_of
from models.llama import Llama
from models.tokenizer import Tokenizer, load_tokenizer

# KL divergence per token that rounding may lead to. Measured on trained models it is a hundredth of these.
KL_LIMITS = {"f32": 1e-6, "f16": 1e-4, "bf16": 1e-2, "q8_0": 1e-2}
PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    " Two  spaces,\ttabs\nand\n\nlines; 1234567890 and 3.14!",
    "Grüße aus Zürich, 日本語, emoji 🦙 and e\u0301.",
    "def f(x):\n    return x**2  # it's what they'll've wanted",
    "<s> </s> <|im_start|> [INST]",
    "",
)


@dataclass(frozen=True)
class Checked:
    """How far the file is from the model."""

    weight_error: float
    """Largest difference of a weight."""
    logit_error: float
    """Largest difference of a logit."""
    kl: float
    """Mean KL divergence of the next token."""
    kl_limit: float


@torch.no_grad()
def check(path: Path, model: Llama, tokenizer: Tokenizer, kinds: Mapping[str, str]) -> Checked:
    """Raise a CheckpointError that says what differs; `kinds` has the type of every tensor by its released name."""
    raw, reader, where = open_checkpoint(path)
    problems = config_problems(llama_config(raw, where), model.config, tokenizer)
    if reader.shapes.keys() != kinds.keys():
        problems.append(f"tensors differ: {sorted(reader.shapes.keys() ^ kinds.keys())[:6]}")
    largest = 0.0
    for name in kinds.keys() & reader.shapes.keys():
        wanted = weight_of(model, name).cpu()
        error = (reader.read(name) - wanted).abs()
        largest = max(largest, error.max().item())
        if not bool((error <= rounding(wanted, kinds[name])).all()):
            problems.append(f"{name} is off by {error.max().item():.2g}, more than {kinds[name]} rounds")
    problems += tokenizer_problems(load_tokenizer(path), tokenizer)
    if problems:
        raise CheckpointError("export: read back, the file differs and was not kept: " + "; ".join(problems[:6]))

    probe = random_probe(model)
    expected = answers(model, probe)
    result = compare(expected, answers(load(path, dtype=torch.float32, device=model.device), probe))
    kl = result.mean_kl
    limit = max(KL_LIMITS[kind] for kind in kinds.values())
    if not kl <= limit:
        raise CheckpointError(
            f"export: read back, the model's answers differ by a KL divergence of {kl:.2g} per token, where "
            f"{limit:.0e} is the limit; the file was not kept. A type with more bits rounds less: --gguf-type f32"
        )
    return Checked(largest, result.max_logit_difference, kl, limit)


def config_problems(found: LlamaConfig, expected: LlamaConfig, tokenizer: Tokenizer) -> list[str]:
    """Fields that differ. Begin and padding ids are the tokenizer's in a GGUF, and compared with it."""
    stops = stop_ids(tokenizer, expected)
    problems = [] if sorted(found.eos_token_id) == sorted(stops) else [f"eos_token_id is {found.eos_token_id}"]
    for field, value in vars(expected).items():
        if field in ("eos_token_id", "bos_token_id", "pad_token_id"):
            continue
        came = getattr(found, field)
        close = isinstance(value, float) and math.isclose(value, came, rel_tol=1e-5)  # floats are float32 there
        if came != value and not close and not same_scaling(came, value):
            problems.append(f"{field} is {came}, not {value}")
    return problems


def same_scaling(found: Any, expected: Any) -> bool:
    """Are these two rotary scalings that turn alike? A factor comes back as a float32."""
    if not isinstance(found, RopeScaling) or not isinstance(expected, RopeScaling):
        return False
    left, right = vars(found), vars(expected)
    used = ["factor"] if left["rope_type"] == "linear" else [key for key in left if key != "rope_type"]
    alike = all(math.isclose(left[key], right[key], rel_tol=1e-5) for key in used)
    return left["rope_type"] == right["rope_type"] and alike


def rounding(weight: Float[Tensor, "..."], kind: str) -> Float[Tensor, "..."]:
    """The most that a type may change each weight by."""
    size = weight.abs()
    if kind == "f32":
        return torch.zeros_like(size)
    if kind == "q8_0":  # half a step of a block's largest / 127, whose float16 errs by 2**-11 of 127 steps
        largest = size.view(*size.shape[:-1], -1, 32).amax(-1, keepdim=True)
        bound = largest / 127 * 0.5001 + largest * 2**-11 + 127 * 2.0**-25
        return bound.expand(*bound.shape[:-1], 32).reshape(size.shape)
    # half a unit in the last place, and below the normal numbers half of the smallest one
    return size * 2**-11 + 2.0**-25 if kind == "f16" else size * 2**-8 + 2.0**-134


def tokenizer_problems(found: Tokenizer, expected: Tokenizer) -> list[str]:
    """What differs of ids, special tokens and chat template."""
    problems = []
    for text in PROBES:
        ids, came = expected.encode(text), found.encode(text)
        if came != ids:
            problems.append(f"the tokenizer gives {came[:8]} for {text[:24]!r}, not {ids[:8]}")
        elif found.decode(ids) != expected.decode(ids):
            problems.append(f"the tokenizer decodes the ids of {text[:24]!r} to {found.decode(ids)!r}")
    for role in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id", "chat_template", "adds_bos"):
        if getattr(found, role) != getattr(expected, role):
            problems.append(f"the tokenizer's {role} is {getattr(found, role)!r:.60}")
    lost = expected.special_tokens.items() - found.special_tokens.items()
    return problems + ([f"special tokens are lost: {sorted(lost)[:4]}"] if lost else [])
