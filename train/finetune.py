"""`qlora train`: from a checkpoint and a data file to an adapter or a model, in one directory that tells the story."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from models.labelled import HEADS
from models.parallel import world
from models.parallel.launch import Processes
from models.precision import parts_in_memory, statement
from models.whole import trained_parameters
from train.loop import TrainResult, without_split
from train.mmlu import remark, shown
from train.preparation import Finetuning, prepare, way
from train.recipe import RunConfig
from train.run import read_metrics

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunConfig):
    """Fine-tune LoRA adapters on a frozen, quantized base, or without either."""

    json: bool = field(default=False, metadata={"saved": False})
    """Print one JSON object on stdout."""

    @property
    def processes(self) -> Processes:
        return Processes(self.nproc, self.device, self.timeout)


def command(options: TrainOptions, console: "Console") -> dict[str, Any]:
    finetuning = prepare(options)
    introduce(finetuning, options, console)
    return outcome(finetuning, finetuning.train(), console)


def introduce(finetuning: Finetuning, given: RunConfig, console: "Console") -> None:
    """Say what is trained, and on what."""
    for line in opening(finetuning, given):
        console.print(line)


def outcome(finetuning: Finetuning, result: TrainResult, console: "Console") -> dict[str, Any]:
    """Say what came of a run, and give it as JSON would; one that was interrupted ends the process."""
    for evaluation in (result.evaluations[0], result.evaluations[-1]) if result.evaluations else ():
        console.print(f"{measured(evaluation)} after step {evaluation['step']:.0f}")
    lines = read_metrics(finetuning.run.directory) if world.is_main() else []
    tracked = [line for line in lines if line["split"] == "mmlu"]
    for line in (tracked[0], tracked[-1]) if tracked else ():
        console.print(f"{shown(line)} after step {line['step']}")
    console.print(f"{result.status}: {finetuning.result.name} in {finetuning.result}")
    if result.signal is not None:
        raise SystemExit(128 + result.signal)
    return {
        "run": str(finetuning.run.directory),
        "status": result.status,
        "steps": result.state.step,
        "loss": result.loss,
        "evaluations": list(result.evaluations),
        **({"mmlu": [without_split(line) for line in tracked]} if tracked else {}),
        "seconds": round(result.seconds, 2),
        "peak_memory": result.peak_memory,
        "optimizer": {"state_bytes": result.state_bytes, "managed_bytes": result.managed_bytes},
        "data": finetuning.data.manifest,
    }


def opening(finetuning: Finetuning, given: RunConfig) -> list[str]:
    """What is trained, and on what: a line each for data, labels, method and the parts of the model."""
    config, manifest = finetuning.config, finetuning.data.manifest
    lines = [
        f"{manifest['file']}: {manifest['format']} records, {manifest['train']} to train on, "
        f"{manifest['held_out']} held out, {manifest['dropped']} dropped; {learned(manifest)}"
    ]
    lines += [f"passed over: {count} {reason}" for reason, count in manifest["passed_over"].items()]
    if config.task in HEADS:
        lines.append(head(finetuning, given))
    lines += finetuning.data.warnings
    if not config.adapters:
        lines.append("every weight is trained, in float32")
    elif config.method != "lora":
        trained = sum(p.numel() for p in trained_parameters(finetuning.model).values())
        lines.append(f"{config.method}: {trained:,} numbers are trained")
    if finetuning.examination is not None:
        lines += remark(finetuning.examination, config.mmlu)
    together = processes(config)
    return [*lines, *([together] if together else []), statement(parts_in_memory(finetuning.model))]


def processes(config: RunConfig) -> str | None:
    """How many processes train, what each of them has, and what they do in a step; nothing where there is one."""
    if world.size() == 1:
        return None
    has = "each with the whole model (ddp)" if way(config) == "ddp" else "each with a share of the model (fsdp)"
    batch = f"{config.batch_size} {'row' if config.batch_size == 1 else 'rows'}"
    if config.batch_tokens is not None:
        batch = f"at most {config.batch_tokens} tokens"
    return f"{world.size()} processes, {has}; a step is {config.accumulation} x {batch}, dealt among them"


def learned(manifest: dict[str, Any]) -> str:
    """How much of the data is learned, in a few words."""
    if manifest["task"] == "classification":
        names = manifest["labels"]
        shown = ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
        return f"{manifest['tokens']:,} tokens; {len(names)} classes: {shown}"
    if manifest["task"] == "regression":
        return f"{manifest['tokens']:,} tokens; a number is learned"
    if manifest["task"] == "seq2seq":
        return f"{manifest['label_tokens']:,} tokens are written to sources"
    return f"{manifest['label_share']:.0%} of {manifest['tokens']:,} tokens are learned"


def head(finetuning: Finetuning, given: RunConfig) -> str:
    """Where the classifier starts, and that it is trained whole."""
    start = "a new classifier" if finetuning.model.fresh_head else "the checkpoint's classifier"
    if not finetuning.config.adapters:
        return f"{start} is trained"
    added = f" (added to {given.method}.modules_to_save)" if finetuning.config.adapter != given.adapter else ""
    return f"{start} is trained whole beside the adapters{added}"


def measured(evaluation: dict[str, int | float]) -> str:
    """Held-out loss, and how far labels agree where there are some."""
    agreement = {
        "accuracy": "accuracy {:.1%}",
        "f1": "F1 {:.1%}",
        "matthews": "Matthews {:.3f}",
        "pearson": "Pearson r {:.3f}",
        "spearman": "Spearman r {:.3f}",
    }
    shown = [form.format(evaluation[name]) for name, form in agreement.items() if name in evaluation]
    return ", ".join([f"held-out loss {evaluation['loss']:.4f}", *shown])
