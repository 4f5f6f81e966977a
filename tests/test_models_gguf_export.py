"""A GGUF that is written holds the merged model and its tokenizer, and one that differs is not kept."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import models
from models.compare import compare
from models.gguf_check import check, rounding
from models.gguf_layout import gguf_name, released_name
from models.gguf_vocabulary import merges_of
from models.gguf_writer import encoded, shapes, stored_as, weight_of, write_gguf
from models.llama import Llama, causal
from models.meta_layout import half_rotation_order, interleaved_order
from models.tokenizer_json import read_tokenizer_json
from tests import tiny
from tests.exporting import as_run, export, told, trained_run
from tests.golden import GOLDEN


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("export") / "base")


@pytest.fixture(scope="module")
def run(base, tmp_path_factory):
    return trained_run(base, tmp_path_factory.mktemp("export") / "run")


def load_gguf(path):
    return causal(models.load(path, dtype=torch.float32), "a test")


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_a_gguf_is_base_and_adapter_merged(run, base, tmp_path, capsys, kind):
    result = told(capsys, run, tmp_path / "m.gguf", "--format", "gguf", "--gguf-type", kind)
    assert result["merged_layers"] == 4
    model, found = as_run(run, base), load_gguf(tmp_path / "m.gguf")
    for name, shape in shapes(model):
        wanted = weight_of(model, name)
        error = (found.get_parameter(name) - wanted).abs()
        assert bool((error <= rounding(wanted, stored_as(name, shape, kind))).all()), name
    ids = torch.arange(40).view(2, 20) * 7 % model.config.vocab_size
    limit = {"f32": 1e-10, "f16": 1e-6, "bf16": 1e-4, "q8_0": 1e-3}[kind]
    assert compare(model(ids), found(ids)).mean_kl < limit
    assert result["kl"] < limit
    tokenizers = models.load_tokenizer(base), models.load_tokenizer(tmp_path / "m.gguf")
    assert tokenizers[0].encode("It is red, 12.") == tokenizers[1].encode("It is red, 12.")
    assert tokenizers[0].chat_template == tokenizers[1].chat_template


@pytest.mark.parametrize("case", ["llama-gqa", "llama3-rope-tied", "llama-headdim-bias"])
def test_every_golden_model_comes_back_from_a_gguf_with_its_logits(case, tmp_path):
    model, tokenizer = causal(models.load(GOLDEN / case, dtype=torch.float32), "a test"), small_tokenizer(tmp_path)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    comparison = check(tmp_path / "m.gguf", model, tokenizer, {name: "f32" for name, _ in shapes(model)})
    assert comparison.weight_error == 0
    io = load_file(GOLDEN / case / "io.safetensors")
    logits = load_gguf(tmp_path / "m.gguf")(io["input_ids"], io["attention_mask"])
    present = io["attention_mask"].bool()
    torch.testing.assert_close(logits[present], io["logits"][present], rtol=1e-4, atol=1e-4)


def test_linear_rope_scaling_comes_back(tmp_path):
    raw = json.loads((GOLDEN / "llama-gqa" / "config.json").read_text())
    config = models.config.llama_config({**raw, "rope_parameters": {"rope_type": "linear", "factor": 3.7}}, "test")
    model = Llama(config)
    model.load_state_dict(models.load(GOLDEN / "llama-gqa", dtype=torch.float32).state_dict())
    tokenizer = small_tokenizer(tmp_path)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    assert check(tmp_path / "m.gguf", model, tokenizer, {name: "f32" for name, _ in shapes(model)}).kl < 1e-9


def small_tokenizer(directory: Path) -> models.Tokenizer:
    """Fifty tokens, so that it fits the golden models' embeddings."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)] + ["Ġ", "th", "the", "<|im_start|>", "<|im_end|>"]
    folder = directory / "tokenizer"
    folder.mkdir()
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(letters)}))
    (folder / "merges.txt").write_text("t h\nth e\n")
    return models.load_tokenizer(folder)


