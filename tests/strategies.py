"""What the properties are tried on: weights of every shape, dtype and distribution, configs, block sizes."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from nf4 import CODEBOOKS, QuantConfig

block_sizes = st.sampled_from([1, 2, 3, 7, 16, 32, 64, 100, 128, 256, 4096])
codebooks = st.sampled_from(CODEBOOKS)
shapes = st.one_of(
    st.just(()),
    st.tuples(st.integers(0, 700)),
    st.lists(st.integers(1, 9), min_size=2, max_size=4).map(tuple),
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
)


@st.composite
def weights(
    draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
) -> Tensor:
    """A finite weight: normal, heavy-tailed, uniform, constant or mostly zero, of any usual magnitude."""
    shape, dtype = draw(shapes), draw(st.sampled_from(dtypes))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    normal = torch.randn(shape, generator=generator)
    uniform = torch.rand(shape, generator=generator)
    kind = draw(st.sampled_from(["normal", "heavy", "uniform", "constant", "sparse", "row of zeros"]))
    if kind == "heavy":
        normal = normal / uniform.clamp_min(0.02)
    elif kind == "uniform":
        normal = 2 * uniform - 1
    elif kind == "constant":
        normal = torch.full(shape, 0.37)
    elif kind == "sparse":
        normal = torch.where(uniform < 0.9, 0, normal)
    elif kind == "row of zeros" and math.prod(shape) > 64:
        normal.view(-1)[: math.prod(shape) // 2] = 0
    return (normal * 10.0 ** draw(st.integers(-3, 2))).to(dtype)


@st.composite
def configs(draw: st.DrawFn, scales: tuple[str, ...] = ("absmax", "search")) -> QuantConfig:
    return QuantConfig(
        codebook=draw(codebooks),
        block_size=draw(block_sizes),
        double_quant=draw(st.booleans()),
        nested_block_size=draw(st.sampled_from([1, 5, 256])),
        scale=draw(st.sampled_from(scales)),
    )
