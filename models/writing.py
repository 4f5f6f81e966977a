"""`qlora generate` and `qlora chat`: a model's text on the terminal, as it is written."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from tyro.conf import Positional

from models.chat import render_chat
from models.errors import ConfigError
from models.generate import generate, stream
from models.llama import causal
from models.model import Model
from models.sampling import Sampling
from models.t5 import T5
from models.target import LoadOptions, load_target
from models.tokenizer import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class GenerateOptions:
    """Write on from a prompt; a T5 reads the prompt and writes another text."""

    target: Positional[str]
    """A checkpoint or a run."""
    prompt: str
    """The text to go on from, or for a T5 to read; with --chat, a user's message."""
    chat: bool = False
    """Put the prompt into the model's chat form."""
    max_new_tokens: int = 128
    """Where to stop if the model does not."""
    sampling: Sampling = Sampling()
    """How tokens are chosen."""
    num_beams: int = 1
    """Texts kept at every step in search of the most probable one; 1 for no search."""
    length_penalty: float = 1.0
    """Beam search ranks texts by the sum of their log-probabilities over length^length_penalty."""
    seed: int | None = None
    """Makes sampling repeatable."""
    load: LoadOptions = LoadOptions()
    """How the model is loaded."""
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True, kw_only=True)
class ChatOptions:
    """Talk with a model; an empty line or end of input leaves."""

    target: Positional[str]
    """A checkpoint or a run."""
    system: str | None = None
    """The system message; by default the model's own, if it has one."""
    max_new_tokens: int = 512
    """Longest answer."""
    sampling: Sampling = Sampling(temperature=0.7, top_p=0.9)
    """How tokens are chosen; by default as the paper samples Guanaco."""
    seed: int | None = None
    """Makes sampling repeatable."""
    load: LoadOptions = LoadOptions()
    """How the model is loaded."""
    json: bool = False
    """Print the conversation as one JSON object at the end."""


def generate_command(options: GenerateOptions, console: "Console") -> dict[str, Any]:
    model, tokenizer = load_target(options.target, options.load)
    if options.chat:
        causal(model, "chat")
        ids, _ = render_chat(tokenizer, [{"role": "user", "content": options.prompt}], add_generation_prompt=True)
    elif isinstance(model, T5):
        ids = tokenizer.encode(options.prompt, eos=True)  # as every text was that its encoder was trained on
    else:
        ids = tokenizer.encode(options.prompt, bos=tokenizer.adds_bos)
    if not ids:
        raise ConfigError("generate: the prompt is empty, and this tokenizer has no id to begin a text with")
    beams = {"num_beams": options.num_beams, "length_penalty": options.length_penalty}
    parts = answer(model, tokenizer, ids, options.max_new_tokens, options.sampling, options.seed, **beams)
    text = say(parts, console)
    return {"target": options.target, "prompt": options.prompt, "text": text}


def chat_command(options: ChatOptions, console: "Console") -> dict[str, Any]:
    model, tokenizer = load_target(options.target, options.load)
    causal(model, "chat")
    messages = [] if options.system is None else [{"role": "system", "content": options.system}]
    while True:
        console.print("[bold]> [/bold]", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return {"target": options.target, "messages": messages}
        messages.append({"role": "user", "content": line})
        ids, _ = render_chat(tokenizer, messages, add_generation_prompt=True)
        text = say(answer(model, tokenizer, ids, options.max_new_tokens, options.sampling, options.seed), console)
        if text.strip():
            messages.append({"role": "assistant", "content": text})
        else:
            messages.pop()
            console.print("[dim](no answer; the conversation goes on without the question)[/dim]")


def answer(
    model: Model,
    tokenizer: Tokenizer,
    ids: list[int],
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    seed: int | None = None,
    num_beams: int = 1,
    length_penalty: float = 1.0,
) -> Iterator[str]:
    """The text that follows a prompt, in pieces as it comes; beam search knows it only when it is done."""
    prompt = torch.tensor([ids], device=model.device)
    if num_beams == 1:
        steps = stream(model, prompt, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed)
    else:
        rows = generate(
            model,
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=sampling.temperature,
            repetition_penalty=sampling.repetition_penalty,
            num_beams=num_beams,
            length_penalty=length_penalty,
        )
        opening = 1 if isinstance(model, T5) else len(ids)
        steps = rows[:, opening:].T
    yield from pieces(tokenizer, steps)


def pieces(tokenizer: Tokenizer, steps: Iterable[Int[Tensor, "1"]]) -> Iterator[str]:
    """Text as it becomes certain: a character whose bytes are not all there yet waits for the rest."""
    ids: list[int] = []
    shown = ""
    for step in steps:
        if int(step) >= tokenizer.vocab_size:
            continue  # some embeddings have more rows than there are tokens
        ids.append(int(step))
        text = tokenizer.decode(ids)
        if not text.endswith("�"):
            yield text[len(shown) :]
            shown = text
    yield tokenizer.decode(ids)[len(shown) :]


def say(parts: Iterable[str], console: "Console") -> str:
    """Print the pieces as they come; all of the text comes back."""
    text = ""
    for part in parts:
        console.out(part, end="", highlight=False)
        console.file.flush()
        text += part
    console.out("")
    return text
