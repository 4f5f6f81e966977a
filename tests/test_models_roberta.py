"""RoBERTa answers what the reference implementation answered, and what algebra demands of each of its heads."""

import json
import logging
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import models
import nf4
from models.attachment import adapted_layers
from models.linear import Linear, NF4Linear
from models.roberta import Roberta, positions_and_mask
from models.roberta_config import RobertaConfig, roberta_config
from tests.golden import DATA, GOLDEN, answers

HEADS = ("mlm", "classification", "regression")
PROBLEMS = {"mlm": None, "classification": "single_label_classification", "regression": "regression"}
LABELS = {"mlm": (), "classification": ("no", "maybe", "yes"), "regression": ("LABEL_0",)}
V, PAD, LONGEST = 37, 1, 14
RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout")
FIRST = "roberta.encoder.layer.0."


def small(head: str, seed: int = 0, changes: dict[str, Any] | None = None) -> Roberta:
    torch.manual_seed(seed)
    options: dict[str, Any] = dict.fromkeys(RATES, 0.0) | (changes or {})
    config = RobertaConfig(
        vocab_size=V,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=3,
        max_position_embeddings=LONGEST + PAD + 1,
        problem_type=PROBLEMS[head],
        labels=LABELS[head],
        **options,
    )
    model = Roberta(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def text(rows: int = 2, length: int = 9) -> torch.Tensor:
    """Ids of tokens that are there, none of them padding."""
    return torch.randint(PAD + 1, V, (rows, length))


def some_labels(head: str, ids: torch.Tensor) -> torch.Tensor:
    """Labels for every text, of which the second and every third token's are not scored."""
    if head == "mlm":
        labels = torch.randint(0, V, ids.shape)
        labels[:, ::3] = -100
    else:
        labels = torch.randint(0, 3, (len(ids),)) if head == "classification" else torch.randn(len(ids))
    labels[1] = -100
    return labels


# Properties


@given(head=st.sampled_from(HEADS), width=st.integers(1, 5), masked=st.booleans(), seed=st.integers(0, 99))
def test_padding_on_either_side_changes_nothing_that_is_there(head, width, masked, seed):
    model, ids = small(head, seed), text(2, 7)
    # where a mask says what is there, the ids under it may be any; without one, padding has its own id
    pads = text(2, width) if masked else torch.full((2, width), PAD)
    ones, zeros = torch.ones_like(ids), torch.zeros_like(pads)
    right = model(torch.cat([ids, pads], 1), torch.cat([ones, zeros], 1) if masked else None)
    left = model(torch.cat([pads, ids], 1), torch.cat([zeros, ones], 1) if masked else None)
    if head == "mlm":
        right, left = right[:, :7], left[:, width:]
    torch.testing.assert_close(right, model(ids))
    torch.testing.assert_close(left, model(ids))


@pytest.mark.parametrize("head", HEADS)
def test_a_batch_gives_what_its_rows_give_alone(head):
    model, ids = small(head), text(4)
    torch.testing.assert_close(model(ids), torch.cat([model(row[None]) for row in ids]))
    assert model(ids).shape == {"mlm": (4, 9, V), "classification": (4, 3), "regression": (4, 1)}[head]


def test_what_a_mask_shows_is_attended_to_even_if_it_is_padding_by_its_id():
    model, ids = small("mlm"), text(1)
    ids[0, 4] = PAD
    shown, hidden = model(ids, torch.ones_like(ids)), model(ids)
    assert not torch.allclose(shown[:, 0], hidden[:, 0], atol=1e-3)
    torch.testing.assert_close(hidden, model(ids, (ids != PAD).long()))


@pytest.mark.parametrize("head", HEADS)
def test_a_row_of_nothing_spoils_no_other_row(head):
    model, ids = small(head), text(3)
    mask = torch.ones_like(ids)
    mask[1] = 0
    logits = model(ids, mask)
    assert logits.isfinite().all()
    torch.testing.assert_close(logits[::2], model(ids)[::2])
    labels = some_labels(head, ids)
    loss = model.loss(input_ids=ids, labels=labels, attention_mask=mask)
    loss.backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    _, seen = positions_and_mask(ids, mask, PAD)
    assert seen is not None
    assert seen.any(dim=-1).all()  # what attention gives for a row of nothing differs between devices


@pytest.mark.parametrize("head", HEADS)
def test_the_loss_is_the_mean_over_the_labels_it_counts_and_so_are_its_gradients(head):
    model, ids = small(head), text(4)
    labels = some_labels(head, ids)
    logits, scored = model(ids), labels != -100
    each = {
        "mlm": lambda: -logits.log_softmax(-1)[scored].gather(1, labels[scored][:, None]),
        "classification": lambda: -logits.log_softmax(-1)[scored].gather(1, labels[scored][:, None]),
        "regression": lambda: (logits[scored, 0] - labels[scored]).square(),
    }[head]()
    each.mean().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = model.loss(input_ids=ids, labels=labels)
    torch.testing.assert_close(loss, each.mean())
    assert model.label_count(labels) == int(scored.sum()) == each.numel()
    loss.backward()
    for name, gradient in expected.items():
        torch.testing.assert_close(model.get_parameter(name).grad, gradient)


@pytest.mark.parametrize("head", HEADS)
def test_checkpointed_gradients_are_the_same_with_the_same_dropout(head):
    model, ids = small(head, 0, {"hidden_dropout_prob": 0.2, "attention_probs_dropout_prob": 0.2}).train(), text()
    ids[0, 5:] = PAD
    gradients, runs = [], []
    model.get_submodule("roberta.encoder.layer.1").register_forward_pre_hook(lambda *_: runs.append(None))
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        torch.manual_seed(5)
        model.loss(input_ids=ids, labels=some_labels(head, ids)).backward()
        gradients.append([p.grad for p in model.parameters()])
    assert len(runs) == 1 + 2  # the second time in backward
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None)


