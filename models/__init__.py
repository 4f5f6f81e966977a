"""LLaMA, T5 and RoBERTa, their adapters, checkpoints, tokenizers and generation."""

from models.adapter import load_adapter, save_adapter
from models.bitfit import BitfitConfig
from models.chat import render_chat
from models.checkpoint import load
from models.errors import CheckpointError, ConfigError, DataError, NonFiniteError, Refusal
from models.generate import generate, stream
from models.ia3 import Ia3Config
from models.llama import Llama
from models.lora import LoraConfig, attach_lora
from models.methods import AdapterConfig, attach, detach, merge_adapter
from models.model import Model
from models.prefix import PrefixConfig
from models.sampling import Sampling
from models.t5 import T5
from models.tokenizer import Tokenizer, load_tokenizer, save_tokenizer
from models.writer import save

__all__ = [
    "T5",
    "AdapterConfig",
    "BitfitConfig",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Ia3Config",
    "Llama",
    "LoraConfig",
    "Model",
    "NonFiniteError",
    "PrefixConfig",
    "Refusal",
    "Sampling",
    "Tokenizer",
    "attach",
    "attach_lora",
    "detach",
    "generate",
    "load",
    "load_adapter",
    "load_tokenizer",
    "merge_adapter",
    "render_chat",
    "save",
    "save_adapter",
    "save_tokenizer",
    "stream",
]
