"""Writing on: greedy or sampled, one text or a batch, all at once or token by token.

Prompts of different length are brought to end together (padding moves to the left), so that every step adds
one column for all of them; positions and attention leave the padding out, and each row gets what it would
get alone. Letters: B batch, T prompt tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.llama import causal
from models.model import Model


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen from its logits."""

    temperature: float = 0.0
    """0 takes the most probable token; 1 samples from the model's own distribution."""
    top_k: int = 0
    """Sample among the k most probable only; 0 for all."""
    top_p: float = 1.0
    """Sample among the fewest tokens whose probabilities reach p (nucleus sampling)."""
    repetition_penalty: float = 1.0
    """Divide the logit of a token that is already there (multiply, where negative)."""

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature is {self.temperature}; it must be 0 or more")
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}; it must be 0 (all) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be above 0 and at most 1")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}; it must be above 0")


def generate(
    model: Model,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | None = None,
) -> Int[Tensor, "B total"]:
    """Each prompt and what follows it, padded on the right with the pad id.

    Padding on the left of a prompt stays where it is; padding on its right is overwritten. `eos_token_id`
    None stands for the checkpoint's own stop ids, -1 for none.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
    steps = stream(
        model,
        input_ids,
        attention_mask,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_token_id=eos_token_id,
        seed=seed,
    )
    columns = list(steps)
    if not columns:
        return input_ids
    new = torch.stack(columns, dim=1)  # (B, new tokens)
    if attention_mask is None:
        return torch.cat([input_ids, new], dim=1)
    pad = pad_id(model, stop_ids(model, eos_token_id))
    total = input_ids.shape[1] + new.shape[1]
    rows = input_ids.new_full((input_ids.shape[0], total), pad)
    for row, prompt, end, continuation in zip(rows, input_ids, ends(attention_mask), new, strict=True):
        row[:end] = prompt[:end]
        row[end : end + new.shape[1]] = continuation
    return rows


@torch.inference_mode()
def stream(
    model: Model,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """One column of new tokens after the other; a row that has stopped gives the pad id."""
    check_prompts(model, input_ids, attention_mask, max_new_tokens)
    stops = torch.tensor(sorted(stop_ids(model, eos_token_id)), device=input_ids.device, dtype=torch.long)
    pad = pad_id(model, set(stops.tolist()))
    generator = None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
    B, T = input_ids.shape
    mask = None
    if attention_mask is not None and not bool(attention_mask.bool().all()):
        input_ids, mask = pad_left(input_ids, attention_mask)

    llama = causal(model, "generation")
    cache = llama.new_cache(B, T + max_new_tokens)
    seen = seen_tokens(model, input_ids, mask) if sampling.repetition_penalty != 1.0 else None
    done = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
    step = input_ids
    for _ in range(max_new_tokens):
        logits = llama.head(llama.model(step, mask, cache)[:, -1]).float()  # (B, V)
        chosen = choose(logits, sampling, seen, generator)
        chosen = torch.where(done, pad, chosen)
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        yield chosen
        done = done | torch.isin(chosen, stops)
        if bool(done.all()):
            return
        step = chosen[:, None]
        if mask is not None:
            mask = torch.cat([mask, mask.new_ones(B, 1)], dim=1)


def choose(
    logits: Float[Tensor, "B V"],
    sampling: Sampling,
    seen: Tensor | None,
    generator: torch.Generator | None,
) -> Int[Tensor, " B"]:
    """The next token of every row."""
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        least = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    if sampling.top_p < 1:
        ordered, order = logits.softmax(dim=-1).sort(dim=-1, descending=True, stable=True)
        # The token that crosses p still belongs to the nucleus: drop those with p reached before them.
        drop = ordered.cumsum(dim=-1) - ordered >= sampling.top_p
        logits = logits.masked_fill(drop.gather(1, order.argsort(dim=-1)), -torch.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]


def check_prompts(
    model: Model, input_ids: Int[Tensor, "B T"], attention_mask: Tensor | None, max_new_tokens: int
) -> None:
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens is {max_new_tokens}; it must be 0 or more")
    if input_ids.shape[1] == 0:
        raise ValueError("the prompt is empty; give at least one token, such as the beginning-of-text id")
    low, high = int(input_ids.min()), int(input_ids.max())
    if low < 0 or high >= model.config.vocab_size:
        raise ValueError(f"prompt ids reach from {low} to {high}; the model knows 0 to {model.config.vocab_size - 1}")
    if attention_mask is not None:
        if attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"attention_mask has shape {tuple(attention_mask.shape)} but the prompts {tuple(input_ids.shape)}"
            )
        if not bool(attention_mask.bool().any(dim=1).all()):
            raise ValueError("a row of attention_mask is all zero: its prompt is empty")


def stop_ids(model: Model, eos_token_id: int | Sequence[int] | None) -> set[int]:
    """The ids that end a text."""
    if eos_token_id is None:
        return set(model.config.eos_token_id)
    given = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    return given - {-1}


def pad_id(model: Model, stops: set[int]) -> int:
    """What fills a row that has stopped: the checkpoint's pad id, else a stop id, else 0."""
    pad = model.config.pad_token_id
    return pad if pad is not None and pad >= 0 else min(stops, default=0)


def ends(attention_mask: Tensor) -> list[int]:
    """One past the last real token of every row."""
    T = attention_mask.shape[1]
    return (T - attention_mask.bool().flip(1).int().argmax(dim=1)).tolist()


def pad_left(input_ids: Int[Tensor, "B T"], attention_mask: Tensor) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Prompts and mask with every row's last real token in the last column."""
    T = input_ids.shape[1]
    shifts = [T - end for end in ends(attention_mask)]
    ids = torch.stack([row.roll(shift) for row, shift in zip(input_ids, shifts, strict=True)])
    mask = torch.stack([row.roll(shift) for row, shift in zip(attention_mask, shifts, strict=True)])
    return ids, mask.long()


def seen_tokens(model: Model, input_ids: Int[Tensor, "B T"], mask: Tensor | None) -> Tensor:
    """(B, V) bool: the tokens that a row's prompt holds, padding aside."""
    seen = torch.zeros(input_ids.shape[0], model.config.vocab_size, dtype=torch.long, device=input_ids.device)
    present = torch.ones_like(input_ids) if mask is None else mask
    return seen.scatter_add_(1, input_ids, present) > 0
