"""Writing on: greedy, sampled or by beam search, one text or a batch, all at once or token by token.

What a model needs to go on token by token is its `Decoding`; here tokens are chosen and texts ended. A row that has
stopped is filled with the pad id while others go on. Letters: B batch, T prompt tokens, V vocabulary.
"""

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from models.beam import beam_search, check_beams
from models.decoding import Decoding, begin, ends
from models.model import Model
from models.packed import is_packed
from models.sampling import Sampling, choose, seen_tokens


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
    num_beams: int = 1,
    length_penalty: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | None = None,
) -> Int[Tensor, "B total"]:
    """Each prompt and what follows it, padded on the right with the pad id.

    From a T5, whose encoder reads the prompt, it is the decoder's start token and what follows. Padding on the left
    of a prompt stays where it is; padding on its right is overwritten. `eos_token_id` None stands for the
    checkpoint's own stop ids, -1 for none. With `num_beams` above 1, see `models/beam.py`.
    """
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
    check_beams(num_beams, length_penalty, temperature, max_new_tokens)
    check_prompts(model, input_ids, attention_mask, max_new_tokens)
    stops = stop_ids(model, eos_token_id).to(input_ids.device)
    pad = pad_id(model, stops)
    with torch.inference_mode():
        decoding = begin(model, input_ids, attention_mask, max_new_tokens)
        if num_beams > 1:
            new = beam_search(
                decoding,
                max_new_tokens=max_new_tokens,
                num_beams=num_beams,
                length_penalty=length_penalty,
                repetition_penalty=repetition_penalty,
                stops=stops,
                pad=pad,
            )
        else:
            columns = list(steps(decoding, max_new_tokens, sampling, stops, pad, seed))
            new = torch.stack(columns, dim=1) if columns else input_ids[:, :0]  # (B, new tokens)
    return joined(decoding, new, pad)


@torch.inference_mode()
def stream(
    model: Model,
    input_ids: Int[Tensor, "B T"],
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    sampling: Sampling = Sampling(),
    eos_token_id: int | Sequence[int] | None = None,
    seed: int | Sequence[int] | None = None,
) -> Iterator[Int[Tensor, " B"]]:
    """One column of new tokens after the other; a row that has stopped gives the pad id.

    With a seed for each row, a row's draws are those that it would have alone.
    """
    check_prompts(model, input_ids, attention_mask, max_new_tokens)
    if isinstance(seed, Sequence) and len(seed) != input_ids.shape[0]:
        raise ValueError(
            f"there are {len(seed)} seeds for {input_ids.shape[0]} prompts; give one for all, or one for each"
        )
    stops = stop_ids(model, eos_token_id).to(input_ids.device)
    decoding = begin(model, input_ids, attention_mask, max_new_tokens)
    yield from steps(decoding, max_new_tokens, sampling, stops, pad_id(model, stops), seed)


def steps(
    decoding: Decoding,
    max_new_tokens: int,
    sampling: Sampling,
    stops: Int[Tensor, " stops"],
    pad: int,
    seed: int | Sequence[int] | None,
) -> Iterator[Int[Tensor, " B"]]:
    """Choose a token for every row until all have stopped."""
    device = decoding.opening.device
    if isinstance(seed, Sequence):
        generator = [torch.Generator().manual_seed(each) for each in seed]
    else:
        generator = None if seed is None else torch.Generator(device).manual_seed(seed)
    done = torch.zeros(decoding.opening.shape[0], dtype=torch.bool, device=device)
    seen = chosen = None
    for _ in range(max_new_tokens):
        logits = decoding.first() if chosen is None else decoding.following(chosen)  # (B, V)
        if seen is None and sampling.repetition_penalty != 1.0:
            seen = seen_tokens(decoding.opening, decoding.opening_mask, logits.shape[1])
        chosen = torch.where(done, pad, choose(logits, sampling, seen, generator))
        if seen is not None:
            seen.scatter_(1, chosen[:, None], True)
        yield chosen
        done = done | torch.isin(chosen, stops)
        if bool(done.all()):
            return


def joined(decoding: Decoding, new: Int[Tensor, "B n"], pad: int) -> Int[Tensor, "B total"]:
    """What the texts open with and what was written, without padding between them."""
    opening, mask = decoding.opening, decoding.opening_mask
    if mask is None or new.shape[1] == 0:
        return torch.cat([opening, new], dim=1)
    rows = opening.new_full((opening.shape[0], opening.shape[1] + new.shape[1]), pad)
    for row, prompt, end, continuation in zip(rows, opening, ends(mask), new, strict=True):
        row[:end] = prompt[:end]
        row[end : end + new.shape[1]] = continuation
    return rows


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
        if is_packed(attention_mask):
            raise ValueError("attention_mask numbers several texts in a row; generation takes one prompt a row")


def stop_ids(model: Model, eos_token_id: int | Sequence[int] | None) -> Int[Tensor, " stops"]:
    """The ids that end a text."""
    if eos_token_id is None:
        eos_token_id = model.config.eos_token_id
    given = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id)
    return torch.tensor(sorted(given - {-1}), dtype=torch.long)


def pad_id(model: Model, stops: Int[Tensor, " stops"]) -> int:
    """What fills a row that has stopped: the checkpoint's pad id, else a stop id, else 0."""
    pad = model.config.pad_token_id
    return pad if pad is not None and pad >= 0 else min(stops.tolist(), default=0)