def test_another_reader_finds_what_was_written(run, base, tmp_path):
    gguf = pytest.importorskip("gguf")
    export(run, tmp_path / "m.gguf", "--format", "gguf", "--gguf-type", "q8_0")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {
        key: field.contents() for key, field in reader.fields.items() if "tokens" not in key and "merges" not in key
    }
    config, tokenizer = models.load(base).config, models.load_tokenizer(base)
    assert fields["general.architecture"] == "llama"
    assert fields["general.file_type"] == 7
    assert fields["llama.attention.head_count_kv"] == config.num_key_value_heads
    assert fields["llama.vocab_size"] == config.vocab_size
    assert fields["tokenizer.ggml.model"] == "gpt2"
    assert fields["tokenizer.ggml.pre"] == "smollm"
    assert fields["tokenizer.ggml.add_bos_token"] is False
    assert fields["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert "output.weight" not in tensors  # the head is the embedding
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert {kind for name, kind in kinds.items() if "norm" in name} == {"F32"}
    assert {kind for name, kind in kinds.items() if "norm" not in name} == {"Q8_0"}
    up = tensors["blk.0.ffn_up.weight"]
    values = torch.from_numpy(np.array(gguf.dequantize(up.data, up.tensor_type)))
    wanted = weight_of(as_run(run, base), "model.layers.0.mlp.up_proj.weight")
    assert bool(((values - wanted).abs() <= rounding(wanted, "q8_0")).all())
    assert tensors["blk.0.ffn_up.weight"].shape.tolist() == [64, 128]


def test_a_file_that_differs_is_not_kept(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("models.gguf_writer.interleaved_order", lambda rows, heads: rows)
    err = told(capsys, run, tmp_path / "m.gguf", "--format", "gguf", code=4)
    assert "q_proj.weight is off by" in err
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_nothing(run, tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("models.gguf_writer.encoded", fails)
    with pytest.raises(OSError, match="No space"):
        export(run, tmp_path / "m.gguf", "--format", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_model_whose_answers_differ_is_refused_though_every_weight_is_right(tmp_path):
    model, tokenizer = (
        causal(models.load(GOLDEN / "llama-gqa", dtype=torch.float32), "a test"),
        small_tokenizer(tmp_path),
    )
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    kinds = {name: "f32" for name, _ in shapes(model)}
    model.head = lambda hidden: Llama.head(model, hidden) * 1.5  # type: ignore[method-assign]
    with pytest.raises(models.CheckpointError, match="answers differ by a KL divergence of"):
        check(tmp_path / "m.gguf", model, tokenizer, kinds)


def test_a_weight_beyond_float16_is_refused_and_named(base, tmp_path, capsys):
    source = shutil.copytree(base, tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = 70000.0
    save_file(tensors, source / "model.safetensors")
    err = told(capsys, source, tmp_path / "m.gguf", "--format", "gguf", code=4)
    assert "up_proj.weight holds 7e+04, and f16 ends at 6.55e+04; choose --gguf-type f32 or bf16" in err
    export(source, tmp_path / "m.gguf", "--format", "gguf", "--gguf-type", "bf16")


def test_rows_that_no_block_divides_are_stored_in_16_bits():
    assert [stored_as("w", (3, width), "q8_0") for width in (32, 64, 33, 576)] == ["q8_0", "q8_0", "f16", "q8_0"]
    assert {stored_as("w", (3,), kind) for kind in ("f32", "f16", "bf16", "q8_0")} == {"f32"}


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_what_a_type_stores_is_within_its_rounding(kind):
    gguf = pytest.importorskip("gguf")
    exponents = torch.randint(-30, 10, (64, 64), generator=torch.Generator().manual_seed(0))
    weight = torch.randn(64, 64, generator=torch.Generator().manual_seed(1)) * 2.0**exponents
    type = gguf.GGMLQuantizationType[kind.upper()]
    stored = encoded(weight, kind, "w")
    found = torch.from_numpy(np.array(gguf.dequantize(stored.view(np.uint8), type))).view(64, 64)
    assert bool(((found - weight).abs() <= rounding(weight, kind)).all())


def test_names_and_row_orders_have_inverses():
    for case in ("llama-gqa", "llama-headdim-bias", "llama3-rope-tied"):
        for name, _ in models.load(GOLDEN / case).named_parameters():
            assert released_name(gguf_name(name)) == name
    rows = torch.randn(24, 5)
    assert torch.equal(interleaved_order(half_rotation_order(rows, 3), 3), rows)
    assert torch.equal(half_rotation_order(interleaved_order(rows[:, 0], 2), 2), rows[:, 0])
    with pytest.raises(ValueError, match="has no name in a GGUF"):
        gguf_name("model.rotary")


# Tokenizers in a GGUF


def sentencepiece_files(directory: Path, kind: str = "bpe", rule: str = "identity") -> Path:
    """A SentencePiece model of the given kind, trained on a few lines."""
    import sentencepiece

    text = ["the quick brown fox", "jumps over the lazy dog", "colours: red, blue, green 123"] * 20
    directory.mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(text),
        model_prefix=str(directory / "tokenizer"),
        vocab_size=320,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        model_type=kind,
        normalization_rule_name=rule,
        remove_extra_whitespaces=False,
    )
    return directory


def with_rows(base, directory, rows):
    """A model with as many rows in its embedding."""
    config = models.config.LlamaConfig(**{**vars(models.load(base).config), "vocab_size": rows})
    model = Llama(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    models.save(model, directory)


def test_a_sentencepiece_tokenizer_comes_back_with_added_tokens_and_empty_rows(base, tmp_path):
    source = sentencepiece_files(tmp_path / "source")
    size = models.load_tokenizer(source).vocab_size
    settings = {"added_tokens_decoder": {str(size + 2): {"content": "<|im_end|>", "special": True}}}
    (source / "tokenizer_config.json").write_text(
        json.dumps(settings | {"eos_token": "<|im_end|>", "chat_template": "{{x}}"})
    )
    with_rows(base, source, size + 9)
    export(source, tmp_path / "m.gguf", "--format", "gguf")
    before, after = models.load_tokenizer(source), models.load_tokenizer(tmp_path / "m.gguf")
    assert after.special_tokens == before.special_tokens
    assert after.vocab_size == before.vocab_size
    for text in ("the quick  fox 123", "Grüße 🦙\n"):
        assert after.encode(text, bos=True, eos=True) == before.encode(text, bos=True, eos=True)


def test_a_tokenizer_that_a_gguf_cannot_hold_is_refused(base, tmp_path, capsys):
    source = sentencepiece_files(tmp_path / "source", "unigram", "nmt_nfkc_cf")
    with_rows(base, source, models.load_tokenizer(source).vocab_size)
    err = told(capsys, source, tmp_path / "m.gguf", "--format", "gguf", code=4)
    assert "the tokenizer gives" in err
    assert not (tmp_path / "m.gguf").exists()


def test_a_tokenizer_of_another_model_is_refused(base, tmp_path, capsys):
    source = sentencepiece_files(tmp_path / "source")
    with_rows(base, source, 100)
    err = told(capsys, source, tmp_path / "m.gguf", "--format", "gguf", code=4)
    assert "but the embedding has 100 rows" in err


def test_merges_follow_from_ranks_where_a_vocabulary_has_none():
    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"he": 257, b"the": 258, b" the": 259}
    assert merges_of(ranks) == [("t", "h"), ("h", "e"), ("t", "he"), ("th", "e"), ("Ġ", "the")]


def test_a_tokenizer_json_keeps_its_merges(base, tmp_path):
    source = shutil.copytree(base, tmp_path / "source")
    export(source, tmp_path / "m.gguf", "--format", "gguf")
    models.save_tokenizer(models.load_tokenizer(tmp_path / "m.gguf"), tmp_path / "out")
    _, merges, pattern, _ = read_tokenizer_json(json.loads((tmp_path / "out" / "tokenizer.json").read_text()))
    lines = (source / "merges.txt").read_text().splitlines()
    assert [" ".join(pair) for pair in merges] == [line for line in lines if line and not line.startswith("#version")]
    assert pattern == "smollm"
