"""Evaluation: what a model's predictions are worth, by protocols that have names."""

from eval.perplexity import Perplexity, perplexity

__all__ = ["Perplexity", "perplexity"]
