"""Optimizers whose states may be in managed memory, and what they stand on: a shim over the CUDA runtime, an arena."""

from train.paged.adamw import AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit
from train.paged.allocation import OversubscriptionError
from train.paged.arena import Arena
from train.paged.cudart import CudaError, Runtime
from train.paged.lion import Lion
from train.paged.memory import Paging

__all__ = [
    "AdamW",
    "AdamW8bit",
    "Arena",
    "CudaError",
    "Lion",
    "OversubscriptionError",
    "PagedAdamW",
    "PagedAdamW8bit",
    "Paging",
    "Runtime",
]
