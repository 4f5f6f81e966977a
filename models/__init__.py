"""LLaMA, its adapters, checkpoints, tokenizers and generation."""

from models.adapter import load_adapter, save_adapter
from models.checkpoint import load
from models.errors import CheckpointError, ConfigError, DataError, NonFiniteError, Refusal
from models.generate import Sampling, generate, stream
from models.llama import Llama
from models.lora import LoraConfig, attach_lora, merge_adapter
from models.writer import save

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Llama",
    "LoraConfig",
    "NonFiniteError",
    "Refusal",
    "Sampling",
    "attach_lora",
    "generate",
    "load",
    "load_adapter",
    "merge_adapter",
    "save",
    "save_adapter",
    "stream",
]
