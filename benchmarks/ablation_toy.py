"""`qlora bench ablation-toy`: where adapters sit, how large they are, which method they are of, at seconds a run.

A model of 260 thousand weights (stories260K) has written stories itself, and is fine-tuned on them in a cipher: some of
the most frequent tokens have changed places. What it has to learn is known and small, so this tells methods apart and
says nothing of language. Every setting gets its own learning rate, chosen on one seed and on other stories than it is
judged by. Then each is trained with several seeds, which draw the adapters' start and the stories that are learned;
all are judged by the same held-out stories, and compared with rank 8 on every layer seed by seed.
"""

import math
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

import models
from benchmarks.ablation import points, shown
from benchmarks.kept import Kept
from eval.scoring import token_losses
from models import AdapterConfig, LoraConfig, Model
from models.device import pick_device
from models.fingerprint import fingerprint
from models.llama import causal
from models.whole import train_every_weight, trained_parameters
from nf4 import QuantConfig
from train.data.batches import Batch
from train.optimizer import OptimizerConfig, make_optimizer, set_learning_rate
from train.passes import passes_of
from train.schedule import learning_rate
from train.seed import seed_everything
from train.step import update
from train.sweep.report import interval

if TYPE_CHECKING:
    from rich.console import Console

STORIES = Path(__file__).parent.parent / "tests" / "data" / "stories260K"
LENGTH, POOL, HELD_OUT, SWAPPED = 64, 320, 64, 12  # tokens of a story, stories of each kind, tokens that changed places
STEPS, ROWS = 40, 8
# The fewer numbers are trained, and the less each counts, the larger the rate that they want.
RATES: dict[str, tuple[float, ...]] = {
    "lora": (3e-3, 1e-2, 3e-2),
    "small": (3e-3, 1e-2, 3e-2, 1e-1),
    "few": (1e-2, 3e-2, 1e-1, 3e-1, 1.0),
    "all": (1e-3, 3e-3, 1e-2),
}
LORA = LoraConfig(rank=8, alpha=math.sqrt(8), rslora=True, dropout=0.0)  # the branch counts once at rank 8
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Setting:
    """One way to fine-tune."""

    group: str
    name: str
    adapter: AdapterConfig | None
    """None: every weight, of a base that is not quantized."""
    rates: tuple[float, ...] = RATES["lora"]
    lora_plus: float = 1.0


def settings() -> list[Setting]:
    """All that is compared; the first of them is what the others are held against."""
    # Ranks with about as many numbers as rank 8 on all layers: 1156 for each rank and block, of which 448 in attention.
    targets = {
        "attention, rank 21": (ATTENTION, 21),
        "feed-forward, rank 13": (FEED_FORWARD, 13),
        "attention and down, rank 14": ((*ATTENTION, "down_proj"), 14),
        "queries and keys, rank 41": (("q_proj", "k_proj"), 41),
    }
    found = [Setting("layers", "all layers, rank 8", LORA)]
    found += [Setting("layers", n, replace(LORA, target_modules=t, rank=r)) for n, (t, r) in targets.items()]
    sizes = {r: RATES["small" if r < 4 else "lora"] for r in (1, 2, 4, 16, 32, 64)}
    found += [Setting("ranks", f"rank {r}", replace(LORA, rank=r), rates) for r, rates in sizes.items()]
    found += [Setting("dropout", f"dropout {p}", replace(LORA, dropout=p)) for p in (0.05, 0.1)]
    found += [
        Setting("variants", "DoRA", replace(LORA, dora=True)),
        Setting("variants", "LoRA+, ratio 16", LORA, (3e-4, 1e-3, 3e-3), 16.0),
        Setting("variants", "PiSSA", replace(LORA, init="pissa")),
        Setting("variants", "LoftQ", replace(LORA, init="loftq")),
        Setting("variants", "rank 64, alpha / rank", replace(LORA, rank=64, rslora=False), RATES["small"]),
        Setting("methods", "IA3", models.Ia3Config(), RATES["few"]),
        Setting("methods", "BitFit", models.BitfitConfig(), RATES["few"]),
        Setting("methods", "prefix of 10", models.PrefixConfig(num_virtual_tokens=10), RATES["few"]),
        Setting("methods", "every weight, not quantized", None, RATES["all"]),
    ]
    return found


@dataclass(frozen=True)
class Stories:
    """Rows of tokens in the cipher: to learn from, to choose a rate by, to judge by."""

    pool: Int[Tensor, "stories tokens"]
    chosen_by: Int[Tensor, "stories tokens"]
    judged_by: Int[Tensor, "stories tokens"]


@cache
def stories(path: str) -> Stories:
    """The model's own stories, drawn at its own probabilities, with the most frequent tokens in each other's place."""
    model = models.load(path, dtype=torch.float32)
    count = POOL + 2 * HELD_OUT
    start = torch.full((count, 1), model.config.bos_token_id or 1)
    rows = models.generate(model, start, max_new_tokens=LENGTH - 1, temperature=1.0, seed=0, eos_token_id=-1)
    frequent = rows[:, 1:].flatten().bincount(minlength=model.config.vocab_size).argsort(descending=True)[:SWAPPED]
    cipher = torch.arange(model.config.vocab_size)
    cipher[frequent] = frequent.view(-1, 2).flip(1).flatten()  # each pair of neighbours in frequency
    return Stories(*cipher[rows].split((POOL, HELD_OUT, HELD_OUT)))


