"""The linear layer of every model here: dense or stored in 4 bits, each with room for an adapter, LoRA's or IA3's.

A block asks for `Linear`; loading with a QuantConfig puts an `NF4Linear` in its place. A head of several layers asks
for `Linear` as well, with `in_head`: such a layer stays in 16 bits and without an adapter unless it is stored in 4 bits
already, or is named. Both keep the parameter names of the released checkpoints (`weight`, `bias`), to which an adapter
adds `lora_A.weight`, `lora_B.weight` and, with DoRA, `lora_magnitude_vector`; or, of IA3, `ia3_l`. In an `NF4Linear`
codes are uint8 parameters without gradient, which sharding treats like any other weight, and float32 scales are buffers
that no cast of the model touches.

Letters: K in_features, N out_features, R rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

import kernels
from models.dora import direct_squares, expanded_squares, rescale, rescaled
from models.parallel import shares
from models.recompute import kept_product
from nf4 import QuantizedTensor


class AdaptableLinear(nn.Module):
    """What dense and 4-bit layers share: sizes, a bias, and the place of an adapter."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    lora_magnitude_vector: nn.Parameter | None
    ia3_l: nn.Parameter | None

    def __init__(self, in_features: int, out_features: int, in_head: bool = False) -> None:
        super().__init__()
        self.in_features, self.out_features, self.in_head = in_features, out_features, in_head
        self.lora_A: nn.Linear | None = None
        self.lora_B: nn.Linear | None = None
        self.register_parameter("lora_magnitude_vector", None)
        self.register_parameter("ia3_l", None)
        self.ia3_on_input = False
        self.scaling, self.dropout = 0.0, 0.0
        self.lora_config: Any = None  # what the adapter was made from, for saving it

    def forward(self, x: Float[Tensor, "*rows K"]) -> Float[Tensor, "*rows N"]:
        """x W^T + bias, with the adapter's branch or vector where there is one."""
        if self.ia3_l is not None:
            return self.scaled(x, self.ia3_l.flatten())
        if self.lora_magnitude_vector is None:
            return self.product(x, self.bias)
        with kept_product():  # the magnitude's gradient is made of it
            product = self.product(x, None)
            lengths = self.row_lengths(exact=x.dtype.itemsize > 2)
        return rescaled(product, self.lora_magnitude_vector, lengths, self.bias)

    def scaled(self, x: Float[Tensor, "*rows K"], vector: Float[Tensor, " L"]) -> Float[Tensor, "*rows N"]:
        """The same with inputs or outputs scaled, in float32 or the vector's dtype if wider."""
        if self.ia3_on_input:
            return self.product(rescale(x, vector, None), self.bias)
        with kept_product():  # the vector's gradient is made of it
            product = self.product(x, self.bias)
        return rescale(product, vector, None)

    @property
    def adapted(self) -> bool:
        """Are there parameters of an adapter?"""
        return self.lora_A is not None or self.ia3_l is not None

    def product(self, x: Float[Tensor, "*rows K"], bias: Tensor | None) -> Float[Tensor, "*rows N"]:
        """x W^T + bias + scaling (drop(x) A^T) B^T."""
        raise NotImplementedError

    def row_lengths(self, exact: bool = True) -> Float[Tensor, " N"]:
        """How long each row of W + scaling B A is, in float32; to 1e-4 also where it is nearly zero, if `exact`.

        Sums of 16-bit numbers are themselves not good to more in such a row. (To look for one, a GPU has to be
        waited for, and a compiled graph cannot.)
        """
        raise NotImplementedError

    def dense_weight(self) -> Float[Tensor, "N K"]:
        """The base weight without its adapter, in the layer's dtype."""
        raise NotImplementedError

    def refill(self, base: Any, source: int | None = None) -> None:
        """Take another base weight of the same form, in the same memory; `source` is as in `shares.put`."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """What the layer multiplies in; for stored codes, what they decode to."""
        return self.weight.dtype

    def extra_repr(self) -> str:
        rank = f", rank={self.lora_A.out_features}" if self.lora_A is not None else ""
        return f"in_features={self.in_features}, out_features={self.out_features}{rank}"


class Linear(AdaptableLinear):
    """The layer over a dense weight."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False, in_head: bool = False) -> None:
        super().__init__(in_features, out_features, in_head)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    @classmethod
    def from_weight(
        cls, weight: Float[Tensor, "N K"], bias: nn.Parameter | None = None, in_head: bool = False
    ) -> "Linear":
        layer = cls.__new__(cls)
        AdaptableLinear.__init__(layer, weight.shape[1], weight.shape[0], in_head)
        layer.weight, layer.bias = nn.Parameter(weight), bias
        return layer

    def product(self, x: Float[Tensor, "*rows K"], bias: Tensor | None) -> Float[Tensor, "*rows N"]:
        y = F.linear(x, self.weight, bias)
        if self.lora_A is None or self.lora_B is None:
            return y
        dropped = F.dropout(x, self.dropout, self.training)
        return y + self.scaling * F.linear(
            F.linear(dropped, self.lora_A.weight.to(x.dtype)), self.lora_B.weight.to(x.dtype)
        )

    @torch.no_grad()
    def row_lengths(self, exact: bool = True) -> Float[Tensor, " N"]:
        assert self.lora_A is not None
        assert self.lora_B is not None
        squares = direct_squares(self.weight, self.lora_A.weight, self.lora_B.weight, self.scaling)
        return squares.sqrt().float()

    def dense_weight(self) -> Float[Tensor, "N K"]:
        return self.weight.detach()

    def refill(self, base: Float[Tensor, "N K"] | None, source: int | None = None) -> None:
        shares.put(self.weight, base, source)


