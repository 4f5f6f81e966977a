"""How states lie in memory: every one once, apart from all others, and every window a range of bytes."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.paged import AdamW, AdamW8bit, Lion, Paging
from train.paged.store import ALIGNMENT, Store

shapes = st.lists(st.lists(st.integers(0, 40), max_size=3).map(tuple), min_size=1, max_size=8)
slots = st.sampled_from([AdamW.slots, AdamW8bit.slots, Lion.slots])


def parameters(shapes):
    return [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]


def bytes_of(tensor):
    return range(tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes)


@given(shapes=shapes, slots=slots)
def test_states_are_zero_of_their_shape_and_never_overlap(shapes, slots):
    params = parameters(shapes)
    store = Store("AdamW", params, slots, None)
    taken = []
    for p in params:
        states = store.states(p)
        assert list(states) == ["step", *(slot.name for slot in slots)]
        assert states["step"].shape == ()
        for slot in slots:
            state = states[slot.name]
            assert state.dtype == slot.dtype
            assert state.shape == (p.shape if slot.per == 1 else (-(-p.numel() // slot.per),))
            assert not state.any()
            taken += [bytes_of(state)] if state.nbytes else []
    taken.sort(key=lambda r: r.start)
    assert all(one.stop <= two.start for one, two in pairwise(taken))
    assert sum(map(len, taken)) <= store.memory.nbytes
    waste = len(params) * ALIGNMENT * 8 + 256 * len(slots)
    assert store.memory.nbytes <= sum(map(len, taken)) + waste


@given(shapes=shapes, slots=slots, window=st.integers(1, 40_000))
def test_windows_cut_every_parameter_into_pieces_that_hold_it_once(shapes, slots, window):
    params = parameters(shapes)
    store = Store("AdamW", params, slots, None)
    windows = store.cut(window)
    seen: dict[torch.Tensor, list[tuple[int, int]]] = {p: [] for p in params}
    for start, stop in windows:
        assert start % ALIGNMENT == 0
        for piece in store.pieces_of(start, stop):
            assert piece.start % 256 == 0  # a block of 8-bit states is never cut
            marked = torch.arange(params[piece.index].numel()).view(params[piece.index].shape)
            assert piece.of(marked).view(-1).tolist() == list(range(piece.start, piece.stop))
            seen[params[piece.index]].append((piece.start, piece.stop))
            ranges = store.byte_ranges(start, stop)
            for slot, state, (first, last) in zip(slots, piece.states, ranges, strict=True):
                whole = store.states(params[piece.index])[slot.name].view(-1)
                per = slot.per
                assert torch.equal(state, whole[piece.start // per : -(-piece.stop // per)])
                assert state.data_ptr() == whole[piece.start // per :].data_ptr()
                base = store.memory.tensor(0, (1,), torch.uint8).data_ptr()
                assert base + first <= state.data_ptr()
                assert state.data_ptr() + state.nbytes <= base + last
    for p, pieces in seen.items():
        ends = [0, *(stop for _, stop in pieces)]
        assert [start for start, _ in pieces] == ends[:-1]
        assert ends[-1] == p.numel()
    assert [stop for _, stop in windows[:-1]] == [start for start, _ in windows[1:]]


@pytest.mark.parametrize(
    ("slots", "bytes_per_element"), [(AdamW.slots, 8), (AdamW8bit.slots, 2 + 8 / 256), (Lion.slots, 4)]
)
def test_a_large_parameter_takes_just_its_states(slots, bytes_per_element):
    (p,) = parameters([(1024, 1024)])
    assert Store("AdamW", [p], slots, None).memory.nbytes == bytes_per_element * 2**20


def test_parameters_on_two_devices_are_refused():
    params = [torch.nn.Parameter(torch.zeros(3)), torch.nn.Parameter(torch.zeros(3, device="meta"))]
    with pytest.raises(ValueError, match="the parameters of one AdamW must be on one device, not on cpu and meta"):
        Store("AdamW", params, AdamW.slots, None)


def test_parameters_that_have_moved_are_no_longer_covered():
    params = parameters([(3,), (4,)])
    store = Store("AdamW", params, AdamW.slots, None)
    assert store.covers(params)
    assert not store.covers([*params, *parameters([(3,)])])
    store.memory.device = torch.device("meta")  # as if the parameters had left it
    assert not store.covers(params)


def test_a_window_without_bytes_is_refused():
    with pytest.raises(ValueError, match="window_bytes must be at least 1, not 0"):
        Paging(window_bytes=0)
