"""T5's released SentencePiece file: published ids, and the tokens that are not in it."""

import json
from pathlib import Path

import pytest

import models

DATA = Path(__file__).parent / "data" / "tokenizers" / "t5"
ROWS = [json.loads(line) for line in (DATA / "expected.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def tokenizer():
    return models.load_tokenizer(DATA)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["text"][:20])
def test_ids_are_those_of_the_reference_implementation(tokenizer, row):
    assert tokenizer.encode(row["text"]) == row["t5"]
    assert tokenizer.encode(row["text"], eos=True) == [*row["t5"], 1]


def test_the_shipped_part_is_told_to_be_t5s(tokenizer):
    roles = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id)
    assert roles == (None, 1, 0, 2)
    assert not tokenizer.adds_bos
    assert tokenizer.special_tokens["<extra_id_0>"] == tokenizer.vocab_size - 1 == 12_000 + 99


def test_a_saved_tokenizer_is_the_same(tokenizer, tmp_path):
    models.save_tokenizer(tokenizer, tmp_path)
    again = models.load_tokenizer(tmp_path)
    assert again.special_tokens == tokenizer.special_tokens
    assert [again.encode(row["text"]) for row in ROWS] == [row["t5"] for row in ROWS]
