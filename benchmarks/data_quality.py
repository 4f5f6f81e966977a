"""`qlora bench data-quality`: what a model is fine-tuned on, against how much of it.

The paper finds that 9,000 examples of OASST1 make a better chatbot than 450,000 of FLAN v2, and that the choice of the
data set moves MMLU ten times as much as its size does. Here every data set given as NAME=PATH lends subsets of two
sizes whose answers are as long as those of the others (benchmarks/subsets.py); QLoRA makes the same number of steps
on each; and each model is measured on what was held out of every set: the loss of the answers, and ROUGE-L of its own
answers against them. A seed decides the subset as well as the training, so that intervals over seeds are about both.

The answers lie in the work folder in the layout that `qlora judge` reads.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import models
from benchmarks import answering, subsets
from benchmarks.corpora import named_files
from benchmarks.data_quality_plot import draw
from benchmarks.kept import Kept
from benchmarks.subsets import Pool
from eval.held_out import held_out_loss
from models import LoraConfig, Model, Tokenizer
from models.device import pick_device, pick_dtype
from models.errors import ConfigError
from models.fingerprint import fingerprint
from nf4 import QuantConfig
from train.data import load_data, padding_id
from train.data.batches import Batches
from train.demo_model import demo_model
from train.optimizer import OptimizerConfig
from train.preparation import prepare
from train.recipe import RunConfig
from train.sweep.report import interval

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.command import BenchOptions

SIZES = (16, 48)  # examples in a subset
STEPS, BATCH = 10, 8  # 80 examples: the smaller subset five times over, the larger less than twice
MAX_LEN = 192  # tokens of a question and its answer; longer ones are left out, not cut, so that all learn to stop
HELD_OUT = 16  # examples of each set
PROMPTS = 8  # of those, how many are answered
UNTRAINED = "untrained"


def bench(options: "BenchOptions", console: "Console") -> dict[str, Any]:
    files = named_files(options.data)
    if len(files) < 2:
        raise ConfigError("data-quality compares data sets: give two or more as NAME=PATH after --data")
    with tempfile.TemporaryDirectory() as folder:
        return compare(options, files, Path(options.work or folder), console)


def compare(options: "BenchOptions", files: dict[str, Path], work: Path, console: "Console") -> dict[str, Any]:
    path = options.model or str(demo_model())
    tokenizer = models.load_tokenizer(path)
    pools = [subsets.read_pool(name, file, tokenizer, MAX_LEN) for name, file in files.items()]
    held_out_count = min(HELD_OUT, options.limit or HELD_OUT)
    settings = {"sizes": SIZES, "steps": STEPS, "batch": BATCH, "max_len": MAX_LEN, "held_out": held_out_count}
    data = {pool.name: pool.facts for pool in pools}
    kept = Kept(work / "results", {"model": fingerprint(path), "data": data, **settings})

    held_out = subsets.matched(pools, held_out_count, seed=0)
    tests = {p.name: subsets.write(p, held_out[p.name], work / "held-out" / f"{p.name}.jsonl") for p in pools}
    questions = answering.write_questions(pools, held_out, PROMPTS, work / "questions.jsonl")

    def measured(name: str, model: Model, answers: bool) -> dict[str, Any]:
        losses = {test: loss_of(model, tokenizer, file) for test, file in tests.items()}
        own = answering.answer(model, tokenizer, questions, work / "answers" / f"{name}.jsonl") if answers else {}
        return {"losses": losses, **own}

    def untrained() -> dict[str, Any]:
        device = pick_device(options.device)
        model = models.load(path, quant=QuantConfig(), dtype=pick_dtype("auto", device), device=device)
        return measured(UNTRAINED, model, answers=True)

    def trained(pool: Pool, size: int, seed: int) -> dict[str, Any]:
        name = f"{pool.name}-{size}-{seed}"
        largest = subsets.matched(pools, max(SIZES), seed, subsets.without(pools, held_out))
        places = subsets.matched(pools, size, seed, largest)[pool.name]  # smaller subsets are parts of the largest
        file = subsets.write(pool, places, work / "subsets" / f"{name}.jsonl")
        finetuning = prepare(recipe(path, options.device, work / "runs" / name, file, seed))
        result = finetuning.train()
        if result.signal is not None:
            raise SystemExit(128 + result.signal)
        manifest = finetuning.data.manifest
        found = measured(name, finetuning.model, answers=size == max(SIZES))
        return {"examples": len(places), **{key: manifest[key] for key in ("tokens", "label_tokens")}, **found}

    results: dict[str, Any] = {UNTRAINED: kept.made(UNTRAINED, untrained)}
    for seed in range(1, options.seeds + 1):
        for size in SIZES:
            for pool in pools:
                name = f"{pool.name}-{size}-{seed}"
                results[name] = kept.made(name, lambda p=pool, n=size, s=seed: trained(p, n, s))
                console.print(f"{name}: {results[name]['losses']}", markup=False)

    names, seeds = [pool.name for pool in pools], range(1, options.seeds + 1)
    found = {
        "matrix": matrix(results, names, seeds),
        "differences": differences(results, names, seeds),
        "answers": answering.summary(results, questions, {n: [f"{n}-{max(SIZES)}-{s}" for s in seeds] for n in names}),
    }
    show(console, found, names)
    if options.plot:
        draw(found["matrix"], options.plot)
    if options.work:
        console.print(f"the answers are in {work / 'answers'}; `qlora judge` compares them: see benchmarks/RESULTS.md")
    return {
        "model": Path(path).name,
        "data": data,
        "settings": settings,
        "seeds": list(seeds),
        "runs": results,
        **found,
    }


def recipe(model: str, device: str, out: Path, file: Path, seed: int) -> RunConfig:
    """As `qlora train` would be told it; the demo's settings, but for the data."""
    return RunConfig(
        model=model,
        out=str(out),
        overwrite=True,
        quiet=True,
        device=device,
        seed=seed,
        batch_size=BATCH,
        accumulation=1,
        max_steps=STEPS,
        save_steps=0,
        dry_step=False,
        gradient_checkpointing=False,
        optimizer=OptimizerConfig(learning_rate=5e-4, schedule="cosine", warmup_steps=2),
        lora=LoraConfig(rank=16, alpha=16, dropout=0.05),
        data=subsets.layout(file, MAX_LEN, seed),
    )