@pytest.mark.parametrize("rate", RATES)
def test_each_dropout_acts_in_training_and_only_there(rate):
    model, ids = small("classification", 0, {rate: 0.5}), text()
    assert torch.equal(model(ids), model(ids))
    before = model(ids)
    model.train()
    assert not torch.allclose(model(ids), before)
    assert small("classification").train()(ids).equal(before)


def test_dropout_stands_where_the_reference_implementation_has_it():
    model, ids = small("classification", 0, {"hidden_dropout_prob": 0.5, "classifier_dropout": 0.5}).train(), text()
    places = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    blocks = [f"roberta.encoder.layer.{i}.{half}output.dropout" for i in (0, 1) for half in ("attention.", "")]
    assert list(places) == ["roberta.embeddings.dropout", *blocks, "classifier.dropout"]
    runs = []
    for name, place in places.items():
        place.register_forward_hook(lambda *_, name=name: runs.append(name))
    model(ids)
    assert runs == [*places, "classifier.dropout"]  # before both of its layers


def test_the_classifiers_dropout_is_the_blocks_unless_said():
    for rate, expected in ((None, 0.3), (0.0, 0.0)):
        changes = {"hidden_dropout_prob": 0.3, "classifier_dropout": rate}
        dropout = small("classification", 0, changes).get_submodule("classifier.dropout")
        assert isinstance(dropout, torch.nn.Dropout)
        assert dropout.p == expected


# The reference implementation


@pytest.mark.parametrize("name", ["roberta-mlm", "roberta-classify", "roberta-fairseq"])
def test_logits_loss_and_gradients_are_the_reference_implementations(name):
    model, io = models.load(GOLDEN / name, dtype=torch.float32), answers(name)
    logits = model(io["input_ids"], io["attention_mask"])
    there = io["attention_mask"].bool() if logits.ndim == 3 else slice(None)
    torch.testing.assert_close(logits[there], io["logits"][there], atol=1e-4, rtol=0)
    if "loss" not in io:
        return
    loss = model.loss(input_ids=io["input_ids"], attention_mask=io["attention_mask"], labels=io["labels"])
    torch.testing.assert_close(loss, io["loss"], atol=1e-4, rtol=0)
    loss.backward()
    checked = [key for key in io if key.startswith("grad.")]
    assert checked
    for key in checked:
        ours = model.get_parameter(key.removeprefix("grad.")).grad
        torch.testing.assert_close(ours, io[key], atol=1e-4, rtol=0)


