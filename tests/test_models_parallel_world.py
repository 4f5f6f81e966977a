"""The few things that processes tell each other."""

from models.parallel import shares, world
from tests.processes import together


def talk():
    alone = world.size()
    with world.world("cpu", timeout=30):
        here = world.rank()
        found = {
            "alone": alone,
            "size": world.size(),
            "main": world.is_main(),
            "sums": world.sums(here + 1, 0.5),
            "most": world.most(here, -here),
            "from_main": world.from_main({"rank": here}),
            "from_all": world.from_all([here]),
            "rows": [list(shares.rows(count)) for count in (5, 1, 0)],
        }
    return found | {"joined": world.joined()}


def test_processes_say_the_same_but_for_who_they_are():
    first, second = together(talk, 2)
    assert (first["alone"], first["size"], second["size"]) == (1, 2, 2)
    assert not first["joined"]
    assert (first["main"], second["main"]) == (True, False)
    for name, expected in {
        "sums": (3.0, 1.0),
        "most": (1.0, 0.0),
        "from_main": {"rank": 0},
        "from_all": [[0], [1]],
    }.items():
        assert first[name] == second[name] == expected, name
    assert first["rows"] == [[0, 1, 2], [0], []]
    assert second["rows"] == [[3, 4], [], []]


def test_a_world_of_one_answers_at_once():
    with world.world("cpu"):
        assert (world.rank(), world.size(), world.is_main(), world.joined()) == (0, 1, True, False)
        assert world.sums(2.0, 3) == (2.0, 3)
        assert world.from_all("x") == ["x"]
        assert world.from_main("x") == "x"


def test_rows_are_cut_as_torch_cuts_a_tensor():
    import torch

    for count in range(12):
        for size in (1, 2, 3, 5):
            cut = [list(chunk.tolist()) for chunk in torch.arange(count).chunk(size)] if count else []
            cut += [[]] * (size - len(cut))
            assert [list(shares.rows(count, rank, size)) for rank in range(size)] == cut
