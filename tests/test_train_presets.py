"""Presets: the paper's numbers by name, under files and flags; and where each value of a config came from."""

import doctest
import tomllib
from pathlib import Path

import pytest

import train.qlora_names
from models.errors import ConfigError
from train.config import parse, read_config
from train.preset import presets
from train.qlora_names import NAMES, translation
from train.recipe import RunConfig
from train.toml import all_keys

NEEDED = ["--model", "m", "--data.path", "d.jsonl"]
OVERLAYS = ("lora-16bit", "full-16bit")
SHIPPED = {name: preset for preset in presets(RunConfig.presets) for name in preset.names}
RECIPES = [name for name in SHIPPED if name not in (*OVERLAYS, "qlora")]

# Table 9: batch, learning rate, steps, source and target length; the bare names are the row of 7B and 13B.
ALL = {
    "": (16, 2e-4, 10000, 384, 128),
    "-7b": (16, 2e-4, 10000, 384, 128),
    "-13b": (16, 2e-4, 10000, 384, 128),
    "-33b": (32, 1e-4, 5000, 384, 128),
    "-65b": (64, 1e-4, 2500, 384, 128),
}
TABLE_9 = {
    f"{name}{size}": row
    for name in ("alpaca", "flan-v2", "self-instruct", "unnatural-instructions", "chip2")
    for size, row in ALL.items()
}
TABLE_9 |= {f"hh-rlhf{size}": (*row[:3], None, 768) for size, row in ALL.items()}
TABLE_9 |= {f"guanaco-{size}": (16, 2e-4, 1875, None, 512) for size in ("7b", "13b")}
TABLE_9 |= {f"guanaco-{size}": (16, 1e-4, 1875, None, 512) for size in ("33b", "65b")}
TABLE_9 |= {f"longform{size}": (16, 2e-4, 4000, 512, 1024) for size in ("", "-7b", "-13b")}
TABLE_9 |= {f"longform{size}": (32, 1e-4, 2343, 512, 1024) for size in ("-33b", "-65b")}


def named(*names, more=()):
    return parse(RunConfig, [*NEEDED, *(word for name in names for word in ("--preset", name)), *more])


@pytest.mark.parametrize("name", TABLE_9)
def test_an_instruction_set_has_the_settings_of_table_9(name):
    config = named(name)
    found = (
        config.batch_size * config.accumulation,
        config.optimizer.learning_rate,
        config.max_steps,
        config.data.source_max_len,
        config.data.target_max_len,
    )
    assert found == TABLE_9[name]


@pytest.mark.parametrize("name", TABLE_9)
def test_what_the_papers_runs_share_is_in_each_of_them(name):
    config = named(name)
    assert (config.quantize, config.quant.codebook, config.quant.double_quant) == (True, "nf4", True)
    assert (config.lora.rank, config.lora.alpha, config.lora.target_modules) == (64, 16.0, "all-linear")
    assert config.lora.dropout == (0.05 if name.endswith(("33b", "65b")) else 0.1)
    optimizer = config.optimizer
    assert (optimizer.name, optimizer.beta2, optimizer.max_grad_norm) == ("paged-adamw", 0.999, 0.3)
    assert (optimizer.schedule, optimizer.warmup_ratio, optimizer.weight_decay) == ("constant", 0.03, 0.0)
    assert config.batch_size == 1
    assert config.data.group_by_length


def test_the_names_that_people_look_for_are_there():
    wanted = {*TABLE_9, "guanaco", "glue-roberta-large", "superni-t5", "superni-t5-xl", "superni-t5-xxl", *OVERLAYS}
    assert wanted <= SHIPPED.keys()
    assert all(preset.summary and not preset.summary.startswith("preset") for preset in SHIPPED.values())


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_whole_alone_and_under_each_16_bit_baseline(name):
    four_bit = named(name)
    assert (four_bit.quantize, four_bit.adapters) == (True, True)
    lora, full = (named(name, overlay) for overlay in OVERLAYS)
    assert (lora.quantize, lora.adapters) == (False, True)
    assert lora.lora == four_bit.lora
    assert (full.quantize, full.adapters) == (False, False)
    assert 1e-6 <= full.optimizer.learning_rate <= 5e-5
    assert full.data == lora.data == four_bit.data
    assert full.max_steps == four_bit.max_steps


