"""One example as a causal model learns it: one text, of which the response is learned, and what is cut of it.

Learned is the response and the end-of-text id behind it, so that the model also learns to stop (in ChatML
that id is the end of a turn). Three limits cut an example, and no end is ever made up:

- `source_max_len` cuts the beginning of the prompt, all that stands before the first response: what is asked,
  and the cue to answer it, stand at its end. The beginning-of-text id stays.
- `target_max_len` cuts a response's end; the example ends there, without an end-of-text id, because the
  response did not end there.
- `max_len` cuts the end of the whole.
"""

from collections.abc import Sequence

from models.chat import render_chat
from models.errors import ConfigError
from models.tokenizer import Tokenizer
from train.data.config import DataConfig
from train.data.formats import Example
from train.data.tokenized import IGNORED, Tokenized


def tokenize(example: Example, tokenizer: Tokenizer, config: DataConfig, layout: str = "") -> Tokenized:
    """Ids and labels of one example, cut to the configured limits.

    The first token is never learned: nothing stands before it to foretell it from. What stands behind the
    last token to learn is left out, since nothing is learned from it.
    """
    ids, learned = render(example, tokenizer, config, layout)
    wanted = sum(learned)

    bos = int(tokenizer.adds_bos and ids[:1] == [tokenizer.bos_token_id])
    over = 0
    if config.source_max_len is not None:
        over = max(0, learned.index(True) - bos - config.source_max_len)
    ids, learned = ids[:bos] + ids[bos + over :], learned[:bos] + learned[bos + over :]

    ends = [len(ids)] if config.max_len is None else [config.max_len]
    if config.target_max_len is not None:
        long = [start for start, stop in runs(learned) if stop - start > config.target_max_len]
        ends += [start + config.target_max_len for start in long[:1]]
    end = max((place + 1 for place, it in enumerate(learned[: min(ends)]) if it), default=0)
    ids, learned = ids[:end], learned[:end]

    cut = sum(learned) < wanted
    if config.train_on_source:
        learned = [True] * end
    learned = [False, *learned[1:]][:end]
    labels = [i if it else IGNORED for i, it in zip(ids, learned, strict=True)]
    return Tokenized(ids, labels, example.where, example.opening, over > 0, cut)


def render(example: Example, tokenizer: Tokenizer, config: DataConfig, layout: str) -> tuple[list[int], list[bool]]:
    """Ids of a whole example, and for each whether it belongs to a response to learn."""
    if example.prompt is not None and example.response is not None and config.template == "plain":
        if tokenizer.eos_token_id is None:
            raise ConfigError("data: this tokenizer has no end-of-text id, so a model could not learn to stop")
        # Encoded apart, so that the prompt has the ids that it will have when the model is to answer it.
        source, target = tokenizer.encode_pair(example.prompt, example.response)
        if tokenizer.adds_bos and tokenizer.bos_token_id is not None:
            source = [tokenizer.bos_token_id, *source]
        target = [*target, tokenizer.eos_token_id]
        return source + target, [False] * len(source) + [True] * len(target)
    style = config.chat_style or ("guanaco" if layout == "guanaco" else None)
    ids, learned = render_chat(tokenizer, list(example.messages), style)
    if example.last_only:
        start, _ = runs(learned)[-1]
        learned = [it and place >= start for place, it in enumerate(learned)]
    return ids, learned


def runs(flags: Sequence[bool]) -> list[tuple[int, int]]:
    """Where the stretches of true flags start and stop."""
    edges = [i for i, (a, b) in enumerate(zip([False, *flags], [*flags, False], strict=True)) if a != b]
    return list(zip(edges[::2], edges[1::2], strict=True))
