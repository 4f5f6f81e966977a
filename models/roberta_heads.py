"""What stands on RoBERTa's encoder: a head that fills masks, or one that labels texts, each with its loss.

B batch, T tokens, D width, V vocabulary. Heads stay in 16 bits, unless a file has them in 4: they are small, and often
trained whole.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

import kernels
from models.linear import Linear
from models.roberta_config import REGRESSION, RobertaConfig


class MaskedHead(nn.Module):
    """Which token stands behind a mask; the last layer is the embedding again, with a bias of its own."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True, in_head=True)
        self.layer_norm = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.bias = nn.Parameter(torch.empty(config.vocab_size))

    def forward(self, x: Float[Tensor, "*rows D"], embedding: Float[Tensor, "V D"]) -> Float[Tensor, "*rows V"]:
        return F.linear(self.transform(x), embedding, self.bias)

    def loss(
        self, x: Float[Tensor, "L D"], embedding: Float[Tensor, "V D"], labels: Int[Tensor, " L"]
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of the labels in float32, some rows at a time: all logits at once would be large."""
        hidden, weight = bias_among_weights(self.transform(x), embedding, self.bias)
        return kernels.linear_cross_entropy(hidden, weight, labels)

    def transform(self, x: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows D"]:
        """What is compared with the embedding of each token."""
        return self.layer_norm(F.gelu(self.dense(x)))


class ClassificationHead(nn.Module):
    """Logits of the classes, or the one number of a regression, from a text's first token."""

    def __init__(self, config: RobertaConfig) -> None:
        super().__init__()
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.regression = config.problem_type == REGRESSION
        self.dropout = nn.Dropout(rate)
        self.dense = Linear(config.hidden_size, config.hidden_size, bias=True, in_head=True)
        self.out_proj = Linear(config.hidden_size, len(config.labels), bias=True, in_head=True)

    def forward(self, x: Float[Tensor, "B D"]) -> Float[Tensor, "B labels"]:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.dropout(x)))))

    def loss(self, x: Float[Tensor, "L D"], labels: Shaped[Tensor, " L"]) -> Float[Tensor, ""]:
        """Mean cross-entropy of classes, or mean squared error of numbers, in float32."""
        return self.score(self(x), labels)

    def score(self, logits: Float[Tensor, "L labels"], labels: Shaped[Tensor, " L"]) -> Float[Tensor, ""]:
        """The loss of logits that are there already."""
        logits = logits.float()
        if self.regression:
            return F.mse_loss(logits[:, 0], labels.float())
        if labels.is_floating_point():
            raise ValueError(
                f"labels are {labels.dtype}, but a classification needs the numbers of classes as integers"
            )
        outside = labels[(labels < 0) | (labels >= logits.shape[1])]
        if outside.numel():
            raise ValueError(f"labels are classes 0 to {logits.shape[1] - 1}, or -100; one is {int(outside[0])}")
        return F.cross_entropy(logits, labels.long())


def bias_among_weights(
    x: Float[Tensor, "L D"], weight: Float[Tensor, "V D"], bias: Float[Tensor, " V"]
) -> tuple[Float[Tensor, "L wider"], Float[Tensor, "V wider"]]:
    """x W^T + b as one product: x with a 1 behind it, W with b, and zeros up to a width that GPUs multiply fast."""
    fill = 7 - weight.shape[1] % 8
    return (
        torch.cat([x, x.new_ones(len(x), 1), x.new_zeros(len(x), fill)], dim=1),
        torch.cat([weight, bias[:, None], weight.new_zeros(len(weight), fill)], dim=1),
    )