def loss_of(model: Model, tokenizer: Tokenizer, file: Path) -> float:
    """Mean loss of the label tokens of a file, in nats."""
    examples = load_data(subsets.layout(file, MAX_LEN), tokenizer).train
    batches = Batches(examples, BATCH, padding_id(tokenizer), group_by_length=True)
    return held_out_loss(model, (batch.inputs for batch in batches.epoch(0))).loss


def matrix(results: dict[str, Any], names: list[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """Losses on every held-out set and their mean, by what was learned; with intervals over seeds."""
    rows: list[dict[str, Any]] = [
        {
            "learned": UNTRAINED,
            "size": 0,
            "losses": {n: asdict(interval([v])) for n, v in columns(results[UNTRAINED]).items()},
        }
    ]
    for size in SIZES:
        for name in names:
            runs = [columns(results[f"{name}-{size}-{seed}"]) for seed in seeds]
            losses = {test: asdict(interval([run[test] for run in runs])) for test in runs[0]}
            tokens = [results[f"{name}-{size}-{seed}"]["label_tokens"] for seed in seeds]
            rows.append({"learned": name, "size": size, "label_tokens": tokens, "losses": losses})
    return rows


def columns(result: dict[str, Any]) -> dict[str, float]:
    return {**result["losses"], "mean": fmean(result["losses"].values())}


def differences(results: dict[str, Any], names: list[str], seeds: Sequence[int]) -> list[dict[str, Any]]:
    """What another data set and another size change in the loss on every held-out set; paired by seed."""
    pairs = [((a, size), (b, size)) for size in SIZES for i, a in enumerate(names) for b in names[i + 1 :]]
    pairs += [((name, SIZES[-1]), (name, SIZES[0])) for name in names]
    found = []
    for (a, m), (b, n) in pairs:
        runs = [(columns(results[f"{a}-{m}-{seed}"]), columns(results[f"{b}-{n}-{seed}"])) for seed in seeds]
        change = {test: asdict(interval([one[test] - other[test] for one, other in runs])) for test in runs[0][0]}
        found.append({"of": f"{a}, {m}", "less": f"{b}, {n}", "losses": change})
    return found


def show(console: "Console", found: dict[str, Any], names: list[str]) -> None:
    from rich.table import Table

    def cells(row: dict[str, Any], sign: str = "") -> list[str]:
        return [
            f"{each['mean']:{sign}.3f}" + ("" if each["half"] is None else f" ± {each['half']:.3f}")
            for each in row["losses"].values()
        ]

    table = Table("learned", "examples", "label tokens", *names, "mean", title="loss on held-out answers")
    for row in found["matrix"]:
        tokens = f"{fmean(row['label_tokens']):.0f}" if "label_tokens" in row else ""
        table.add_row(row["learned"], str(row["size"]), tokens, *cells(row))
    console.print(table)
    table = Table("difference", *names, "mean", title="paired by seed")
    for row in found["differences"]:
        table.add_row(f"{row['of']} - {row['less']}", *cells(row, "+"))
    console.print(table)
    table = Table("learned", "ROUGE-L", "above untrained", "words", title="answers to held-out questions")
    for row in found["answers"]:
        shown = [
            f"{row[key]['value']:.2f} [{row[key]['low']:.2f}, {row[key]['high']:.2f}]" for key in ("rouge_l", "above")
        ]
        table.add_row(row["learned"], *shown, f"{row['words']:.1f}")
    console.print(table)
