"""The whole recipe: its flags, its file, its directory."""

import re

import pytest

from models import LoraConfig
from models.errors import ConfigError
from train.config import parse, read_config, to_toml
from train.optimizer import OptimizerConfig
from train.preparation import prepare
from train.recipe import RunConfig

BASE = ["--model", "m", "--data.path", "d.jsonl", "--max-steps", "5"]


def test_flags_of_every_part_are_understood():
    flags = "--lora.rank 16 --lora.target-modules q_proj v_proj --quant.block-size 128"
    more = ["--lora.rank-pattern", "q_proj", "8", "--optimizer.schedule", "cosine"]
    config = parse(RunConfig, [*BASE, *flags.split(), *more])
    assert (config.lora.rank, config.lora.target_modules) == (16, ("q_proj", "v_proj"))
    assert config.lora.rank_pattern == {"q_proj": 8}
    assert (config.quant.block_size, config.optimizer.schedule) == (128, "cosine")
    assert config.optimizer == OptimizerConfig(schedule="cosine")


def test_the_variants_of_an_adapter_are_flags_and_lines_of_a_file(tmp_path):
    flags = "--lora.dora --lora.rslora --lora.init pissa --lora.modules-to-save embed_tokens lm_head"
    config = parse(RunConfig, [*BASE, *flags.split(), "--optimizer.lora-plus-ratio", "16"])
    expected = LoraConfig(dora=True, rslora=True, init="pissa", modules_to_save=("embed_tokens", "lm_head"))
    assert config.lora == expected
    assert config.optimizer.lora_plus_ratio == 16.0
    (tmp_path / "config.toml").write_text(to_toml(config))
    assert read_config(RunConfig, tmp_path / "config.toml") == config
    assert 'modules_to_save = ["embed_tokens", "lm_head"]' in (tmp_path / "config.toml").read_text()


def test_a_recipe_written_and_read_back_is_equal_but_for_what_belongs_to_one_call(tmp_path):
    config = parse(RunConfig, [*BASE, "--name", "x", "--optimizer.max-grad-norm", "inf", "--overwrite", "--quiet"])
    (tmp_path / "config.toml").write_text(to_toml(config))
    again = read_config(RunConfig, tmp_path / "config.toml")
    assert (again.overwrite, again.quiet) == (False, False)
    assert again == parse(RunConfig, [*BASE, "--name", "x", "--optimizer.max-grad-norm", "inf"])


def test_the_directory_is_out_or_the_name_under_runs_or_the_time_and_the_model():
    def directory(*flags):
        return parse(RunConfig, [*BASE, *flags]).directory().as_posix()

    assert directory("--out", "here/there", "--name", "x") == "here/there"
    assert directory("--name", "x") == "runs/x"
    assert re.fullmatch(r"runs/\d{4}-\d\d-\d\d-\d{6}-m", directory())


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--model", ""], "--model: model must name a checkpoint"),
        (["--seed", "-1"], "--seed: seed must be at least 0 and below"),
        (["--name", "a/b"], "--name: name must be a plain name without slashes, not 'a/b'"),
        (["--optimizer.beta2", "2"], "--optimizer.beta2: beta2 must be at least 0 and below 1, not 2.0"),
        (["--epochs", "1"], "exactly one of max_steps and epochs says how long to train; got 5 and 1.0"),
        (["--lora.init", "pisa"], "--lora.init: lora: init is 'pisa'; choose from default, pissa, loftq; did you mean"),
        (["--accumulation", "0"], "--accumulation: accumulation must be at least 1, not 0"),
    ],
)
def test_an_impossible_recipe_is_refused_by_flag(flags, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        parse(RunConfig, [*BASE, *flags])


def test_every_flag_has_a_help_text(capsys):
    with pytest.raises(SystemExit):
        parse(RunConfig, ["--help"])
    out = " ".join(re.sub("[│─╭╮╰╯]", " ", capsys.readouterr().out).split())
    for said in (
        "Checkpoint to start from",
        "Micro-batches in a step",
        "Inner dimension r",
        "The update rule",
    ):
        assert said in out


def test_several_processes_are_not_promised_where_one_prepares(tmp_path):
    with pytest.raises(ConfigError, match="nproc is 2, but this is one process"):
        prepare(parse(RunConfig, [*BASE, "--nproc", "2", "--out", str(tmp_path / "run")]))
    assert not (tmp_path / "run").exists()
