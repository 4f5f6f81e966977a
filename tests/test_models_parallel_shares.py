"""Rows that travel between processes: dealt out, collected, put together; and refusals that all have to make."""

from typing import Any

import pytest
import torch
from torch import nn

from models.parallel import shares, world
from models.parallel.agreement import agreed, by_turns
from tests.processes import together

KINDS = (torch.uint8, torch.bfloat16, torch.float32)
SHAPES = ((7, 3), (1, 4), (2,), (6, 2))


def shared(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    return distribute_tensor(torch.zeros(shape, dtype=dtype), init_device_mesh("cpu", (world.size(),)), [Shard(0)])


def value(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(1, 1 + torch.Size(shape).numel()).view(shape).to(dtype)


def same(one: torch.Tensor | None, other: torch.Tensor) -> bool:
    return one is not None and torch.equal(one, other)


def travel() -> list[str]:
    """What does not arrive as it was sent."""
    wrong, here = [], world.rank()
    for dtype in KINDS:
        for shape in SHAPES:
            whole = value(shape, dtype)
            for source in (None, 0, 1, 2):
                for tensor in (shared(shape, dtype), torch.zeros(shape, dtype=dtype)):
                    shares.put(tensor, whole if source in (None, here) else None, source)
                    case = f"{dtype} {shape} from {source}, {'shared' if shares.is_shared(tensor) else 'whole'}"
                    rows = shares.rows(shape[0]) if shares.is_shared(tensor) else range(shape[0])
                    if not torch.equal(shares.local(tensor), whole[rows.start : rows.stop]):
                        wrong.append(f"{case}: put")
                    if not torch.equal(shares.gathered(tensor), whole):
                        wrong.append(f"{case}: gathered")
                    collected = shares.collected(tensor)
                    if (here != 0 and collected is not None) or (here == 0 and not same(collected, whole)):
                        wrong.append(f"{case}: collected")
    narrow = shared((5,), torch.float32)
    shares.put(narrow, value((5,), torch.bfloat16) if here == 1 else None, 1)  # what is sent has the tensor's dtype
    return wrong if torch.equal(shares.gathered(narrow), value((5,), torch.float32)) else [*wrong, "another dtype"]


def looked_at() -> dict[str, Any]:
    """A layer that is put together for a while, and a model of which what is trained is whole on one process."""
    trained, frozen = shared((5, 2), torch.float32), shared((5,), torch.uint8)
    shares.put(trained, value((5, 2), torch.float32))
    layer = nn.Module()
    layer.register_parameter("trained", nn.Parameter(trained))
    layer.register_parameter("frozen", nn.Parameter(frozen, requires_grad=False))
    before = dict(layer.named_parameters())
    with shares.together(layer):
        inside = [tuple(p.shape) for p in layer.parameters() if not shares.is_shared(p)]
    with shares.whole(layer):
        on_main = {name: shares.is_shared(p) for name, p in layer.named_parameters()}
        sums = float(layer.get_parameter("trained").sum()) if world.is_main() else None
    return {
        "inside": inside,
        "on main": on_main,
        "sum": sums,
        "after": all(before[name] is p for name, p in layer.named_parameters()),
        "any": shares.any_shared(layer),
    }


def refused() -> dict[str, Any]:
    """Refusals by one, by two of them, and none."""
    said = []
    for refusing in ((1,), (2, 1), ()):
        try:
            with agreed():
                if world.rank() in refusing:
                    raise ValueError(f"{world.rank()} of {refusing} refuses")
            said.append("")
        except ValueError as error:
            said.append(str(error))
    taken: list[Any] = []

    def make(item: str) -> str:
        if item == "h":
            raise ValueError("h cannot be made")
        return f"{item} by {world.rank()}"

    by_turns(list("abcde"), make, lambda *given: taken.append(given))
    with pytest.raises(ValueError, match="h cannot be made"):
        by_turns(list("fgh"), make, lambda *given: taken.append(given))
    alone: list[Any] = []
    by_turns(list("ab"), make, lambda *given: alone.append(given), together=False)
    return {"said": said, "taken": taken, "alone": alone}


def all_of_it() -> dict[str, Any]:
    with world.world("cpu", timeout=60):
        return {"travel": travel(), "looked at": looked_at(), "refused": refused()}


def test_rows_and_refusals_travel_between_three_processes():
    results = together(all_of_it, 3)
    for rank, each in enumerate(results):
        assert each["travel"] == []
        assert each["looked at"] == {
            "inside": [(5, 2), (5,)],
            "on main": {"trained": rank != 0, "frozen": True},
            "sum": 55.0 if rank == 0 else None,
            "after": True,
            "any": True,
        }
        assert each["refused"] == {
            "said": ["1 of (1,) refuses", "1 of (2, 1) refuses", ""],
            "taken": [
                (item, f"{item} by {maker}" if rank == maker else None, maker)
                for maker, item in zip((0, 1, 2, 0, 1), "abcde", strict=True)
            ],
            "alone": [("a", f"a by {rank}", None), ("b", f"b by {rank}", None)],
        }


def test_what_nobody_shares_is_its_own_share():
    layer = nn.Linear(3, 2)
    shares.put(layer.weight, torch.ones(2, 3))
    assert torch.equal(shares.local(layer.weight), torch.ones(2, 3))
    assert shares.collected(layer.weight) is not None
    assert torch.equal(shares.gathered(layer.weight), torch.ones(2, 3))
    assert shares.home(layer.weight) == torch.device("cpu")
    with shares.whole(layer):
        shares.refuse_shared(layer, "this")
    with pytest.raises(ValueError, match="of mine"), agreed():
        raise ValueError("of mine")
