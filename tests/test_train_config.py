"""Settings from files and flags, written and read back; and every way to get them wrong."""

from dataclasses import dataclass, field, replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import ConfigError
from train.config import parse, read_config, to_toml


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """Which layers."""

    rank: int = 64
    """Inner dimension of the branch."""
    alpha: float = 16.0
    """Scale."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Leaf names."""
    rank_pattern: dict[str, int] = field(default_factory=dict)
    """Ranks of single layers."""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, not {self.rank}")
        if self.alpha <= 0:
            raise ValueError(f"alpha must be above 0, not {self.alpha}")


@dataclass(frozen=True, kw_only=True)
class Inner:
    """Deepest."""

    a: int = 1
    b: int = 2


@dataclass(frozen=True, kw_only=True)
class Outer:
    """Between."""

    inner: Inner = Inner(a=5)
    c: int = 3


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A run."""

    model: str
    """Directory of the model."""
    schedule: Literal["constant", "cosine"] = "constant"
    """How the rate goes on."""
    max_steps: int | None = None
    """How many updates."""
    epochs: float | None = None
    """How many passes."""
    quantize: bool = True
    """Store the base in four bits."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decays."""
    lora: Adapter = Adapter(rank=8)
    """The adapter."""
    outer: Outer = Outer(c=7)
    """Two levels down."""
    seed: int = 42
    """Where random numbers start."""
    overwrite: bool = field(default=False, metadata={"saved": False})
    """For one call only."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, not {self.seed}")
        if self.epochs is not None and self.epochs <= 0:
            raise ValueError(f"epochs must be above 0, not {self.epochs}")
        if (self.max_steps is None) == (self.epochs is None):
            raise ValueError(f"set one of max_steps and epochs; got {self.max_steps}, {self.epochs}")


BASE = ["--model", "m", "--max-steps", "5"]


@pytest.fixture
def toml(tmp_path):
    def write(text, name="run.toml"):
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return str(path)

    return write


def problems(cls, *argv):
    with pytest.raises(ConfigError) as caught:
        parse(cls, list(argv))
    return str(caught.value)


# What holds for every config

texts = st.text(st.characters(codec="utf-8"))
floats = st.floats(min_value=1e-300, allow_nan=False)
adapters = st.builds(
    Adapter,
    rank=st.integers(1, 2**62),
    alpha=floats,
    target_modules=texts | st.lists(texts).map(tuple),
    rank_pattern=st.dictionaries(texts, st.integers()),
)
settings = st.builds(
    lambda either, **rest: Settings(max_steps=either[0], epochs=either[1], **rest),
    either=st.tuples(st.integers(), st.none()) | st.tuples(st.none(), floats),
    model=texts,
    schedule=st.sampled_from(["constant", "cosine"]),
    quantize=st.booleans(),
    betas=st.tuples(st.floats(allow_nan=False), floats),
    lora=adapters,
    outer=st.builds(Outer, inner=st.builds(Inner, a=st.integers())),
)


@given(config=settings)
def test_a_config_written_and_read_back_is_equal(config, tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.toml"
    path.write_bytes(to_toml(config).encode())
    assert read_config(Settings, path) == config
    assert parse(Settings, ["--config", str(path)]) == config


def test_what_toml_cannot_say_is_refused():
    @dataclass(frozen=True)
    class Odd:
        limit: int | None = 3

    with pytest.raises(ValueError, match="limit is None, which TOML cannot say"):
        to_toml(Odd(limit=None))


def test_what_belongs_to_one_call_is_not_written():
    config = parse(Settings, [*BASE, "--overwrite"])
    assert config.overwrite
    assert "overwrite" not in to_toml(config)


# Where a value comes from


def test_flags_alone_give_a_config():
    config = parse(Settings, [*BASE, "--lora.rank", "4", "--no-quantize", "--schedule", "cosine"])
    assert config == Settings(
        model="m", max_steps=5, quantize=False, schedule="cosine", lora=Adapter(rank=4), outer=Outer(c=7)
    )


def test_hyphen_and_underscore_are_alike_in_flags_and_in_files(toml):
    path = toml('model = "m"\nmax-steps = 5\n[lora]\ntarget-modules = ["q_proj"]\n')
    assert parse(Settings, ["--config", path]).lora.target_modules == ("q_proj",)
    assert parse(Settings, [*BASE, "--lora.target_modules", "q_proj", "v_proj"]) == parse(
        Settings, [*BASE, "--lora.target-modules", "q_proj", "v_proj"]
    )


def test_a_flag_wins_over_a_file_and_a_later_file_over_an_earlier(toml):
    one = toml('model = "one"\nmax_steps = 1\nlora.rank = 1\nlora.alpha = 2\n', "one.toml")
    two = toml('model = "two"\n[lora]\nrank = 2\n', "two.toml")
    config = parse(Settings, ["--config", one, f"--config={two}", "--lora.rank", "3"])
    assert (config.model, config.max_steps, config.lora.rank, config.lora.alpha) == ("two", 1, 3, 2.0)


def test_a_nested_default_stays_where_a_file_is_silent(toml):
    assert parse(Settings, ["--config", toml("[lora]\nalpha = 3\n"), *BASE]).lora == Adapter(rank=8, alpha=3.0)
    config = parse(Settings, ["--config", toml("outer.inner.b = 9\n"), *BASE])
    assert config.outer == Outer(c=7, inner=Inner(a=5, b=9))
    assert parse(Settings, [*BASE, "--outer.inner.b", "9"]) == config


def test_a_flag_may_ask_for_the_default_of_the_class_against_that_of_the_field():
    assert parse(Settings, BASE).lora.rank == 8
    assert parse(Settings, [*BASE, "--lora.rank", "64"]).lora.rank == 64
    assert parse(Settings, [*BASE, "--outer.c=3", "--outer.inner.a", "1"]).outer == Outer(c=3, inner=Inner(a=1))


def test_help_shows_the_default_of_the_field(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, ["--help"])
    assert "(default: 8)" in " ".join(capsys.readouterr().out.split())


def test_lists_become_tuples_and_whole_numbers_floats(toml):
    config = parse(Settings, ["--config", toml("betas = [0, 1]\nlora.alpha = 32\n"), *BASE])
    assert config.betas == (0.0, 1.0)
    assert [type(value) for value in (*config.betas, config.lora.alpha)] == [float, float, float]


def test_a_dict_is_one_value_which_a_flag_replaces(toml):
    path = toml("[lora.rank_pattern]\nq_proj = 2\n")
    assert parse(Settings, ["--config", path, *BASE]).lora.rank_pattern == {"q_proj": 2}
    flags = ["--lora.rank-pattern", "v_proj", "4", "o_proj", "8"]
    assert parse(Settings, ["--config", path, *BASE, *flags]).lora.rank_pattern == {"v_proj": 4, "o_proj": 8}


def test_a_flag_can_take_back_what_a_file_sets(toml):
    config = parse(Settings, ["--config", toml("max_steps = 3\n"), "--model=m", "--max-steps=None", "--epochs=1"])
    assert (config.max_steps, config.epochs) == (None, 1.0)


def test_help_shows_docstrings_and_the_values_of_the_file(toml, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(
            Settings,
            ["--config", toml("lora.rank = 33\n"), "--help"],
            prog="qlora train",
            description="Train.",
        )
    out = capsys.readouterr().out
    assert stop.value.code == 0
    for said in (
        "qlora train",
        "Train.",
        "--config FILE",
        "Directory of the model.",
        "Inner dimension",
        "33",
    ):
        assert said in out


# Refusals


def test_everything_wrong_in_a_file_is_listed_at_once(toml):
    path = toml(
        'max_steps = 5\nepochs = -1\nschedule = "cosin"\nquantize = 1\nbetas = [1]\nrank = 3\n'
        '[lora]\nrank = 0\nalpha = 0\ntarget_module = "x"\nrank_pattern = {q = true}\n'
    )
    text = problems(Settings, "--config", path, "--model", "m")
    assert text.splitlines()[0] == "9 problems in the settings:"
    for problem in (
        'schedule: must be one of "constant", "cosine", not "cosin"; did you mean cosine?',
        "quantize: must be true or false, not 1",
        "betas: must be a list of 2: a number, a number, not [1]",
        "rank: unknown key; did you mean lora.rank?",
        "lora.target_module: unknown key; did you mean lora.target_modules?",
        'lora.rank_pattern: must be a table, each value a whole number, not {"q" = true}',
        "epochs: epochs must be above 0, not -1.0",
        "lora.rank: rank must be at least 1, not 0",
        "lora.alpha: alpha must be above 0, not 0.0",
    ):
        assert f"  {path}: {problem}" in text.splitlines()


def test_a_rule_over_two_settings_names_where_they_came_from(toml):
    path = toml('model = "m"\nmax_steps = 5\n')
    rule = "set one of max_steps and epochs; got"
    assert problems(Settings, "--model", "m") == f"{rule} None, None"
    assert problems(Settings, "--config", path, "--epochs", "1") == f"{path}, --epochs: {rule} 5, 1.0"


def test_a_rule_over_two_settings_is_listed_beside_an_impossible_third(toml):
    path = toml("max_steps = 5\nepochs = 1\nseed = -1\n[lora]\nrank = 0\n")
    assert problems(Settings, "--config", path, "--model", "m").splitlines() == [
        "3 problems in the settings:",
        f"  {path}: lora.rank: rank must be at least 1, not 0",
        f"  {path}: seed: seed must not be negative, not -1",
        f"  {path}: set one of max_steps and epochs; got 5, 1.0",
    ]


def test_an_impossible_flag_is_a_config_error_naming_the_flag():
    assert problems(Settings, *BASE, "--lora.rank", "0") == "--lora.rank: rank must be at least 1, not 0"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("max_steps = true", "max_steps: must be a whole number, not true"),
        ("max_steps = 1.0", "max_steps: must be a whole number, not 1.0"),
        ("lora.alpha = true", "lora.alpha: must be a number, not true"),
        ("lora.alpha = '1'", 'lora.alpha: must be a number, not "1"'),
        ("lora.target_modules = 3", "must be text or a list, each item text, not 3"),
        ("lora.target_modules = ['a', 3]", 'must be text or a list, each item text, not ["a", 3]'),
        ("model = 2026-01-01", "model: must be text, not 2026-01-01"),
        ("lora = 3", "lora: must be a table, [lora], not 3"),
        ("max_steps = 1\nmax-steps = 2", "max_steps: given twice, with - and with _"),
        ("max_stpes = 1", "max_stpes: unknown key; did you mean max_steps?"),
        ("lorra.rank = 1", "lorra: unknown key; did you mean lora?"),
        ("zebra = 1", "zebra: unknown key"),
        ("max_steps = ", "is not TOML: Invalid value"),
    ],
)
def test_a_wrong_file_is_refused_by_key(toml, text, says):
    path = toml(text)
    message = problems(Settings, "--config", path, *BASE)
    assert message.startswith(f"{path}: ")
    assert says in message
    assert message.splitlines() == [message]


def test_a_file_that_cannot_be_read_is_refused(tmp_path):
    assert "missing.toml: cannot be read: No such file" in problems(Settings, "--config", "missing.toml", *BASE)
    (tmp_path / "latin.toml").write_bytes('model = "é"'.encode("latin-1"))
    assert "is not UTF-8 text (byte 9)" in problems(Settings, "--config", str(tmp_path / "latin.toml"), *BASE)


def test_a_setting_without_default_must_be_set(toml, capsys):
    with pytest.raises(ConfigError, match=r"^model: is not set and has no default$"):
        read_config(Settings, toml("max_steps = 1"))
    with pytest.raises(SystemExit) as stop:
        parse(Settings, ["--max-steps", "5"])
    assert stop.value.code == 2
    assert "--model" in capsys.readouterr().err


def test_a_misspelt_required_key_is_named_beside_the_missing_one(toml):
    assert "modle: unknown key; did you mean model?" in problems(Settings, "--config", toml('modle = "m"'))


@pytest.mark.parametrize("flags", [["--lora.rnk", "3"], ["--lora.rank", "many"], ["--schedule", "cosin"], ["--config"]])
def test_a_wrong_flag_exits_with_2_and_speaks_on_stderr(flags, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Settings, [*BASE, *flags])
    out, err = capsys.readouterr()
    assert stop.value.code == 2
    assert out == ""
    assert flags[0] in err


def test_an_unknown_flag_is_answered_with_the_nearest_one(capsys):
    with pytest.raises(SystemExit):
        parse(Settings, [*BASE, "--lora.rnk", "3"])
    assert "Perhaps you meant" in (err := capsys.readouterr().err)
    assert "--lora.rank" in err


def test_a_config_is_not_changed_by_being_checked():
    config = parse(Settings, BASE)
    assert type(config) is Settings
    assert type(config.lora) is Adapter
    assert replace(config, max_steps=6).max_steps == 6
