"""Texts that a model writes while it learns: the same few prompts answered at each evaluation, side by side in time.

Answers are greedy and draw no random number, so a run with samples and one without make the same steps.
Of several processes each answers some of the prompts.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eval.dealing import in_order
from eval.mode import evaluating
from models import ConfigError, Llama
from models.parallel import world
from models.parallel.turns import Turns
from models.t5 import T5
from models.tokenizer import Tokenizer
from models.writing import answer
from train.data import DataConfig
from train.data.causal import tokenize
from train.data.example import Example
from train.data.examples import open_examples
from train.data.tokenized import IGNORED, Tokenized
from train.recipe import RunConfig
from train.run import Run

JOURNAL = "eval/samples.jsonl"


@dataclass(frozen=True)
class Sampler:
    """Answers its prompts when it is called with a step, into eval/samples.jsonl and as lines to show."""

    model: Any
    tokenizer: Tokenizer
    prompts: tuple[tuple[int, ...], ...]
    max_new_tokens: int
    run: Run
    eval_steps: int | None = None
    """At each evaluation."""

    @torch.inference_mode()
    def __call__(self, step: int) -> list[str]:
        with evaluating(self.model), Turns(self.model) as turns:
            mine = [self.text(ids) for ids in self.prompts[world.rank() :: world.size()]]
            texts = in_order(turns.gathered(mine))
        shown = []
        for ids, text in zip(self.prompts, texts, strict=True):
            prompt = self.tokenizer.decode(list(ids))
            self.run.append(JOURNAL, step=step, prompt=prompt, text=text)
            shown.append(f"step {step}  {shortened(prompt)} → {text.strip()!r}")
        return shown

    def text(self, ids: tuple[int, ...]) -> str:
        """What the model writes after a prompt."""
        room = self.max_new_tokens
        if self.model.max_tokens is not None:
            room = min(room, self.model.max_tokens - len(ids))
        return "".join(answer(self.model, self.tokenizer, list(ids), room))


def sampler(
    config: RunConfig, model: Any, tokenizer: Tokenizer, held_out: Sequence[Tokenized], run: Run
) -> Sampler | None:
    """Give what answers the prompts that the config asks for; None if it asks for none."""
    if not (config.samples or config.sample_prompts):
        return None
    if not isinstance(model, (Llama, T5)):
        raise ConfigError(f"samples: {type(model).__name__} writes no text; leave out samples and sample_prompts")
    prompts = held_out_prompts(config, model, held_out) + own_prompts(config, model, tokenizer)
    for number, ids in enumerate(prompts, 1):
        if model.max_tokens is not None and len(ids) >= model.max_tokens:
            raise ConfigError(
                f"samples: prompt {number} has {len(ids)} tokens, which leaves no room for an answer in the "
                f"{model.max_tokens} positions that the model knows; give a shorter one"
            )
    return Sampler(model, tokenizer, tuple(prompts), config.sample_tokens, run)


def held_out_prompts(config: RunConfig, model: Any, held_out: Sequence[Tokenized]) -> list[tuple[int, ...]]:
    """The prompts of the first examples held out, up to the first answer."""
    if config.samples and not held_out:
        raise ConfigError("samples answers held-out examples, and there are none; set data.eval_size above 0")
    if config.samples and config.data.train_on_source and not isinstance(model, T5):
        raise ConfigError(
            "samples cannot tell prompts from answers where data.train_on_source learns both; give sample_prompts"
        )
    chosen = [held_out[i] for i in range(min(config.samples, len(held_out)))]
    return [tuple(e.input_ids) if isinstance(model, T5) else before_answer(e) for e in chosen]


def own_prompts(config: RunConfig, model: Any, tokenizer: Tokenizer) -> list[tuple[int, ...]]:
    """The prompts that were given as texts, in the form that the data has."""
    if isinstance(model, T5):
        return [tuple(tokenizer.encode(text, eos=True)) for text in config.sample_prompts]
    if not config.sample_prompts:
        return []
    examples = open_examples(config.data.path, config.data.format)
    chat = config.data.template == "chat" or examples[0].prompt is None
    uncut = replace(config.data, train_on_source=False, max_len=None, source_max_len=None, target_max_len=None)
    return [asked(text, chat, tokenizer, uncut, examples.format) for text in config.sample_prompts]


def asked(text: str, chat: bool, tokenizer: Tokenizer, config: DataConfig, layout: str) -> tuple[int, ...]:
    """A text as training would show it, up to where the answer begins; the answer here is any."""
    if chat:
        example = Example(({"role": "user", "content": text}, {"role": "assistant", "content": "."}))
    else:
        example = Example(prompt=text, response=" .")
    return before_answer(tokenize(example, tokenizer, config, layout))


def before_answer(example: Tokenized) -> tuple[int, ...]:
    first = next(place for place, label in enumerate(example.labels) if label != IGNORED)
    return tuple(example.input_ids[:first])


def shortened(prompt: str, width: int = 60) -> str:
    """The end of a prompt, on one line: what is asked stands there.

    >>> shortened("a long prompt with two\\nlines", 12)
    "'…two lines'"
    """
    line = " ".join(prompt.split())
    return repr(line if len(line) <= width else f"…{line[-(width - 3) :].lstrip()}")
