"""One example as a T5 learns it: a source that its encoder reads, and a target that its decoder writes.

Both are texts of their own and end in `</s>`; neither begins with anything, since the decoder's start is the model's.
Limits cut as T5 and Tk-Instruct were trained: of a long source the end is left out and `</s>` stays, because their
prompts begin with the task and its definition. A target that is cut has no `</s>`: it did not end there.

- `source_max_len` counts the tokens of the source, `</s>` included; `target_max_len` those of the target.
- `max_len` stands for each of the two that is not given.

A conversation has its last answer for target, and all before for source. What a single user says is the source as it
is; where there is more, each turn stands on a line behind the name of who says it.
"""

from collections.abc import Sequence

from models.errors import ConfigError
from models.tokenizer import Tokenizer
from train.data.config import DataConfig
from train.data.formats import Example, Message
from train.data.tokenized import Tokenized


def tokenize(example: Example, tokenizer: Tokenizer, config: DataConfig, layout: str = "") -> Tokenized:
    """Ids of the source and, for labels, of the target, cut to the configured limits."""
    if tokenizer.eos_token_id is None:
        raise ConfigError("data: this tokenizer has no end-of-text id, so a model could not learn to stop")
    if config.train_on_source:
        raise ConfigError("data: train_on_source is for causal models; a T5's source is read and never written")
    source, target = (tokenizer.encode(text, eos=True) for text in texts(example, config))
    source_len = config.source_max_len or config.max_len or len(source)
    target_len = config.target_max_len or config.max_len or len(target)
    long_source, long_target = len(source) > source_len, len(target) > target_len
    if long_source:
        source = [*source[: source_len - 1], tokenizer.eos_token_id]
    return Tokenized(source, target[:target_len], example.where, example.opening, long_source, long_target)


def texts(example: Example, config: DataConfig) -> tuple[str, str]:
    """Source and target; white space that would join the two to one text belongs to neither."""
    if example.prompt is not None and example.response is not None and config.template == "plain":
        return example.prompt.strip(), example.response.strip()
    if not example.messages:
        raise ConfigError(f"data: {example.where} has a label but no text for it, which a T5 would have to write")
    *history, answer = up_to_last_answer(example.messages)
    if len(history) == 1 and history[0]["role"] == "user":
        return history[0]["content"].strip(), answer["content"].strip()
    turns = [f"{message['role'].capitalize()}: {message['content'].strip()}" for message in history]
    return "\n".join([*turns, "Assistant:"]), answer["content"].strip()


def up_to_last_answer(messages: Sequence[Message]) -> Sequence[Message]:
    """The conversation without what is said after its last answer."""
    last = max(place for place, message in enumerate(messages) if message["role"] == "assistant")
    return messages[: last + 1]
