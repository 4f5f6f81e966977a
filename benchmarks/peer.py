"""The peer that training is compared with: bitsandbytes' Linear4bit under LoRA and LLaMA in plain eager torch.

Nothing here is ours but the names: norms, rotary positions, SwiGLU, attention and the loss are written as eager
implementations usually are, one torch function after another, with the logits of all positions at once. Module
names are those of `models.Llama`, so that both can be given the same weights and adapters.
Axes: B batch, T tokens, D width, H query heads, K key/value heads, C channels per head, V vocabulary.
"""

import importlib
import logging
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import kernels
from models.config import LlamaConfig
from models.rope import inverse_frequencies


def quietly_imported() -> Any:
    """bitsandbytes, so imported that `kernels` stays ours and nothing is said about it.

    On a CPU with AVX-512 BF16 it looks for a package called `kernels`, Hugging Face's, which would fetch another
    matrix product from the network. Ours has that name and, imported above, is the one it finds; that it lacks
    what bitsandbytes wants is a warning of no interest, and its own product in C++ is used.
    """
    assert not hasattr(kernels, "get_kernel")
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module("bitsandbytes")
    finally:
        logger.setLevel(before)


bitsandbytes = quietly_imported()


class StoredLinear(bitsandbytes.nn.Linear4bit):
    """Linear4bit with double quantization over a dense weight."""

    def __init__(self, weight: Tensor) -> None:
        N, K = weight.shape
        super().__init__(
            K, N, bias=False, compute_dtype=weight.dtype, compress_statistics=True, quant_type="nf4", device="meta"
        )
        four_bit = bitsandbytes.nn.Params4bit(
            weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=self
        )
        self.weight = four_bit.to(weight.device)  # moving is what quantizes


class LoraLinear(StoredLinear):
    """The same, and beside it a LoRA branch of plain torch."""

    def __init__(self, weight: Tensor, rank: int, scaling: float, dropout: float = 0.0) -> None:
        super().__init__(weight)
        N, K = weight.shape
        self.lora_A = nn.Linear(K, rank, bias=False, device=weight.device)  # float32, as the optimizer wants it
        self.lora_B = nn.Linear(rank, N, bias=False, device=weight.device)
        self.scaling, self.dropout = scaling, dropout

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout, self.training)
        inner = F.linear(dropped, self.lora_A.weight.to(x.dtype))
        return super().forward(x) + F.linear(inner, self.lora_B.weight.to(x.dtype)) * self.scaling


class RMSNorm(nn.Module):
    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        variance = h.pow(2).mean(-1, keepdim=True)
        return self.weight * (h * torch.rsqrt(variance + self.eps)).to(x.dtype)


def rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), dim=-1)


class Attention(nn.Module):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, C)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, C)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, K, T, C)
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(y.transpose(1, 2).contiguous().view(B, T, -1))


class MLP(nn.Module):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config.head_dim)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1], device=x.device).float()
        angles = torch.outer(positions, inverse_frequencies(self.config, x.device))
        angles = torch.cat((angles, angles), dim=-1)[None, None]  # (1, 1, T, C)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            if self.gradient_checkpointing:
                x = checkpoint(layer, x, cos, sin, use_reentrant=False)
            else:
                x = layer(x, cos, sin)
        return self.norm(x)


class Llama(nn.Module):
    """LLaMA with tied embeddings, built from a stream of named weights: a linear layer is quantized as it comes."""

    def __init__(self, config: LlamaConfig, weights: Iterable[tuple[str, Tensor]], rank: int, alpha: float) -> None:
        super().__init__()
        assert config.tie_word_embeddings
        with torch.device("meta"):
            self.model = Decoder(config)
        for name, weight in weights:
            parent, _, leaf = name.removesuffix(".weight").rpartition(".")
            if leaf.endswith("_proj"):
                self.get_submodule(parent).add_module(leaf, LoraLinear(weight, rank, alpha / rank))
            else:
                self.get_submodule(f"{parent}.{leaf}").weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)"""
        return F.linear(self.model(input_ids), self.model.embed_tokens.weight)

    def loss(self, *, input_ids: Tensor, labels: Tensor) -> Tensor:
        logits = self(input_ids).float()
        shifted = F.pad(labels, (0, 1), value=-100)[:, 1:]
        return F.cross_entropy(logits.view(-1, logits.shape[-1]), shifted.reshape(-1), ignore_index=-100)

    @staticmethod
    def label_count(labels: Tensor) -> int:
        return int((labels[:, 1:] != -100).sum())
