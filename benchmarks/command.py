"""`qlora bench NAME`: measurements side by side in one run, each held against its target.

A benchmark is a row of `BENCHMARKS`: a function that measures, prints its table, and returns its part of the
result, or the module that has it under the name `bench`. What every result carries besides (machine, versions,
commit, date) is added here. A benchmark that finds something wrong, not merely slow, lists it under "failures" and
the verb ends with exit code 1.
"""

import difflib
import importlib
import json
import pkgutil
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tyro.conf import Positional

import kernels
from benchmarks.provenance import provenance
from benchmarks.tables import show, show_verdicts
from models.device import pick_device
from models.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from benchmarks.roofline import Limits

Result = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class BenchOptions:
    """Measure this machine, against bitsandbytes where that is installed and against dense weights."""

    name: Positional[str]
    """What to measure. Speed and memory: kernels, training, load, generate, memory, planner, scale (several GPUs, on
    paper). Quality: datatypes, normality, codes, parity, ablation, ablation-toy, data-quality."""
    device: str = "auto"
    """Where to measure."""
    repeats: int = 7
    """Rounds in which each contestant has one turn; medians over them are told."""
    sizes: str | None = None
    """kernels: weights to measure, as outputs x inputs: 4096x4096,11008x4096."""
    aot: str | None = None
    """kernels: compile everything that is shipped for these chips instead, no GPU needed: sm_80,sm_90,sm_100."""
    tune: bool = False
    """kernels: search for a better table of launches instead, and print it."""
    profile: bool = False
    """training: say where the time of one step goes instead."""
    model: str | None = None
    """Of what measures a model's quality, and load: the checkpoint; generate: also a size by name (llama-7b)."""
    data: tuple[str, ...] = ()
    """Likewise: what it is measured on, as NAME=PATH."""
    limit: int | None = None
    """Likewise: only so many windows or questions of each, or rows of each layer."""
    seeds: int = 3
    """Of what trains: runs of each kind, over which means and 95 % intervals are taken."""
    steps: int | None = None
    """Likewise: optimizer steps of each run; by default as few as each task needs."""
    work: str | None = None
    """Of what takes long: where its results and runs are kept, so that what is done is not done again."""
    out: str | None = None
    """Write the result as JSON to this file too."""
    json: bool = False
    """Print one JSON object on stdout."""

    def __post_init__(self) -> None:
        if self.name not in BENCHMARKS:
            near = difflib.get_close_matches(self.name, BENCHMARKS, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"name must be one of {', '.join(BENCHMARKS)}, not {self.name!r}{hint}")
        if self.repeats < 1:
            raise ValueError(f"repeats is {self.repeats}; a median needs at least 1")
        for flag in ("limit", "seeds", "steps"):
            if (value := getattr(self, flag)) is not None and value < 1:
                raise ValueError(f"{flag} is {value}; it must be at least 1")
        for flag, owners in OWNERS.items():
            if getattr(self, flag) != type(self).__dataclass_fields__[flag].default and self.name not in owners:
                whose = f"benchmark{'s' if len(owners) > 1 else ''} {', '.join(owners)}"
                raise ValueError(f"{flag} belongs to the {whose}, not to {self.name}")
        if self.sizes is not None:
            parse_sizes(self.sizes)

    @property
    def plot(self) -> Path | None:
        """Where a picture of the result goes: beside it, if it is written to a file."""
        return Path(self.out).with_suffix(".png") if self.out else None


def command(options: BenchOptions, console: "Console") -> Result:
    device = str(pick_device(options.device))
    found = BENCHMARKS[options.name]
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    bench = importlib.import_module(found).bench if isinstance(found, str) else found
    result = {"benchmark": options.name, **provenance(device), **bench(options, console)}
    if options.out:
        Path(options.out).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    failures = result.get("failures", [])
    for failure in failures:
        console.print(f"wrong: {failure}", style="red", markup=False)
    if failures:
        if options.json:
            print(json.dumps(result))
        raise SystemExit(1)
    return result


