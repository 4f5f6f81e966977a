"""Examples as text, with what is learned of them in double brackets: what a person reads before a run."""

from collections.abc import Sequence

from models.tokenizer import Tokenizer
from train.data.causal import runs
from train.data.tokenized import IGNORED, Tokenized


def preview(examples: Sequence[Tokenized], tokenizer: Tokenizer, count: int = 3) -> str:
    """The first examples as training sees them: [[what is learned]] in double brackets, ids as text."""
    return "\n\n".join(f"{headline(e)}\n{marked(e, tokenizer)}" for e in examples[:count])


def headline(example: Tokenized) -> str:
    cuts = (["prompt cut"] if example.cut_prompt else []) + (["response cut"] if example.cut_response else [])
    size = f"{len(example.input_ids) + example.target_length} tokens, {example.label_count} learned"
    return f"--- {', '.join([example.where, size, *cuts])}"


def marked(example: Tokenized, tokenizer: Tokenizer) -> str:
    """An example's text, and behind it a target of its own or its label.

    Each stretch is decoded for itself, so that a bracket stands between tokens.
    """
    if example.label is not None:
        return f"{shown(example.input_ids, tokenizer)}[[{example.label}]]"
    if example.target_length:
        return f"{shown(example.input_ids, tokenizer)}[[{shown(example.labels, tokenizer)}]]"
    text, done = "", 0
    for start, stop in runs([label != IGNORED for label in example.labels]):
        before, learned = example.input_ids[done:start], example.input_ids[start:stop]
        text += f"{shown(before, tokenizer)}[[{shown(learned, tokenizer)}]]"
        done = stop
    return text + shown(example.input_ids[done:], tokenizer)


def shown(ids: list[int], tokenizer: Tokenizer) -> str:
    return tokenizer.decode(ids, skip_special=False)
