"""The paper's Tables 3 and 4: full fine-tuning, LoRA and QLoRA side by side, and how far they can be told apart."""