def bench_kernels(options: BenchOptions, console: "Console") -> Result:
    """Correctness first, then every operator beside its rivals and below the machine's roof."""
    from benchmarks import correctness, roofline
    from benchmarks.kernels import failures, measure

    if options.aot:
        return gate(options.aot, console)
    if options.tune:
        return tuned(console)
    device = str(pick_device(options.device))
    sizes = parse_sizes(options.sizes) if options.sizes else None
    checked = correctness.check(device)
    limits = measured_limits(device, console)
    rows = measure(device, sizes, options.repeats, limits=limits)
    shapes = ["×".join(map(str, row["shape"])) for row in rows]
    console.print(f"weights: {', '.join(dict.fromkeys(shapes))} in bfloat16, NF4 with double quantization")
    several = len(set(shapes)) > 1
    names = [f"{shape} {row['case']}" if several else row["case"] for shape, row in zip(shapes, rows, strict=True)]
    show(console, names, rows, ["ours_ms", "bitsandbytes_ms", "bitsandbytes_repacked_ms", "dense_ms"])
    show(console, names, rows, ["vs_bitsandbytes", "vs_bitsandbytes_repacked", "vs_dense", "bandwidth_share"])
    roofline.show_shares(console, names, rows)
    show_verdicts(console, names, rows)
    if options.plot:
        roofline.draw(rows, limits, options.plot)
    return {
        "limits": asdict(limits),
        "rows": rows,
        "correctness": checked,
        "failures": correctness.failures(checked) + failures(rows),
    }


def measured_limits(device: str, console: "Console") -> "Limits":
    """What this machine can do at most, measured now and told."""
    from benchmarks.roofline import limits

    found = limits(device)
    products = ", ".join(f"{name} {speed / 1e12:.3g}" for name, speed in found.peak.items())
    console.print(f"this machine now: copies {found.bandwidth / 1e9:.3g} GB/s; products, TFLOP/s: {products}")
    return found


def bench_training(options: BenchOptions, console: "Console") -> Result:
    """The training step of SmolLM2-135M beside its peer and the same on dense weights."""
    from benchmarks import training

    setting = training.Setting(device=str(pick_device(options.device)))
    if options.profile:
        text = training.profile(setting)
        console.print(text, markup=False, soft_wrap=True)
        return {"profile": text}
    limits = measured_limits(setting.device, console)
    rows = training.measure(setting, repeats=options.repeats, limits=limits)
    names = [f"dropout {row['dropout']}" for row in rows]
    show(console, names, rows, ["ours_tokens_s", "peer_tokens_s", "dense_tokens_s", "speed_ratio"])
    show(console, names, rows, ["ours_of_roof", "peer_of_roof", "dense_of_roof"])
    for peak in ("peak", "peak_above_start"):
        columns = [f"{name}_{peak}_MiB" for name in training.BUILDERS]
        show(console, names, in_mib(rows), [*columns, f"{peak}_ratio"])
    show_verdicts(console, names, rows)
    return {"limits": asdict(limits), "rows": rows, "setting": training.described(setting)}


def bench_load(options: BenchOptions, console: "Console") -> Result:
    """From files to a model in 4 bits: time beside bitsandbytes, and memory."""
    from benchmarks import load, roofline

    device = str(pick_device(options.device))
    if options.model is not None and not Path(options.model).exists():
        raise ConfigError(f"model: {options.model}: no such file or directory; give a checkpoint, or none for random")
    limits = measured_limits(device, console)
    found = load.measure(device, Path(options.model) if options.model else None, options.repeats, limits)
    rows, names = found["rows"], [row["case"] for row in found["rows"]]
    who = ("ours", "bitsandbytes", "16_bits", "reading")
    show(console, names, rows, [f"{name}_seconds" for name in who])
    show(console, names, rows, [f"{name}_weights_s" for name in who])
    roofline.show_shares(console, names, rows)
    show(console, ["memory"], [found["memory"]], list(found["memory"]))
    name = Path(options.model).name if options.model else "random LLaMA"
    return {"limits": asdict(limits), "model": name, **found}


