"""Adapter files: what is written comes back, PEFT's rules are kept, and what does not fit changes nothing."""

import json
import re
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import models
import nf4
from models.attachment import adapted_layers, attached
from models.lora_config import ends_with, fits
from models.methods import detach
from models.peft_config import chooses, first_wins, longest_first, target_names
from models.peft_methods import peft_config
from models.peft_names import released_name
from tests.golden import GOLDEN, answers
from tests.tiny_classifier import Classifier

IDS = torch.arange(24).view(2, 12) % 128
LAYERS = [f"model.layers.{i}.{n}" for i in (0, 1) for n in ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")]


def base(quant=None):
    return models.load(GOLDEN / "llama-gqa", quant, dtype=torch.float32)


def move(model):
    torch.manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(torch.randn_like(p) * 0.05)


def changed(tmp_path, name, **fields):
    """A golden adapter whose configuration says something else."""
    directory = tmp_path / name
    shutil.copytree(GOLDEN / name, directory)
    path = directory / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))
    return directory


def state(model):
    return {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}


def unchanged(model, before):
    after = state(model)
    assert next(adapted_layers(model), None) is None
    assert after.keys() == before.keys()
    for name, (value, trainable) in after.items():
        assert torch.equal(value, before[name][0])
        assert trainable == before[name][1]


# What is written comes back


@pytest.mark.parametrize("quant", [None, nf4.QuantConfig()])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rslora": True, "rank_pattern": {"down_proj": 2}},
        {"dora": True, "alpha_pattern": {"layers.0.self_attn.q_proj": 9.0}},
        {"target_modules": ("q_proj", "layers.1.mlp.up_proj"), "modules_to_save": ("norm",)},
        {"target_modules": r"layers\.\d\.mlp\.(up|gate)_proj"},
    ],
)
def test_a_saved_adapter_comes_back(tmp_path, options, quant):
    model = base(quant)
    models.attach_lora(model, models.LoraConfig(rank=4, alpha=3.0, **options))
    move(model)
    models.save_adapter(model, tmp_path)
    again = base(quant)
    models.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))
    assert {n for n, p in again.named_parameters() if p.requires_grad} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    assert peft_config(again) == peft_config(model)


def test_the_file_has_pefts_keys_and_fields(tmp_path):
    model = base()
    config = models.LoraConfig(
        rank=4, alpha=3.0, dora=True, rslora=True, target_modules=("q_proj",), modules_to_save=("lm_head",)
    )
    models.attach_lora(model, config)
    models.save_adapter(model, tmp_path)
    layer = "base_model.model.model.layers.0.self_attn.q_proj"
    names = load_file(tmp_path / "adapter_model.safetensors").keys()
    parts = (f"{layer}.lora_A.weight", f"{layer}.lora_B.weight", f"{layer}.lora_magnitude_vector")
    assert {*parts, "base_model.model.lm_head.weight"} <= names
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 3.0, "use_rslora": True}
    expected |= {"use_dora": True, "target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
    assert expected.items() <= raw.items()


@pytest.mark.parametrize(
    ("saved", "written"),
    [(("norm",), ["model.norm"]), (("lm_head",), ["lm_head"]), (("layers.1.mlp",), ["layers.1.mlp"])],
)
def test_modules_to_save_are_written_so_that_ends_of_letters_fit_them_alone(saved, written):
    model = base()
    models.attach_lora(model, models.LoraConfig(rank=2, target_modules=("o_proj",), modules_to_save=saved))
    assert peft_config(model)["modules_to_save"] == written


def test_a_head_that_is_its_embedding_is_written_under_both_names(tmp_path):
    def tied():
        return models.load(GOLDEN / "llama3-rope-tied", dtype=torch.float32)

    model = tied()
    models.attach_lora(model, models.LoraConfig(rank=2, modules_to_save=("embed_tokens",)))
    move(model)
    models.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    head, embedding = "base_model.model.lm_head.weight", "base_model.model.model.embed_tokens.weight"
    assert torch.equal(tensors[head], tensors[embedding])
    raw = json.loads((tmp_path / "adapter_config.json").read_text())
    assert raw["ensure_weight_tying"] is True
    again = tied()
    models.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS), model(IDS))

    for changed, message in (
        (
            {**tensors, head: tensors[head] + 1},
            r"lm_head\.weight and model\.embed_tokens\.weight differ, but",
        ),
        ({n: t for n, t in tensors.items() if n != head}, r"model\.embed_tokens\.weight was trained alone"),
        ({n: t for n, t in tensors.items() if n != embedding}, r"lm_head\.weight was trained alone"),
    ):
        save_file(changed, tmp_path / "adapter_model.safetensors")
        with pytest.raises(models.CheckpointError, match=message):
            models.load_adapter(tied(), tmp_path)


