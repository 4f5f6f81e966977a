"""What an example leaves open until it is known who learns it: which of its responses, and how long a prompt.

A response is drawn by the seed and what is asked, and so is the same in every epoch: lengths, and with them the
batches, the packing and the plan of memory, follow from examples that do not change. A prompt is written to fit where
the layout has a rule for it; the limits of `seq2seq` and `causal` then find little or nothing to cut.
"""

from dataclasses import replace
from hashlib import blake2b

from eval.room import Room
from models.tokenizer import Tokenizer
from train.data.config import DataConfig
from train.data.example import Example, exchange, joined


def settled(example: Example, task: str, tokenizer: Tokenizer, config: DataConfig) -> Example:
    """The example as it is learned."""
    if example.prompt is None or example.response is None or not (example.others or example.fit):
        return example
    prompt, response = example.prompt, example.response.strip()
    if example.others:
        response = drawn([response, *example.others], f"{config.seed} {example.opening}").strip()
    most = config.source_max_len or (config.max_len if task == "seq2seq" else None)
    if example.fit is not None and most is not None:
        prompt = example.fit(Room(tokenizer, most, eos=task == "seq2seq"))
    made = exchange(prompt.strip(), response, prompt, joined(prompt, response))
    if task == "causal":  # tokens begin with their space: it belongs to the response, as in evaluation
        bare = prompt.rstrip(" ")
        made = replace(made, prompt=bare, response=f"{prompt[len(bare) :]}{made.response}")
    return replace(example, messages=made.messages, prompt=made.prompt, response=made.response)


def lost_end(example: Example, decided: Example) -> bool:
    """Whether the prompt that fits is without its end, so that more than examples was left out of it."""
    whole, fitting = (it.prompt.rstrip() if it.prompt else "" for it in (example, decided))
    return not whole.endswith(fitting[-20:])


def drawn(texts: list[str], by: str) -> str:
    """One of several texts, by a hash."""
    number = int.from_bytes(blake2b(by.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
    return texts[number % len(texts)]
