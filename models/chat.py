"""Chats as token ids, with a mark on those that are trained.

Two forms. ChatML, as SmolLM2 was tuned on, wraps each message in two special tokens:

    <|im_start|>user\\nHow high is Mont Blanc?<|im_end|>\\n<|im_start|>assistant\\n4,806 metres.<|im_end|>\\n

Guanaco, of the QLoRA paper's OASST1 models, is plain text, with the end-of-text token after each answer:

    ### Human: How high is Mont Blanc?### Assistant: 4,806 metres.</s>

Special tokens are inserted as ids and all content is plain text, so no message can imitate ChatML's frame.
What is trained is an answer and the token that ends it.
"""

from collections.abc import Sequence
from typing import Any

from models.errors import ConfigError, DataError
from models.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
DEFAULT_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
CHATML_START, CHATML_END = "<|im_start|>", "<|im_end|>"
STYLES = ("chatml", "guanaco")


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Any],
    style: str | None = None,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """Ids of a chat and, for each, whether it is trained; with the opening of an answer at the end if asked.

    A message is {"role": "system" | "user" | "assistant", "content": text}. Without a style it is "chatml"
    where the tokenizer has its special tokens, else "guanaco". The answer's text is encoded on its own,
    so that in training it follows exactly the ids that generation will start from.
    """
    has_chatml = {CHATML_START, CHATML_END} <= tokenizer.special_tokens.keys()
    style = style or ("chatml" if has_chatml else "guanaco")
    if style not in STYLES:
        raise ConfigError(f'chat style "{style}" is unknown; known are {", ".join(STYLES)}')
    if style == "chatml" and not has_chatml:
        raise ConfigError(
            f'chat style "chatml" needs the special tokens {CHATML_START} and {CHATML_END}, which this'
            ' tokenizer lacks; "guanaco" needs none'
        )
    _check(messages)
    return (_chatml if style == "chatml" else _guanaco)(tokenizer, messages, add_generation_prompt)


class _Rendering:
    """Ids and their marks, growing together."""

    def __init__(self):
        self.ids: list[int] = []
        self.trained: list[bool] = []

    def add(self, ids: list[int], trained: bool = False) -> None:
        self.ids += ids
        self.trained += [trained] * len(ids)


def _chatml(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], add_generation_prompt: bool
) -> tuple[list[int], list[bool]]:
    """SmolLM2's template: a default system message comes first unless the chat has one there."""
    start, end = ([tokenizer.special_tokens[token]] for token in (CHATML_START, CHATML_END))
    if messages[0]["role"] != "system":
        messages = [{"role": "system", "content": DEFAULT_SYSTEM}, *messages]

    out = _Rendering()
    for message in messages:
        out.add(start)
        if message["role"] == "assistant":
            out.add(tokenizer.encode("assistant\n"))
            out.add(tokenizer.encode(message["content"]) + end, trained=True)
        else:
            out.add(tokenizer.encode(f"{message['role']}\n{message['content']}") + end)
        out.add(tokenizer.encode("\n"))
    if add_generation_prompt:
        out.add(start + tokenizer.encode("assistant\n"))
    return out.ids, out.trained


def _guanaco(
    tokenizer: Tokenizer, messages: Sequence[dict[str, Any]], add_generation_prompt: bool
) -> tuple[list[int], list[bool]]:
    """The form of the OASST1-Guanaco data; a system message stands before it, on a line of its own."""
    if tokenizer.eos_token_id is None:
        raise ConfigError('chat style "guanaco" ends answers with the end-of-text token, which this tokenizer lacks')
    space = "" if tokenizer.starts_with_space else " "

    out, prompt = _Rendering(), ""
    if tokenizer.adds_bos and tokenizer.bos_token_id is not None:
        out.add([tokenizer.bos_token_id])
    for message in messages:
        if message["role"] == "assistant":
            out.add(tokenizer.encode(prompt + "### Assistant:"))
            answer = tokenizer.encode(space + message["content"])
            out.add([*answer, tokenizer.eos_token_id], trained=True)
            prompt = ""
        else:
            prompt += f"{message['content']}\n" if message["role"] == "system" else f"### Human: {message['content']}"
    if add_generation_prompt:
        prompt += "### Assistant:"
    if prompt:
        out.add(tokenizer.encode(prompt))
    return out.ids, out.trained


def _check(messages: Sequence[Any]) -> None:
    if not messages:
        raise DataError("a chat has no messages; at least one from the user is needed")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise DataError(f"message {number} is a {type(message).__name__} where a table is expected")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            raise DataError(f"message {number} has the role {role!r}; known are {', '.join(ROLES)}")
        if not isinstance(content, str):
            raise DataError(f'message {number} ({role}) has no text: "content" is {content!r:.80}')
        if role == "assistant" and not content.strip():
            raise DataError(f"message {number} ({role}) is empty")
