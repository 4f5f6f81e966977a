"""What is claimed of paging on a device: on the GPU where there is one, and rehearsed over the stand-in runtime."""

import pytest
import torch

from benchmarks import paged
from tests.standin import fresh

SMALL = ((33, 70), (5,), (2000,))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="managed memory needs a CUDA device")
def test_every_claim_holds_on_the_gpu():
    assert paged.measure("cuda", 1)["failures"] == []


def test_every_claim_holds_over_the_stand_in():
    with fresh() as standin:
        result = paged.measure("cpu", 1, standin.runtime, SMALL)
    assert result["failures"] == []
    assert len(result["rows"]) == 2 * 8
    assert all(row["paged_ms"] > 0 for row in result["rows"] if row["case"].endswith("a step"))


def test_a_claim_that_does_not_hold_is_a_failure(monkeypatch):
    """Where the platform has no managed memory, states are pinned: the first claim is then wrong, and what moves."""
    with fresh() as standin:
        standin.attributes(managed=0)
        failures = paged.measure("cpu", 1, standin.runtime, SMALL)["failures"]
    assert "PagedAdamW: states are in managed memory" in failures
    assert "PagedAdamW: prefetch moves them to 0" in failures
    assert not [case for case in failures if "bit for bit" in case]
