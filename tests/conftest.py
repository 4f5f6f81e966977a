"""Shapes in signatures are checked while the tests run, and hypothesis gives the same cases every time."""

import os
import signal

# A shell's background jobs ignore Ctrl-C, and so would every program that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Tests run side by side, and the programs that they start as well: each on one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch
from hypothesis import HealthCheck, settings
from jaxtyping import install_import_hook

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read where a kernel is defined, so before any of them is imported

import tests.interpreter
import tests.on_gpu
import tests.typecheck

(tests.on_gpu if torch.cuda.is_available() else tests.interpreter).mend()
if os.environ.get("QLORA_TEST_SHAPES") != "unchecked":  # torch.compile cannot trace the check: see compiled.py
    install_import_hook(["nf4", "kernels", "models", "eval", "train"], "tests.typecheck.check")

settings.register_profile("qlora", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("qlora")


@pytest.fixture(autouse=True, scope="module")
def threads_of_fixtures(request):
    """Small models are fastest on one thread; kernels are tested on two, among which they share their work."""
    torch.set_num_threads(2 if request.path.name.startswith("test_kernels_") else 1)


@pytest.fixture(autouse=True)
def threads(request, threads_of_fixtures):
    """The same for each test, whatever the one before has set."""
    torch.set_num_threads(2 if request.path.name.startswith("test_kernels_") else 1)


@pytest.fixture(params=[12080, 13000])  # one of each signature
def cuda(request):
    """A CUDA runtime over malloc, of its own for each test; at the end nothing may be left in it."""
    from tests.standin import fresh  # below the hook: it imports what is checked

    with fresh(request.param) as standin:
        yield standin
