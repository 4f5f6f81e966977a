"""Evaluation by several processes, with a whole model each or with one that they share: what one process finds."""

import doctest
from typing import Any

import pytest
import torch

from eval import dealing
from eval.dealing import dealt, in_order
from models.parallel import world
from tests.evaluating import ROOM, bench, everything
from tests.processes import together


def work(folder):
    with world.world("cpu", timeout=60):
        return {how: everything(folder, how) for how in ("ddp", "fsdp")}


def everywhere(test: Any) -> Any:
    """A test of what each process finds in either way."""
    return pytest.mark.parametrize("distributed", ["ddp", "fsdp"])(pytest.mark.parametrize("rank", [0, 1])(test))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return bench(tmp_path_factory.mktemp("bench"))


@pytest.fixture(scope="module")
def alone(folder):
    return everything(folder, "ddp")


@pytest.fixture(scope="module")
def found(folder):
    return together(work, 2, folder)


def same(a: Any, b: Any, tolerance: float = 0.0) -> bool:
    """Equal, as far as this relative tolerance; to the last bit without one."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name], tolerance) for name in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    return a == pytest.approx(b, rel=tolerance, abs=0) if isinstance(a, float) else a == b


@everywhere
@pytest.mark.parametrize("what", ["tasks", "questions", "prompt", "masked", "labels", "t5", "cache"])
def test_several_processes_find_what_one_finds_to_the_last_bit(alone, found, distributed, rank, what):
    assert same(found[rank][distributed][what], alone[what])


@everywhere
def test_they_look_at_a_model_while_it_learns(alone, found, distributed, rank):
    assert same(found[rank][distributed]["training"], alone["training"], 1e-6)


@everywhere
def test_all_halve_their_batches_where_one_has_too_little_memory(alone, found, distributed, rank):
    here = found[rank][distributed]["memory"]
    assert same(here["answers"], alone["memory"]["answers"], 1e-6)
    assert min(here["largest"]) > ROOM >= max(here["last"])
    assert here["left"] == alone["memory"]["left"]  # the model is left as it was


@everywhere
def test_processes_that_ask_different_things_are_refused(alone, found, distributed, rank):
    assert alone["different"] == ""
    assert found[rank][distributed]["different"].startswith("the processes do not ask the same")


def test_what_was_answered_is_asked_on_no_process(alone):
    first, again, half = alone["cache"]["asked"]
    assert (again, half) == (0, (first + 1) // 2)
    assert alone["questions"]["answered"] == (5, 3)
    assert alone["questions"]["again"]


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("count", range(7))
def test_every_batch_is_dealt_to_one_process_and_all_make_as_many_rounds(monkeypatch, count, size):
    monkeypatch.setattr(world, "size", lambda: size)
    parts, rounds = [], set()
    for rank in range(size):
        monkeypatch.setattr(world, "rank", lambda rank=rank: rank)
        given = list(dealt(iter(range(count))))
        rounds.add(len(given))
        assert all(mine or batch % size == 0 for batch, mine in given)
        parts.append([batch for batch, mine in given if mine])
    assert rounds == {-(-count // size)}
    assert in_order(parts) == list(range(count))


def test_the_example_is_right():
    assert doctest.testmod(dealing) == (0, 1)
