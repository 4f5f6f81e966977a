"""adapter_config.json: what PEFT has to be told of our adapters, and what its own say.

PEFT chooses layers by the ends of their dotted names, so a leaf name is written only where every module of that
name was adapted, and the whole name otherwise. Of several patterns that fit a layer PEFT takes the first where here
the longest wins: we write the longest first. Reading, its rules hold: what they choose is handed on by name.
"""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from torch import nn

from models.attachment import Attachment, adapted_layers
from models.errors import CheckpointError
from models.linear import AdaptableLinear, NF4Linear
from models.lora_config import LoraConfig, ends_with, fits, matching
from models.lora_init import LOFTQ_ROUNDS
from models.peft_names import layer_of
from models.tied_head import tied_heads
from models.whole import within
from nf4 import QuantConfig

# Values of init_lora_weights that leave the base as it is, so that A and B alone are the adapter.
BASE_KEPT = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

# Fields that change what an adapter computes and that we do not, with the values that mean "not used".
UNKNOWN: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    **dict.fromkeys(
        (
            "lora_bias",
            "fan_in_fan_out",
            "layer_replication",
            "trainable_token_indices",
            "target_parameters",
            "alora_invocation_tokens",
            "arrow_config",
            "kasa_config",
            "monteclora_config",
            "megatron_config",
            "use_bdlora",
            "use_qalora",
        ),
        (False, None, [], {}),
    ),
}
HEADS = ("classifier", "score")  # where PEFT looks for the trained head of a sequence classifier


def lora_config(model: nn.Module, attachment: Attachment) -> dict[str, Any]:
    """adapter_config.json, as PEFT writes it for the LoRA adapters of this model."""
    config = attachment.config
    return {
        **common(model, "LORA", config.modules_to_save),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True if config.init == "default" else config.init,
        "loftq_config": loftq_config(model) if config.init == "loftq" else {},
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "rank_pattern": longest_first(config.rank_pattern),
        "alpha_pattern": longest_first(config.alpha_pattern),
        "target_modules": target_names(model),
        "modules_to_save": saved_names(model, config.modules_to_save) or None,
        "ensure_weight_tying": bool(tied_heads(model, attachment.originals)),
        "use_rslora": config.rslora,
        "use_dora": config.dora,
    }


def common(model: nn.Module, kind: str, modules_to_save: Collection[str]) -> dict[str, Any]:
    """The fields of every kind of adapter."""
    task = getattr(model, "task_type", None)
    if task == "SEQ_CLS" and not any(name.rpartition(".")[2] in HEADS for name in modules_to_save):
        task = None  # PEFT would look for the classifier in the file
    return {"peft_type": kind, "task_type": task, "base_model_name_or_path": None, "inference_mode": True}


def target_names(model: nn.Module) -> list[str]:
    """Names that, as ends of dotted names, fit the adapted layers and no other module."""
    adapted = {name for name, _ in adapted_layers(model)}
    others = {name.rpartition(".")[2] for name, _ in model.named_modules() if name not in adapted}
    leaves = {name: name.rpartition(".")[2] for name in adapted}
    return sorted({name if leaf in others else leaf for name, leaf in leaves.items()})


def saved_names(model: nn.Module, given: Collection[str]) -> list[str]:
    """Names of the modules to save. PEFT looks for ends of letters, not of parts: for it `norm` is `layernorm` too."""
    modules = [name for name, _ in model.named_modules()]
    names = []
    for g in given:
        fitting = [m for m in modules if ends_with(m, g)]
        names += [g] if len(fitting) == sum(m.endswith(g) for m in modules) else fitting
    return names


def longest_first(pattern: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(pattern.items(), key=lambda item: -len(item[0])))


def loftq_config(model: nn.Module) -> dict[str, Any]:
    """PEFT's two fields, and the format that the base must be loaded in for the same start to come out."""
    return {"loftq_bits": 4, "loftq_iter": LOFTQ_ROUNDS, "formats": sorted(formats(dict(adapted_layers(model))))}


