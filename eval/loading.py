"""A model or a run made ready to be asked, with what tells its answers from another's."""

import json
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path

from eval.examinee import UNLIMITED, Architecture, Examinee
from models import Llama
from models.fingerprint import fingerprint
from models.roberta import Roberta
from models.target import LoadOptions, Target, load_target, resolve


def load_examinee(target: str | Path, load: LoadOptions = LoadOptions(), chat: bool = False) -> Examinee:
    """The model that a path names."""
    parts = resolve(target, load)
    model, tokenizer = load_target(target, load)
    architecture: Architecture = (
        "llama" if isinstance(model, Llama) else "roberta" if isinstance(model, Roberta) else "t5"
    )
    return Examinee(
        tokenizer=tokenizer,
        architecture=architecture,
        max_tokens=model.max_tokens or UNLIMITED,
        loaded=model,
        identity=identity(parts, load, str(model.dtype), model.device.type),
        chat=chat,
    )


def identity(parts: Target, load: LoadOptions, dtype: str, device: str) -> str:
    """What tells a model's answers from another's: its files, how it is quantized, what it computes in."""
    files = [fingerprint(path) for path in (parts.base, parts.adapter) if path is not None]
    quant = None if parts.quant is None else asdict(parts.quant)
    what = [files, quant, dtype, device, parts.head, parts.labels, load.head, load.num_labels]
    return sha256(json.dumps(what).encode()).hexdigest()
