"""From a config to a run that is ready, and from there to its result: the same for every model and method.

The order matters: data first, because its mistakes are the commonest and cheapest to find; seeds before the model and
its adapters, of which parts start from random numbers; the result read back after it is written, before the run calls
itself done. Several processes do all of it alike, and one of them writes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from eval.held_out import held_out_loss
from eval.labels import agreement, predict
from eval.mmlu.tracking import Examination
from models import ConfigError, Model, Refusal, save_adapter, save_tokenizer
from models.checkpoint import Description, describe, unprepared
from models.device import pick_device, pick_dtype
from models.fingerprint import fingerprint
from models.labelled import HEADS, labelling, load_labelled
from models.methods import prepare as prepare_adapters
from models.parallel import shares, world
from models.parallel.agreement import agreed
from models.parallel.loading import loading
from models.tokenizer import Tokenizer, load_tokenizer
from models.trained import save_model
from models.whole import train_every_weight
from train.data import Dataset, load_data, padding_id, preview
from train.data.batches import Batches
from train.data.glue import measures
from train.loop import TrainResult, Watcher, train
from train.mmlu import MmluWatcher, examination
from train.planner.advice import advised
from train.planner.choose import choose
from train.recipe import RunConfig
from train.run import Follower, Run
from train.samples import sampler
from train.seed import seed_everything
from train.snapshot import room
from train.task import plan
from train.tensorboard import check_installed, tensorboard


@dataclass
class Finetuning:
    """A run made ready: a model with what is to be trained in it, data in tokens, a directory to write into."""

    config: RunConfig
    """Its task is decided."""
    model: Model
    tokenizer: Tokenizer
    data: Dataset
    run: Run
    examination: Examination | None = None
    """MMLU's questions, if they are to be asked while it learns."""

    @property
    def result(self) -> Path:
        """Where the run leaves what it has trained."""
        return self.run.directory / ("adapter" if self.config.adapters else "model")

    def held_out(self, step: int) -> dict[str, float]:
        """Loss on the examples held out, and of labels how far they agree; the loop writes it down."""
        batches = Batches(
            self.data.held_out,
            self.config.batch_size,
            padding_id(self.tokenizer),
            group_by_length=True,
            batch_tokens=self.config.batch_tokens,
        )
        inputs = (batch.inputs for batch in batches.epoch(0))
        if self.config.task not in HEADS:
            result = held_out_loss(self.model, inputs)
            return {"loss": result.loss, "labels": result.tokens}
        found = predict(labelling(self.model), inputs)
        scored_by = measures(self.data.manifest["format"], self.config.task)
        return {"loss": found.loss, **agreement(found, scored_by), "labels": len(found.labels)}

    def train(self, **how: Any) -> TrainResult:
        """Run the loop, which takes what else is given, then write the result and check what was written."""
        config, data = self.config, self.config.data
        batches = Batches(
            self.data.train,
            config.batch_size,
            padding_id(self.tokenizer),
            data.seed,
            data.group_by_length,
            batch_tokens=config.batch_tokens,
            row_tokens=data.max_len if data.pack else None,
        )
        begin = how.get("begin")
        start = begin.state.step if begin else 0
        board = tensorboard(self.run, start, on=config.tensorboard and world.is_main())
        told, advice = world.last_words(self.run.tell_of), advised(config, self.data.manifest["longest"])
        with self.run, told, world.doing("the training"), room(self.run), advice, board:
            result = train(
                self.model,
                batches,
                config,
                self.run,
                eval_fn=self.held_out if self.data.held_out else None,
                watchers=self.watchers(),
                seed=config.seed,
                quiet=config.quiet,
                **how,
            )
            self.model.eval()
            self.save()
            if result.status == "done":
                self.run.status("done")
        return result

    def watchers(self) -> list[Watcher]:
        """What looks at the model while it learns."""
        samples = sampler(self.config, self.model, self.tokenizer, self.data.held_out, self.run)
        asked = self.examination
        mmlu = None if asked is None else MmluWatcher(self.model, asked, self.config.mmlu, self.run)
        return [watcher for watcher in (samples, mmlu) if watcher is not None]

    def save(self) -> None:
        """Write the adapter, or the whole model with its tokenizer."""
        with shares.whole(self.model), agreed():
            if not world.is_main():
                return
            if self.config.adapters:
                save_adapter(self.model, self.result)
            else:
                save_model(self.model, self.result)
                save_tokenizer(self.tokenizer, self.result)