def formats(layers: Mapping[str, AdaptableLinear]) -> set[str]:
    """How these layers are stored, in words that tell formats apart."""
    configs = {m.quant_config if isinstance(m, NF4Linear) else QuantConfig() for m in layers.values()}
    return {
        f"{c.codebook} in blocks of {c.block_size}, scales "
        + (f"in 8 bits in blocks of {c.nested_block_size}" if c.double_quant else "in float32")
        + (" (searched)" if c.scale == "search" else "")
        for c in configs
    }


def read_lora_config(path: Path, raw: dict[str, Any], model: nn.Module, names: Collection[str]) -> LoraConfig:
    """LoRA's configuration in an adapter_config.json, for this model; `names` are those of the tensors in the file."""
    refuse_unknown(path, raw, UNKNOWN)
    check_names(path, raw)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, AdaptableLinear)}
    try:
        chosen = [name for name, layer in layers.items() if chooses(raw, name, layer.in_head)]
        init = read_init(path, raw, {name: layers[name] for name in chosen})
        config = LoraConfig(
            rank=raw["r"],
            alpha=raw["lora_alpha"],
            dropout=raw.get("lora_dropout") or 0.0,
            target_modules=targets(path, raw, chosen, layers),
            dora=bool(raw.get("use_dora")),
            rslora=bool(raw.get("use_rslora")),
            init=init,
            rank_pattern=first_wins(raw.get("rank_pattern") or {}, chosen, raw["r"]),
            alpha_pattern=first_wins(raw.get("alpha_pattern") or {}, chosen, raw["lora_alpha"]),
            modules_to_save=saved_modules(model, raw.get("modules_to_save") or [], names),
        )
    except CheckpointError:
        raise
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError, re.error) as error:
        raise CheckpointError(f"{path}: not a usable LoRA configuration ({error!r})") from error
    return config


