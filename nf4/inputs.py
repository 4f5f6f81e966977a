"""What a layer multiplies its weight by, as far as rounding the weight is concerned: second moments.

A layer computes y = W x. If W is stored as W + E, its output is off by E x, and over all inputs by

    E[ |E x|^2 ] = trace(E H E^T)        H = E[ x x^T ], (K, K)

So H says what an error in a weight costs. Its diagonal, the mean square of each input, is enough to weigh errors that
do not know of each other; the rest says how an error in one column is made up for by others (`nf4.feedback`).

Layers before this one are rounded too, so its inputs x are not those it would have had, and W x not what it should
answer. The residual d = y - W x is what W misses, and as far as d goes along with x, another weight answers better,

    W + E[ d x^T ] H^-1

is the one with the least E[ |y - W' x|^2 ]. It is the one to be rounded (Li et al., GPTAQ, 2025, arXiv:2504.02692).

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

    def mean_square(self, weight: Float[Tensor, "N K"]) -> float:
        """The mean of |W x|^2: trace(W H W^T)."""
        weight = weight.float()
        return float(((weight @ self.moment) * weight).double().sum())


class Residuals:
    """By how much a layer's outputs are off, and how that goes along with its inputs."""

    def __init__(self, outputs: int, size: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(outputs, size, device=device)
        self.squares = 0.0
        self.count = 0

    def add(self, d: Float[Tensor, "*rows N"], x: Float[Tensor, "*rows K"]) -> None:
        """Take more of what the layer should answer less what it does, and of its inputs, into account."""
        d, x = (t.reshape(-1, t.shape[-1]).float() for t in (d, x))
        self.total.addmm_(d.T, x)
        self.squares += float(d.double().square().sum())
        self.count += len(x)

    def fitted(self, weight: Float32[Tensor, "N K"], inputs: Inputs) -> Float32[Tensor, "N K"]:
        """The weight whose outputs come closest, damped as the feedback is."""
        return weight + self.total / self.count @ inputs.factor.T @ inputs.factor

    def mean_square(self, change: Float[Tensor, "N K"], inputs: Inputs) -> float:
        """The mean of |d|^2 once the weight has been changed by so much."""
        products = float((self.total * change.float()).double().sum()) / self.count
        return max(self.squares / self.count - 2 * products + inputs.mean_square(change), 0.0)


TILE = 256  # columns whose products with all later ones are taken at once
