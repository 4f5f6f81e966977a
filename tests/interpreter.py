"""Triton's interpreter, made right for these tests: kernels run on a CPU, one program after the other, in numpy.

It is off unless a test session finds no GPU (`TRITON_INTERPRET` is read when a kernel is defined, so
conftest sets it before any import). Three things in it are mended here:

* bfloat16 is kept as its bits, and arithmetic and `tl.dot` then act on the bits: a value is widened first
  and rounded to nearest even afterwards.
* A loop bound that is not a constant comes as an array of one element, which new versions of numpy do not
  take for an integer.
* A kernel's source is run again in the globals of its function, and that must be the kernel's own function,
  not the wrapper which the check of shapes puts around everything.
"""

import inspect
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

Handle = interpreter.TensorHandle
Builder = interpreter.InterpreterBuilder
ARITHMETIC = {np.add, np.subtract, np.multiply, np.divide, np.fmax, np.fmin, np.maximum, np.minimum}
COMPARISONS = {np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal}


def widened(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def rounded(values: np.ndarray) -> np.ndarray:
    """The bits of the bfloat16 nearest to each float32, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32).astype(np.uint64)
    nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), nearest)


def is_bfloat16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def mend() -> None:
    """Put the three repairs in place."""
    convert, dot, binary = interpreter._convert_float, Builder.create_dot, Builder.binary_op
    patch_tensor, initialize = interpreter._patch_lang_tensor, interpreter.InterpretedFunction.__init__

    def convert_float(values: Any, source: Any, target: Any, mode: Any) -> Any:
        if source == tl.bfloat16 and target == tl.float32:
            return widened(values).view(np.uint32)
        if source == tl.float32 and target == tl.bfloat16:
            return rounded(values)
        return convert(values, source, target, mode)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        a, b = (Handle(widened(h.data), tl.float32) if is_bfloat16(h) else h for h in (a, b))
        return dot(self, a, b, *rest)

    def binary_op(self: Any, left: Any, right: Any, op: Any) -> Any:
        if is_bfloat16(left) and op in ARITHMETIC:
            return Handle(rounded(op(widened(left.data), widened(right.data))), tl.bfloat16)
        if is_bfloat16(left) and op in COMPARISONS:
            return Handle(op(widened(left.data), widened(right.data)), tl.int1)
        return binary(self, left, right, op)

    def patch_lang_tensor(tensor: Any, scope: Any, *rest: Any) -> Any:
        result = patch_tensor(tensor, scope, *rest)
        scope.set_attr(tensor, "__index__", lambda self: int(np.asarray(self.handle.data).reshape(-1)[0]))
        return result

    def initialize_unwrapped(self: Any, fn: Any, **options: Any) -> None:
        initialize(self, inspect.unwrap(fn), **options)

    interpreter._convert_float = convert_float  # pyrefly: ignore[bad-assignment]
    Builder.create_dot = create_dot  # pyrefly: ignore[bad-assignment]
    Builder.binary_op = binary_op  # pyrefly: ignore[bad-assignment]
    interpreter._patch_lang_tensor = patch_lang_tensor
    interpreter.InterpretedFunction.__init__ = initialize_unwrapped
