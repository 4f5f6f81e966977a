"""`qlora doctor`: what this machine has, and whether 4-bit arithmetic comes out right on it."""

import importlib.metadata
import importlib.util
import platform
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

import kernels
import nf4
from kernels.cpu_build import capabilities, library
from train.paged.cudart import CudaError, DeviceAttribute
from train.paged.libraries import find, search_order, version_text

if TYPE_CHECKING:
    from rich.console import Console

PACKAGES = ("torch", "triton", "numpy", "scipy", "sentencepiece", "tiktoken", "safetensors", "gguf")


@dataclass(frozen=True, kw_only=True)
class DoctorOptions:
    """Say what this machine has, and test 4-bit arithmetic on it."""

    json: bool = False
    """Print one JSON object on stdout."""


def command(options: DoctorOptions, console: "Console") -> dict[str, Any]:
    from rich.table import Table

    report = {"python": platform.python_version(), "platform": platform.platform(), **packages(), **devices()}
    report["cuda runtime"] = search_order()
    report["managed memory"] = managed_memory()
    report["self_test"] = self_test(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    table = Table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")  # paths are to be read whole
    for key, value in report.items():
        table.add_row(key, "\n".join(value) if isinstance(value, list) else str(value))
    console.print(table)
    return report


def packages() -> dict[str, str]:
    """Installed versions of what the project uses."""
    found = {name: importlib.util.find_spec(name) is not None for name in PACKAGES}
    return {name: importlib.metadata.version(name) if there else "not installed" for name, there in found.items()}


def devices() -> dict[str, Any]:
    """Processors, and what they multiply natively."""
    cpu = capabilities()
    wide = ("avx2", "avx512_f", "avx512_bf16", "amx_bf16", "neon", "bf16", "sve")
    report: dict[str, Any] = {
        "cpu": f"{cpu.get('cpu_name', platform.machine())}, {torch.get_num_threads()} threads",
        "cpu instructions": ", ".join(name for name in wide if cpu.get(name)) or "none of note",
        "cpu operators": "C, built for this CPU" if library() is not None else "plain torch",
        "gpu": "none that torch sees",
    }
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        report["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.1f} GiB, CUDA {torch.version.cuda}"
    return report


def managed_memory() -> str:
    """Whether optimizer states can be in memory that pages between the GPU and the host, as CUDA tells it."""
    try:
        runtime = find()
    except RuntimeError:
        return "no CUDA runtime library"
    version = f"CUDA {version_text(runtime.version)}"
    try:
        there = runtime.device_attribute(DeviceAttribute.MANAGED_MEMORY, 0)
        concurrent = runtime.device_attribute(DeviceAttribute.CONCURRENT_MANAGED_ACCESS, 0)
    except CudaError as error:
        return f"{version}: {error}"
    if there and concurrent:
        return f"{version}: there, with concurrent access"
    missing = "without concurrent access" if there else "not on this GPU"
    return f"{version}: {missing}, so pinned host memory takes its place"


def self_test(device: torch.device) -> str:
    """One layer forward and backward against float64; a wrong answer raises."""
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=generator).to(device)
    x = torch.randn(16, 512, generator=generator).to(device).requires_grad_()
    q = kernels.quantize(weight, nf4.QuantConfig())
    y = kernels.nf4_linear(x, q)
    y.sum().backward()

    dense = nf4.dequantize(q, torch.float32).double()
    expected, gradient = x.detach().double() @ dense.T, dense.sum(dim=0).expand_as(x)
    assert x.grad is not None
    worst = max((y - expected).abs().max().item(), (x.grad - gradient).abs().max().item())
    if not worst < 1e-3:
        raise RuntimeError(f"doctor: NF4 forward and backward on {device} are off by {worst:.3g}")
    return f"passed on {device} in {time.perf_counter() - start:.2f} s (largest difference to float64: {worst:.1e})"
