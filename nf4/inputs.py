"""What a layer multiplies its weight by, as far as rounding the weight is concerned: second moments of its inputs.

A layer computes y = W x. If W is stored as W + E, its output is off by E x, and over all inputs by

    E[ |E x|^2 ] = trace(E H E^T)        H = E[ x x^T ], (K, K)

So H says what an error in a weight costs. Its diagonal, the mean square of each input, is enough to weigh errors that
do not know of each other; the rest says how an error in one column is made up for by others (`nf4.feedback`).

H is gathered from some text, and a model that is rounded for that text alone would be worse on others. A part of the
mean of its diagonal is added to the diagonal: it makes H invertible, and errors in directions that the text
happened not to have are not free.
"""

from functools import cached_property

import torch
from jaxtyping import Float, Float32
from torch import Tensor

DAMPING = 0.05


class Inputs:
    """The second moment of a layer's inputs, gathered some rows at a time."""

    def __init__(self, size: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(size, size, device=device)
        self.count = 0

    def add(self, x: Float[Tensor, "*rows K"]) -> None:
        """Take more inputs into account."""
        x = x.reshape(-1, x.shape[-1]).float()
        for start in range(0, len(self.total), TILE):  # of a symmetric matrix one triangle is enough
            self.total[start : start + TILE, start:].addmm_(x[:, start : start + TILE].T, x[:, start:])
        self.count += len(x)

    @cached_property
    def moment(self) -> Float32[Tensor, "K K"]:
        """E[x x^T] over what was added; nothing can be added afterwards."""
        if self.count == 0:
            raise ValueError("no inputs were added, and a second moment is a mean over some")
        upper = self.total.triu() / self.count
        found = upper + upper.triu(1).T
        if not bool(found.isfinite().all()):
            raise ValueError("the layer's inputs are not finite: the model or the text it is calibrated on is damaged")
        return found

    def error(self, difference: Float[Tensor, "N K"]) -> float:
        """The mean square by which an output of the layer changes with its weight: trace(E H E^T) / N."""
        difference = difference.float()
        return float(((difference @ self.moment) * difference).double().sum() / max(len(difference), 1))

    @property
    def importance(self) -> Float32[Tensor, " K"]:
        """The mean square of each input."""
        return self.moment.diagonal()

    @cached_property
    def factor(self) -> Float32[Tensor, "K K"]:
        """The upper triangular U with U^T U = (H + damping)^-1.

        With J, the exchange of first and last, and J H J = L L^T, it is J L^-1 J: no inverse of H is ever made.
        """
        damped = self.moment.double()
        mean = damped.diagonal().mean()
        damped.diagonal().add_(DAMPING * mean if mean > 0 else 1.0)  # without any input all errors count alike
        lower = torch.linalg.cholesky(damped.flip(0, 1))
        unit = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        return torch.linalg.solve_triangular(lower, unit, upper=False).flip(0, 1).float()


TILE = 256  # columns whose products with all later ones are taken at once