class NF4Linear(AdaptableLinear):
    """The same layer over a quantized weight, which is decoded inside the product and never kept."""

    def __init__(self, q: QuantizedTensor, bias: nn.Parameter | None = None, in_head: bool = False) -> None:
        if len(q.shape) != 2:
            raise ValueError(f"a linear layer needs a weight of 2 dimensions; this one has shape {q.shape}")
        N, K = q.shape
        super().__init__(K, N, in_head)
        self.bias = bias
        self.store(q)

    absmax: Tensor | None
    nested_absmax: Tensor | None
    absmax_offset: Tensor | None

    def store(self, q: QuantizedTensor) -> None:
        """Take this weight for the base; it shares memory with the layer."""
        self.quant_config, self.weight_dtype = q.config, q.dtype
        # One row of codes for one output where bytes allow it, so that sharding splits by outputs.
        packed = q.packed.view(self.out_features, -1) if q.packed.numel() % self.out_features == 0 else q.packed
        self.weight = nn.Parameter(packed, requires_grad=False)
        if q.absmax_codes is None:
            self.absmax_codes = None
        else:
            self.absmax_codes = nn.Parameter(q.absmax_codes, requires_grad=False)
        self.register_buffer("absmax", q.absmax)
        self.register_buffer("nested_absmax", q.nested_absmax)
        self.register_buffer("absmax_offset", q.absmax_offset)
        self.base_squares: Tensor | None = None

    @property
    def quantized(self) -> QuantizedTensor:
        """The stored weight; it shares memory with the layer."""
        return QuantizedTensor(
            packed=self.weight.detach().view(-1),
            absmax=self.absmax,
            absmax_codes=None if self.absmax_codes is None else self.absmax_codes.detach(),
            nested_absmax=self.nested_absmax,
            absmax_offset=self.absmax_offset,
            shape=(self.out_features, self.in_features),
            dtype=self.weight_dtype,
            config=self.quant_config,
        )

    def kept(self) -> dict[str, Tensor]:
        """What the weight is kept in, by the names of `QuantizedTensor`: shared ones are this process's share."""
        tensors = {
            "packed": self.weight,
            "absmax": self.absmax,
            "absmax_codes": self.absmax_codes,
            "nested_absmax": self.nested_absmax,
            "absmax_offset": self.absmax_offset,
        }
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def refill(self, base: QuantizedTensor | None, source: int | None = None) -> None:
        for name, tensor in self.kept().items():
            value = None if base is None else getattr(base, name).view(tensor.shape)
            shares.put(tensor, value, source)
        self.base_squares = None

    def product(self, x: Float[Tensor, "*rows K"], bias: Tensor | None) -> Float[Tensor, "*rows N"]:
        if self.lora_A is None or self.lora_B is None:
            return kernels.nf4_linear(x, self.quantized, bias)
        dropout = self.dropout if self.training else 0.0
        return kernels.nf4_lora_linear(
            x, self.quantized, self.lora_A.weight, self.lora_B.weight, self.scaling, bias, dropout
        )

    @torch.no_grad()
    def row_lengths(self, exact: bool = True) -> Float[Tensor, " N"]:
        assert self.lora_A is not None
        assert self.lora_B is not None
        a, b, q = self.lora_A.weight, self.lora_B.weight, self.quantized
        if self.base_squares is None or self.base_squares.device != a.device:
            decoded = kernels.dequantize(q, torch.float32)
            self.base_squares = direct_squares(decoded, torch.zeros_like(a), torch.zeros_like(b), 0.0)
        projected = kernels.nf4_linear(a.float(), q).T
        squares, doubtful = expanded_squares(self.base_squares, projected, a, b, self.scaling)
        if exact and not torch.compiler.is_compiling() and bool(doubtful.any()):
            rows = kernels.dequantize(q, torch.float32)[doubtful]
            squares[doubtful] = direct_squares(rows, a, b[doubtful], self.scaling)
        return squares.sqrt().float()

    def dense_weight(self) -> Float[Tensor, "N K"]:
        return kernels.dequantize(self.quantized, self.weight_dtype)

    @property
    def dtype(self) -> torch.dtype:
        return self.weight_dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        """Let scales follow the model to a device, but through no cast: `fn` sees them as integers."""
        scales = {name: b for name, b in self._buffers.items() if b is not None}
        for name, scale in scales.items():
            self._buffers[name] = scale.view(torch.int32)
        super()._apply(fn, recurse)
        for name in scales:
            moved = self._buffers[name]
            assert moved is not None
            self._buffers[name] = moved.view(torch.float32)
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return self
