"""The names of RoBERTa's tensors in released files, and which head a model gets of those that a file holds.

A file of the encoder alone leaves out the prefix `roberta.`; old files call the parameters of a norm gamma and
beta; some carry the tied decoder a second time and the table 0, 1, 2, ... of positions. What belongs to a head that
the model does not have is left out, as other readers do.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import replace

from models.errors import CheckpointError, ConfigError
from models.roberta_config import CLASSIFICATION, REGRESSION, RobertaConfig, numbered_labels

HEADS = ("mlm", "classification", "regression")

BARE = ("embeddings.", "encoder.layer.", "pooler.")
OLD = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
BUFFERS = ("roberta.embeddings.position_ids", "roberta.embeddings.token_type_ids")
COPIES = {
    "lm_head.decoder.weight": "roberta.embeddings.word_embeddings.weight",
    "lm_head.decoder.bias": "lm_head.bias",
}
# What tensors beside the encoder start with. The last two belong to no head here: answers to questions, BERT's pooler.
BESIDE = ("lm_head.", "classifier.", "classification_heads.", "qa_outputs.", "roberta.pooler.")


def parameter_for(name: str, head: str) -> str | None:
    """The parameter that a tensor is for, in a model whose head is called `head`; None: it is for none."""
    name = released_name(name)
    if name in BUFFERS or (name.startswith(BESIDE) and not name.startswith(f"{head}.")):
        return None
    return COPIES.get(name, name)


def released_name(name: str) -> str:
    """The name that newer and whole files give a tensor."""
    if name.startswith(BARE):
        name = f"roberta.{name}"
    for old, new in OLD.items():
        name = name.replace(old, new)
    return name


def with_head(
    config: RobertaConfig, where: str, tensors: Collection[str], head: str | None, num_labels: int | None
) -> tuple[RobertaConfig, bool]:
    """The config of a model with the head asked for, or the one that is held, and whether the head is a new one."""
    names = {released_name(name) for name in tensors}
    head = head or held_head(config, where, names)
    if head not in HEADS:
        raise ConfigError(
            f"{where}: RoBERTa has no head {head!r}, for it reads a text from both sides; choose from "
            f"{', '.join(HEADS)} (mlm fills masks)"
        )
    if head == "mlm":
        if num_labels is not None:
            raise ConfigError(f"{where}: num_labels={num_labels} is for classification; a masked head has none")
        if not has_masked_head(names):
            raise CheckpointError(
                f"{where}: the checkpoint has no masked-language-model head (lm_head.*), and a new one would have to "
                "be pre-trained; load a checkpoint as it was pre-trained, or head='classification'"
            )
        return replace(config, problem_type=None, labels=()), False

    several = named_classifiers(names)
    if several:
        raise CheckpointError(
            f"{where}: holds {len(several)} classification heads ({', '.join(several)}) and one can be loaded; "
            "save the file again with that one alone, or load head='mlm'"
        )
    fresh = not has_classifier(names)
    labels = chosen_labels(config, where, head, num_labels, fresh)
    return replace(config, problem_type=REGRESSION if head == "regression" else CLASSIFICATION, labels=labels), fresh


def held_head(config: RobertaConfig, where: str, names: Collection[str]) -> str:
    """The head that a checkpoint holds; of two, as fairseq's fine-tuned models have them, the one for the task."""
    if has_classifier(names) or named_classifiers(names):
        if config.problem_type not in (None, CLASSIFICATION, REGRESSION):
            raise CheckpointError(
                f"{where}: problem_type is {config.problem_type!r}, whose loss is not known here; "
                "head='classification' reads its logits"
            )
        alone = config.problem_type is None and len(config.labels) == 1
        return "regression" if alone or config.problem_type == REGRESSION else "classification"
    if has_masked_head(names):
        return "mlm"
    raise ConfigError(
        f"{where}: the checkpoint holds an encoder without a head; choose one to start: head='classification' with "
        "num_labels, or head='regression'"
    )


def chosen_labels(config: RobertaConfig, where: str, head: str, num_labels: int | None, fresh: bool) -> tuple[str, ...]:
    """Names of the logits: the config's, unless the caller wants another number of them."""
    if head == "regression":
        if num_labels not in (None, 1):
            raise ConfigError(f"{where}: num_labels={num_labels}, but a regression gives one number")
        return config.labels if len(config.labels) == 1 else numbered_labels(1)
    if num_labels is None and fresh:
        raise ConfigError(
            f"{where}: has no classification head; give num_labels, how many classes a new one is to tell apart"
        )
    count = num_labels if num_labels is not None else len(config.labels) or 2  # the format's own default
    if count < 2:
        raise ConfigError(
            f"{where}: num_labels is {count}; classes are 2 or more, and head='regression' gives 1 number"
        )
    return config.labels if len(config.labels) == count else numbered_labels(count)


def has_masked_head(names: Collection[str]) -> bool:
    return "lm_head.dense.weight" in names


def has_classifier(names: Collection[str]) -> bool:
    """RoBERTa's has two layers: `classifier.weight` alone is another task's."""
    return "classifier.dense.weight" in names or "classifier.out_proj.weight" in names


def held_labels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """How many labels the classification head among tensors of these shapes gives; None: there is none."""
    counts = [shape[0] for name, shape in shapes.items() if released_name(name) == "classifier.out_proj.bias"]
    return counts[0] if counts else None


def in_classifier(name: str) -> bool:
    """Is a tensor part of a classification head, of the only one or one of several?"""
    return name.startswith(("classifier.", "classification_heads."))


def named_classifiers(names: Collection[str]) -> list[str]:
    """The names of classification heads, where a file has several."""
    matches = (re.match(r"classification_heads\.([^.]+)\.", name) for name in names)
    return sorted({match[1] for match in matches if match})
