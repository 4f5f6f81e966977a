"""fairseq's own layout of RoBERTa: one *.pt with the weights, how they were trained, and often the optimizer's state.

Two generations of names are about, `decoder.sentence_encoder` and `encoder.sentence_encoder`; the oldest files keep
the query, key and value projections in one tensor. All sizes are read off the tensors, but for the number of
attention heads, which only the training arguments tell: `args`, an argparse.Namespace, or in newer files `cfg`,
a dictionary. Nothing but tensors, plain containers and Namespaces is read; whatever else was pickled is refused.
"""

import argparse
import logging
import re
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.errors import CheckpointError
from models.readers import Stored, check_tensors, dtype_name, is_mapped, load_torch

STEM = r"(?:decoder|encoder)\.sentence_encoder\."
LAYER = rf"{STEM}layers\.(\d+)\."
OURS = "roberta.encoder.layer."
LAST = r"(weight|bias)"

# Their name, and the released ones; three of them for a tensor that holds three projections, one above the other.
NAMES = (
    (rf"{STEM}embed_tokens\.weight", ("roberta.embeddings.word_embeddings.weight",)),
    (rf"{STEM}embed_positions\.weight", ("roberta.embeddings.position_embeddings.weight",)),
    (rf"{STEM}(?:emb_layer_norm|layernorm_embedding)\.{LAST}", (r"roberta.embeddings.LayerNorm.\1",)),
    (rf"{LAYER}self_attn\.q_proj\.{LAST}", (rf"{OURS}\1.attention.self.query.\2",)),
    (rf"{LAYER}self_attn\.k_proj\.{LAST}", (rf"{OURS}\1.attention.self.key.\2",)),
    (rf"{LAYER}self_attn\.v_proj\.{LAST}", (rf"{OURS}\1.attention.self.value.\2",)),
    (
        rf"{LAYER}self_attn\.in_proj_{LAST}",
        tuple(rf"{OURS}\1.attention.self.{part}.\2" for part in ("query", "key", "value")),
    ),
    (rf"{LAYER}self_attn\.out_proj\.{LAST}", (rf"{OURS}\1.attention.output.dense.\2",)),
    (rf"{LAYER}self_attn_layer_norm\.{LAST}", (rf"{OURS}\1.attention.output.LayerNorm.\2",)),
    (rf"{LAYER}fc1\.{LAST}", (rf"{OURS}\1.intermediate.dense.\2",)),
    (rf"{LAYER}fc2\.{LAST}", (rf"{OURS}\1.output.dense.\2",)),
    (rf"{LAYER}final_layer_norm\.{LAST}", (rf"{OURS}\1.output.LayerNorm.\2",)),
    (rf"(?:decoder|encoder)\.lm_head\.(dense|layer_norm)\.{LAST}", (r"lm_head.\1.\2",)),
    (r"(?:decoder|encoder)\.lm_head\.bias", ("lm_head.bias",)),
)
CLASSIFIER = r"classification_heads\.([^.]+)\.((?:dense|out_proj)\.(?:weight|bias))"
DECODER = r"(?:decoder|encoder)\.lm_head\.weight"
IGNORED = r".*\.(version|_float_tensor)"  # buffers without content
TOKEN_TYPES = "roberta.embeddings.token_type_embeddings.weight"

# Arguments with one value that can be computed here; absent means this value.
FIXED = {
    "activation_fn": "gelu",
    "pooler_activation_fn": "tanh",
    "encoder_normalize_before": False,
    "no_scale_embedding": True,
}
# Arguments that act in training only, and do not here.
TRAINING = ("activation_dropout", "encoder_layerdrop", "quant_noise_pq", "quant_noise_scalar")


