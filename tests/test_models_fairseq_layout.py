"""fairseq's files: every variant that is about gives the same model, and what cannot be read is refused."""

import argparse
import logging
import os
import re
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

import models
from models.checkpoint import open_checkpoint
from models.fairseq_layout import FairseqReader
from tests.golden import DATA, GOLDEN, answers

STEM = "decoder.sentence_encoder."


def golden() -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(GOLDEN / "roberta-fairseq" / "model.pt", weights_only=True)


def written(path: Path, state: dict, args: dict | None = None, old: bool = False, **beside) -> Path:
    """A file like the golden one, with other tensors and with other or more things beside them."""
    saved = {"args": argparse.Namespace(**vars(golden()["args"]) | (args or {})), "model": state} | beside
    torch.save(saved, path, _use_new_zipfile_serialization=not old)
    return path


def same(path: Path) -> bool:
    ours = dict(models.load(path, dtype=torch.float32).named_parameters())
    expected = dict(models.load(GOLDEN / "roberta-fairseq", dtype=torch.float32).named_parameters())
    return ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in expected)


def newer(state: dict) -> dict:
    """The second generation of names."""
    names = {"decoder.": "encoder.", ".emb_layer_norm.": ".layernorm_embedding."}
    for old, new in names.items():
        state = {name.replace(old, new): value for name, value in state.items()}
    return state


def split(state: dict) -> dict:
    """A projection for each of query, key and value."""
    parts = {}
    for name, value in state.items():
        if "in_proj" not in name:
            parts[name] = value
            continue
        for part, third in zip("qkv", value.chunk(3), strict=True):
            parts[name.replace("in_proj_", f"{part}_proj.")] = third.clone()
    return parts


def untouched(state: dict) -> dict:
    return state


def without_decoder(state: dict) -> dict:
    return {name: value for name, value in state.items() if name != "decoder.lm_head.weight"}


def with_buffers(state: dict) -> dict:
    none = {f"{STEM}version": torch.tensor([3.0]), f"{STEM}embed_positions._float_tensor": torch.zeros(1)}
    return OrderedDict(none | state)


def head(name: str, labels: int, width: int = 64) -> dict:
    torch.manual_seed(labels)
    shapes = {"dense.weight": (width, 64), "dense.bias": (width,), "out_proj.weight": (labels, width)}
    shapes["out_proj.bias"] = (labels,)
    return {f"classification_heads.{name}.{leaf}": torch.randn(shape) for leaf, shape in shapes.items()}


# What can be read


@pytest.mark.parametrize("old", [False, True], ids=["zip", "before-1.6"])
@pytest.mark.parametrize("change", [untouched, newer, split, without_decoder, with_buffers, lambda s: newer(split(s))])
def test_every_variant_of_names_gives_the_same_model(change, old, tmp_path):
    state = golden()["model"]
    assert same(written(tmp_path / "checkpoint_best.pt", change(state), old=old))


def test_the_optimizers_state_and_what_else_training_left_is_passed_over(tmp_path):
    state = golden()["model"]
    optimizer = {"state": {0: {"exp_avg": torch.zeros(9, 9), "step": 7}}, "param_groups": [{"lr": 0.1}]}
    left = {"train_iterator": {"epoch": 7}, "best": 1.4, "metrics": OrderedDict(loss=[(10, torch.tensor(1.0))])}
    file = written(tmp_path / "m.pt", state, last_optimizer_state=optimizer, extra_state=left, optimizer_history=[{}])
    assert same(file)
    assert same(tmp_path)  # the directory, which holds this file alone


def test_arguments_are_read_from_a_configuration_of_plain_containers(tmp_path):
    state, args = golden()["model"], golden()["args"]
    for file, saved in (
        ("a.pt", {"args": None, "cfg": {"model": vars(args), "task": None}}),
        ("b.pt", {"cfg": {"model": args, "optimizer": {"lr": [0.1]}}}),
    ):
        torch.save({"model": state} | saved, tmp_path / file)
        assert same(tmp_path / file)


