"""Loading by rows: bit for bit the rows that `models.load` gives, and no more of the file than they are."""

import shutil
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import models
import nf4
from models.adapter import prepare_adapter
from models.checkpoint import load, open_checkpoint, unprepared
from models.labelled import load_labelled
from models.llama import Llama
from models.lora import prepare_lora
from models.methods import prepare
from models.parallel import shares, world
from models.parallel.loading import load_shared, loading
from models.parallel.shard import ShardConfig
from models.precision import parts_in_memory
from models.readers import SafetensorsReader
from models.target import LoadOptions, Target, load_parts
from models.trained import restore_trained, save_model, save_trained
from models.whole import plain_name, train_every_weight, trained_parameters
from tests.golden import GOLDEN, layout
from tests.processes import together
from tests.test_models_checkpoint import gguf_tensors, write_gguf
from train.data import DataConfig
from train.preparation import trainable_model
from train.recipe import RunConfig

PLAIN = nf4.QuantConfig(double_quant=False)
OTHER = nf4.QuantConfig(codebook="nf3", block_size=32, nested_block_size=16)


@dataclass(frozen=True)
class Source:
    """A checkpoint, and what becomes of it."""

    name: str
    quant: nf4.QuantConfig | None = None
    dtype: torch.dtype = torch.float32
    prepare: Any = unprepared
    labels: tuple[str, ...] = ()
    """Load it as a model with these classes."""

    def load(self, directory: Path, how: Any) -> models.Model:
        """What `load`, or something like it, makes of it."""
        path = directory / self.name if (directory / self.name).exists() else GOLDEN / self.name
        if self.labels:
            given = (self.quant, self.dtype, "cpu", self.prepare, how)
            return load_labelled(path, "classification", self.labels, *given)
        return how(path, self.quant, self.dtype, prepare=self.prepare)


def trained_whole(model):
    train_every_weight(model)
    return lambda: None


def lora(**options):
    return partial(prepare_lora, config=replace(models.LoraConfig(rank=5), **options))


NF4 = nf4.QuantConfig()
HEAD = lora(modules_to_save=("classifier",))
SOURCES = {
    "llama-gqa": Source("llama-gqa", NF4, torch.bfloat16, lora()),
    "llama-gqa, dense": Source("llama-gqa", None, torch.bfloat16, trained_whole),
    "llama-gqa, adapters that start from its weights": Source("llama-gqa", NF4, prepare=lora(init="pissa", dora=True)),
    "llama-gqa, dense, with such adapters": Source("llama-gqa", None, torch.bfloat16, lora(init="loftq")),
    "llama-headdim-bias": Source("llama-headdim-bias", PLAIN, prepare=lora(dora=True, modules_to_save=("lm_head",))),
    "llama3-rope-tied": Source("llama3-rope-tied", OTHER, torch.bfloat16, lora(modules_to_save=("embed_tokens",))),
    "llama-gqa, vectors": Source("llama-gqa", NF4, torch.bfloat16, partial(prepare, config=models.Ia3Config())),
    "llama-gqa, biases": Source("llama-gqa", NF4, torch.bfloat16, partial(prepare, config=models.BitfitConfig())),
    "llama-bnb-4bit": Source("llama-bnb-4bit", None, torch.float32, lora(rank=1)),
    "llama-sharded": Source("llama-sharded", NF4),
    "llama-bin": Source("llama-bin"),
    "llama-raw-2": Source("llama-raw-2"),
    "llama-raw-vocab-parallel": Source("llama-raw-vocab-parallel", NF4),
    "m.gguf": Source("m.gguf", NF4, torch.bfloat16),
    "m.gguf, dense": Source("m.gguf"),
    "roberta-mlm": Source("roberta-mlm", NF4),
    "roberta-fairseq": Source("roberta-fairseq/model.pt"),
    "t5-v1_0": Source("t5-v1_0", NF4, prepare=lora(modules_to_save=("relative_attention_bias",))),
    "t5-v1_1": Source("t5-v1_1", None, prepare=trained_whole),
    "an adapter": Source("llama-gqa", NF4, prepare=partial(prepare_adapter, path=GOLDEN / "lora")),
    "an adapter with DoRA": Source("llama-gqa", None, prepare=partial(prepare_adapter, path=GOLDEN / "lora-dora")),
    "classes in another order": Source(
        "roberta-classify",
        NF4,
        torch.bfloat16,
        lora(modules_to_save=("classifier",)),
        ("LABEL_2", "LABEL_0", "LABEL_1"),
    ),
    "a new head": Source(
        "roberta-mlm", NF4, prepare=lora(modules_to_save=("classifier",)), labels=("a", "b", "c", "d")
    ),
    "4 bits": Source("4bits", None, torch.bfloat16, lora(dora=True)),
    "4 bits, scales as they are": Source("4bits-plain"),
}