class FairseqReader:
    """The model in a fairseq file, under the released names."""

    released_dtype: torch.dtype | None = None

    def __init__(self, path: Path) -> None:
        self.path = path
        saved = self.load()
        state = model_state(saved, path)
        self.arguments = arguments(saved, path)
        self.kept = None if is_mapped(path) else state
        self.dtypes = {name: value.dtype for name, value in state.items()}
        # our name -> theirs, and which of how many parts stacked in it; without theirs, zeros of that shape
        self.rows: dict[str, tuple[str, int, int]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.classifiers = sorted({m[1] for m in (re.fullmatch(CLASSIFIER, name) for name in state) if m})
        for theirs, value in state.items():
            if not re.fullmatch(rf"{IGNORED}|{DECODER}", theirs):
                self.add(theirs, tuple(value.shape))
        embedding = self.rows.get("roberta.embeddings.word_embeddings.weight")
        for theirs in state:
            if embedding is not None and re.fullmatch(DECODER, theirs):
                self.check_tied(state[theirs], state[embedding[0]], theirs, embedding[0])
        if embedding is not None:
            self.shapes[TOKEN_TYPES] = (1, *state[embedding[0]].shape[1:])  # fairseq has one kind of text, unmarked

    def add(self, theirs: str, shape: tuple[int, ...]) -> None:
        """Enter the released names of a tensor and the shapes of its parts."""
        ours = released_names(theirs, alone=len(self.classifiers) == 1)
        if len(ours) > 1 and (not shape or shape[0] % len(ours)):
            raise CheckpointError(
                f"{self.path}: {theirs} is {list(shape)}, which does not split into query, key and value"
            )
        for part, name in enumerate(ours):
            if name in self.rows:
                raise CheckpointError(f"{self.path}: {theirs} and {self.rows[name][0]} are both for {name}; keep one")
            self.rows[name] = (theirs, part, len(ours))
            self.shapes[name] = (shape[0] // len(ours), *shape[1:]) if len(ours) > 1 else shape

    def read(self, name: str) -> Tensor:
        return self.tensor(name).clone()

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensor(name)[start:stop].clone()

    def tensor(self, name: str) -> Tensor:
        """One tensor, which is read from the file where it is used."""
        if name == TOKEN_TYPES:
            return torch.zeros(self.shapes[name])
        theirs, part, parts = self.rows[name]
        state = model_state(self.load(), self.path) if self.kept is None else self.kept
        return state[theirs].chunk(parts)[part] if parts > 1 else state[theirs]

    def stored(self, name: str) -> Stored:
        dtype = torch.float32 if name == TOKEN_TYPES else self.dtypes[self.rows[name][0]]
        return Stored(dtype_name(dtype), prod(self.shapes[name]) * dtype.itemsize)

    def where(self, name: str) -> str:
        return str(self.path)

    def load(self) -> Any:
        """All that was pickled; of a mapped file no tensor is read by that."""
        try:
            with torch.serialization.safe_globals([argparse.Namespace]):
                return load_torch(self.path)
        except CheckpointError as error:
            foreign = re.search(r"GLOBAL (\S+)", str(error.__cause__))
            if foreign is None:
                raise
            raise CheckpointError(
                f"{self.path}: refused, because it holds a {foreign[1]}, and making one could run code; only tensors, "
                "plain containers and argparse.Namespace are read. If you trust the file, load it with the program "
                "that wrote it, and save again its 'model', with 'args' or 'cfg' as a plain dictionary"
            ) from error

    def check_tied(self, decoder: Tensor, embedding: Tensor, theirs: str, other: str) -> None:
        if not torch.equal(decoder, embedding):
            raise CheckpointError(
                f"{self.path}: {theirs} is not a copy of {other}: an untied masked head, which is not supported"
            )


def open_fairseq(path: Path) -> tuple[dict[str, Any], FairseqReader]:
    """A config in released field names, and the reader of the tensors."""
    reader = FairseqReader(path)
    shapes, told = reader.shapes, reader.arguments
    for key, only in FIXED.items():
        if told.get(key, only) != only:
            raise CheckpointError(f"{path}: was trained with {key} {told[key]!r}; only {only!r} is supported")
    heads = told.get("encoder_attention_heads")
    if isinstance(heads, bool) or not isinstance(heads, int):
        raise CheckpointError(
            f"{path}: its arguments say {heads!r} for encoder_attention_heads, and the tensors do not tell; "
            "add the number to 'args' and save the file again"
        )
    active = [key for key in TRAINING if told.get(key)]
    if active:
        logging.getLogger(__name__).warning("%s: %s is not applied in further training", path, ", ".join(active))

    sizes = {}
    for key, name, dimension in (
        ("vocab_size", "roberta.embeddings.word_embeddings.weight", 0),
        ("hidden_size", "roberta.embeddings.word_embeddings.weight", 1),
        ("max_position_embeddings", "roberta.embeddings.position_embeddings.weight", 0),
        ("intermediate_size", f"{OURS}0.intermediate.dense.weight", 0),
    ):
        if len(shapes.get(name, ())) != 2:
            raise CheckpointError(f"{path}: no matrix for {name}; is it a RoBERTa of fairseq?")
        sizes[key] = shapes[name][dimension]
    layers = (re.match(rf"{re.escape(OURS)}(\d{{1,9}})\.", name) for name in shapes)
    config = {
        "model_type": "roberta",
        **sizes,
        "num_hidden_layers": 1 + max(int(match[1]) for match in layers if match),
        "num_attention_heads": heads,
        "type_vocab_size": 1,
        "layer_norm_eps": 1e-5,
        "hidden_dropout_prob": told.get("dropout", 0.1),
        "attention_probs_dropout_prob": told.get("attention_dropout", 0.1),
        "classifier_dropout": told.get("pooler_dropout", 0.0),
        "bos_token_id": 0,
        "pad_token_id": 1,
        "eos_token_id": 2,
        "problem_type": "regression" if told.get("regression_target") else None,
        "num_labels": shapes.get("classifier.out_proj.bias", (0,))[0],
    }
    return config, reader


def released_names(theirs: str, alone: bool) -> list[str]:
    """Our names for a tensor; an unknown one keeps its own, to be reported by it.

    A classification head that is `alone` in its file has the name that released files give it. Of several each
    keeps its name, for none of them can be chosen here.
    """
    for pattern, ours in NAMES:
        match = re.fullmatch(pattern, theirs)
        if match is not None:
            return [match.expand(name) for name in ours]
    match = re.fullmatch(CLASSIFIER, theirs)
    return [f"classifier.{match[2]}" if match is not None and alone else theirs]


def model_state(saved: Any, path: Path) -> dict[str, Tensor]:
    """The tensors by their names."""
    state = saved.get("model") if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not state:
        found = ", ".join(map(str, saved))[:200] if isinstance(saved, dict) else type(saved).__name__
        raise CheckpointError(f"{path}: has no 'model' with tensors, as fairseq's files do; it holds {found}")
    check_tensors(state, path)
    return state


def arguments(saved: dict[str, Any], path: Path) -> dict[str, Any]:
    """What the model was built with, from either of the places."""
    told = saved.get("args")
    if told is None and isinstance(saved.get("cfg"), dict):
        told = saved["cfg"].get("model")
    told = vars(told) if isinstance(told, argparse.Namespace) else told
    if not isinstance(told, dict):
        raise CheckpointError(
            f"{path}: has neither 'args' nor 'cfg' with a 'model', and nothing else tells the number of attention "
            "heads; save it again with args=argparse.Namespace(encoder_attention_heads=...)"
        )
    plain = str | int | float | bool | None
    return {str(key): value if isinstance(value, plain) else type(value).__name__ for key, value in told.items()}
