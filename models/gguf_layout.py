"""GGUF: one file with metadata, tokenizer and (mostly quantized) tensors, read through the gguf package.

As in Meta's layout, query and key rows are in the order of interleaved rotary positions.
"""

import math
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config import RopeScaling, llama_config
from models.config_fields import real, size
from models.errors import CheckpointError
from models.gguf_header import GgufHeader, read_gguf_header
from models.meta_layout import rows_in_order
from models.readers import Stored
from models.rope import inverse_frequencies

NAMES = (  # a GGUF's, and the released one; # stands for a block's number
    ("token_embd", "model.embed_tokens"),
    ("output_norm", "model.norm"),
    ("output", "lm_head"),
    ("blk.#.attn_norm", "model.layers.#.input_layernorm"),
    ("blk.#.attn_q", "model.layers.#.self_attn.q_proj"),
    ("blk.#.attn_k", "model.layers.#.self_attn.k_proj"),
    ("blk.#.attn_v", "model.layers.#.self_attn.v_proj"),
    ("blk.#.attn_output", "model.layers.#.self_attn.o_proj"),
    ("blk.#.ffn_norm", "model.layers.#.post_attention_layernorm"),
    ("blk.#.ffn_gate", "model.layers.#.mlp.gate_proj"),
    ("blk.#.ffn_up", "model.layers.#.mlp.up_proj"),
    ("blk.#.ffn_down", "model.layers.#.mlp.down_proj"),
)
STOP_IDS = ("eos_token_id", "eot_token_id", "eom_token_id")  # ends of a text, of a turn, of a message
ROPE_FACTORS = "rope_freqs.weight"  # llama3 scaling, as the divisor of each frequency


class GgufReader:
    """The tensors of one .gguf under the released names, decoded to float32."""

    # GGUF's scales are float16, but the weights that it approximates were bfloat16 in every LLaMA release
    # since the second.
    released_dtype: torch.dtype | None = torch.bfloat16

    def __init__(self, header: GgufHeader, heads: int, kv_heads: int) -> None:
        self.header = header
        self.heads = {"q_proj": heads, "k_proj": kv_heads}
        self.names = {released_name(name): name for name in header.tensors if name != ROPE_FACTORS}
        self.shapes = {ours: header.tensors[name].shape for ours, name in self.names.items()}

    def read(self, name: str) -> Tensor:
        return self.read_rows(name, 0, self.shapes[name][0])

    def read_rows(self, name: str, start: int, stop: int) -> Tensor:
        heads = self.heads.get(name.split(".")[-2])
        read = partial(self.header.read_rows, self.names[name])
        return rows_in_order(read, self.shapes[name][0], heads, start, stop)

    def stored(self, name: str) -> Stored:
        tensor = self.header.tensors[self.names[name]]
        return Stored(tensor.kind.name, tensor.nbytes)

    def where(self, name: str) -> str:
        return str(self.header.path)


def open_gguf(path: Path) -> tuple[dict[str, Any], GgufReader]:
    """A config in released field names, and the reader of the tensors."""
    header = read_gguf_header(path)
    meta, tensors = header.metadata, header.tensors
    architecture = meta.get("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{path}: architecture {architecture!r} is not known; of GGUF files, llama is")
    for name in ("token_embd.weight", "blk.0.ffn_gate.weight"):
        if name not in tensors:
            raise CheckpointError(f"{path}: lacks {name}; files with experts or fused layers are not read")

    def need(key: str) -> int:
        if f"llama.{key}" not in meta:
            raise CheckpointError(f"{path}: its metadata lacks llama.{key}")
        return optional(key, None)

    def optional(key: str, default: Any) -> int:
        return size(meta.get(f"llama.{key}", default), f"{path}: llama.{key}")

    width, heads = need("embedding_length"), need("attention.head_count")
    kv_heads = optional("attention.head_count_kv", heads)
    head_dim = optional("attention.key_length", meta.get("llama.rope.dimension_count", width // heads))
    epsilon = "llama.attention.layer_norm_rms_epsilon"
    eos = [meta[f"tokenizer.ggml.{k}"] for k in STOP_IDS if f"tokenizer.ggml.{k}" in meta]
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": tensors["token_embd.weight"].shape[0] if tensors["token_embd.weight"].shape else 0,
        "hidden_size": width,
        "intermediate_size": need("feed_forward_length"),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": optional("context_length", 2048),
        # Stored as float32; 9.999999747e-06 was 1e-05.
        "rms_norm_eps": float(f"{real(meta.get(epsilon), f'{path}: {epsilon}'):.6g}"),
        "rope_theta": real(meta.get("llama.rope.freq_base", 10000.0), f"{path}: llama.rope.freq_base"),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(id for id in eos if isinstance(id, int))) or None,
        "pad_token_id": meta.get("tokenizer.ggml.padding_token_id"),
    }
    config["rope_scaling"] = gguf_rope_scaling(header, config)
    return config, GgufReader(header, heads, kv_heads)


def gguf_rope_scaling(header: GgufHeader, config: dict[str, Any]) -> dict[str, Any] | None:
    """Linear scaling is in the metadata; llama3's only shows in the divisors that it led to."""
    path, meta = header.path, header.metadata
    kind = meta.get("llama.rope.scaling.type", "none")
    factor = meta.get("llama.rope.scaling.factor", meta.get("llama.rope.scale_linear"))
    if kind == "linear" or (kind == "none" and factor not in (None, 0, 1)):
        return {"rope_type": "linear", "factor": real(factor or 1, f"{path}: llama.rope.scaling.factor")}
    if kind != "none":
        raise CheckpointError(f"{path}: rotary scaling {kind!r:.80} is not known; linear and llama3 are")
    if ROPE_FACTORS not in header.tensors:
        return None

    divisors = header.read(ROPE_FACTORS).flatten()
    factor = divisors.max().item() if len(divisors) else math.nan
    plain = inverse_frequencies(llama_config(config, str(path)), divisors.device)
    told = size(meta.get("llama.rope.scaling.original_context_length", 8192), f"{path}: original_context_length")
    for original in (told, 8192, 4096, 2048, 16384, 1024, 512, 256, 128, 64):
        guess = RopeScaling(rope_type="llama3", factor=factor, original_max_position_embeddings=original)
        scaled = inverse_frequencies(llama_config({**config, "rope_scaling": vars(guess)}, str(path)), divisors.device)
        if divisors.shape == plain.shape and torch.allclose(plain / divisors, scaled, rtol=1e-3):
            return dict(vars(guess))
    raise CheckpointError(f"{path}: {ROPE_FACTORS} does not follow llama3's scaling with its usual constants")


def released_name(name: str) -> str:
    """What a tensor of a GGUF is called here; an unknown one keeps its name, to be reported by it."""
    return renamed(name, NAMES) or name


def gguf_name(name: str) -> str:
    """What a GGUF calls a parameter: the inverse of `released_name`."""
    found = renamed(name, [(ours, theirs) for theirs, ours in NAMES])
    if found is None:
        raise ValueError(f"{name} has no name in a GGUF of the llama architecture")
    return found


def renamed(name: str, pairs: Iterable[tuple[str, str]]) -> str | None:
    """The second name of the pair whose first one this is, with its block and what stands behind, as `.weight`."""
    block = re.search(r"\.(\d+)\.", name)
    layer, _, part = name.replace(block[0], ".#.", 1).rpartition(".") if block else name.rpartition(".")
    found = dict(pairs).get(layer)
    return found and f"{found}.{part}".replace("#", block[1] if block else "")