def bench_generate(options: BenchOptions, console: "Console") -> Result:
    """Tokens a second of reading prompts and of greedy decoding, beside dense weights and bitsandbytes."""
    from benchmarks import generation, roofline

    setting = generation.Setting(device=str(pick_device(options.device)))
    if options.model is not None:
        setting = replace(setting, config=generation.sizes_of(options.model))
    limits = measured_limits(setting.device, console)
    rows = generation.measure(setting, options.repeats, limits)
    names = [row["case"] for row in rows]
    show(console, names, rows, [f"{name}_tokens_s" for name in ("ours", "bitsandbytes", "dense")])
    show(console, names, rows, ["vs_bitsandbytes", "vs_dense"])
    roofline.show_shares(console, names, rows)
    if options.plot:
        roofline.draw(rows, limits, options.plot)
    return {"limits": asdict(limits), "rows": rows, "setting": generation.described(setting)}


def bench_memory(options: BenchOptions, console: "Console") -> Result:
    """The paper's Figure 6; then where memory is under each optimizer, and how long each one's update takes."""
    from benchmarks import figure6, memory, training, updates

    device = str(pick_device(options.device))
    setting = training.Setting(device=device)
    planned = figure6.measure(device)
    figure6.show_figure(planned, console)
    if options.plot:
        figure6.draw(planned["rows"], options.plot)
    rows = memory.measure(setting)
    console.print("SmolLM2-135M's sizes with LoRA of rank 16: MiB of the tensors of each part under each optimizer")
    optimizers = {row["optimizer"]: row for row in rows}
    parts = [{name: row[part] / 2**20 for name, row in optimizers.items()} for part in memory.PARTS]
    show(console, list(memory.PARTS.values()), parts, list(optimizers))
    if device == "cpu":
        console.print("Managed memory needs a CUDA device; without one, paged states are in ordinary memory")
    times = updates.measure(device, options.repeats)
    show(console, [row["case"] for row in times], times, [name for name in times[0] if name.endswith("_ms")])
    return {"rows": rows, "updates": times, "setting": training.described(setting), "figure6": planned}


def bench_planner(options: BenchOptions, console: "Console") -> Result:
    """What the memory planner says beside what steps really take."""
    from benchmarks import planner

    rows = planner.measure(str(pick_device(options.device)))
    in_mib = [{f"{name}_MiB": row[f"{name}_bytes"] / 2**20 for name in ("predicted", "measured")} | row for row in rows]
    show(console, [row["case"] for row in rows], in_mib, ["predicted_MiB", "measured_MiB", "ratio"])
    return {"rows": rows, "failures": planner.failures(rows)}


def bench_scale(options: BenchOptions, console: "Console") -> Result:
    """LLaMA on 1 to 8 GPUs, by plan: memory of each, what is sent, and how long that takes at least."""
    from rich.table import Table

    from benchmarks import scale

    rows, small = scale.measure(), scale.two_small_gpus()
    console.print("planned, not measured: GiB of each GPU, and what each sends in a step of 16 micro-batches, at least")
    names = [f"{row['model']}, {row['gpus']} x {row['way']}" for row in rows]
    show(console, names, [in_gib(row) for row in rows], ["tensors", "not_pageable", "on_CPU", "smallest_GPU", "sent"])
    console.print(
        f"seconds of a micro-batch, from datasheets: products at {scale.ATTAINED:.0%}, and sending at full speed"
    )
    table = Table("", *scale.MACHINES)
    for name, row in zip(names, rows, strict=True):
        if row["sent_in_round_bytes"]:
            table.add_row(name, *(f"{t['products']:.3g}, {t['sending']:.3g}" for t in row["times"].values()))
    console.print(table)
    for told in small:
        verdict = "fits" if told["fits"] else "does not fit"
        takes = told["takes_bytes"] / 2**30
        console.print(f"llama-65b on 2 GPUs of 24 GB with {told['with']}: {takes:.1f} GiB, {verdict}", markup=False)
    if options.plot:
        scale.draw(rows, options.plot)
    return {"device": "none: planned", "machine": None, "attained": scale.ATTAINED, "rows": rows, "two_of_24GB": small}


