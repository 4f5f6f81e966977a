"""Models, adapters, checkpoints, tokenizers and generation."""

from models.chat import render_chat
from models.lora import LoraConfig
from models.tokenizer import Tokenizer, load_tokenizer, save_tokenizer

__all__ = ["LoraConfig", "Tokenizer", "load_tokenizer", "render_chat", "save_tokenizer"]
