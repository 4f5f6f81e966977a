"""A LLaMA's tensors and metadata as a GGUF file.

Base and adapter are merged in float32 onto the decoded base, one layer at a time, and each tensor goes to disk
before the next is made. Matrices are stored in the type that was asked for, norms and biases in float32. Query and
key rows go back to the order of interleaved rotary positions; `models/gguf_layout.py` is the way in.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from models.config import LlamaConfig
from models.errors import CheckpointError
from models.gguf_layout import ROPE_FACTORS, gguf_name
from models.gguf_vocabulary import write_tokenizer
from models.linear import AdaptableLinear
from models.llama import Llama
from models.meta_layout import interleaved_order
from models.methods import merged, merged_bias
from models.rope import inverse_frequencies
from models.tokenizer import Tokenizer

# What a file says it mostly holds, by the name of the type.
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
Q8_BLOCK = 32


@torch.no_grad()
def write_gguf(model: Llama, tokenizer: Tokenizer, path: Path, kind: str) -> None:
    """Header first, then tensor by tensor; nothing is compared yet."""
    import gguf

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_type("model")
    writer.add_file_type(FILE_TYPES[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    write_config(writer, model.config)
    write_tokenizer(writer, tokenizer, model.config)
    divisors = rope_divisors(model.config)
    if divisors is not None:
        writer.add_tensor_info(ROPE_FACTORS, divisors.shape, divisors.dtype, divisors.nbytes)
    for name, shape in shapes(model):
        type = gguf.GGMLQuantizationType[stored_as(name, shape, kind).upper()]
        block, block_bytes = gguf.GGML_QUANT_SIZES[type]
        nbytes = int(np.prod(shape)) // block * block_bytes
        writer.add_tensor_info(gguf_name(name), shape, np.dtype(np.float32), nbytes, raw_dtype=type)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if divisors is not None:
            writer.write_tensor_data(divisors)
        for name, shape in shapes(model):
            weight = weight_of(model, name)
            heads = {"q_proj": model.config.num_attention_heads, "k_proj": model.config.num_key_value_heads}
            count = heads.get(name.split(".")[-2])
            weight = weight.cpu() if count is None else interleaved_order(weight.cpu(), count)
            writer.write_tensor_data(encoded(weight, stored_as(name, shape, kind), name))
    finally:
        writer.close()


def shapes(model: Llama) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every parameter of the model without its adapter, under its released name."""
    with torch.device("meta"):
        plain = Llama(model.config)
    for name, parameter in plain.named_parameters():
        yield name, tuple(parameter.shape)


def weight_of(model: Llama, name: str) -> Float[Tensor, "..."]:
    """A parameter in float32, a 4-bit one decoded, an adapted one merged."""
    owner, _, part = name.rpartition(".")
    layer = model.get_submodule(owner)
    if part == "weight" and isinstance(layer, AdaptableLinear):
        return merged(layer.dense_weight(), layer)
    value = getattr(layer, part).detach().float()  # what was trained whole is no parameter by that name
    return merged_bias(value, layer) if isinstance(layer, AdaptableLinear) else value


def stored_as(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Matrices in the type asked for; rows that no block of 32 divides in 16 bits; the rest in float32."""
    if len(shape) < 2:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % Q8_BLOCK else kind


def encoded(weight: Float[Tensor, "..."], kind: str, name: str) -> np.ndarray:
    """The bytes of a tensor; a number that the type cannot hold is refused."""
    import gguf

    largest = weight.abs().max().item()
    limit = {"f16": 65504.0, "q8_0": 65504.0 * 127}.get(kind, torch.finfo(torch.bfloat16).max)
    if not largest <= limit:
        raise CheckpointError(
            f"export: {name} holds {largest:.4g}, and {kind} ends at {limit:.4g}; "
            + ("the model is broken" if kind == "f32" else "choose --gguf-type f32 or bf16")
        )
    if kind == "q8_0":
        return gguf.quantize(weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
    if kind == "bf16":
        return weight.bfloat16().view(torch.uint16).numpy()
    return weight.numpy().astype(np.float16 if kind == "f16" else np.float32)


def write_config(writer: Any, config: LlamaConfig) -> None:
    """The sizes and switches of the model."""
    import gguf

    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    scaling = config.rope_scaling
    if scaling is not None and scaling.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)
    elif scaling is not None:
        writer.add_rope_scaling_orig_ctx_len(scaling.original_max_position_embeddings)


def rope_divisors(config: LlamaConfig) -> np.ndarray | None:
    """What llama3's scaling divides each rotary frequency by."""
    if config.rope_scaling is None or config.rope_scaling.rope_type != "llama3":
        return None
    device = torch.device("cpu")
    plain = replace(config, rope_scaling=None)
    return (inverse_frequencies(plain, device) / inverse_frequencies(config, device)).numpy()
