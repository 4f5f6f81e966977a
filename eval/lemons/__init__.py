"""Lemon-picking: prompts that show how a chatbot fails."""
