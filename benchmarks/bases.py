"""Does a better base make the fine-tuned model better? The same adapters, steps and data on one base or another.

LoRA learns to make up for what quantizing lost, beside what it is to learn, so a better base could help, or no longer
matter after some steps. Everything but the base is the same for a seed; what is told of a base is its mean over seeds,
and its difference from plain NF4 in pairs of the same seed. Loss is measured on conversations held out from training
and calibration alike, and on the first windows of the ladder's texts, which training is not about.
"""

import shutil
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

import models
from benchmarks.quality import window_losses
from models import LoraConfig
from models.errors import DataError
from models.llama import causal
from train.data import DataConfig, load_data
from train.demo import DATA
from train.optimizer import OptimizerConfig
from train.preparation import prepare
from train.recipe import RunConfig
from train.sweep.report import interval

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.codes import Setting

STEPS = 16
WINDOWS = 8  # of each of the ladder's texts
MAX_LEN = 256  # tokens of a conversation that are learned from
TRAINING = DataConfig(path=str(DATA), template="chat", max_len=MAX_LEN, eval_size=0.1)


@dataclass(frozen=True)
class Base:
    """What adapters are trained on."""

    row: str | None
    """The ladder's row that has a checkpoint of it; None: made of the original one when it is loaded."""
    settings: dict[str, Any]
    """Of the run."""


def all_bases() -> dict[str, Base]:
    """The bases by name; the one that others are compared with is the second."""
    from benchmarks.codes import LADDER, OURS, RANK

    lora = LoraConfig(rank=RANK, alpha=RANK, dropout=0.05)
    assert LADDER[OURS].calibration is not None
    return {
        "16 bit": Base(None, {"quantize": False, "lora": lora}),
        "NF4": Base(None, {"lora": lora}),
        OURS: Base(OURS, {"lora": lora}),
        "PiSSA": Base(None, {"lora": replace(lora, init="pissa")}),
        "LoftQ": Base(None, {"lora": replace(lora, init="loftq")}),
    }


def training_text(model: Path, windows: int, tokens: int) -> Int[Tensor, "windows tokens"]:
    """Windows of the conversations that are trained on, so of none that is held out.

    They are as training has them; where that is not enough, it goes on with what training cuts off the longer ones.
    """
    tokenizer = models.load_tokenizer(model)
    data = load_data(TRAINING, tokenizer)
    held_out = {example.opening for example in data.held_out}
    whole = load_data(replace(TRAINING, max_len=4 * MAX_LEN, eval_size=0), tokenizer).train
    ends = (example.input_ids[MAX_LEN:] for example in whole if example.opening not in held_out)
    text = torch.cat([shuffled(ids, tokens) for ids in ((example.input_ids for example in data.train), ends)])
    if len(text) < windows:
        raise DataError(
            f"codes: {windows} windows of {tokens} tokens are wanted, but the demo's data has only {len(text)}"
        )
    return text[:windows]


def shuffled(texts: Iterable[list[int]], tokens: int) -> Int[Tensor, "windows tokens"]:
    """One text after the other, cut into windows, in an order drawn by chance."""
    ids = torch.tensor(list(chain.from_iterable(texts)), dtype=torch.long)
    table = ids[: len(ids) // tokens * tokens].view(-1, tokens)
    return table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]


def measure(setting: "Setting", seeds: int, tell: Callable[[str], Any]) -> dict[str, Any]:
    """Runs of every base with every seed, and what they came to."""
    runs = []
    for seed in range(1, seeds + 1):
        for name, base in all_bases().items():
            runs.append(setting.kept.made(f"{name}, seed {seed}", partial(run, setting, name, base, seed)))
            tell(f"adapters on {name}, seed {seed}: done")
    return {"runs": runs, "bases": compared(runs)}


def run(setting: "Setting", name: str, base: Base, seed: int) -> dict[str, Any]:
    """Train adapters and measure what came of it."""
    from benchmarks.codes import LADDER, checkpoint

    directory = setting.work / "runs" / f"{name}-{seed}".replace(", ", "-").replace(" ", "-")
    model = setting.model if base.row is None else checkpoint(setting, base.row, LADDER[base.row])
    config = RunConfig(
        model=str(model),
        out=str(directory),
        overwrite=True,
        quiet=True,
        seed=seed,
        device=setting.device,
        dtype="bfloat16",
        batch_size=8,
        accumulation=1,
        max_steps=STEPS,
        save_steps=0,
        dry_step=False,
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="cosine", warmup_steps=2),
        data=TRAINING,
        **base.settings,
    )
    finetuning = prepare(config)
    trained = finetuning.train()
    llama = causal(finetuning.model, "bench codes")
    after = {
        each.name: float(window_losses(llama, replace(each, windows=each.windows[:WINDOWS])).mean())
        for each in setting.corpora
    }
    shutil.rmtree(directory)
    before, last = trained.evaluations[0]["loss"], trained.evaluations[-1]["loss"]
    return {"base": name, "seed": seed, "steps": STEPS, "held_out_before": before, "held_out": last, **after}


def compared(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each base: means over seeds with 95 % intervals, and paired differences from plain NF4."""
    measures = [key for key in runs[0] if key not in ("base", "seed", "steps")]
    by_base = {name: [r for r in runs if r["base"] == name] for name in dict.fromkeys(r["base"] for r in runs)}
    rows = []
    for name, own in by_base.items():
        told: dict[str, Any] = {"base": name, "seeds": len(own)}
        for key in measures:
            told[key] = asdict(interval([r[key] for r in own]))
            pairs = [a[key] - b[key] for a, b in zip(own, by_base["NF4"], strict=False)]
            told[f"{key}_less_NF4"] = asdict(interval(pairs))
        rows.append(told)
    return rows


def show_bases(console: "Console", tuned: dict[str, Any]) -> None:
    from rich.table import Table

    rows = tuned["bases"]
    measures = [key for key in rows[0] if key not in ("base", "seeds") and not key.endswith("_less_NF4")]
    for suffix, title in (("", "loss after training"), ("_less_NF4", "its difference from NF4's, in pairs")):
        table = Table(title, *measures)
        for r in rows:
            table.add_row(r["base"], *(spelt(r[f"{key}{suffix}"]) for key in measures))
        console.print(table)


def spelt(found: dict[str, Any]) -> str:
    return f"{found['mean']:.4f}" + ("" if found["half"] is None else f" ± {found['half']:.4f}")
