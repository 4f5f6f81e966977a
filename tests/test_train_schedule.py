"""The learning rate of every step, and the optimizer's settings."""

import doctest
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import train.progress
import train.schedule
from train.optimizer import OptimizerConfig, make_optimizer
from train.schedule import learning_rate, warmup_steps

totals = st.integers(1, 500)
configs = st.builds(
    OptimizerConfig,
    schedule=st.sampled_from(["constant", "cosine", "linear"]),
    warmup_ratio=st.floats(0, 1),
    warmup_steps=st.none() | st.integers(0, 100),
    min_ratio=st.floats(0, 1),
)


@given(total=totals, config=configs, step=st.integers(1, 2000))
def test_every_rate_is_above_zero_and_at_most_the_full_one(total, config, step):
    rate = learning_rate(min(step, total), total, config)
    assert 0 < rate <= config.learning_rate


@given(total=totals, config=configs)
def test_the_rate_rises_evenly_to_the_last_warmup_step_and_never_again(total, config):
    warmup = warmup_steps(total, config)
    rates = [learning_rate(step, total, config) for step in range(1, total + 1)]
    for step, rate in enumerate(rates[:warmup], start=1):
        assert rate == pytest.approx(config.learning_rate * step / warmup)
    after = rates[max(0, warmup - 1) :]
    assert all(later <= earlier for earlier, later in pairwise(after))
    if config.schedule == "constant":
        assert set(after) <= {config.learning_rate}


def test_a_cosine_is_half_way_down_in_the_middle_and_ends_at_its_share():
    config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=10, min_ratio=0.1)
    assert learning_rate(11, 110, config) == 1.0
    assert learning_rate(61, 110, config) == pytest.approx(0.55)
    assert learning_rate(110, 110, config) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi * 0.99)) / 2)


def test_a_linear_decay_falls_by_the_same_at_each_step():
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_steps=2, min_ratio=0.2)
    rates = [learning_rate(step, 6, config) for step in range(1, 7)]
    assert rates == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4])


def test_warmup_counts_a_started_step_whole_and_steps_win_over_the_ratio():
    assert warmup_steps(100, OptimizerConfig(warmup_ratio=0.07)) == 7  # 0.07 * 100 is above 7 in floats
    assert warmup_steps(101, OptimizerConfig(warmup_ratio=0.07)) == 8
    assert warmup_steps(100, OptimizerConfig(warmup_ratio=0.5, warmup_steps=0)) == 0


def test_the_examples_in_the_docstrings_hold():
    for module in (train.schedule, train.progress):
        assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize("step", [0, 11])
def test_a_step_outside_the_run_is_refused(step):
    with pytest.raises(ValueError, match=f"steps go from 1 to 10, not {step}"):
        learning_rate(step, 10, OptimizerConfig())


def test_adamw_makes_the_published_update():
    """Kingma & Ba's algorithm with Loshchilov & Hutter's decay, two steps by hand."""
    weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    config = OptimizerConfig(learning_rate=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.01)
    optimizer = make_optimizer({"weight": weight}, config)
    expected, m, v = weight.detach().double(), torch.zeros(2), torch.zeros(2)
    for step, gradient in enumerate([torch.tensor([0.5, -1.0]), torch.tensor([-0.25, 3.0])], start=1):
        weight.grad = gradient
        optimizer.step()
        gradient = gradient.double()
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        expected = expected * (1 - 0.1 * 0.01)
        expected = expected - 0.1 * (m / (1 - 0.8**step)) / ((v / (1 - 0.9**step)).sqrt() + 1e-6)
    torch.testing.assert_close(weight.detach().double(), expected, rtol=2e-7, atol=0)


def test_the_defaults_are_the_papers():
    config = OptimizerConfig()
    (group,) = make_optimizer({"weight": torch.nn.Parameter(torch.ones(1))}, config).param_groups
    assert (
        config.learning_rate,
        group["betas"][1],
        config.max_grad_norm,
        config.schedule,
        config.warmup_ratio,
    ) == ((2e-4, 0.999, 0.3, "constant", 0.03))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("learning_rate", 0.0, "learning_rate must be a positive number, not 0.0"),
        ("learning_rate", math.inf, "learning_rate must be a positive number, not inf"),
        ("learning_rate", math.nan, "learning_rate must be a positive number, not nan"),
        ("eps", -1e-8, "eps must be a positive number"),
        ("beta1", 1.0, "beta1 must be at least 0 and below 1, not 1.0"),
        ("beta2", -0.1, "beta2 must be at least 0 and below 1, not -0.1"),
        ("weight_decay", -0.1, "weight_decay must not be negative, not -0.1"),
        ("max_grad_norm", 0.0, "max_grad_norm must be above 0"),
        ("max_grad_norm", math.nan, "max_grad_norm must be above 0"),
        ("min_ratio", 1.5, "min_ratio is a share between 0 and 1, not 1.5"),
        ("warmup_ratio", -0.1, "warmup_ratio is a share between 0 and 1, not -0.1"),
        ("warmup_steps", -1, "warmup_steps must not be negative, not -1"),
    ],
)
def test_an_impossible_setting_is_refused(field, value, says):
    with pytest.raises(ValueError, match=says):
        OptimizerConfig(**{field: value})


@pytest.mark.parametrize(("field", "value"), [("name", "sgd"), ("schedule", "stepwise")])
def test_an_unknown_choice_is_refused_from_a_file(field, value, tmp_path):
    from train.config import read_config

    (tmp_path / "o.toml").write_text(f'{field} = "{value}"')
    with pytest.raises(ValueError, match=rf'{field}: must be one of "(adamw|constant)".*, not "{value}"'):
        read_config(OptimizerConfig, tmp_path / "o.toml")
