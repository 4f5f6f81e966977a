"""Encoding by parts gives the ids of the whole, whatever the text and the vocabulary."""

import doctest
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import models
import models.parts
from models.bpe import CHUNK
from models.parts import Parts, cut
from models.spm import BYTE, CONTROL, NORMAL, UNKNOWN, SentencePieces, build_model

DATA = Path(__file__).parent / "data" / "tokenizers"
TRICKY = [
    "a",
    "B1",
    "\n",
    "\n\n",
    "\r\n",
    " ",
    "  ",
    "\t",
    ".",
    "_",
    "'s",
    "é",
    "日",
    "²",
    "Ⅷ",
    "́",
    "\x1c",
    "\x85",
    "▁",
    "😀",
]
tricky = st.lists(st.sampled_from(TRICKY), min_size=8, max_size=40).map("".join)
texts = tricky | st.text()


def pieces(more=()):
    """A vocabulary of SentencePiece with all bytes and a few pieces, such as LLaMA's is."""
    named = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = ["▁", "a", "B", "1", ".", "▁a", "a.", "aB", "▁aB", "B1", "▁▁", *more]
    kinds = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(words)]
    return [*named, *words], [0.0] * 259 + [-float(i) for i in range(len(words))], kinds


def spm(folder, more=(), **options):
    model = build_model(*pieces(more), {"unk": 0, "bos": 1, "eos": 2, "pad": -1}, **options)
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model)
    return models.load_tokenizer(folder)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("spm")
    return {
        "gpt2": models.load_tokenizer(DATA / "gpt2"),
        "smollm2": models.load_tokenizer(DATA / "smollm2"),
        "t5": models.load_tokenizer(DATA / "t5"),
        "llama": spm(folder / "llama"),
        "bare": spm(folder / "bare", add_dummy_prefix=False),
        "joined": spm(folder / "joined", ["a\n", "a\nB"]),
    }


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "t5", "llama", "bare", "joined"])
@given(text=texts)
def test_a_text_has_the_ids_that_it_has_whole(tokenizers, name, text):
    tokenizer = tokenizers[name]
    assert Parts(tokenizer).encode(text) == tokenizer.encode(text)


def test_which_vocabularies_have_parts(tokenizers):
    apart = {name: Parts(tokenizer).apart for name, tokenizer in tokenizers.items()}
    assert apart == {"gpt2": True, "smollm2": True, "t5": False, "llama": True, "bare": True, "joined": False}


def test_a_vocabulary_that_joins_across_lines_shows_why_it_must_not_be_cut(tokenizers):
    """The same text by parts and whole: the check of the vocabulary is what keeps them equal."""
    tokenizer = tokenizers["joined"]
    parts = Parts(tokenizer)
    parts.apart = True
    assert parts.encode("Ba\nB") != tokenizer.encode("Ba\nB")


def test_a_unigram_model_is_encoded_whole():
    model = build_model(*pieces(), {"unk": 0, "bos": 1, "eos": 2, "pad": -1})
    kind = model.rfind(b"\x18\x02") + 1  # the trainer's field 3, behind all pieces
    assert SentencePieces(model).lines_apart
    assert not SentencePieces(model[:kind] + b"\x01" + model[kind + 1 :]).lines_apart


@given(text=texts)
def test_parts_are_the_text(text):
    parts = cut(text)
    assert "".join(parts) == text
    assert all(part.startswith("\n") for part in parts[1:])
    assert all(part[-1].isalnum() for part in parts[:-1])


def test_what_prompts_have_in_common_is_encoded_once(tokenizers, monkeypatch):
    parts, seen = Parts(tokenizers["llama"]), []
    encode = tokenizers["llama"].encode
    monkeypatch.setattr(tokenizers["llama"], "encode", lambda text: seen.append(text) or encode(text))
    parts.encode("a B1\n\na one\nanswer: A")
    parts.encode("a B1\n\na one\nanswer: B")
    parts.encode("a B1\n\na one\nanswer: B")
    assert seen == ["a B1", "\n\na one", "\nanswer: A", "\nanswer: B"]


def test_ids_that_were_given_can_be_changed(tokenizers):
    parts = Parts(tokenizers["gpt2"])
    for text in ("a\nb", "a"):
        expected = tokenizers["gpt2"].encode(text)
        parts.encode(text).append(7)
        parts.encode(text)[0] = 7
        assert parts.encode(text) == expected


@pytest.mark.parametrize("text", ["a" * 3 * CHUNK + "\n" + "b", "-" * 3 * CHUNK + "a\nb", "a\n" + "-" * 3 * CHUNK])
def test_a_long_run_that_is_cut_by_force_is_cut_as_in_the_whole(tokenizers, text):
    assert Parts(tokenizers["gpt2"]).encode(text) == tokenizers["gpt2"].encode(text)


def test_many_lines_take_no_longer_than_so_many(tokenizers):
    began = time.perf_counter()
    assert len(cut("\n" * 10**6)) == 1
    assert len(cut("a\n" * 10**5)) == 10**5 + 1
    assert time.perf_counter() - began < 5  # seconds; in quadratic time it would be minutes


def test_examples():
    assert doctest.testmod(models.parts).failed == 0