def prepare(config: RunConfig, run: Run | None = None) -> Finetuning:
    """Read data and model, make trainable what is to be trained, and open the run's directory.

    A run that is there already is gone on with: nothing in it is written anew.
    """
    if config.nproc > 1 and world.size() == 1:
        raise ConfigError(
            f"nproc is {config.nproc}, but this is one process, and stays it; `qlora train --nproc {config.nproc}` or "
            "torchrun starts several"
        )
    if config.tensorboard:
        check_installed()
    device = pick_device(config.device)
    tokenizer = load_tokenizer(config.model)
    base = describe(config.model)
    planned = plan(config, base)
    config = with_ids(planned.config, tokenizer)
    data = load_data(config.data, tokenizer, planned.task)
    if planned.task in HEADS:
        data.manifest["labels"] = list(planned.labels)
    check_length(data, base, config)
    config = replace(config, distributed=choose(config, data.manifest["longest"], device))  # and a resumed run keeps it
    asked = examination(config.mmlu, tokenizer, base)
    opened = run or create(config, data, tokenizer, device)
    told, advice = world.last_words(opened.tell_of), advised(config, data.manifest["longest"])
    with opened, told, world.doing("the loading of the model"), advice:
        seed_everything(config.seed)
        model = trainable_model(config, planned.labels, device)
        model.gradient_checkpointing = config.gradient_checkpointing
    return Finetuning(config, model, tokenizer, data, opened, asked)


def way(config: RunConfig) -> str | None:
    """How several processes share the work, as the config says once it is decided; None for one."""
    return config.distributed if world.size() > 1 else None


def with_ids(config: RunConfig, tokenizer: Tokenizer) -> RunConfig:
    """The text that a prefix starts from, in the tokenizer's ids as well."""
    if config.method != "prefix" or not config.prefix.init_text:
        return config
    ids = tuple(tokenizer.encode(config.prefix.init_text))
    return replace(config, prefix=replace(config.prefix, init_ids=ids))


def check_length(data: Dataset, base: Description, config: RunConfig) -> None:
    """Refuse examples that the model has no positions for, or that fit into no batch."""
    longest, most = data.manifest["longest"], base.config.max_tokens
    before = config.prefix.num_virtual_tokens if config.method == "prefix" else 0
    if most is not None and before + longest > most:
        behind = f" behind a prefix of {before}" if before else ""
        raise ConfigError(
            f"data: the longest example has {longest} tokens{behind}, but the model knows {most} positions; "
            "set data.max_len"
        )
    for part in (data.train, data.held_out):
        Batches(part, 1, 0, batch_tokens=config.batch_tokens)


def create(config: RunConfig, data: Dataset, tokenizer: Tokenizer, device: torch.device) -> Run:
    """A new directory, with what is trained on in it."""
    directory = world.from_main(config.directory())  # its name may have the time in it
    with agreed():
        if not world.is_main():
            return Follower(directory)
        hashes, base = {data.manifest["file"]: data.manifest["sha256"]}, fingerprint(config.model)
        given: dict[str, Any] = {"device": device, "data": hashes, "base": base, "distributed": way(config)}
        run = Run.create(directory, config, overwrite=config.overwrite, **given)
        with run, room(run):
            run.write_data(data.manifest, preview(data.train, tokenizer))
        return run


def trainable_model(config: RunConfig, labels: tuple[str, ...], device: torch.device) -> Model:
    """The model with adapters, or with every weight to be trained; a new head and adapters draw random numbers.

    With fsdp and other processes it is this one's share of it.
    """
    quant, dtype = config.quant if config.quantize else None, pick_dtype(config.dtype, device)
    how, prepare = loading(config.distributed, config.fsdp), partial(prepare_training, config)
    if config.task in HEADS:
        return load_labelled(config.model, config.task, labels, quant, dtype, device, prepare, how)
    return how(config.model, quant, dtype, device, prepare=prepare)


def prepare_training(config: RunConfig, model: Model) -> Callable[[], None]:
    """Make trainable what is to be trained; what gives it its first values comes back."""
    with impossible():
        if config.adapters:
            start = prepare_adapters(model, config.adapter)
        else:
            train_every_weight(model)
            start = unprepared(model)
    return impossible()(start)


@contextmanager
def impossible() -> Iterator[None]:
    """Around what trains as the settings ask for: if it cannot be, they are to blame."""
    try:
        yield
    except Refusal:
        raise
    except ValueError as error:
        raise ConfigError(str(error)) from error
