"""Chats as ids: SmolLM2's own template defines ChatML, the OASST1-Guanaco data the other form."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import Template

import models
from models.chat import DEFAULT_SYSTEM
from models.errors import ConfigError, DataError

DATA = Path(__file__).parent / "data" / "tokenizers"
SMOLLM2 = models.load_tokenizer(DATA / "smollm2")
GPT2 = models.load_tokenizer(DATA / "gpt2")

contents = st.text("abc theing <|im_end|>\n#:1", min_size=1, max_size=30).filter(str.strip)
messages_of = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content},
              st.sampled_from(["system", "user", "assistant"]), contents),
    min_size=1, max_size=5,
)  # fmt: skip
CHAT = [
    {"role": "user", "content": "How high is Mont Blanc?"},
    {"role": "assistant", "content": "4,806 metres."},
    {"role": "user", "content": "And in feet?"},
    {"role": "assistant", "content": "15,766."},
]


def trained_text(tokenizer: models.Tokenizer, ids: list[int], trained: list[bool]) -> str:
    kept = [id for id, mark in zip(ids, trained, strict=True) if mark]
    return tokenizer.decode(kept, skip_special=False)


# ---- properties


@given(messages=messages_of, prompt=st.booleans())
def test_chatml_is_the_text_that_the_models_template_gives(messages, prompt):
    template = Template((DATA / "smollm2/chat_template.jinja").read_text())
    ids, _ = models.render_chat(SMOLLM2, messages, add_generation_prompt=prompt)
    expected = template.render(messages=messages, add_generation_prompt=prompt)
    assert SMOLLM2.decode(ids, skip_special=False) == expected


@given(messages=messages_of)
def test_chatml_trains_answers_and_the_token_that_ends_them(messages):
    answers = [m["content"] + "<|im_end|>" for m in messages if m["role"] == "assistant"]
    assert trained_text(SMOLLM2, *models.render_chat(SMOLLM2, messages)) == "".join(answers)


@given(messages=messages_of)
def test_guanaco_trains_answers_and_the_end_of_text(messages):
    answers = [f" {m['content']}<|endoftext|>" for m in messages if m["role"] == "assistant"]
    assert trained_text(GPT2, *models.render_chat(GPT2, messages)) == "".join(answers)


@given(messages=messages_of)
def test_no_message_can_imitate_chatmls_frame(messages):
    ids, _ = models.render_chat(SMOLLM2, messages)
    framed = len(messages) + (messages[0]["role"] != "system")
    assert ids.count(SMOLLM2.special_tokens["<|im_start|>"]) == framed
    assert ids.count(SMOLLM2.special_tokens["<|im_end|>"]) == framed


@pytest.mark.parametrize("tokenizer", [SMOLLM2, GPT2])
@given(content=contents, answer=contents)
def test_training_starts_an_answer_from_the_ids_that_generation_starts_from(tokenizer, content, answer):
    question = [{"role": "user", "content": content}]
    prompt, nothing = models.render_chat(tokenizer, question, add_generation_prompt=True)
    ids, trained = models.render_chat(tokenizer, [*question, {"role": "assistant", "content": answer}])
    assert not any(nothing)
    assert ids[: len(prompt)] == prompt
    assert trained.index(True) == len(prompt)


# ---- what the forms look like


def test_chatml_puts_smollm2s_default_system_message_first():
    ids, _ = models.render_chat(SMOLLM2, CHAT[:1], add_generation_prompt=True)
    assert SMOLLM2.decode(ids, skip_special=False) == (
        f"<|im_start|>system\n{DEFAULT_SYSTEM}<|im_end|>\n"
        "<|im_start|>user\nHow high is Mont Blanc?<|im_end|>\n<|im_start|>assistant\n"
    )
    ids, _ = models.render_chat(SMOLLM2, [{"role": "system", "content": ""}, *CHAT[:1]])
    assert SMOLLM2.decode(ids, skip_special=False).startswith("<|im_start|>system\n<|im_end|>\n<|im_start|>user")


def test_guanaco_is_plain_text_with_the_end_of_text_after_each_answer():
    ids, _ = models.render_chat(GPT2, CHAT)
    assert GPT2.decode(ids, skip_special=False) == (
        "### Human: How high is Mont Blanc?### Assistant: 4,806 metres.<|endoftext|>"
        "### Human: And in feet?### Assistant: 15,766.<|endoftext|>"
    )
    ids, _ = models.render_chat(GPT2, [{"role": "system", "content": "Be brief."}, CHAT[0]], "guanaco", True)
    assert GPT2.decode(ids) == "Be brief.\n### Human: How high is Mont Blanc?### Assistant:"


def test_a_style_can_be_chosen_where_the_tokenizer_has_both():
    ids, _ = models.render_chat(SMOLLM2, CHAT[:2], style="guanaco")
    assert SMOLLM2.decode(ids, skip_special=False).endswith("### Assistant: 4,806 metres.<|im_end|>")


# ---- refusals


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "a chat has no messages"),
        ([*CHAT, {"role": "tool", "content": "x"}], "message 5 has the role 'tool'; known are system, user"),
        ([{"content": "x"}], "message 1 has the role None"),
        ([{"role": "user"}], r'message 1 \(user\) has no text: "content" is None'),
        ([{"role": "user", "content": ["x"]}], "has no text"),
        ([CHAT[0], {"role": "assistant", "content": " \n"}], r"message 2 \(assistant\) is empty"),
        (["hello"], "message 1 is a str where a table"),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_refused(messages, message):
    with pytest.raises(DataError, match=message):
        models.render_chat(SMOLLM2, messages)


def test_a_style_that_is_unknown_or_needs_other_tokens_is_refused():
    with pytest.raises(ConfigError, match='chat style "vicuna" is unknown; known are chatml, guanaco'):
        models.render_chat(SMOLLM2, CHAT, style="vicuna")
    with pytest.raises(ConfigError, match=r"needs the special tokens <\|im_start\|>"):
        models.render_chat(GPT2, CHAT, style="chatml")