def test_t5_and_roberta_have_their_own_task_and_adapters():
    t5, xl, glue = named("superni-t5"), named("superni-t5-xl"), named("glue-roberta-large")
    assert (t5.task, t5.lora.rank, xl.lora.rank) == ("seq2seq", 16, 64)
    assert (t5.lora.alpha, t5.lora.dropout, xl.lora.alpha) == (64.0, 0.0, 64.0)
    assert (t5.data.source_max_len, t5.data.target_max_len, t5.optimizer.learning_rate) == (1024, 128, 5e-5)
    assert (t5.data.per_task, t5.epochs, t5.optimizer.schedule) == (100, 2, "constant")
    assert (glue.task, glue.lora.rank, glue.lora.modules_to_save) == ("classification", 8, ("classifier",))


# Tasks of GLUE in the LoRA authors' scripts: batch (of 8 devices), learning rate, epochs, length.
SCRIPT = {
    "mnli": (32, 3e-4, 10, 128),
    "sst2": (64, 4e-4, 10, 512),
    "mrpc": (32, 3e-4, 20, 512),
    "cola": (32, 3e-4, 20, 128),
    "qnli": (32, 2e-4, 10, 512),
    "qqp": (32, 3e-4, 20, 512),
    "rte": (64, 4e-4, 20, 512),
    "stsb": (32, 3e-4, 10, 128),
}
PAPER = SCRIPT | {"sst2": (32, 4e-4, 10, 512), "cola": (32, 2e-4, 20, 128), "stsb": (64, 2e-4, 30, 128)}


@pytest.mark.parametrize("task", SCRIPT)
@pytest.mark.parametrize(("source", "table"), [("script", SCRIPT), ("paper", PAPER)])
def test_glue_has_the_settings_of_lora_by_their_source(source, table, task):
    config = named(f"glue_lora_{source}-{task}")
    optimizer = config.optimizer
    found = (config.batch_size * config.accumulation, optimizer.learning_rate, config.epochs, config.data.max_len)
    assert found == table[task]
    assert (config.lora.rank, config.lora.alpha, config.lora.dropout) == (8, 16.0, 0.0)
    assert (config.lora.target_modules, config.lora.modules_to_save) == (("query", "value"), ("classifier",))
    assert (optimizer.weight_decay, optimizer.warmup_ratio, optimizer.max_grad_norm) == (0.1, 0.06, 1.0)
    assert (config.seed, config.dtype) == (0, "float32")
    assert config.task == ("regression" if task == "stsb" else "classification")


def test_every_file_is_utf_8_toml_that_names_only_settings():
    known = set(all_keys(RunConfig))
    for path in RunConfig.presets.glob("*.toml"):
        table = tomllib.loads(path.read_text("utf-8"))
        assert set(table) - {"preset", "sizes"} <= known, path
        assert path.read_text("utf-8").startswith("# "), path


# Where a value comes from