THREE = ("llama-gqa, adapters that start from its weights", "llama-bnb-4bit", "m.gguf", "4 bits", "a new head")
TRAINED = {
    "adapters": Source("llama3-rope-tied", NF4, torch.bfloat16, lora(dora=True, modules_to_save=("embed_tokens",))),
    "biases": Source("roberta-mlm", NF4, torch.bfloat16, partial(prepare, config=models.BitfitConfig())),
    "vectors": Source("t5-v1_0", NF4, torch.bfloat16, partial(prepare, config=models.Ia3Config())),
    "all": Source("t5-v1_0", None, torch.bfloat16, trained_whole),
}
SIZED = {"sized": None, "sized, to be quantized": NF4, "sized, 4 bits": None}


def tensors(model: models.Model) -> dict[str, torch.Tensor]:
    """Everything that a model keeps here."""
    kept = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {plain_name(name): tensor.detach() for name, tensor in kept.items()}


def differences(source: Source, directory: Path) -> list[str]:
    """What is not a share of what one process would load, of parameters and everything around them."""
    torch.manual_seed(3)
    alone = source.load(directory, load)
    drawn = torch.rand(())
    torch.manual_seed(3)
    model = source.load(directory, load_shared)
    found, expected = tensors(model), tensors(alone)
    wrong = [] if torch.equal(torch.rand(()), drawn) else ["another number is drawn after it"]
    wrong += [] if model.config == alone.config else ["the config differs"]
    wrong += [f"{name} is too much or too little" for name in found.keys() ^ expected.keys()]
    for name, whole in expected.items():
        mine = shares.local(found[name])
        kept = shares.rows(len(whole)) if shares.is_shared(found[name]) else None
        theirs = whole if kept is None else whole[kept.start : kept.stop]
        if mine.dtype != theirs.dtype or not torch.equal(mine, theirs):
            wrong.append(f"{name} differs")
        if kept is None and "absmax" not in name:
            wrong.append(f"{name} is not shared")
        if found[name].requires_grad != whole.requires_grad:
            wrong.append(f"{name} is trained by one of them")
    originals = [getattr(each.attachment, "originals", {}) for each in (model, alone)]
    for name, whole in originals[1].items():
        kept = shares.rows(len(whole))
        if not torch.equal(originals[0][name], whole[kept.start : kept.stop]):
            wrong.append(f"the original of {name} differs")
    if [asdict(part) for part in parts_in_memory(model)] != [asdict(part) for part in parts_in_memory(alone)]:
        wrong.append("the account of its parts differs")
    return wrong


def counted(path: Path, quant: nf4.QuantConfig | None) -> int:
    """The bytes that this process reads of a checkpoint of safetensors to load its share."""
    total, whole, some = 0, SafetensorsReader.read, SafetensorsReader.read_rows

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal total
        total += tensor.nbytes
        return tensor

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SafetensorsReader, "read", lambda *given: count(whole(*given)))
        patch.setattr(SafetensorsReader, "read_rows", lambda *given: count(some(*given)))
        load_shared(path, quant)
    return total


def refusal(path: Path, quant: nf4.QuantConfig | None, how: Any) -> tuple[str, str]:
    """Why a checkpoint is not loaded."""
    with pytest.raises(ValueError) as caught:  # noqa: PT011  what it says is compared
        how(path, quant)
    return type(caught.value).__name__, str(caught.value)


def moved(model: models.Model) -> models.Model:
    """The model after some training, which does not depend on how many processes share it."""
    for number, parameter in enumerate(trained_parameters(model).values()):
        generator = torch.Generator().manual_seed(number)
        shares.put(parameter, torch.randn(parameter.shape, generator=generator).to(parameter.dtype))
    return model