def test_a_real_trained_model_fills_masks_as_it_was_published_to():
    expected = json.loads((DATA / "sapiens_roberta" / "expected.json").read_text())
    model = models.load(DATA / "sapiens_roberta", dtype=torch.float32)
    tokenizer = models.load_tokenizer(DATA / "sapiens_roberta")
    ids = tokenizer.encode(" ".join(expected["sequence"]), bos=True, eos=True)
    assert ids == expected["ids"]

    mask = tokenizer.special_tokens["<mask>"]
    masked = torch.tensor([ids])
    masked[0, expected["masked_positions"]] = mask
    with torch.no_grad():
        logits = model(masked)[0]
        best = model(torch.tensor([ids]))[0, 1:-1].argmax(-1)
        one_at_a_time = torch.tensor([ids]).repeat(len(ids) - 2, 1)
        one_at_a_time.diagonal(1).fill_(mask)
        guesses = model(one_at_a_time).diagonal(1).argmax(0)
    for position, values in expected["masked_logits"].items():
        torch.testing.assert_close(logits[int(position)], torch.tensor(values), atol=2e-5, rtol=0)
    assert tokenizer.decode(best.tolist()).replace(" ", "") == expected["argmax_unmasked"]
    assert int((guesses == torch.tensor(ids[1:-1])).sum()) == expected["single_mask_top1_correct"]


# Files


@pytest.mark.parametrize("quant", [None, nf4.QuantConfig()])
@pytest.mark.parametrize("head", HEADS)
def test_a_saved_model_comes_back_with_its_head(head, quant, tmp_path):
    model, ids = small(head), text()
    models.save(model, tmp_path / "plain")
    model = models.load(tmp_path / "plain", quant, dtype=torch.float32)
    models.save(model, tmp_path / "saved", shard_bytes=9000)
    again = models.load(tmp_path / "saved", dtype=torch.float32)
    assert again.config == model.config == small(head).config
    assert torch.equal(again(ids), model(ids))
    config = json.loads((tmp_path / "saved" / "config.json").read_text())
    task = "MaskedLM" if head == "mlm" else "SequenceClassification"
    assert (config["architectures"], config["model_type"]) == ([f"RobertaFor{task}"], "roberta")
    if head == "classification":
        assert config["id2label"] == {"0": "no", "1": "maybe", "2": "yes"}
        assert config["label2id"]["yes"] == 2
    assert again.task_type == (None if head == "mlm" else "SEQ_CLS")


def test_the_linear_layers_of_the_blocks_are_quantized_and_nothing_else_is():
    model = models.load(GOLDEN / "roberta-classify", nf4.QuantConfig())
    quantized = {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}
    layer = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    leaves = (*layer, "intermediate.dense", "output.dense")
    assert quantized == {f"roberta.encoder.layer.{i}.{leaf}" for i in (0, 1) for leaf in leaves}
    assert all(module.in_head for module in model.modules() if isinstance(module, Linear))
    assert model.get_parameter("classifier.dense.weight").dtype == torch.bfloat16