def test_sizes_come_from_the_tensors_and_rates_from_the_arguments(tmp_path):
    told = {"encoder_layers": 99, "max_positions": 7, "dropout": 0.2, "attention_dropout": 0.3, "pooler_dropout": 0.4}
    config = models.load(written(tmp_path / "m.pt", golden()["model"], told)).config
    assert (config.num_hidden_layers, config.max_position_embeddings, config.num_attention_heads) == (2, 34, 4)
    assert (config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (0.2, 0.3)
    assert (config.classifier_dropout, config.layer_norm_eps, config.pad_token_id) == (0.4, 1e-5, 1)
    assert (config.bos_token_id, config.eos_token_id, config.type_vocab_size) == (0, (2,), 1)


@pytest.mark.parametrize(
    ("labels", "told", "problem"),
    [(3, {}, "single_label_classification"), (1, {}, "regression"), (1, {"regression_target": True}, "regression")],
)
def test_a_classification_head_has_as_many_labels_as_its_tensors(labels, told, problem, tmp_path):
    state = golden()["model"] | head("mnli", labels)
    model = models.load(written(tmp_path / "m.pt", state, told), dtype=torch.float32)
    assert (model.config.problem_type, len(model.config.labels)) == (problem, labels)
    expected = state["classification_heads.mnli.out_proj.weight"]
    assert torch.equal(model.get_parameter("classifier.out_proj.weight"), expected)
    assert models.load(tmp_path / "m.pt", head="mlm").config.problem_type is None


def test_saved_in_the_released_layout_it_answers_the_same(tmp_path):
    io = answers("roberta-fairseq")
    models.save(models.load(GOLDEN / "roberta-fairseq", dtype=torch.float32), tmp_path)
    again = models.load(tmp_path, dtype=torch.float32)(io["input_ids"], io["attention_mask"])
    there = io["attention_mask"].bool()
    torch.testing.assert_close(again[there], io["logits"][there], atol=1e-4, rtol=0)


def test_what_may_be_unpickled_is_allowed_for_the_time_of_reading_only():
    models.load(GOLDEN / "roberta-fairseq")
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_a_tensor_that_was_read_lives_without_its_file(tmp_path):
    shutil.copy(GOLDEN / "roberta-fairseq" / "model.pt", tmp_path)
    _, reader, _ = open_checkpoint(tmp_path / "model.pt")
    key = "roberta.encoder.layer.1.attention.self.key.weight"
    value = reader.read(key)
    expected = golden()["model"][f"{STEM}layers.1.self_attn.in_proj_weight"][64:128]
    (tmp_path / "model.pt").write_bytes(bytes((tmp_path / "model.pt").stat().st_size))
    assert torch.equal(value, expected)
    assert reader.shapes[key] == (64, 64)
    assert isinstance(reader, FairseqReader)
    assert reader.kept is None  # nothing stays mapped, for its pages would count as this process's memory


def test_what_acts_in_training_only_and_is_not_done_here_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert same(written(tmp_path / "m.pt", golden()["model"], {"activation_dropout": 0.1, "quant_noise_pq": 0}))
    assert "activation_dropout is not applied in further training" in caplog.text
    assert "quant_noise_pq" not in caplog.text


def test_a_published_file_is_read():
    model = models.load(DATA / "sapiens_roberta" / "checkpoint_vh.pt", dtype=torch.float32)
    assert (model.config.num_hidden_layers, model.config.num_attention_heads, model.max_tokens) == (4, 8, 144)
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(DATA / "sapiens_roberta" / "checkpoint_vh.pt", weights_only=True)["model"]
    theirs = state["decoder.sentence_encoder.layers.3.self_attn.v_proj.weight"]
    assert torch.equal(model.get_parameter("roberta.encoder.layer.3.attention.self.value.weight"), theirs.float())
    assert not model.get_parameter("roberta.embeddings.token_type_embeddings.weight").any()  # fairseq has none


# Refusals


class Hostile:
    """Its pickle asks the reader to run a command."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


class Meter:
    """A class of a training program, as old files hold them."""


@pytest.mark.parametrize("old", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_runs_nothing(old, tmp_path):
    mark = tmp_path / "it-ran"
    file = written(tmp_path / "m.pt", golden()["model"], old=old, extra_state=Hostile(mark))
    with pytest.raises(models.CheckpointError, match=r"m\.pt: refused, because it holds a posix\.system"):
        models.load(file)
    assert not mark.exists()


def test_objects_of_other_programs_are_refused_with_what_to_do(tmp_path):
    file = written(tmp_path / "m.pt", golden()["model"], cfg=Meter())
    with pytest.raises(models.CheckpointError, match=r"holds a \S+\.Meter, .* save again its 'model', with"):
        models.load(file)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"encoder_normalize_before": True}, "was trained with encoder_normalize_before True; only False"),
        ({"activation_fn": "gelu_fast"}, "activation_fn 'gelu_fast'; only 'gelu'"),
        ({"activation_fn": "relu"}, "activation_fn 'relu'"),
        ({"pooler_activation_fn": "relu"}, "pooler_activation_fn 'relu'; only 'tanh'"),
        ({"no_scale_embedding": False}, "no_scale_embedding False"),
        ({"encoder_attention_heads": None}, "say None for encoder_attention_heads, and the tensors do not tell"),
        ({"encoder_attention_heads": 5}, "hidden_size 64 does not split into 5 heads"),
        ({"dropout": "much"}, "hidden_dropout_prob is 'much'; a finite number"),
    ],
)
def test_arguments_that_mean_another_model_are_refused(told, message, tmp_path):
    with pytest.raises(models.CheckpointError, match=message):
        models.load(written(tmp_path / "m.pt", golden()["model"], told))


def test_a_file_without_arguments_is_refused_with_what_to_do(tmp_path):
    for content in ({}, {"args": None, "cfg": {"task": 1}}, {"args": None, "cfg": None}):
        torch.save({"model": golden()["model"]} | content, tmp_path / "m.pt")
        with pytest.raises(models.CheckpointError, match=r"neither 'args' nor 'cfg'.* save it again with args="):
            models.load(tmp_path / "m.pt")


def test_several_classification_heads_are_refused_by_name(tmp_path):
    state = golden()["model"] | head("mnli", 3) | head("rte", 2)
    file = written(tmp_path / "m.pt", state)
    for asked in (None, "classification"):
        with pytest.raises(models.CheckpointError, match=r"holds 2 classification heads \(mnli, rte\)"):
            models.load(file, head=asked)
    assert models.load(file, head="mlm").config.problem_type is None


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"decoder.lm_head.weight": torch.zeros(128, 64)}, r"lm_head\.weight is not a copy of .*embed_tokens\.weight"),
        ({f"{STEM}layer_norm.weight": torch.ones(64)}, r"1 unexpected: decoder\.sentence_encoder\.layer_norm\.weight"),
        ({f"{STEM}steps": torch.tensor(3)}, r"1 unexpected: decoder\.sentence_encoder\.steps"),
        ({"encoder.lm_head.bias": torch.ones(128)}, r"encoder\.lm_head\.bias and decoder\.lm_head\.bias are both for"),
        (
            {f"{STEM}layers.0.self_attn.in_proj_bias": torch.zeros(190)},
            r"in_proj_bias is \[190\], which does not split into query, key and value",
        ),
        (
            {f"{STEM}layers.1.fc1.weight": torch.zeros(9, 64)},
            r"layer\.1\.intermediate\.dense\.weight \[9, 64\], expected",
        ),
        ({f"{STEM}layers.3.fc1.bias": torch.zeros(128)}, r"missing: roberta\.encoder\.layer\.2\.attention"),
        ({f"{STEM}layers.0.fc2.bias": "text"}, r"layers\.0\.fc2\.bias' is not a tensor"),
        (head("odd", 3, width=32), r"classifier\.dense\.weight \[32, 64\], expected \[64, 64\]"),
    ],
)
def test_tensors_that_do_not_make_a_roberta_are_refused_by_name(extra, message, tmp_path):
    with pytest.raises(models.CheckpointError, match=message):
        models.load(written(tmp_path / "m.pt", golden()["model"] | extra))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"args": argparse.Namespace(), "weights": {}}, "has no 'model' with tensors.* holds args, weights"),
        ([1, 2], "has no 'model' with tensors, .* it holds list"),
        (
            {"args": argparse.Namespace(encoder_attention_heads=1), "model": {"w": torch.zeros(1)}},
            r"no matrix for roberta\.embeddings\.word_embeddings\.weight; is it a RoBERTa",
        ),
    ],
)
def test_another_torch_file_is_refused_with_what_it_lacks(content, message, tmp_path):
    torch.save(content, tmp_path / "m.pt")
    with pytest.raises(models.CheckpointError, match=message):
        models.load(tmp_path / "m.pt")


def test_two_files_or_half_a_file_are_refused(tmp_path):
    content = (GOLDEN / "roberta-fairseq" / "model.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(models.CheckpointError, match=re.escape(str(tmp_path / "a.pt"))):
        models.load(tmp_path)
    (tmp_path / "b.pt").write_bytes(content)
    with pytest.raises(models.CheckpointError, match=r"one \*\.gguf or \*\.pt, found 2 of the last two: name one"):
        models.load(tmp_path)
    assert same(tmp_path / "b.pt")
