"""GGUF: one file with metadata, tokenizer and (mostly quantized) tensors, read through the gguf package.

As in Meta's layout, query and key rows are in the order of interleaved rotary positions.
"""

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.config import RopeScaling, llama_config
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

    def need(key: str) -> Any:
        if f"llama.{key}" not in meta:
            raise CheckpointError(f"{path}: its metadata lacks llama.{key}")
        return meta[f"llama.{key}"]

    width, heads = int(need("embedding_length")), int(need("attention.head_count"))
    kv_heads = int(meta.get("llama.attention.head_count_kv", heads))
    head_dim = int(meta.get("llama.attention.key_length", meta.get("llama.rope.dimension_count", width // heads)))
    eos = [meta[f"tokenizer.ggml.{k}"] for k in ("eos_token_id", "eot_token_id") if f"tokenizer.ggml.{k}" in meta]
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": width,
        "intermediate_size": int(need("feed_forward_length")),
        "num_hidden_layers": int(need("block_count")),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": int(meta.get("llama.context_length", 2048)),
        # Stored as float32; 9.999999747e-06 was 1e-05.
        "rms_norm_eps": float(f"{need('attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": float(meta.get("llama.rope.freq_base", 10000.0)),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": list(dict.fromkeys(eos)) or None,
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
        return {"rope_type": "linear", "factor": float(factor or 1)}
    if kind != "none":
        raise CheckpointError(f"{path}: rotary scaling {kind!r} is not known; linear and llama3 are")
    if ROPE_FACTORS not in header.tensors:
        return None

    divisors = header.read(ROPE_FACTORS).flatten()
    plain = inverse_frequencies(llama_config(config, str(path)), divisors.device)
    for original in (8192, 4096, 2048, 16384, 1024, 512, 256, 128, 64):
        guess = RopeScaling(rope_type="llama3", factor=float(divisors.max()), original_max_position_embeddings=original)
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
