"""The updates of optimizers on a CPU, in C: what is handed to `kernels/c/updates.c`, which works in place.

Plain torch takes a dozen passes over memory for a step of AdamW and makes as many temporaries; here it is one pass
over all tensors. The bits are those of kernels/updates.py.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from kernels import tensor_lists
from kernels.cpu import DTYPES, loaded, threads
from kernels.cpu_build import DynamicMap, library
from kernels.dynamic_buckets import BUCKETS, LOWEST, bucket_tables
from kernels.tensor_lists import STATES_8BIT, Group, grouped
from kernels.updates import AdamWNumbers, LionNumbers, Tensors
from nf4.dynamic import map_on


def accepts(params: Tensors, grads: Tensors) -> bool:
    """Are these tensors of dtypes that C computes in?"""
    return library() is not None and tensor_lists.accepts(params, grads)


def adamw(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, numbers: Sequence[AdamWNumbers]
) -> None:
    """AdamW (Loshchilov and Hutter 2019) with float32 states."""
    for group in grouped(params, grads, {"exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}, numbers):
        loaded().adamw(*handed(group), threads())


def adamw_8bit(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_absmaxes: Tensors,
    exp_avg_sqs: Tensors,
    exp_avg_sq_absmaxes: Tensors,
    numbers: Sequence[AdamWNumbers],
) -> None:
    """The same with states of 8 bits: signed entries for the mean of gradients, unsigned ones for that of squares."""
    lists = exp_avgs, exp_avg_absmaxes, exp_avg_sqs, exp_avg_sq_absmaxes
    states = dict(zip(STATES_8BIT, lists, strict=True))
    for group in grouped(params, grads, states, numbers, eight_bits=True):
        loaded().adamw_8bit(*handed(group), maps()[0], threads())


def lion(params: Tensors, grads: Tensors, exp_avgs: Tensors, numbers: Sequence[LionNumbers]) -> None:
    """Lion (Chen et al. 2023, arXiv:2302.06675): the sign of an average decides, one state remembers."""
    for group in grouped(params, grads, {"exp_avgs": exp_avgs}, numbers):
        loaded().lion(*handed(group), threads())


def handed(group: Group) -> tuple[ctypes.Array, int, int, int]:
    """A table as C takes it, its rows, and the dtypes of parameters and gradients."""
    table = (ctypes.c_char * len(group.table)).from_buffer(group.table)
    return table, len(group.sizes), DTYPES[group.param_dtype], DTYPES[group.grad_dtype]


@lru_cache
def maps() -> tuple[ctypes.Array, list[Tensor]]:
    """The signed and the unsigned map as C reads them, with the tensors that the pointers lead to."""
    cpu = torch.device("cpu")
    made, kept = [], []
    for signed in (True, False):
        below, midpoints = bucket_tables(cpu, signed)
        kept += [map_on(cpu, signed), midpoints, below]
        made.append(DynamicMap(*(tensor.data_ptr() for tensor in kept[-3:]), LOWEST, BUCKETS))
    return (DynamicMap * 2)(*made), kept