@pytest.mark.parametrize("head", HEADS)
def test_steps_on_4_bits_change_the_adapters_alone(head, tmp_path):
    models.save(small(head), tmp_path)
    model = models.load(tmp_path, nf4.QuantConfig(), dtype=torch.float32).train()
    models.attach_lora(model, models.LoraConfig(rank=2, dropout=0.0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    ids = text()
    labels = some_labels(head, ids)
    for _ in range(2):  # B starts from zero, so the first step moves nothing but B
        optimizer.zero_grad()
        model.loss(input_ids=ids, labels=labels).backward()
        optimizer.step()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert changed == {name for name in before if "lora_" in name}


def renamed(directory, change, **config):
    """The golden masked model with its tensors' names changed."""
    directory.mkdir(parents=True, exist_ok=True)
    raw = json.loads((GOLDEN / "roberta-mlm" / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(raw | config))
    save_file(change(load_file(GOLDEN / "roberta-mlm" / "model.safetensors")), directory / "model.safetensors")
    return directory


def with_copies(tensors):
    """As old files have them: the decoder twice, a table of positions, BERT's pooler."""
    embedding = tensors["roberta.embeddings.word_embeddings.weight"]
    return tensors | {
        "lm_head.decoder.weight": embedding.clone(),
        "lm_head.decoder.bias": tensors["lm_head.bias"].clone(),
        "roberta.embeddings.position_ids": torch.arange(34)[None],
        "roberta.pooler.dense.weight": torch.zeros(64, 64),
        "roberta.pooler.dense.bias": torch.zeros(64),
    }


def with_only_the_copy(tensors):
    return {name.replace("lm_head.bias", "lm_head.decoder.bias"): t for name, t in tensors.items()}


def bare(tensors):
    return {name.removeprefix("roberta."): t for name, t in tensors.items()}


def greek(tensors):
    norms = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    for new, old in norms.items():
        tensors = {name.replace(new, old): t for name, t in tensors.items()}
    return tensors


@pytest.mark.parametrize(
    "change", [with_copies, with_only_the_copy, bare, greek, lambda t: greek(bare(with_copies(t)))]
)
def test_every_way_of_naming_gives_the_same_parameters(change, tmp_path):
    expected = dict(models.load(GOLDEN / "roberta-mlm", dtype=torch.float32).named_parameters())
    found = dict(models.load(renamed(tmp_path, change), dtype=torch.float32).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_bin_files_whole_or_in_shards_give_the_same_parameters(tmp_path):
    expected = dict(models.load(GOLDEN / "roberta-mlm", dtype=torch.float32).named_parameters())
    tensors = load_file(GOLDEN / "roberta-mlm" / "model.safetensors")
    names = sorted(tensors)
    for directory, parts in (("whole", [names]), ("shards", [names[:11], names[11:]])):
        (tmp_path / directory).mkdir()
        shutil.copy(GOLDEN / "roberta-mlm" / "config.json", tmp_path / directory)
        files = ["pytorch_model.bin"] if len(parts) == 1 else ["a.bin", "b.bin"]
        for file, part in zip(files, parts, strict=True):
            torch.save({name: tensors[name] for name in part}, tmp_path / directory / file)
        if len(parts) > 1:
            table = {name: file for file, part in zip(files, parts, strict=True) for name in part}
            index = tmp_path / directory / "pytorch_model.bin.index.json"
            index.write_text(json.dumps({"weight_map": table}))
        found = dict(models.load(tmp_path / directory, dtype=torch.float32).named_parameters())
        assert all(torch.equal(found[name], expected[name]) for name in expected)


# Heads


def test_the_names_in_a_file_say_which_head_it_holds(tmp_path):
    assert models.load(GOLDEN / "roberta-mlm").config.problem_type is None
    assert models.load(GOLDEN / "roberta-classify").config.problem_type == "single_label_classification"
    models.save(small("regression"), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    del raw["problem_type"]  # then it is the single label that tells
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert models.load(tmp_path).config.problem_type == "regression"


def test_a_classification_head_comes_before_the_masked_one_that_fine_tuning_left(tmp_path):
    classifier = load_file(GOLDEN / "roberta-classify" / "model.safetensors")
    both = renamed(tmp_path, lambda t: t | {n: v for n, v in classifier.items() if n.startswith("classifier.")})
    assert models.load(both).config.problem_type == "single_label_classification"
    assert models.load(both, head="mlm").config.problem_type is None


@pytest.mark.parametrize(("head", "count"), [("classification", 5), ("regression", None)])
@pytest.mark.parametrize("change", [dict, bare])
def test_a_head_that_a_file_lacks_starts_from_small_random_weights(head, count, change, tmp_path, caplog):
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING):
        model = models.load(renamed(tmp_path, change), dtype=torch.float32, head=head, num_labels=count)
    assert f"a new one of {count or 1} labels" in caplog.text
    assert "modules_to_save=('classifier',)" in caplog.text
    fresh = {layer: model.get_submodule(f"classifier.{layer}") for layer in ("dense", "out_proj")}
    weights = torch.cat([layer.get_parameter("weight").flatten() for layer in fresh.values()])
    assert weights.std().item() == pytest.approx(model.config.initializer_range, rel=0.05)
    assert not any(layer.get_parameter("bias").any() for layer in fresh.values())
    assert model(text()).shape == (2, count or 1)
    assert torch.equal(
        model.embedding.weight, models.load(GOLDEN / "roberta-mlm", dtype=torch.float32).embedding.weight
    )


def test_a_head_of_which_half_is_there_is_not_started_anew(tmp_path):
    half = renamed(tmp_path, lambda t: t | {"classifier.dense.weight": torch.zeros(64, 64)})
    with pytest.raises(models.CheckpointError, match=r"3 missing: classifier\.dense\.bias, classifier\.out_proj"):
        models.load(half)


def test_another_number_of_labels_than_the_file_has_is_a_matter_of_shapes():
    with pytest.raises(models.CheckpointError, match=r"classifier\.out_proj\.weight \[3, 64\], expected \[4, 64\]"):
        models.load(GOLDEN / "roberta-classify", num_labels=4)


# Refusals


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("roberta-mlm", {"head": "lm"}, "RoBERTa has no head 'lm', for it reads a text from both sides.*mlm fills"),
        ("roberta-classify", {"head": "mlm"}, r"no masked-language-model head \(lm_head\.\*\)"),
        ("roberta-mlm", {"head": "mlm", "num_labels": 2}, "num_labels=2 is for classification"),
        ("roberta-mlm", {"head": "classification"}, "no classification head; give num_labels"),
        ("roberta-mlm", {"head": "classification", "num_labels": 1}, "num_labels is 1; classes are 2 or more"),
        ("roberta-mlm", {"head": "regression", "num_labels": 2}, "num_labels=2, but a regression gives one"),
    ],
)
def test_a_head_that_cannot_be_is_refused(case, options, message):
    with pytest.raises(models.Refusal, match=message):
        models.load(GOLDEN / case, **options)


def test_an_encoder_alone_is_refused_until_a_head_is_chosen(tmp_path):
    alone = renamed(tmp_path, lambda t: bare({n: v for n, v in t.items() if n.startswith("roberta.")}))
    with pytest.raises(models.ConfigError, match="an encoder without a head; choose one"):
        models.load(alone)
    assert models.load(alone, head="classification", num_labels=2).config.labels == ("LABEL_0", "LABEL_1")


def test_a_decoder_that_is_not_the_embedding_is_refused(tmp_path):
    other = renamed(tmp_path, lambda t: t | {"lm_head.decoder.weight": torch.zeros(128, 64)})
    with pytest.raises(models.CheckpointError, match=r"lm_head\.decoder\.weight is not a copy of roberta\.embeddings"):
        models.load(other)


def test_an_unknown_tensor_is_refused_by_its_name(tmp_path):
    other = renamed(tmp_path, lambda t: t | {f"{FIRST}crossattention.self.query.bias": torch.zeros(64)})
    with pytest.raises(models.CheckpointError, match=r"1 unexpected: .*crossattention\.self\.query\.bias"):
        models.load(other)


def test_what_a_table_has_no_row_for_is_refused():
    model = small("mlm")
    assert model.max_tokens == LONGEST
    model(text(1, LONGEST))
    with pytest.raises(ValueError, match=r"a text of 15 tokens is longer than the 14 .*max_length=14\)"):
        model(text(1, LONGEST + 1))
    for id in (-1, V):
        with pytest.raises(ValueError, match=f"id {id} is outside the vocabulary of 37 tokens"):
            model(torch.tensor([[5, id]]))
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\) but input_ids \(1, 4\)"):
        model(text(1, 4), torch.ones(1, 3))


@pytest.mark.parametrize(
    ("head", "labels", "message"),
    [
        ("mlm", torch.zeros(2, dtype=torch.long), r"labels have shape \(2,\), .*one for each token: \(2, 9\)"),
        ("classification", torch.zeros(2, 9, dtype=torch.long), r"one for each text: \(2,\)"),
        ("classification", torch.tensor([0, 3]), "labels are classes 0 to 2, or -100; one is 3"),
        ("classification", torch.tensor([0.0, 1.0]), "needs the numbers of classes as integers"),
        ("regression", torch.tensor([-100.0, -100.0]), "no label to score"),
        ("mlm", torch.full((2, 9), V), r"targets are -100 \(not scored\) or in \[0, 37\)"),
    ],
)
def test_labels_that_a_head_cannot_learn_are_refused(head, labels, message):
    with pytest.raises(ValueError, match=message):
        small(head).loss(input_ids=text(), labels=labels)


def test_text_is_not_generated_from_an_encoder():
    with pytest.raises(models.ConfigError, match="Roberta"):
        models.generate(small("mlm"), text(), max_new_tokens=2)


@pytest.mark.parametrize("head", HEADS)
def test_a_config_survives_being_written(head):
    config = small(head, 0, {"eos_token_id": (2, 5), "classifier_dropout": 0.3}).config
    assert roberta_config(json.loads(json.dumps(config.to_dict())), "written") == config


def test_a_number_of_labels_is_read_from_either_field():
    raw = small("classification").config.to_dict()
    assert roberta_config(raw | {"num_labels": 3}, "x").labels == ("no", "maybe", "yes")
    assert roberta_config(raw | {"num_labels": 2}, "x").labels == ("LABEL_0", "LABEL_1")
    assert len(roberta_config({**raw, "id2label": None, "num_labels": 4}, "x").labels) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": None}, "config.json: lacks hidden_size"),
        ({"hidden_act": "gelu_new"}, "hidden_act is 'gelu_new'"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'; RoBERTa is computed with 'gelu' only"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type is 'relative_key'"),
        ({"is_decoder": True}, "is_decoder is True"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"num_attention_heads": 5}, "hidden_size 64 does not split into 5 heads"),
        ({"vocab_size": "many"}, "vocab_size is 'many'; a whole number"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0"),
        ({"pad_token_id": 128}, "pad_token_id 128 is no row of 128"),
        ({"max_position_embeddings": 2}, "max_position_embeddings is 2, but the first token's position is .* 2"),
        ({"hidden_dropout_prob": 1.0}, "hidden_dropout_prob is 1.0"),
        ({"layer_norm_eps": "small"}, "layer_norm_eps is 'small'; a finite number"),
        ({"eos_token_id": ["</s>"]}, "eos_token_id is '</s>'"),
        ({"id2label": ["a"]}, "id2label is .'a'.; a name for each"),
        ({"id2label": {"0": "a", "2": "b"}}, "a name for each of 0, 1, 2"),
        ({"problem_type": 3}, "problem_type is 3; a name"),
    ],
)
def test_a_config_that_asks_for_other_arithmetic_is_refused(change, message):
    raw = json.loads((GOLDEN / "roberta-mlm" / "config.json").read_text())
    with pytest.raises(models.CheckpointError, match=message):
        roberta_config({**raw, **change}, "config.json")


