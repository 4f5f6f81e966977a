"""Names of an adapter's tensors, in a PEFT file and here.

PEFT puts its own parts into a name: `base_model.model.` before it, the adapter's name behind `lora_A`, and
`modules_to_save` behind a module that is trained whole. Newer versions leave the last two out when they save. A prefix
is one tensor of the whole model, and has a short name in the file.
"""

import re

PREFIX = "base_model.model."
PART = re.compile(r"\.(lora_A|lora_B|lora_magnitude_vector|ia3_l)(?:\.default)?(?:\.weight)?$")
PROMPT = ("prompt_embeddings", "model.prompt_embeddings")  # in a file, and here


def file_name(name: str) -> str:
    """The name in a file of what is trained here under that name."""
    return PROMPT[0] if name == PROMPT[1] else PREFIX + name


def released_name(name: str) -> str:
    """The parameter that a tensor of the file is for."""
    if name == PROMPT[0]:
        return PROMPT[1]
    name = re.sub(r"\.modules_to_save(?:\.default)?\.", ".", name.removeprefix(PREFIX))
    found = PART.search(name)
    if found is None:
        return name
    weight = "" if found[1] in ("lora_magnitude_vector", "ia3_l") else ".weight"
    return f"{name[: found.start()]}.{found[1]}{weight}"


def layer_of(name: str) -> str | None:
    """The adapted layer that a parameter belongs to; None if it is not of an adapter."""
    found = PART.search(name)
    return None if found is None else name[: found.start()]
