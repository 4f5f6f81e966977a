"""`qlora chat`, and a model's text on the terminal as it is written."""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor
from tyro.conf import Positional

from models.chat import render_chat
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
