"""The contract of torch.optim.Optimizer, kept by all of ours: groups, closures, hooks, state dicts, pickling."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch

from tests.optimizing import ADAMWS, CLASSES, SHAPES, equal, give_gradients, parameters, states_equal, steps
from train.paged import AdamW, AdamW8bit, Lion, PagedAdamW, PagedAdamW8bit

every_class = pytest.mark.parametrize("cls", CLASSES)
every_adamw = pytest.mark.parametrize("cls", ADAMWS)


@every_class
def test_a_run_from_a_state_dict_goes_on_as_one_that_was_never_stopped(cls):
    straight = cls(parameters(), lr=1e-2)
    steps(straight, 6)
    first = cls(parameters(), lr=1e-2)
    params = steps(first, 3)
    saved = io.BytesIO()
    torch.save(first.state_dict(), saved)
    saved.seek(0)
    resumed = cls([torch.nn.Parameter(p.detach().clone()) for p in params], lr=7.0)
    resumed.load_state_dict(torch.load(saved, weights_only=True))  # weights_only: nothing but plain tensors
    steps(resumed, 3, start=3)
    assert equal(resumed.param_groups[0]["params"], straight.param_groups[0]["params"])
    assert states_equal(resumed, straight)


@every_class
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_goes_on_alike_and_apart(cls, copied):
    optimizer = cls(parameters(), lr=1e-2)
    steps(optimizer, 2)
    twin = copied(optimizer)
    before = twin.state_dict()
    ours = steps(optimizer, 2, start=2)
    assert all(torch.equal(before["state"][k]["exp_avg"], s["exp_avg"]) for k, s in twin.state_dict()["state"].items())
    assert equal(steps(twin, 2, start=2), ours)
    assert states_equal(optimizer, twin)


@every_class
def test_a_state_dict_does_not_change_with_later_steps(cls):
    optimizer = cls(parameters())
    steps(optimizer, 1)
    saved = optimizer.state_dict()["state"][0]
    before = {name: value.clone() for name, value in saved.items()}
    steps(optimizer, 1, start=1)
    assert all(torch.equal(saved[name], before[name]) for name in before)


@every_class
def test_loading_into_used_states_forgets_them(cls):
    optimizer, other = cls(parameters()), cls(parameters())
    steps(optimizer, 3)
    steps(other, 1, start=9)
    optimizer.load_state_dict(other.state_dict())
    assert states_equal(optimizer, other)
    optimizer.load_state_dict(cls(parameters()).state_dict())
    assert optimizer.state_dict()["state"] == {}
    anew = cls(parameters())
    for either in (optimizer, anew):
        steps(either, 2, start=20)
    assert states_equal(optimizer, anew)


@every_class
def test_states_that_are_thrown_away_begin_at_zero(cls):
    """As those do who start the optimizer anew in the middle of a run."""
    optimizer, anew = cls(parameters(), lr=0.0), cls(parameters(), lr=0.0)
    params = steps(optimizer, 3)
    optimizer.state.clear()
    steps(optimizer, 2, start=20)
    steps(anew, 2, start=20)
    assert states_equal(optimizer, anew)
    optimizer.load_state_dict(anew.state_dict())
    del optimizer.state[params[0]]
    steps(optimizer, 1, start=22)
    alone = cls(parameters(SHAPES[:1]), lr=0.0)
    alone.param_groups[0]["params"][0].grad = params[0].grad
    alone.step()
    assert torch.equal(optimizer.state[params[0]]["exp_avg"], alone.state_dict()["state"][0]["exp_avg"])
    state = optimizer.state_dict()["state"]
    assert [float(state[i]["step"]) for i in range(3)] == [1, 3, 3]


@every_class
def test_each_group_has_its_own_rate_and_zero_does_not_move(cls):
    params = parameters()
    optimizer = cls([{"params": params[:1], "lr": 0.0}, {"params": params[1:], "weight_decay": 0.3}], lr=1e-2)
    before = [p.detach().clone() for p in params]
    steps(optimizer, 1)
    assert torch.equal(params[0], before[0])
    assert not torch.equal(params[3], before[3])
    alone = cls(parameters()[1:], lr=1e-2, weight_decay=0.3)
    for p, q in zip(alone.param_groups[0]["params"], params[1:], strict=True):
        p.grad = q.grad
    alone.step()
    assert equal(alone.param_groups[0]["params"], params[1:])


@every_class
def test_the_update_is_that_of_each_parameter_alone(cls):
    together = steps(cls(parameters(), lr=1e-2), 3)
    for index in range(len(SHAPES)):
        params = parameters()
        optimizer = cls([params[index]], lr=1e-2)
        for number in range(3):
            give_gradients(params, number)
            optimizer.step()
        assert torch.equal(params[index], together[index])


@every_class
def test_a_closure_gives_the_loss_and_may_use_gradients(cls):
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = cls([p], lr=1e-2)

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 3.0
    assert (p < 1).all()


@every_class
def test_hooks_are_called_in_their_places(cls):
    optimizer, called = cls(parameters()), []
    optimizer.register_step_pre_hook(lambda *_: called.append("before"))
    optimizer.register_step_post_hook(lambda *_: called.append("after"))
    optimizer.register_state_dict_post_hook(lambda _, packed: {**packed, "note": 1})
    optimizer.register_load_state_dict_pre_hook(lambda _, given: {k: v for k, v in given.items() if k != "note"})
    optimizer.register_load_state_dict_post_hook(lambda o: called.append(len(o.state)))
    steps(optimizer, 1)
    saved = optimizer.state_dict()
    assert saved["note"] == 1
    optimizer.load_state_dict(saved)
    assert called == ["before", "after", len(SHAPES)]


@every_class
def test_a_scheduler_of_torch_drives_the_rate(cls):
    optimizer = cls(parameters(), lr=1.0)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    steps(optimizer, 1)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 0.5


@every_class
def test_a_parameter_without_gradient_stays_and_has_no_state(cls):
    params = parameters()
    optimizer = cls(params, weight_decay=0.5)
    before = params[0].detach().clone()
    for p in params[1:]:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(params[0], before)
    assert sorted(optimizer.state_dict()["state"]) == list(range(1, len(SHAPES)))


@every_class
def test_no_gradient_at_all_is_no_step(cls):
    optimizer = cls(parameters())
    optimizer.step()
    assert (optimizer.state_bytes, optimizer.memory_kind) == (0, None)


@every_class
def test_a_late_parameter_begins_at_its_own_first_step_and_disturbs_no_other(cls):
    params, alone = parameters(), parameters()
    optimizer, reference = cls(params[:3], lr=1e-2), cls(alone[:3], lr=1e-2)
    steps(optimizer, 2)
    steps(reference, 2)
    optimizer.add_param_group({"params": params[3:]})
    steps(optimizer, 1, start=2)
    steps(reference, 1, start=2)
    assert equal(params[:3], alone[:3])
    state = optimizer.state_dict()["state"]
    assert [float(state[i]["step"]) for i in range(4)] == [3, 3, 3, 1]


@every_class
def test_parameters_of_one_group_may_be_at_different_steps(cls):
    params = parameters([(300,), (300,)])
    optimizer = cls(params, lr=1e-2)
    for number in range(3):
        params[0].grad = torch.randn(300, generator=torch.Generator().manual_seed(number))
        params[1].grad = params[0].grad if number == 2 else None  # its first step, and the other's third
        optimizer.step()
    first = cls(parameters([(300,), (300,)])[1:], lr=1e-2)
    first.param_groups[0]["params"][0].grad = params[1].grad
    first.step()
    assert torch.equal(params[1], first.param_groups[0]["params"][0])


@every_class
def test_a_parameter_that_is_frozen_at_first_is_taken_in_when_it_thaws(cls):
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = cls(params, lr=1e-2)
    give_gradients(params[1:], 0)
    optimizer.step()
    size = optimizer.state_bytes
    before = copy.deepcopy(optimizer.state_dict()["state"])
    params[0].requires_grad_()
    params[0].grad = torch.ones_like(params[0])
    for p in params[1:]:
        p.grad = None
    optimizer.step()
    assert optimizer.state_bytes > size
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(before[k][name], after[k][name]) for k in before for name in before[k])
    assert float(after[0]["step"]) == 1


@every_class
def test_layout_in_memory_does_not_matter(cls):
    weight = torch.randn(6, 300, generator=torch.Generator().manual_seed(3))
    plain, turned = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.t().contiguous().t())
    assert not turned.is_contiguous()
    for p in (plain, turned):
        optimizer = cls([p], lr=1e-2)
        for number in range(3):
            p.grad = torch.randn(6, 300, generator=torch.Generator().manual_seed(number))
            optimizer.step()
    assert torch.equal(plain, turned)
    assert not turned.is_contiguous()


@every_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_16_bit_parameter_is_computed_in_float32_and_rounded_once(cls, dtype):
    half = cls(parameters(dtype=dtype), lr=1e-2)
    ours = steps(half, 1)
    full = cls([torch.nn.Parameter(p.detach().float()) for p in parameters(dtype=dtype)], lr=1e-2)
    for p, q in zip(full.param_groups[0]["params"], ours, strict=True):
        p.grad = q.grad.float()
    full.step()
    assert equal(ours, [p.to(dtype) for p in full.param_groups[0]["params"]])
    assert states_equal(half, full)


@every_class
def test_a_16_bit_parameters_states_come_back_unrounded(cls):
    optimizer = cls(parameters(dtype=torch.bfloat16))
    steps(optimizer, 3)
    other = cls(parameters(dtype=torch.bfloat16))
    other.load_state_dict(optimizer.state_dict())  # torch would cast them to bfloat16
    assert states_equal(optimizer, other)


@every_class
def test_a_zero_gradient_never_moves_a_parameter(cls):
    p = torch.nn.Parameter(torch.randn(600))
    before = p.detach().clone()
    optimizer = cls([p], lr=1e-2, weight_decay=0.0)
    for number in range(20):
        p.grad = torch.randn(600, generator=torch.Generator().manual_seed(number))
        p.grad[100:300] = 0
        optimizer.step()
    assert torch.equal(p[100:300], before[100:300])
    assert (p[:100] != before[:100]).float().mean() > 0.5  # Lion, in steps of one length, may come back


def test_lion_is_that_of_its_paper():
    (p,) = params = parameters([(500,)])
    optimizer = Lion(params, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    expected, m = p.detach().double(), torch.zeros(500, dtype=torch.float64)
    for number in range(20):
        give_gradients(params, number)
        optimizer.step()
        assert p.grad is not None
        g = p.grad.double()
        expected = expected - 1e-2 * ((0.9 * m + 0.1 * g).sign() + 0.1 * expected)
        m = 0.99 * m + 0.01 * g
    torch.testing.assert_close(p.detach().double(), expected, rtol=1e-6, atol=1e-6)


# Conversions


@pytest.mark.parametrize("cls", [AdamW, PagedAdamW])
def test_200_steps_are_those_of_torch_within_rounding(cls):
    ours, theirs = parameters(), parameters()
    settings = {"lr": 3e-3, "betas": (0.8, 0.99), "eps": 1e-7, "weight_decay": 0.1}
    steps(cls(ours, **settings), 200)
    steps(torch.optim.AdamW(theirs, foreach=False, **settings), 200)
    exact = [p.double() for p in parameters()]
    exact = [torch.nn.Parameter(p.detach()) for p in exact]
    reference = torch.optim.AdamW(exact, foreach=False, **settings)
    for number in range(200):
        give_gradients(ours, number)
        for p, q in zip(exact, ours, strict=True):
            assert q.grad is not None
            p.grad = q.grad.double()
        reference.step()
    for p, q, r in zip(ours, theirs, exact, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=2e-6)
        if p.numel():  # no further from the truth than torch is, but for a little luck
            assert (p - r).abs().max() <= 2 * (q - r).abs().max() + 1e-7


@every_adamw
def test_torch_goes_on_from_our_state_and_we_from_its(cls):
    first = cls(parameters(), lr=1e-2, weight_decay=0.1)
    params = steps(first, 5)
    theirs = torch.optim.AdamW([torch.nn.Parameter(p.detach().clone()) for p in params])
    theirs.load_state_dict(first.torch_state_dict())
    assert theirs.param_groups[0]["lr"] == 1e-2
    back = cls([torch.nn.Parameter(p.detach().clone()) for p in params])
    back.load_state_dict(theirs.state_dict())
    near(back.torch_state_dict(), first.torch_state_dict())
    if cls in (AdamW, PagedAdamW):
        assert states_equal(back, first)
    # What 8 bits decode to is the same for both, and only the step is rounded in two ways.
    for p, q in zip(steps(first, 1, start=5), steps(theirs, 1, start=5), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def near(packed, other):
    """States alike but for what 8 bits round: 5 % of a value, or 1 % of the largest."""
    for key, state in other["state"].items():
        assert torch.equal(packed["state"][key]["step"], state["step"])
        for name in ("exp_avg", "exp_avg_sq"):
            atol = 0.01 * float(state[name].abs().max()) if state[name].numel() else 0.0
            torch.testing.assert_close(packed["state"][key][name], state[name], rtol=0.05, atol=atol)


@pytest.mark.parametrize(("source", "target"), [(AdamW, PagedAdamW8bit), (AdamW8bit, PagedAdamW)])
def test_states_change_their_precision_on_loading(source, target):
    optimizer = source(parameters())
    steps(optimizer, 4)
    other = target(parameters())
    other.load_state_dict(optimizer.state_dict())
    near(other.torch_state_dict(), optimizer.torch_state_dict())
    steps(other, 1, start=4)


def test_a_ratio_of_lora_plus_survives_a_state_dict_that_has_none():
    optimizer = AdamW([{"params": parameters(), "ratio": 16.0}])
    theirs = torch.optim.AdamW(parameters())
    optimizer.load_state_dict(theirs.state_dict())
    assert optimizer.param_groups[0]["ratio"] == 16.0


# Refusals


def broken(change):
    """A state dict of two parameters with something wrong."""
    optimizer = AdamW(parameters([(4,), (600,)]))
    steps(optimizer, 1)
    saved = optimizer.state_dict()
    change(saved)
    return saved


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["state"][1].pop("exp_avg"), r"state of parameter 1, of shape \(600,\): AdamW keeps exp_avg, exp_avg_sq, but exp_avg_sq came"),  # noqa: E501
        (lambda s: s["state"][0].update(max_exp_avg_sq=torch.ones(4)), "but exp_avg, exp_avg_sq, max_exp_avg_sq came"),
        (lambda s: s["state"][0].update(exp_avg=torch.ones(5)), r"exp_avg must be torch.float32 of shape \(4,\), not torch.float32 of \(5,\)"),  # noqa: E501
        (lambda s: s["state"][0].update(exp_avg=torch.ones(4, dtype=torch.uint8)), "must be torch.float32 of shape"),
        (lambda s: s["state"][0].update(exp_avg=[0.0] * 4), "must be torch.float32 of shape .*, not list"),
        (lambda s: s["state"][0].update(step=torch.tensor(-1.0)), "step must be a whole number and not negative"),
        (lambda s: s["state"][0].update(step=1.5), "step must be a whole number"),
        (lambda s: s["state"][0].pop("step"), "step must be a whole number and not negative, not None"),
        (lambda s: s["state"].update({7: s["state"][0]}), "a state for 7, which is no parameter"),
        (lambda s: s["param_groups"][0].update(amsgrad=True), "amsgrad is not supported"),
        (lambda s: s["param_groups"][0].update(maximize=True), "maximize is not supported"),
        (lambda s: s["param_groups"][0].update(lr=-1.0), "lr must be finite and not negative, not -1.0"),
        (lambda s: s["param_groups"][0].update(betas=[0.9]), "betas must be two numbers"),
        (lambda s: s["param_groups"][0].update(params=[0]), "doesn't match the size"),
    ],
)  # fmt: skip
def test_a_state_dict_that_does_not_fit_is_refused_and_changes_nothing(change, message):
    optimizer = AdamW(parameters([(4,), (600,)]), lr=0.25)
    steps(optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(broken(change))
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for key, state in before["state"].items():
        assert all(torch.equal(after["state"][key][name], state[name]) for name in state)


def test_codes_of_another_type_are_refused():
    optimizer = AdamW8bit(parameters([(4,)]))
    steps(optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["exp_avg"] = saved["state"][0]["exp_avg"].long()
    with pytest.raises(ValueError, match=r"exp_avg must be torch.uint8 of shape \(4,\), not torch.int64 of \(4,\)"):
        optimizer.load_state_dict(saved)


def test_lion_does_not_take_adamws_states():
    optimizer = AdamW(parameters())
    steps(optimizer, 1)
    with pytest.raises(ValueError, match="Lion keeps exp_avg, but exp_avg, exp_avg_sq came"):
        Lion(parameters()).load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr": -1.0}, "lr must be finite and not negative, not -1.0"),
        ({"lr": float("nan")}, "lr must be finite"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers, at least 0 and below 1, not \(0.9, 1.0\)"),
        ({"weight_decay": -0.1}, "weight_decay must be finite and not negative"),
    ],
)
@every_class
def test_impossible_hyperparameters_are_refused(cls, settings, message):
    with pytest.raises(ValueError, match=message):
        cls(parameters(), **settings)


@every_adamw
def test_a_negative_eps_is_refused(cls):
    with pytest.raises(ValueError, match="eps must be finite and not negative, not -1"):
        cls(parameters(), eps=-1.0)


def test_a_group_that_is_refused_is_not_added():
    optimizer = AdamW(parameters())
    with pytest.raises(ValueError, match="lr must be finite"):
        optimizer.add_param_group({"params": [torch.nn.Parameter(torch.ones(2))], "lr": -1.0})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64])
def test_a_parameter_of_another_type_is_refused(dtype):
    with pytest.raises(ValueError, match=f"must be one of .*; one of shape \\(2,\\) is {dtype}"):
        AdamW([torch.nn.Parameter(torch.ones(2, dtype=dtype))])


def test_a_sparse_gradient_is_refused_before_anything_moves():
    first, second = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([first, second])
    first.grad, second.grad = torch.ones(3), torch.ones(3).to_sparse()
    with pytest.raises(RuntimeError, match=r"gradients must be dense; that of a parameter of shape \(3,\) is .*sparse"):
        optimizer.step()
    assert torch.equal(first, torch.ones(3))


@pytest.mark.parametrize("use", ["step", "state_dict", "pickle", "load_state_dict"])
def test_a_closed_optimizer_is_of_no_use(use):
    optimizer = PagedAdamW8bit(parameters())
    steps(optimizer, 1)
    saved = optimizer.state_dict()
    optimizer.close()
    optimizer.close()
    uses = {
        "step": optimizer.step,
        "state_dict": optimizer.state_dict,
        "pickle": partial(pickle.dumps, optimizer),
        "load_state_dict": partial(optimizer.load_state_dict, saved),
    }
    with pytest.raises(RuntimeError, match="this PagedAdamW8bit is closed and its states are gone"):
        uses[use]()


def test_a_paged_optimizer_without_a_gpu_says_so_once(caplog):
    from train.paged.memory import say_unpaged

    say_unpaged.cache_clear()
    plain, paged, again = (cls(parameters(), lr=1e-2) for cls in (AdamW, PagedAdamW, PagedAdamW))
    with caplog.at_level("WARNING"):
        assert equal(steps(paged, 3), steps(plain, 3))
        steps(again, 1)
    assert [r.message for r in caplog.records] == [
        "PagedAdamW: managed memory needs a CUDA device and these parameters are on the cpu, "
        "so states are in ordinary memory; results are the same"
    ]
    assert (paged.memory_kind, paged.managed_bytes, paged.state_bytes) == ("ordinary", 0, plain.state_bytes)