def test_a_loss_that_is_not_known_is_refused_but_its_logits_can_be_read(tmp_path):
    shutil.copytree(GOLDEN / "roberta-classify", tmp_path, dirs_exist_ok=True)
    raw = json.loads((GOLDEN / "roberta-classify" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"problem_type": "multi_label_classification"}))
    with pytest.raises(models.CheckpointError, match="problem_type is 'multi_label_classification'"):
        models.load(tmp_path)
    ids = text()
    given = models.load(tmp_path, dtype=torch.float32, head="classification")(ids)
    assert torch.equal(given, models.load(GOLDEN / "roberta-classify", dtype=torch.float32)(ids))


def test_gelu_is_the_exact_one():
    half = small("mlm").get_submodule(f"{FIRST}intermediate")
    x = torch.randn(1, 3, 24)
    z = F.linear(x, half.get_parameter("dense.weight"), half.get_parameter("dense.bias"))
    torch.testing.assert_close(half(x), z * 0.5 * (1 + torch.erf(z / 2**0.5)))
    assert not torch.allclose(half(x), F.gelu(z, approximate="tanh"), atol=1e-5)


# Heads in other tools' files


@pytest.mark.parametrize("name", ["roberta-mlm", "roberta-classify"])
def test_a_head_that_is_stored_in_4_bits_stays_so_and_gets_no_adapter_unless_it_is_named(name, tmp_path):
    """Other writers quantize the layers of these heads too."""
    tensors = load_file(GOLDEN / name / "model.safetensors")
    heads = [n for n in tensors if n.startswith(("lm_head.", "classifier.")) and tensors[n].ndim == 2]
    for head in heads:
        tensors |= nf4.to_state_dict(nf4.quantize(tensors.pop(head)), head)
    save_file(tensors, tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / name / "config.json", tmp_path)
    model = models.load(tmp_path, nf4.QuantConfig(), dtype=torch.float32)
    stored = {n for n, m in model.named_modules() if isinstance(m, NF4Linear) and m.in_head}
    assert {f"{n}.weight" for n in stored} == set(heads)
    models.attach_lora(model, models.LoraConfig(rank=2))
    assert not stored & {n for n, _ in adapted_layers(model)}

    named = models.load(tmp_path, dtype=torch.float32)
    models.attach_lora(named, models.LoraConfig(rank=2, target_modules=tuple(stored)))
    assert {n for n, _ in adapted_layers(named)} == stored
    models.merge_adapter(named)
    models.save(named, tmp_path / "merged")
    assert {n for n, m in named.named_modules() if isinstance(m, Linear) and m.in_head} == stored