def saved_and_restored(method: str, directory: Path) -> list[str]:
    """What is wrong with saving what was trained of a shared model, and with putting it into another one."""
    source, target = TRAINED[method], directory / f"{method} by {world.size()}"
    model = moved(source.load(directory, load_shared))
    before = {name: shares.local(tensor).clone() for name, tensor in tensors(model).items()}
    with shares.whole(model):
        if world.is_main():
            save_trained(model, target)
            if method == "all":
                save_model(model, target / "for use")
    world.barrier()
    wrong = [name for name, tensor in tensors(model).items() if not torch.equal(shares.local(tensor), before[name])]
    other = source.load(directory, load_shared)
    restore_trained(other, target)
    wrong += [name for name, tensor in tensors(other).items() if not torch.equal(shares.local(tensor), before[name])]
    for what in (models.merge_adapter, lambda model: models.save(model, target / "not")):
        with pytest.raises(ValueError, match="this process has a share of it"):
            what(model)
    return wrong


def prepared() -> list[bool]:
    """Whether models for training and for use are shared where they are asked to be."""
    run = partial(
        RunConfig, model=str(GOLDEN / "llama-gqa"), data=DataConfig(path="none"), dtype="float32", max_steps=1
    )
    base = Target(GOLDEN / "llama-gqa", GOLDEN / "lora", NF4)
    target = partial(load_parts, base, dtype=torch.float32, device=torch.device("cpu"))
    made = [trainable_model(run(distributed=how), (), torch.device("cpu")) for how in ("fsdp", "ddp")]
    made += [target(LoadOptions(distributed=how)) for how in ("fsdp", "ddp")]
    return [shares.any_shared(model) for model in made]


