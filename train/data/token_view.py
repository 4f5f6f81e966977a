"""One example as a person sees it at a terminal: every token with its bounds, what is learned in colour.

Tokens are told apart by two shades in turn. A byte-level token can be part of a character: the character stands
with the token that completes it.
"""

from collections.abc import Iterator
from itertools import cycle

from rich.text import Text

from eval.data.records import printable
from models.tokenizer import Tokenizer
from train.data.tokenized import IGNORED, Tokenized

LEARNED = ("black on green", "black on bright_green")
CONTEXT = ("dim", "dim underline")
UNKNOWN = "\ufffd"  # what the bytes of an unfinished character are decoded to


def legend() -> Text:
    return Text.assemble(("context", CONTEXT[0]), "  ", ("learned", LEARNED[0]), ("tokens", LEARNED[1]), "  ↵ newline")


def view(example: Tokenized, tokenizer: Tokenizer) -> Text:
    """The tokens of an example, and behind them a target of its own or its label."""
    text = Text()
    if example.label is not None or example.target_length:
        flags = [False] * len(example.input_ids)
    else:
        flags = [label != IGNORED for label in example.labels]
    add(text, example.input_ids, flags, tokenizer)
    if example.label is not None:
        text.append(" → ").append(str(example.label), LEARNED[0])
    elif example.target_length:
        text.append(" → ")
        add(text, example.labels, [True] * len(example.labels), tokenizer)
    return text


def add(text: Text, ids: list[int], learned: list[bool], tokenizer: Tokenizer) -> None:
    shades = {True: cycle(LEARNED), False: cycle(CONTEXT)}
    for piece, it in zip(pieces(ids, tokenizer), learned, strict=True):
        text.append(printable(piece).replace("\n", "↵\n"), next(shades[it]))


def pieces(ids: list[int], tokenizer: Tokenizer) -> Iterator[str]:
    """What each token adds to the text; together they are the text."""
    whole, start = 0, 0  # where the last whole characters end, and those before them begin
    for place in range(1, len(ids) + 1):
        # Decoded behind the token before, since that decides whether a space stands between.
        before, now = (tokenizer.decode(ids[start:stop], skip_special=False) for stop in (whole, place))
        if now.endswith(UNKNOWN) and place < len(ids):
            yield ""
        else:
            yield now.removeprefix(before)
            whole, start = place, whole
