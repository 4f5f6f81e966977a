"""From a config.json to the model that it describes: one line for each architecture."""

from collections.abc import Callable, Collection
from typing import Any

from models.errors import CheckpointError
from models.llama import build_llama
from models.model import Model
from models.roberta import build_roberta
from models.t5 import build_t5

# Each takes the config's fields, the file to name in errors, the names of the tensors that are there, and the
# head and number of labels asked for (None: what the checkpoint holds).
Build = Callable[[dict[str, Any], str, Collection[str], str | None, int | None], Model]

ARCHITECTURES: dict[str, Build] = {
    "llama": build_llama,
    "t5": build_t5,
    "roberta": build_roberta,
}


def build(
    raw: dict[str, Any],
    where: str,
    tensors: Collection[str] = (),
    head: str | None = None,
    num_labels: int | None = None,
) -> Model:
    """The model that a config describes; under `torch.device("meta")` it has shapes and names but no memory."""
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        raise CheckpointError(f"{where}: architecture {kind!r} is not known; {', '.join(ARCHITECTURES)} are")
    return ARCHITECTURES[kind](raw, where, tensors, head, num_labels)
