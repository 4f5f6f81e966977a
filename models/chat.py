"""Conversations as token ids, in the form that a model was or will be trained on.

`chatml`: SmolLM2's and others' `<|im_start|>role ... <|im_end|>`. `guanaco`: `### Human: ...### Assistant: ...`
as in the paper's OASST1 data. Marks of turns are put in as ids; what people wrote is always plain text, so
nobody can end a turn by writing its mark.
"""

from collections.abc import Sequence

from models.errors import DataError
from models.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
# The template of SmolLM2 puts this where a conversation has no system message.
SMOLLM2_SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def render_chat(
    tokenizer: Tokenizer,
    messages: Sequence[dict[str, str]],
    style: str | None = None,
    add_generation_prompt: bool = False,
) -> tuple[list[int], list[bool]]:
    """Ids of a conversation, and for each whether it is learned: what the assistant says, and its end.

    Messages have a role (system, user, assistant) and content. With `add_generation_prompt` the ids end where
    the assistant is to speak. `style` is chatml or guanaco; by default what the tokenizer has marks for.
    """
    if not messages:
        raise DataError("chat: the conversation is empty")
    for number, message in enumerate(messages, 1):
        if message.get("role") not in ROLES:
            raise DataError(f"chat: message {number} is by {message.get('role')!r}; known are {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"chat: message {number} has no text as its content")
    marks = {"<|im_start|>", "<|im_end|>"} <= tokenizer.special_tokens.keys()
    style = style or ("chatml" if marks else "guanaco")
    if style == "chatml":
        if not marks:
            raise DataError("chat: this tokenizer lacks <|im_start|> and <|im_end|>; use the style guanaco")
        return chatml(tokenizer, messages, add_generation_prompt)
    if style == "guanaco":
        return guanaco(tokenizer, messages, add_generation_prompt)
    raise DataError(f"chat: style {style!r} is not known; give chatml or guanaco")


def chatml(
    tokenizer: Tokenizer, messages: Sequence[dict[str, str]], add_generation_prompt: bool
) -> tuple[list[int], list[bool]]:
    start, end = tokenizer.special_tokens["<|im_start|>"], tokenizer.special_tokens["<|im_end|>"]
    line = tokenizer.encode("\n")
    ids: list[int] = []
    trained: list[bool] = []
    if messages[0]["role"] != "system" and SMOLLM2_SYSTEM in (tokenizer.chat_template or SMOLLM2_SYSTEM):
        messages = [{"role": "system", "content": SMOLLM2_SYSTEM}, *messages]
    for message in messages:
        head = [start, *tokenizer.encode(message["role"] + "\n")]
        body = [*tokenizer.encode(message["content"]), end]
        ids += head + body + line
        trained += [False] * len(head) + [message["role"] == "assistant"] * len(body) + [False] * len(line)
    if add_generation_prompt:
        head = [start, *tokenizer.encode("assistant\n")]
        ids, trained = ids + head, trained + [False] * len(head)
    return ids, trained


def guanaco(
    tokenizer: Tokenizer, messages: Sequence[dict[str, str]], add_generation_prompt: bool
) -> tuple[list[int], list[bool]]:
    """The end-of-text id stands behind every answer, so that a model learns to leave the next turn to us."""
    end = tokenizer.eos_token_id
    if end is None:
        raise DataError("chat: this tokenizer has no end-of-text id, so an answer could not end")
    bos = tokenizer.bos_token_id if tokenizer.adds_bos else None
    ids = [] if bos is None else [bos]
    trained = [False] * len(ids)
    pending = ""  # text that is not learned, up to the next answer
    for message in messages:
        content = message["content"].strip()
        if message["role"] != "assistant":
            pending += f"### Human: {content}" if message["role"] == "user" else f"{content}\n"
            continue
        before, answer = tokenizer.encode_pair(f"{pending}### Assistant:", f" {content}")
        ids += [*before, *answer, end]
        trained += [False] * len(before) + [True] * (len(answer) + 1)
        pending = ""
    if add_generation_prompt:
        pending += "### Assistant:"
    rest = tokenizer.encode(pending)
    return ids + rest, trained + [False] * len(rest)