def refuse_unknown(path: Path, raw: dict[str, Any], unknown: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse fields that change what an adapter computes and are not known here."""
    for key, neutral in unknown.items():
        if key in raw and raw[key] not in neutral:
            raise CheckpointError(f"{path}: {key} is {raw[key]!r}, which is not supported here")


def check_names(path: Path, raw: dict[str, Any]) -> None:
    """Refuse what cannot be names of modules, or a pattern that is not tried."""
    for key in ("modules_to_save", "target_modules", "exclude_modules", "feedforward_modules"):
        value = raw.get(key) or []
        if isinstance(value, str) and key != "modules_to_save":
            continue
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CheckpointError(f"{path}: {key} is {value!r}; a list of names is needed")
    for pattern in patterns_in(raw):
        if not harmless(pattern):
            raise CheckpointError(
                f"{path}: {pattern!r:.80} is not a pattern that is tried here; name the layers instead"
            )


def patterns_in(raw: dict[str, Any]) -> list[str]:
    """Every text in the file that will be matched against names of layers."""
    keys = ("target_modules", "exclude_modules", "feedforward_modules", "layers_pattern", "rank_pattern")
    patterns: list[Any] = []
    for value in map(raw.get, (*keys, "alpha_pattern")):
        patterns += value if isinstance(value, list | dict) else [value]
    return [pattern for pattern in patterns if isinstance(pattern, str)]


def harmless(pattern: str) -> bool:
    """Is a regular expression matched in a blink? A repeated group, or many repetitions, can take for ever."""
    return len(pattern) <= 1000 and len(re.findall(r"[*+{]", pattern)) <= 6 and not re.search(r"\)[*+{]", pattern)


def chooses(raw: dict[str, Any], name: str, in_head: bool = False) -> bool:
    """Would PEFT put an adapter on the linear layer of that name?"""
    targets, excluded = raw.get("target_modules"), raw.get("exclude_modules")
    if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else listed(name, excluded)):
        return False
    if within(name, raw.get("modules_to_save") or []):
        return False
    if targets == "all-linear":
        return not in_head
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return listed(name, targets or []) and transformed(raw, name)


def listed(name: str, ends: Collection[str]) -> bool:
    return any(ends_with(name, end) for end in ends)


def transformed(raw: dict[str, Any], name: str) -> bool:
    """Is the layer in one of the blocks that layers_to_transform lists, if it lists any?"""
    wanted = raw.get("layers_to_transform")
    if wanted is None or wanted == []:
        return True
    patterns = raw.get("layers_pattern") or []
    patterns = [patterns] if isinstance(patterns, str) else patterns
    tries = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in patterns] or [r".*?\.[^.]*\.(\d+)\."]
    found = next((match for match in (re.match(t, name) for t in tries) if match), None)
    return found is not None and int(found[1]) in (wanted if isinstance(wanted, list) else [wanted])


def targets(path: Path, raw: dict[str, Any], chosen: Collection[str], layers: Collection[str]) -> tuple[str, ...]:
    """The fewest names for the chosen layers: the file's own where they choose the same, else whole names."""
    given = raw.get("target_modules")
    if not chosen:
        leaves = ", ".join(sorted({name.rpartition(".")[2] for name in layers}))
        shown = given if isinstance(given, str) else ", ".join(given or [])
        raise CheckpointError(f"{path}: no layer is called {shown}; this model has {leaves}")
    used = () if isinstance(given, str) else tuple(t for t in given or () if any(ends_with(n, t) for n in layers))
    same = {name for name in layers if listed(name, used)} == set(chosen)
    return used if same else tuple(chosen)


def first_wins(pattern: dict[str, Any], chosen: Collection[str], default: float) -> dict[str, Any]:
    """A pattern in which the longest key that fits gives what PEFT's rule, the first one, gives."""
    first = {name: next((value for key, value in pattern.items() if fits(key, name)), default) for name in chosen}
    if all(matching(pattern, name, default) == value for name, value in first.items()):
        return pattern
    return {f"^{re.escape(name)}": value for name, value in first.items() if value != default}


def saved_modules(model: nn.Module, given: Collection[str], names: Collection[str]) -> tuple[str, ...]:
    """The modules to save that the model has. (PEFT lists every name that a classifier may go by.)

    One that the model lacks is left out only if the file has no tensors for it. For PEFT `norm` is the end of
    `layernorm` too: what is saved of such modules is handed on by name.
    """
    modules = [name for name, _ in model.named_modules()]
    owners = [name.rpartition(".")[0] for name in names if layer_of(name) is None]
    known = [g for g in given if any(ends_with(m, g) for m in modules) or any(within(o, [g]) for o in owners)]
    longer = [m for m in modules if any(m.endswith(g) and not ends_with(m, g) for g in given)]
    return tuple(known + [m for m in longer if any(within(owner, [m]) for owner in owners)])


def read_init(path: Path, raw: dict[str, Any], layers: Mapping[str, AdaptableLinear]) -> str:
    """How the base has to be changed before A and B fit it."""
    init = raw.get("init_lora_weights")
    if init in BASE_KEPT:
        return "default"
    if init == "pissa":
        return init
    if init != "loftq":
        raise CheckpointError(
            f"{path}: init_lora_weights is {init!r}: it changes the base in a way that cannot be made again here; "
            "convert the adapter to plain LoRA where it was made"
        )
    wanted = (raw.get("loftq_config") or {}).get("formats")
    if wanted is None:
        raise CheckpointError(
            f"{path}: init_lora_weights is 'loftq', but loftq_config does not say for which 4-bit format: PEFT's own "
            "LoftQ makes another base than is made here; merge the adapter where it was made"
        )
    if raw["loftq_config"].get("loftq_iter") != LOFTQ_ROUNDS:
        raise CheckpointError(f"{path}: loftq_iter is {raw['loftq_config'].get('loftq_iter')}, not {LOFTQ_ROUNDS}")
    found = sorted(formats(layers))
    if found != wanted:
        raise CheckpointError(
            f"{path}: LoftQ made this adapter for a base stored as {'; '.join(wanted)}, but this one is stored as "
            f"{'; '.join(found)}; load it as it was trained"
        )
    return init