def test_an_adapter_as_torch_saves_it_is_read(tmp_path):
    directory = changed(tmp_path, "lora")
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    (directory / "adapter_model.safetensors").unlink()
    model, same = base(), base()
    models.load_adapter(model, directory)
    models.load_adapter(same, GOLDEN / "lora")
    assert torch.equal(model(IDS), same(IDS))


@pytest.mark.parametrize("name", ["lora", "lora-dora"])
def test_tensors_are_read_under_their_names_in_a_peft_model_too(tmp_path, name):
    """With the adapter's name in them, and the magnitude with `.weight` as a module has it."""
    directory = changed(tmp_path, name)
    tensors = load_file(directory / "adapter_model.safetensors")
    tensors = {re.sub(r"(lora_[AB])\.", r"\1.default.", n): t for n, t in tensors.items()}
    tensors = {re.sub(r"magnitude_vector$", "magnitude_vector.default.weight", n): t for n, t in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors")
    model, io = base(), answers(name)
    models.load_adapter(model, directory)
    there = io["attention_mask"].bool()
    logits = model(io["input_ids"], io["attention_mask"])
    torch.testing.assert_close(logits[there], io["logits"][there], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("base_model.model.a.q.lora_A.weight", "a.q.lora_A.weight"),
        ("base_model.model.a.q.lora_B.default.weight", "a.q.lora_B.weight"),
        ("base_model.model.a.q.lora_magnitude_vector", "a.q.lora_magnitude_vector"),
        ("base_model.model.a.q.lora_magnitude_vector.weight", "a.q.lora_magnitude_vector"),
        ("base_model.model.a.q.lora_magnitude_vector.default", "a.q.lora_magnitude_vector"),
        ("base_model.model.head.modules_to_save.default.dense.weight", "head.dense.weight"),
        ("base_model.model.head.modules_to_save.dense.bias", "head.dense.bias"),
        ("base_model.model.head.dense.bias", "head.dense.bias"),
        ("base_model.model.a.default.q.lora_A.weight", "a.default.q.lora_A.weight"),
    ],
)
def test_names_of_a_file_become_names_of_the_model(theirs, ours):
    assert released_name(theirs) == ours


# Which layers, in PEFT's words


@given(st.sets(st.sampled_from(LAYERS), min_size=1))
def test_the_names_that_are_written_fit_the_adapted_layers_and_nothing_else(chosen):
    model = base()
    models.attach_lora(model, models.LoraConfig(rank=1, target_modules=tuple(sorted(chosen))))
    names = target_names(model)
    everything = [name for name, module in model.named_modules() if type(module) is not torch.nn.Module]
    fitting = {n for n in everything if any(ends_with(n, name) for name in names) and ".lora_" not in n}
    assert fitting == chosen


def test_a_head_with_the_same_leaf_name_is_not_targeted():
    model = Classifier()
    models.attach_lora(model, models.LoraConfig(rank=2))
    names = target_names(model)
    assert {"query", "value"} < set(names)
    assert "dense" not in names  # classifier.dense is called so as well, and has no adapter
    assert [n for n in names if n.endswith("dense")] == [
        f"roberta.encoder.layer.{i}.attention.output.dense" for i in (0, 1)
    ]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"target_modules": ["q_proj"]}, {0, 3}),
        ({"target_modules": "all-linear"}, {0, 1, 2, 3, 4, 5}),
        ({"target_modules": r".*layers\.1\..*(q|up)_proj"}, {3, 5}),
        ({"target_modules": "q_proj"}, set()),  # a pattern is for the whole name
        ({"target_modules": ["v_proj", "up_proj"], "layers_to_transform": [1]}, {4, 5}),
        ({"target_modules": ["v_proj"], "layers_to_transform": 0}, {1}),
        ({"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": "layers"}, {1}),
        ({"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": ["h", "layers"]}, {1}),
        ({"target_modules": ["v_proj"], "layers_to_transform": [0], "layers_pattern": ["h"]}, set()),
        ({"target_modules": ["v_proj"], "exclude_modules": ["layers.1.self_attn.v_proj"]}, {1}),
        ({"target_modules": ["v_proj"], "exclude_modules": r".*\.1\..*"}, {1}),
        ({"target_modules": ["v_proj", "up_proj"], "modules_to_save": ["mlp"]}, {1, 4}),
    ],
)
def test_layers_are_chosen_by_pefts_rules(fields, expected):
    assert {i for i, name in enumerate(LAYERS) if chooses(fields, name)} == expected


KEYS = st.sampled_from(["q_proj", "v_proj", ".*_proj", "mlp.up_proj", "layers.0.*", "^model.layers.1.mlp.up_proj", "x"])


@given(st.lists(st.tuples(KEYS, st.integers(1, 4)), max_size=5).map(dict), st.integers(1, 4))
def test_patterns_mean_the_same_on_both_sides(pattern, default):
    """PEFT takes the first key that fits and we the longest: reading and writing translate."""

    def theirs(rule, name):
        return next((value for key, value in rule.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    read = models.LoraConfig(rank=default, rank_pattern=first_wins(pattern, LAYERS, default))
    assert [read.size(name)[0] for name in LAYERS] == [theirs(pattern, name) for name in LAYERS]
    ours = models.LoraConfig(rank=default, rank_pattern=pattern)
    assert [theirs(longest_first(pattern), name) for name in LAYERS] == [ours.size(name)[0] for name in LAYERS]


@given(st.lists(st.sampled_from(["a", "b", "ab", "proj"]), min_size=1, max_size=4), st.integers(0, 4))
def test_a_key_fits_at_dots_only(parts, cut):
    name, end = ".".join(parts), ".".join(parts[min(cut, len(parts) - 1) :])
    assert fits(end, name)
    assert ends_with(name, end)
    assert not fits(end, name + "x")
    assert not ends_with("x" + end, end)
    assert not fits(end, "x" + end)
    assert fits(f"^{name}", name)
    assert not fits(f"^{name}", f"model.{name}")


@pytest.mark.parametrize("form", ["list", "regex", "layers"])
def test_an_adapter_is_read_whichever_way_it_names_its_layers(tmp_path, form):
    fields = {
        "list": {"target_modules": ["q_proj", "o_proj", "not_here"]},
        "regex": {"target_modules": r".*\.[qo]_proj"},
        "layers": {"target_modules": ["q_proj", "o_proj"], "layers_to_transform": [0, 1]},
    }[form]
    directory = changed(tmp_path, "lora", **fields)
    tensors = load_file(directory / "adapter_model.safetensors")
    kept = {n: t for n, t in tensors.items() if "q_proj" in n or "o_proj" in n}
    save_file(kept, directory / "adapter_model.safetensors")
    model = base()
    models.load_adapter(model, directory)
    assert {name.rpartition(".")[2] for name, _ in adapted_layers(model)} == {"q_proj", "o_proj"}
    assert len(list(adapted_layers(model))) == 4


# Heads


def test_a_classifiers_adapter_brings_its_head(tmp_path):
    """PEFT lists both names that a head may have; this model has one of them."""
    model = Classifier()
    models.attach_lora(model, models.LoraConfig(rank=2, modules_to_save=("classifier",)))
    move(model)
    models.save_adapter(model, tmp_path)
    path = tmp_path / "adapter_config.json"
    raw = json.loads(path.read_text())
    assert raw["task_type"] == "SEQ_CLS"
    path.write_text(json.dumps({**raw, "modules_to_save": ["classifier", "score"]}))
    again = Classifier()
    before = again(IDS % 32)
    models.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS % 32), model(IDS % 32))
    assert not torch.equal(again(IDS % 32), before)


def test_modules_to_save_of_a_peft_file_are_found_by_the_ends_of_their_letters(tmp_path):
    """For PEFT `norm` is the end of `input_layernorm` too, and its files say no more."""
    model = base()
    models.attach_lora(model, models.LoraConfig(rank=2, modules_to_save=("norm", "layers.1.input_layernorm")))
    models.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "modules_to_save": ["norm"]}))
    again = base()
    models.load_adapter(again, tmp_path)
    attachment = attached(again)
    assert attachment is not None
    assert set(attachment.originals) == {"model.norm.weight", "model.layers.1.input_layernorm.weight"}


@pytest.mark.parametrize("saved", [(), ("classifier.out_proj",)])
def test_an_adapter_without_the_whole_head_is_not_called_a_classifiers(tmp_path, saved):
    model = Classifier()
    models.attach_lora(model, models.LoraConfig(rank=2, modules_to_save=saved))
    models.save_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] is None


def test_head_tensors_without_a_place_are_refused(tmp_path):
    model = Classifier()
    models.attach_lora(model, models.LoraConfig(rank=2, modules_to_save=("classifier",)))
    models.save_adapter(model, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    renamed = {n.replace("model.classifier", "model.score"): t for n, t in tensors.items()}
    save_file(renamed, tmp_path / "adapter_model.safetensors")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": ["score"]}))
    with pytest.raises(models.CheckpointError, match="modules_to_save: no module with weights is called score"):
        models.load_adapter(Classifier(), tmp_path)


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "VERA"}, "peft_type is 'VERA'"),
        ({"use_dora": True}, r"for another model: lacks .*lora_magnitude_vector"),
        ({"modules_to_save": ["lm_head"]}, "for another model: lacks lm_head.weight"),
        ({"modules_to_save": "lm_head"}, "modules_to_save is 'lm_head'; a list of names is needed"),
        ({"r": 3}, r"is for another model: .*lora_A.weight is \[8, 64\], expected \[3, 64\]"),
        ({"r": 10**12}, r"is for another model: .*expected \[1000000000000, 64\]"),
        ({"r": 0}, "rank is 0"),
        ({"r": 2.5}, "not a usable LoRA configuration"),
        ({"r": "8"}, "not a usable LoRA configuration"),
        ({"rank_pattern": ["q_proj"]}, "not a usable LoRA configuration"),
        ({"rank_pattern": {"(": 2}}, "not a usable LoRA configuration"),
        ({"target_modules": ["query"]}, "no layer is called query; this model has down_proj"),
        ({"target_modules": [3]}, r"target_modules is \[3\]; a list of names is needed"),
        ({"target_modules": "("}, "not a usable LoRA configuration"),
        ({"target_modules": ["q_proj"]}, "which this model has no place for"),
        ({"lora_bias": True}, "lora_bias is True, which is not supported here"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["x"]}, "target_parameters"),
        ({"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        ({"use_qalora": True}, "use_qalora"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_leaves_the_model_alone(tmp_path, change, message):
    directory = changed(tmp_path, "lora", **change)
    model = base()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    before = state(model)
    with pytest.raises(models.CheckpointError, match=message):
        models.load_adapter(model, directory)
    unchanged(model, before)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.full((8, 64), float("nan")), "q_proj.lora_A.weight holds NaN or infinity; the training"),
        (torch.full((8, 64), float("inf")), "holds NaN or infinity"),
        (torch.ones(8, 64, dtype=torch.int32), "holds torch.int32, not floating-point numbers"),
        (torch.ones(8, 65), r"q_proj.lora_A.weight is \[8, 65\], expected \[8, 64\]"),
        (None, r"lacks model\.layers\.0\.self_attn\.q_proj\.lora_A"),
    ],
)
def test_tensors_that_are_not_an_adapters_are_refused(tmp_path, value, message):
    directory = changed(tmp_path, "lora")
    tensors = load_file(directory / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    tensors.pop(name)
    save_file(tensors if value is None else {**tensors, name: value}, directory / "adapter_model.safetensors")
    model = base()
    before = state(model)
    with pytest.raises(models.CheckpointError, match=message):
        models.load_adapter(model, directory)
    unchanged(model, before)


def test_an_adapters_directory_without_one_of_its_files_is_refused(tmp_path):
    with pytest.raises(models.CheckpointError, match=r"no adapter_config\.json; is it an adapter's directory"):
        models.load_adapter(base(), tmp_path)
    shutil.copy(GOLDEN / "lora" / "adapter_config.json", tmp_path)
    with pytest.raises(models.CheckpointError, match=r"has no adapter_model.safetensors and no adapter_model.bin"):
        models.load_adapter(base(), tmp_path)


def test_a_second_adapter_and_an_alpha_beside_the_files_own_are_refused():
    model = base()
    with pytest.raises(ValueError, match=r"alpha=3.0 was given, but the adapter's own configuration says"):
        models.load_adapter(model, GOLDEN / "lora", alpha=3.0)
    models.load_adapter(model, GOLDEN / "lora")
    with pytest.raises(ValueError, match="already has adapters"):
        models.load_adapter(model, GOLDEN / "lora")


def test_detaching_gives_the_model_back_with_its_gradients():
    model = base()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    before = state(model)
    models.attach_lora(model, models.LoraConfig(rank=2, dora=True, modules_to_save=("lm_head",)))
    move(model)
    detach(model)
    unchanged(model, before)
    models.attach_lora(model, models.LoraConfig(rank=2))  # and another may be attached


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors: {k: v + 1 for k, v in tensors.items()}, "differs after writing"),
        (lambda tensors: dict(list(tensors.items())[1:]), "differs after writing"),
        (lambda tensors: {**tensors, "more": torch.ones(1)}, "tensor count differs after writing"),
    ],
)
def test_what_is_read_back_after_writing_is_compared(tmp_path, monkeypatch, damage, message):
    model = base()
    models.attach_lora(model, models.LoraConfig(rank=2))
    monkeypatch.setattr("models.adapter.save_file", lambda t, path, _: save_file(damage(t), path))
    with pytest.raises(RuntimeError, match=message):
        models.save_adapter(model, tmp_path)
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_an_adapter_that_is_not_all_numbers_is_not_saved(tmp_path):
    model = base()
    models.attach_lora(model, models.LoraConfig(rank=2))
    model.get_parameter("model.layers.1.mlp.up_proj.lora_B.weight").data[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"not saved: 1 of 28 tensors hold NaN or infinity, .*up_proj.lora_B.weight"):
        models.save_adapter(model, tmp_path / "a")
    assert not (tmp_path / "a").exists()