def test_flags_win_over_files_over_later_presets_over_earlier_ones(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("max_steps = 7\n[lora]\nalpha = 8\n")
    config = named("alpaca", "guanaco-33b", more=["--config", str(path), "--lora.alpha", "4"])
    assert (config.data.source_max_len, config.data.target_max_len) == (384, 512)
    assert (config.optimizer.learning_rate, config.max_steps, config.lora.alpha) == (1e-4, 7, 4.0)


def test_a_file_may_name_presets_to_be_laid_over(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = ["alpaca-33b", "lora-16bit"]\nmodel = "m"\nmax_steps = 7\n[data]\npath = "d"\n')
    config = read_config(RunConfig, path)
    assert (config.accumulation, config.quantize, config.max_steps) == (32, False, 7)
    assert parse(RunConfig, ["--config", str(path), "--accumulation", "2"]).accumulation == 2


def test_print_config_gives_a_file_of_every_setting_with_its_origin(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text("log_every = 5\n")
    flags = ["--config", str(path), "--no-quantize", "--lora.rank=64", "--seed", "3"]
    with pytest.raises(SystemExit) as stop:
        named("guanaco-33b", more=[*flags, "--print-config"])
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    for line in (
        "learning_rate = 0.0001  # preset guanaco-33b",
        "max_steps = 1875  # preset guanaco",
        "alpha = 16.0  # preset qlora",
        f"log_every = 5  # {path}",
        "quantize = false  # --quantize",
        "rank = 64  # --lora.rank",  # although a preset says the same
        "seed = 3  # --seed",
        'device = "auto"  # default',
        "# epochs is not set  # default",
    ):
        assert line in printed.splitlines()
    (tmp_path / "printed.toml").write_text(printed)
    assert read_config(RunConfig, tmp_path / "printed.toml") == named("guanaco-33b", more=flags)


# Refusals


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("guanco-7b", r"preset 'guanco-7b' is not known; did you mean guanaco-7b\?"),
        ("alpaca-30b", r"preset 'alpaca-30b' is not known; did you mean alpaca-[13]3b\?"),
        ("zebra", r"preset 'zebra' is not known; there are alpaca, .*superni-t5-xxl.* \(qlora list presets\)"),
    ],
)
def test_an_unknown_preset_is_answered_with_the_nearest_name(name, says):
    with pytest.raises(ConfigError, match=says):
        named(name, more=["--max-steps", "1"])


def test_an_unknown_preset_in_a_file_is_named_with_the_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('preset = "alpca"\nmax_steps = 3\n')
    with pytest.raises(ConfigError, match=r"run.toml: preset 'alpca' is not known; did you mean alpaca"):
        named(more=["--config", str(path)])
    path.write_text("preset = 3\nmax_steps = 3\n")
    with pytest.raises(ConfigError, match="preset: must be a name or a list of names, not 3"):
        named(more=["--config", str(path)])


def test_epochs_that_are_given_later_take_the_place_of_steps_and_the_other_way_round(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("epochs = 2\n")
    assert (named("guanaco-7b").max_steps, named("guanaco-7b").epochs) == (1875, None)
    for more, expected in (
        (["--epochs", "1"], (None, 1.0)),
        (["--config", str(path)], (None, 2.0)),
        (["--config", str(path), "--max-steps=7"], (7, None)),
        (["--max-steps", "None", "--epochs", "1"], (None, 1.0)),
    ):
        config = named("guanaco-7b", more=more)
        assert (config.max_steps, config.epochs) == expected
    with pytest.raises(ConfigError, match="exactly one of max_steps and epochs"):
        named("guanaco-7b", more=["--max-steps", "3", "--epochs", "1"])


def test_settings_of_qlora_py_are_translated_in_files_and_flags(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_text("max_steps = 3\nlora_r = 8\nper_device_train_batch_size = 4\nmax_memory_MB = 80000\nbits = 4\n")
    with pytest.raises(ConfigError) as caught:
        named(more=["--config", str(path), "--gradient_accumulation_steps=4"])
    for said in (
        "lora_r: unknown key; qlora.py's lora_r is lora.rank here",
        "qlora.py's per_device_train_batch_size is batch_size here",
        "there is no need for qlora.py's max_memory_MB: a model is loaded whole onto the one device",
        "qlora.py's bits is quantize and quant.codebook here",
        "--gradient_accumulation_steps: unknown flag; qlora.py's gradient_accumulation_steps is accumulation here",
    ):
        assert said in str(caught.value)
    capsys.readouterr()


def test_every_translation_names_a_setting_that_there_is():
    known = all_keys(RunConfig)
    later = {"keep_checkpoints"}  # with checkpoints
    assert {ours for each in NAMES.values() for ours in each} - later <= set(known)
    assert translation("lora_r", ["window"]) == ""
    assert doctest.testmod(train.qlora_names).failed == 0


def test_the_presets_are_shipped_with_the_package():
    shipped = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())
    assert "presets/*" in shipped["tool"]["setuptools"]["package-data"]["train"]
