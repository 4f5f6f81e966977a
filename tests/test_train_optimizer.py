"""Names to optimizers, and LoRA+: the own learning rate of B, in groups of the optimizer."""

import pytest
import torch

from models.errors import ConfigError
from train.optimizer import NAMES, OptimizerConfig, make_optimizer, set_learning_rate
from train.paged import AdamW, AdamW8bit, Lion, PagedAdamW, PagedAdamW8bit, Paging


def adapter():
    return {
        "layer.lora_A.weight": torch.nn.Parameter(torch.ones(2, 3)),
        "layer.lora_B.weight": torch.nn.Parameter(torch.ones(4, 2)),
        "layer.lora_magnitude_vector": torch.nn.Parameter(torch.ones(4)),
    }


@pytest.mark.parametrize("ratio", [0.5, 16.0])
def test_b_moves_ratio_times_as_far_as_all_else_in_adams_first_step(ratio):
    parameters = adapter()
    optimizer = make_optimizer(parameters, OptimizerConfig(lora_plus_ratio=ratio, eps=1e-30))
    set_learning_rate(optimizer, 1e-3)
    for parameter in parameters.values():
        parameter.grad = torch.full_like(parameter, 7.0)  # Adam's first step is as long as the rate, whatever came
    optimizer.step()
    moved = {name.split(".")[1]: float((1 - p).mean().detach()) for name, p in parameters.items()}
    assert moved["lora_A"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["lora_magnitude_vector"] == pytest.approx(1e-3, rel=1e-3)
    assert moved["lora_B"] == pytest.approx(ratio * 1e-3, rel=1e-3)


def test_the_groups_hold_every_parameter_once_and_start_at_their_own_rate():
    parameters = adapter()
    optimizer = make_optimizer(parameters, OptimizerConfig(learning_rate=0.5, lora_plus_ratio=4.0))
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(map(id, parameters.values()))
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 2.0]


def test_ratio_one_is_one_group_in_the_parameters_order():
    parameters = adapter()
    (group,) = make_optimizer(parameters, OptimizerConfig()).param_groups
    assert list(map(id, group["params"])) == list(map(id, parameters.values()))
    assert group["lr"] == OptimizerConfig().learning_rate


@pytest.mark.parametrize("ratio", [0.0, -1.0, float("inf"), float("nan")])
def test_an_impossible_ratio_is_refused(ratio):
    with pytest.raises(ValueError, match="lora_plus_ratio must be a positive number"):
        OptimizerConfig(lora_plus_ratio=ratio)


def test_a_ratio_without_adapters_is_refused():
    with pytest.raises(ConfigError, match=r"lora_plus_ratio is 16.0, but no lora_B is trained"):
        make_optimizer({"weight": torch.nn.Parameter(torch.ones(1))}, OptimizerConfig(lora_plus_ratio=16.0))


@pytest.mark.parametrize(
    ("name", "cls", "betas"),
    [
        ("adamw", AdamW, (0.9, 0.999)),
        ("paged-adamw", PagedAdamW, (0.9, 0.999)),
        ("adamw-8bit", AdamW8bit, (0.9, 0.999)),
        ("paged-adamw-8bit", PagedAdamW8bit, (0.9, 0.999)),
        ("lion", Lion, (0.9, 0.99)),
    ],
)
def test_each_name_is_a_class_with_its_papers_betas(name, cls, betas):
    optimizer = make_optimizer(adapter(), OptimizerConfig(name=name, weight_decay=0.25, lora_plus_ratio=2.0))
    assert type(optimizer) is cls
    assert [group["betas"] for group in optimizer.param_groups] == [betas, betas]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.25, 0.25]
    assert [group["lr"] for group in optimizer.param_groups] == [2e-4, 4e-4]


@pytest.mark.parametrize("name", NAMES)
def test_betas_that_are_given_are_taken(name):
    optimizer = make_optimizer(adapter(), OptimizerConfig(name=name, beta1=0.5, beta2=0.75))
    assert optimizer.param_groups[0]["betas"] == (0.5, 0.75)


def test_oversubscription_reaches_the_paged_and_is_refused_for_others():
    optimizer = make_optimizer(adapter(), OptimizerConfig(name="paged-adamw", allow_oversubscription=True))
    assert optimizer.paging is not None
    assert optimizer.paging.allow_oversubscription
    with pytest.raises(ValueError, match="allow_oversubscription is for paged optimizers, and lion is none"):
        OptimizerConfig(name="lion", allow_oversubscription=True)


@pytest.mark.parametrize("cls", [PagedAdamW, PagedAdamW8bit])
@pytest.mark.parametrize("flag", [False, True])
@pytest.mark.parametrize("setting", [None, False, True])
def test_oversubscription_is_allowed_if_the_flag_or_the_paging_says_so(cls, flag, setting):
    paging = None if setting is None else Paging(allow_oversubscription=setting, window_bytes=7)
    made = cls([torch.nn.Parameter(torch.ones(1))], allow_oversubscription=flag, paging=paging).paging
    assert made.allow_oversubscription == (flag or bool(setting))
    assert made.window_bytes == (Paging().window_bytes if paging is None else 7)
