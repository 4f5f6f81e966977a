"""Where to compute and in which precision, when the user leaves that to us.

bfloat16 is chosen where the hardware multiplies it: on GPUs since Ampere, and on CPUs whose instruction set
has it (AVX-512 BF16 or AMX). Elsewhere it would be emulated, slower than float32 and less exact.
"""

import torch

from kernels.cpu_build import capabilities
from models.errors import ConfigError

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def pick_device(name: str) -> torch.device:
    """ "auto" is the first GPU, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device: {name!r} is not a device; give auto, cpu or cuda") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device: {name!r} was asked for, but torch sees no GPU; `qlora doctor` says more")
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the device multiplies it, else float32."""
    if name == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    if name not in DTYPES:
        raise ConfigError(f"dtype: {name!r} is not known; give auto, {', '.join(DTYPES)}")
    return DTYPES[name]


def multiplies_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = capabilities()
    return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16") or cpu.get("bf16"))


def is_out_of_memory(error: BaseException) -> bool:
    """Did an allocation fail? On a CPU torch has no error of its own for that."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )
