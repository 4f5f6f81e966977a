"""Models, adapters, checkpoints, tokenizers and generation."""

from models.lora import LoraConfig

__all__ = ["LoraConfig"]
