"""Models, adapters, checkpoints, tokenizers and generation."""