def all_of_it(directory: Path, broken: list[Path], torn: Path) -> dict[str, Any]:
    """Everything that is looked at on several processes, in one start of them."""
    with world.world("cpu", timeout=60):
        names = SOURCES if world.size() == 2 else THREE
        found = {name: differences(SOURCES[name], directory) for name in names}
        restored = {method: saved_and_restored(method, directory) for method in TRAINED}
        restoring = moved(TRAINED["adapters"].load(directory, load_shared))
        return {
            "differences": {name: wrong for name, wrong in found.items() if wrong},
            "bytes": {name: counted(directory / name, quant) for name, quant in SIZED.items()},
            "refusals": [refusal(path, quant, load_shared) for path in broken for quant in (None, NF4)],
            "restored": {method: wrong for method, wrong in restored.items() if wrong},
            "torn": refusal(torn, None, lambda path, _: restore_trained(restoring, path)),
            "shared": prepared(),
        }


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Checkpoints in every layout, and one with large weights, which is mostly codes."""
    directory = tmp_path_factory.mktemp("checkpoints")
    write_gguf(directory / "m.gguf", gguf_tensors())
    for name in ("llama-sharded", "llama-bin", "llama-raw-vocab-parallel"):
        layout(name, directory)
    models.save(models.load(GOLDEN / "llama-headdim-bias", NF4), directory / "4bits")
    models.save(models.load(GOLDEN / "llama-gqa", PLAIN), directory / "4bits-plain")
    torch.manual_seed(0)
    config = replace(models.load(GOLDEN / "llama-gqa").config, hidden_size=256, intermediate_size=510, vocab_size=700)
    model = Llama(config).to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    models.save(model, directory / "sized")
    shutil.copytree(directory / "sized", directory / "sized, to be quantized")
    models.save(models.load(directory / "sized", NF4), directory / "sized, 4 bits")
    return directory


@pytest.fixture(scope="module")
def broken(directory) -> list[Path]:
    """Checkpoints that are refused for their names, for numbers in the first or in the last row, or for a copy."""
    source = load_file(GOLDEN / "llama-gqa" / "model.safetensors")
    middle, last, head = "model.layers.1.mlp.down_proj.weight", "model.norm.weight", "lm_head.weight"

    def without(name: str) -> dict[str, torch.Tensor]:
        return {key: value for key, value in source.items() if key != name}

    def with_nan(name: str, row: int) -> dict[str, torch.Tensor]:
        changed = source[name].clone()
        changed[row] = torch.nan
        return {**source, name: changed}

    tied = load_file(GOLDEN / "llama3-rope-tied" / "model.safetensors")
    untied = tied["model.embed_tokens.weight"].clone()
    untied[-1] += 1
    stored = load_file(directory / "4bits" / "model.safetensors")
    scales = next(name for name in stored if name.endswith("nested_absmax"))
    changes = {
        "missing": ("llama-gqa", without(middle)),
        "first": ("llama-gqa", with_nan(head, 0)),
        "last": ("llama-gqa", with_nan(last, -1)),
        "quantized": ("llama-gqa", with_nan(middle, -1)),
        "copy": ("llama3-rope-tied", {**tied, "lm_head.weight": untied}),
        "scales": (directory / "4bits", {**stored, scales: stored[scales] * torch.inf}),
    }
    for name, (base, content) in changes.items():
        (directory / name).mkdir()
        shutil.copy(GOLDEN / base / "config.json", directory / name)
        save_file(content, directory / name / "model.safetensors")
    return [directory / name for name in changes]


@pytest.fixture(scope="module")
def torn(directory) -> Path:
    """What was trained of a model, with a number in the last row of it that is none."""
    save_trained(moved(TRAINED["adapters"].load(directory, load)), directory / "torn")
    file = directory / "torn" / "adapter_model.safetensors"
    saved = load_file(file)
    name = next(name for name in saved if name.endswith("lora_B.weight"))
    saved[name][-1] = torch.inf
    save_file(saved, file)
    return directory / "torn"


@pytest.fixture(scope="module", params=[2, 3])
def results(request, directory, broken, torn):
    return together(all_of_it, request.param, directory, broken, torn, timeout=300)


def test_shares_are_the_rows_of_what_one_process_loads(results):
    for each in results:
        assert each["differences"] == {}


def test_a_process_reads_little_more_than_its_share(results, directory):
    for name in SIZED:
        stored = load_file(directory / name / "model.safetensors")
        size = sum(tensor.nbytes for tensor in stored.values())
        small = sum(t.nbytes for key, t in stored.items() if "nested" in key or "quant_" in key)
        read = [each["bytes"][name] for each in results]
        assert 0.95 * size < sum(read) < size + 2 * len(results) * small + 1
        most = 1.4 if "to be" in name else 1.02  # whole weights, taken in turn
        assert max(read) < most * (size - small) / len(results) + 2 * small


def test_a_broken_checkpoint_is_refused_by_all_as_one_process_refuses_it(results, broken):
    expected = [refusal(path, quant, load) for path in broken for quant in (None, NF4)]
    for each in results:
        assert each["refusals"] == expected


def test_what_is_trained_is_saved_whole_and_restored_by_rows(results, directory, tmp_path):
    for each in results:
        assert each["restored"] == {}
        assert each["torn"][0] == "CheckpointError"
        assert "holds NaN or infinity" in each["torn"][1]
    for method, source in TRAINED.items():
        model = moved(source.load(directory, load))
        save_trained(model, tmp_path / method)
        if method == "all":
            save_model(model, tmp_path / method / "for use")
        for file in (path for path in (tmp_path / method).rglob("*") if path.is_file()):
            there = directory / f"{method} by {len(results)}" / file.relative_to(tmp_path / method)
            assert there.read_bytes() == file.read_bytes(), file


def test_a_model_is_shared_where_it_is_asked_to_be(results):
    for each in results:
        assert each["shared"] == [True, False, True, False]
    assert loading("fsdp", ShardConfig()) is load


@pytest.mark.parametrize("name", ["llama-gqa", "llama-bin", "llama-raw-2", "llama-raw-vocab-parallel", "m.gguf", "f"])
def test_every_reader_gives_rows(name, directory):
    path = GOLDEN / "roberta-fairseq" / "model.pt" if name == "f" else directory / name
    _, reader, _ = open_checkpoint(path if path.exists() else GOLDEN / name)
    for tensor, (count, *_) in reader.shapes.items():
        whole = reader.read(tensor)
        for start, stop in ((0, count), (count // 3, count // 2 + 1), (count - 1, count), (count, count)):
            assert torch.equal(reader.read_rows(tensor, start, stop), whole[start:stop]), tensor
