"""What an optimizer's step takes: AdamW, AdamW with states of 8 bits and Lion over many tensors, beside others'.

Two sets of float32 tensors: the LoRA matrices of SmolLM2-135M at rank 16, which are 420 small ones, and three large
ones, as in a full fine-tune. Speed does not depend on the values, so that everyone updates the same parameters with
the same gradients, each with states of its own. Others' are torch.optim.AdamW, with lists of tensors and fused, and the
optimizers of bitsandbytes where that is installed.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from benchmarks.timing import interleaved, stopwatch
from benchmarks.training import SMOLLM2, finished
from models.config import LlamaConfig
from train.paged import AdamW, AdamW8bit, Lion

RANK = 16
LR, DECAY = 1e-4, 0.01
UPDATES = ("AdamW", "AdamW 8-bit", "Lion")


def measure(device: str, repeats: int, sets: Mapping[str, Sequence[int]] | None = None) -> list[dict[str, Any]]:
    """A row for each set of tensors and each update; what someone does not have stays None."""
    rows = []
    for name, sizes in (SETS if sets is None else sets).items():
        contestants, state_bytes = contest(sizes, torch.device(device))
        times = interleaved(contestants, repeats, lambda work: stopwatch(finished(work, device)))
        milliseconds = {who: timing.median * 1000 for who, timing in times.items()}
        for update in UPDATES:
            row: dict[str, Any] = {"case": f"{name}, {update}", "elements": sum(sizes), "tensors": len(sizes)}
            for who in ("ours", "torch_foreach", "torch_fused", "bitsandbytes"):
                row[f"{who}_ms"] = milliseconds.get(f"{who} {update}")
            rows.append(row | {"state_bytes": state_bytes[update]})
    return rows


def contest(sizes: Sequence[int], device: torch.device) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """One step by everyone who is here, and the bytes of our states."""
    params = [nn.Parameter(torch.randn(size, device=device)) for size in sizes]
    for p in params:
        p.grad = torch.randn_like(p) * 1e-3
    adamw: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": DECAY}
    lion: dict[str, Any] = {"lr": LR, "betas": (0.9, 0.99), "weight_decay": DECAY}
    ours = {"AdamW": AdamW(params, **adamw), "AdamW 8-bit": AdamW8bit(params, **adamw), "Lion": Lion(params, **lion)}
    contestants: dict[str, Callable[[], object]] = {
        f"ours {update}": optimizer.step for update, optimizer in ours.items()
    }
    for how in ("foreach", "fused"):
        contestants[f"torch_{how} AdamW"] = torch.optim.AdamW(params, **(adamw | {how: True})).step
    if importlib.util.find_spec("bitsandbytes"):
        optim = importlib.import_module("benchmarks.peer").bitsandbytes.optim
        contestants["bitsandbytes AdamW"] = optim.AdamW32bit(params, **adamw).step
        contestants["bitsandbytes AdamW 8-bit"] = optim.AdamW8bit(params, **adamw).step
        contestants["bitsandbytes Lion"] = optim.Lion32bit(params, **lion).step
    for optimizer in ours.values():
        optimizer.step()
    return contestants, {update: optimizer.state_bytes for update, optimizer in ours.items()}


def lora_sizes(config: LlamaConfig, rank: int) -> list[int]:
    """Elements of A and B of every linear layer of a model."""
    width, inner = config.hidden_size, config.intermediate_size
    heads, keys = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    layers = [
        (width, heads),
        (width, keys),
        (width, keys),
        (heads, width),
        (width, inner),
        (width, inner),
        (inner, width),
    ]
    return [rank * side for layer in layers for side in layer] * config.num_hidden_layers


SETS = {"LoRA on SmolLM2-135M": lora_sizes(SMOLLM2, RANK), "three matrices of 4096 x 4096": [4096 * 4096] * 3}
