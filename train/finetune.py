"""`qlora train`: from a checkpoint and a data file to an adapter, in one directory that tells the whole story.

The order matters: data first, because its mistakes are the commonest and cheapest to find; seeds before the
adapters, which are random; the adapter read back after it is written, before the run calls itself done.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.held_out import held_out_loss
from models import ConfigError, Llama, Refusal, attach_lora, load, save_adapter
from models.device import pick_device, pick_dtype
from models.llama import causal
from models.precision import parts_in_memory, statement
from models.tokenizer import Tokenizer, load_tokenizer
from train.data import Dataset, load_data, padding_id, preview
from train.data.batches import Batches
from train.loop import TrainResult, train
from train.planner.advice import advised
from train.recipe import RunConfig
from train.run import Run
from train.seed import seed_everything

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class TrainOptions(RunConfig):
    """Fine-tune LoRA adapters on a frozen, quantized base."""

    json: bool = field(default=False, metadata={"saved": False})
    """Print one JSON object on stdout."""


@dataclass
class Finetuning:
    """A run made ready: adapters on the model, data in tokens, a directory to write into."""

    config: RunConfig
    model: Llama
    tokenizer: Tokenizer
    data: Dataset
    run: Run

    def held_out(self, step: int) -> dict[str, float]:
        """Loss on the examples held out; the loop writes it down before, during and after training."""
        batches = Batches(self.data.held_out, self.config.batch_size, padding_id(self.tokenizer), group_by_length=True)
        result = held_out_loss(self.model, (batch.inputs for batch in batches.epoch(0)))
        return {"loss": result.loss, "labels": result.tokens}

    def train(self) -> TrainResult:
        """Run the loop, then write the adapter and check what was written."""
        config, data = self.config, self.config.data
        batches = Batches(
            self.data.train, config.batch_size, padding_id(self.tokenizer), data.seed, data.group_by_length
        )
        with self.run:
            result = train(
                self.model,
                batches,
                config,
                self.run,
                eval_fn=self.held_out if self.data.held_out else None,
                quiet=config.quiet,
            )
            self.model.eval()
            save_adapter(self.model, self.run.directory / "adapter")
            if result.status == "done":
                self.run.status("done")
        return result


def prepare(config: RunConfig) -> Finetuning:
    """Read data and model, attach the adapters, and open the run's directory."""
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.model)
    data = load_data(config.data, tokenizer)
    hashes = {data.manifest["file"]: data.manifest["sha256"]}
    run = Run.create(config.directory(), config, overwrite=config.overwrite, device=device, data=hashes)
    with run:
        run.write_data(data.manifest, preview(data.train, tokenizer))
        quant = config.quant if config.quantize else None
        model = causal(load(config.model, quant, pick_dtype(config.dtype, device), device), "training on responses")
        longest = max(len(e.input_ids) for e in [*data.train, *data.held_out])
        if longest > model.max_tokens:
            raise ConfigError(
                f"data: the longest example has {longest} tokens, but the model knows {model.max_tokens} "
                "positions; set data.max_len"
            )
        seed_everything(config.seed)
        try:
            attach_lora(model, config.lora)
        except Refusal:
            raise
        except ValueError as error:
            raise ConfigError(str(error)) from error
        model.gradient_checkpointing = config.gradient_checkpointing
    return Finetuning(config, model, tokenizer, data, run)


def command(options: TrainOptions, console: "Console") -> dict[str, Any]:
    finetuning = prepare(options)
    manifest = finetuning.data.manifest
    console.print(
        f"{manifest['file']}: {manifest['format']} records, {manifest['train']} to train on, "
        f"{manifest['held_out']} held out, {manifest['dropped']} dropped; "
        f"{manifest['label_share']:.0%} of {manifest['tokens']:,} tokens are learned"
    )
    console.print(statement(parts_in_memory(finetuning.model)))
    with advised(options, manifest["longest"]):
        result = finetuning.train()
    directory = str(finetuning.run.directory)
    for evaluation in (result.evaluations[0], result.evaluations[-1]) if result.evaluations else ():
        console.print(f"held-out loss {evaluation['loss']:.4f} after step {evaluation['step']:.0f}")
    console.print(f"{result.status}: adapter in {Path(directory) / 'adapter'}")
    if result.signal is not None:
        raise SystemExit(128 + result.signal)
    return {
        "run": directory,
        "status": result.status,
        "steps": result.state.step,
        "loss": result.loss,
        "evaluations": list(result.evaluations),
        "seconds": round(result.seconds, 2),
        "peak_memory": result.peak_memory,
        "optimizer": {"state_bytes": result.state_bytes, "managed_bytes": result.managed_bytes},
        "data": manifest,
    }