def trained(path: str, setting: Setting, rate: float, seed: int, device: torch.device) -> tuple[Model, int]:
    """A model fine-tuned in one way, and how many numbers of it were trained."""
    seed_everything(seed)
    quant = None if setting.adapter is None else QuantConfig()
    model = models.load(path, quant, torch.float32, device)
    if setting.adapter is None:
        train_every_weight(model)
    else:
        models.attach(model, setting.adapter)
    model.train()
    config = OptimizerConfig(
        learning_rate=rate, schedule="cosine", warmup_steps=2, max_grad_norm=1.0, lora_plus_ratio=setting.lora_plus
    )
    passes = passes_of(model)
    optimizer = make_optimizer(passes.moved, config)
    order = torch.randperm(POOL, generator=torch.Generator().manual_seed(seed))
    for step in range(1, STEPS + 1):
        rows = stories(path).pool[order[torch.arange((step - 1) * ROWS, step * ROWS) % POOL]]
        set_learning_rate(optimizer, learning_rate(step, STEPS, config))
        update(passes, optimizer, [Batch({"input_ids": rows, "labels": rows})], step, config.max_grad_norm)
    return model.eval(), sum(p.numel() for p in trained_parameters(model).values())


def loss(model: Model, rows: Int[Tensor, "stories tokens"]) -> float:
    return float(token_losses(causal(model, "ablation-toy"), rows.to(model.device)).double().mean())


def run(path: str, setting: Setting, rate: float, seed: int, device: torch.device) -> dict[str, Any]:
    """Held-out losses of one run."""
    model, count = trained(path, setting, rate, seed, device)
    rows = stories(path)
    return {"chosen": loss(model, rows.chosen_by), "judged": loss(model, rows.judged_by), "trained": count}


def measure(path: str, seeds: int, device: torch.device, work: str | None, limit: int | None = None) -> dict[str, Any]:
    """A row for each setting (the first `limit` of them): its rate, held-out loss, and difference to the first one."""
    told = {
        "model": Path(path).name,
        "stories": {"learned": POOL, "judged_by": HELD_OUT, "tokens": LENGTH, "swapped_tokens": SWAPPED},
        "steps": STEPS,
        "rows_in_step": ROWS,
    }
    kept = Kept(Path(work) / "ablation-toy" if work else None, {**told, "model": fingerprint(path)})

    def losses(setting: Setting, rate: float, seed: int) -> dict[str, Any]:
        name = f"{setting.group}, {setting.name}, {rate:g}, seed {seed}"
        return kept.made(name, partial(run, path, setting, rate, seed, device))

    rows, reference = [], []
    for setting in settings()[:limit]:
        tried = {rate: losses(setting, rate, 0)["chosen"] for rate in setting.rates}
        rate = min(tried, key=lambda rate: tried[rate])
        runs = [losses(setting, rate, seed) for seed in range(1, seeds + 1)]
        found = [run["judged"] for run in runs]
        reference = reference or found
        rows.append(
            {
                "group": setting.group,
                "setting": setting.name,
                "trained": runs[0]["trained"],
                "rate": rate,
                "loss": asdict(interval(found)),
                "over_reference": asdict(interval([a - b for a, b in zip(found, reference, strict=True)])),
            }
        )
    base = models.load(path, QuantConfig(), torch.float32, device)
    return {
        **told,
        "seeds": list(range(1, seeds + 1)),
        "untrained_loss": loss(base, stories(path).judged_by),
        "rows": rows,
    }


def bench(options: Any, console: "Console") -> dict[str, Any]:
    from rich.table import Table

    path, device = options.model or str(STORIES), pick_device(options.device)
    result = measure(path, options.seeds, device, options.work, options.limit)
    table = Table("", "trained", "rate", "held-out loss", "over rank 8 on all layers")
    for row in result["rows"]:
        table.add_row(row["setting"], f"{row['trained']:,}", f"{row['rate']:g}", *shown(row))
    console.print(f"held-out loss before training {result['untrained_loss']:.3f}; 95 % intervals over seeds")
    console.print(table)
    if options.plot:
        draw(result, options.plot)
    return result


def draw(result: dict[str, Any], target: Path) -> None:
    """Layers, ranks and methods: held-out loss with its interval over seeds, as in the paper's Figures 2 and 4."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    layers, ranks, methods = figure.subplots(1, 3, sharey=True)
    rows, first = result["rows"], result["rows"][0]
    points(layers, [row for row in rows if row["group"] == "layers"], first)
    layers.set(title="layers, with as many numbers")
    sizes = {int(row["setting"].split()[1]): row for row in rows if row["group"] == "ranks"} | {8: first}
    points(ranks, [sizes[rank] | {"setting": f"rank {rank}"} for rank in sorted(sizes)], first)
    ranks.set(title="ranks, on all layers")
    points(methods, [first, *(row for row in rows if row["group"] in ("dropout", "variants", "methods"))], first)
    methods.set(title="methods")
    layers.set_ylabel("held-out loss (nats per token)")
    figure.savefig(target, dpi=120)
