"""GGUF: one file with metadata, tokenizer and (mostly quantized) tensors, read through the gguf package.

As in Meta's layout, query and key rows are in the order of interleaved rotary positions.
"""

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config import RopeScaling, llama_config
from models.config_fields import real, size
from models.errors import CheckpointError
from models.gguf_header import GgufHeader, read_gguf_header
from models.meta_layout import half_rotation_order
from models.readers import Stored
from models.rope import inverse_frequencies

NAMES = (
    (r"token_embd\.(.*)", r"model.embed_tokens.\1"),
    (r"output_norm\.(.*)", r"model.norm.\1"),
    (r"output\.(.*)", r"lm_head.\1"),
    (r"blk\.(\d+)\.attn_norm\.(.*)", r"model.layers.\1.input_layernorm.\2"),
    (r"blk\.(\d+)\.attn_q\.(.*)", r"model.layers.\1.self_attn.q_proj.\2"),
    (r"blk\.(\d+)\.attn_k\.(.*)", r"model.layers.\1.self_attn.k_proj.\2"),
    (r"blk\.(\d+)\.attn_v\.(.*)", r"model.layers.\1.self_attn.v_proj.\2"),
    (r"blk\.(\d+)\.attn_output\.(.*)", r"model.layers.\1.self_attn.o_proj.\2"),
    (r"blk\.(\d+)\.ffn_norm\.(.*)", r"model.layers.\1.post_attention_layernorm.\2"),
    (r"blk\.(\d+)\.ffn_gate\.(.*)", r"model.layers.\1.mlp.gate_proj.\2"),
    (r"blk\.(\d+)\.ffn_up\.(.*)", r"model.layers.\1.mlp.up_proj.\2"),
    (r"blk\.(\d+)\.ffn_down\.(.*)", r"model.layers.\1.mlp.down_proj.\2"),
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
        weight = self.header.read(self.names[name])
        heads = self.heads.get(name.split(".")[-2])
        return half_rotation_order(weight, heads) if heads else weight

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
    for pattern, released in NAMES:
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(released)
    return name  # unknown: reported under its own name


def gguf_name(name: str) -> str:
    """What a GGUF calls a parameter: the inverse of `released_name`."""
    for theirs, released in NAMES:
        groups = re.findall(r"\(.*?\)", theirs)
        pattern, template = re.escape(released), theirs.replace("\\.", ".")
        for i, group in enumerate(groups, 1):
            pattern, template = pattern.replace(f"\\\\{i}", group), template.replace(group, f"\\{i}", 1)
        match = re.fullmatch(pattern, name)
        if match is not None:
            return match.expand(template)
    raise ValueError(f"{name} has no name in a GGUF of the llama architecture")