def in_gib(row: Result) -> Result:
    """A row of `scale` as a person reads it."""
    shown = {"tensors": "tensors_bytes", "not_pageable": "not_pageable_bytes", "on_CPU": "host_bytes"}
    values = {name: row[key] / 2**30 for name, key in shown.items()}
    return values | {"smallest_GPU": row["smallest_gpu_GB"], "sent": row["sent_in_step_bytes"] / 2**30}


BENCHMARKS: dict[str, Callable[[BenchOptions, "Console"], Result] | str] = {
    "kernels": bench_kernels,
    "training": bench_training,
    "load": bench_load,
    "generate": bench_generate,
    "memory": bench_memory,
    "planner": bench_planner,
    "scale": bench_scale,
    "datatypes": "benchmarks.datatypes",
    "normality": "benchmarks.normality",
    "codes": "benchmarks.codes",
    "parity": "benchmarks.parity.command",
    "ablation": "benchmarks.ablation",
    "ablation-toy": "benchmarks.ablation_toy",
    "data-quality": "benchmarks.data_quality",
}
OWNERS = {  # of the flags that are not for all
    "sizes": ("kernels",),
    "aot": ("kernels",),
    "tune": ("kernels",),
    "profile": ("training",),
    "model": (
        "load",
        "generate",
        "datatypes",
        "normality",
        "codes",
        "parity",
        "ablation",
        "ablation-toy",
        "data-quality",
    ),
    "data": ("datatypes", "codes", "parity", "ablation", "data-quality"),
    "limit": ("datatypes", "normality", "codes", "parity", "ablation-toy", "data-quality"),
    "seeds": ("codes", "parity", "ablation-toy", "data-quality"),
    "steps": ("parity",),
    "work": ("datatypes", "codes", "parity", "ablation", "ablation-toy", "data-quality"),
}


def gate(chips: str, console: "Console") -> Result:
    """Every shipped kernel compiled for chips that need not be here."""
    from benchmarks import aot

    reports = aot.gate(chips.split(","))
    console.print(aot.table(reports))
    return {
        "rows": [asdict(report) for report in reports],
        "failures": [failure for report in reports for failure in report.failures()],
    }


def tuned(console: "Console") -> Result:
    """Every launch worth trying of every kernel that has a choice, timed on the GPU at hand."""
    if not torch.cuda.is_available():
        raise ConfigError("tune: kernels are timed where they run, and torch sees no CUDA GPU here")
    from benchmarks import tune

    modules = [importlib.import_module(f"kernels.{found.name}") for found in pkgutil.iter_modules(kernels.__path__)]
    timings = [timing for module in modules if hasattr(module, "candidates") for timing in tune.tune(module)]
    console.print(tune.table(timings))
    return {"rows": [row | {"launch": str(row["launch"])} for row in map(asdict, timings)]}


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """ "4096x4096,11008x4096" as (outputs, inputs) each."""
    sizes = []
    for part in text.split(","):
        found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", part)
        if not found:
            raise ValueError(f"sizes are outputs x inputs such as 4096x4096,11008x4096, not {part!r}")
        sizes.append((int(found[1]), int(found[2])))
    return sizes


def in_mib(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with their peaks in MiB, as a person reads them."""
    peaks = [f"{name}_{peak}" for name in ("ours", "peer", "dense") for peak in ("peak", "peak_above_start")]
    return [row | {f"{name}_MiB": row[name] / 2**20 for name in peaks if name in row} for row in rows]
