"""The golden LLaMA cases in every layout, made from the few files under tests/data/golden.

All plain layouts hold the weights of `llama-gqa`, so one file of each kind is kept and the others are cut
or joined from it here.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

DATA = Path(__file__).parent / "data"
GOLDEN = DATA / "golden"
LAYOUTS = (
    "llama-gqa",
    "llama-gqa-old-config",
    "llama-headdim-bias",
    "llama3-rope-tied",
    "llama3-rope-tied-old-config",
    "llama-sharded",
    "llama-bin",
    "llama-bin-sharded",
    "llama-raw-1",
    "llama-raw-2",
    "llama-raw-vocab-parallel",
)


def layout(name: str, directory: Path) -> Path:
    """A directory with the case in that layout; what does not lie ready is built inside `directory`."""
    if (GOLDEN / name).exists():
        return GOLDEN / name
    target = directory / name
    target.mkdir(parents=True, exist_ok=True)
    if name.endswith("-old-config"):
        source = GOLDEN / name.removesuffix("-old-config")
        shutil.copy(source / "model.safetensors", target)
        shutil.copy(source / "config-old.json", target / "config.json")
    elif name.startswith("llama-raw"):
        raw(name, target)
    else:
        released(name, target)
    return target


def answers(name: str) -> dict[str, torch.Tensor]:
    """Inputs and what the reference implementation gave for them."""
    own = GOLDEN / name.removesuffix("-old-config") / "io.safetensors"
    return load_file(own if own.exists() else GOLDEN / "llama-gqa" / "io.safetensors")


def released(name: str, target: Path) -> None:
    shutil.copy(GOLDEN / "llama-gqa" / "config.json", target)
    tensors = load_file(GOLDEN / "llama-gqa" / "model.safetensors")
    if name == "llama-bin":
        torch.save(tensors, target / "pytorch_model.bin")
        return
    halves = [dict(list(tensors.items())[:9]), dict(list(tensors.items())[9:])]
    stem, suffix = ("model", "safetensors") if name == "llama-sharded" else ("pytorch_model", "bin")
    weight_map = {}
    for i, half in enumerate(halves, start=1):
        file = f"{stem}-{i:05d}-of-00002.{suffix}"
        save_file(half, target / file) if suffix == "safetensors" else torch.save(half, target / file)
        weight_map |= dict.fromkeys(half, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (target / f"{stem}.{suffix}.index.json").write_text(json.dumps(index))


def raw(name: str, target: Path) -> None:
    parts = [torch.load(GOLDEN / "llama-raw-2" / f"consolidated.0{i}.pth", weights_only=True) for i in (0, 1)]
    shutil.copy(GOLDEN / "llama-raw-2" / "params.json", target)
    embedding = torch.cat([part["tok_embeddings.weight"] for part in parts], dim=1)
    if name == "llama-raw-vocab-parallel":
        for i, (part, rows) in enumerate(zip(parts, embedding.chunk(2), strict=True)):
            torch.save({**part, "tok_embeddings.weight": rows.clone()}, target / f"consolidated.0{i}.pth")
        return
    whole = {}
    for key, first in parts[0].items():
        columns = "wo" in key or "w2" in key or "tok_embeddings" in key
        replicated = "norm" in key or "rope" in key
        both = [part[key] for part in parts]
        whole[key] = first if replicated else torch.cat(both, dim=1 if columns else 0)
    torch.save(whole, target / "consolidated.00.pth")
