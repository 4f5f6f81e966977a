"""From a config.json to the model that it describes: a line for each architecture in both tables."""

from collections.abc import Callable, Collection
from typing import Any

from models.config import llama_config
from models.config_fields import short
from models.errors import CheckpointError
from models.llama import build_llama
from models.model import Config, Model
from models.roberta import build_roberta
from models.roberta_config import roberta_config
from models.t5 import build_t5
from models.t5_config import t5_config

# Each takes the config's fields, the file to name in errors, the names of the tensors that are there, and the
# head and number of labels asked for (None: what the checkpoint holds).
Build = Callable[[dict[str, Any], str, Collection[str], str | None, int | None], Model]

ARCHITECTURES: dict[str, Build] = {
    "llama": build_llama,
    "t5": build_t5,
    "roberta": build_roberta,
}

# What a file says of itself, for those who need to know it before any weight is read.
CONFIGS: dict[str, Callable[[dict[str, Any], str], Config]] = {
    "llama": llama_config,
    "t5": t5_config,
    "roberta": roberta_config,
}

# A layer is built before its tensors are looked for, so that a count must be believable.
LAYER_COUNTS = ("num_hidden_layers", "num_layers", "num_decoder_layers")


def build(
    raw: dict[str, Any],
    where: str,
    tensors: Collection[str] = (),
    head: str | None = None,
    num_labels: int | None = None,
) -> Model:
    """The model that a config describes; under `torch.device("meta")` it has shapes and names but no memory."""
    kind = architecture(raw, where)
    for name in LAYER_COUNTS:
        count = raw.get(name)
        if tensors and isinstance(count, int) and count > len(tensors):
            raise CheckpointError(f"{where}: {name} is {short(count)}, but there are {len(tensors)} tensors in all")
    return ARCHITECTURES[kind](raw, where, tensors, head, num_labels)


def architecture(raw: dict[str, Any], where: str) -> str:
    """The name in the tables that a config gives."""
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise CheckpointError(f"{where}: architecture {kind!r:.80} is not known; {', '.join(ARCHITECTURES)} are")
    return kind
