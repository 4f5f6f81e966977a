"""An encoder with a classification head, in RoBERTa's names and as small as can be: for adapters that bring a head."""

import torch
from torch import Tensor, nn

from models.linear import Linear
from models.model import Model

WIDTH, LAYERS, LABELS = 16, 2, 3


class Classifier(Model):
    task_type = "SEQ_CLS"

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.roberta = nn.ModuleDict({"embeddings": Embeddings(), "encoder": Encoder()})
        self.classifier = Head()
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.requires_grad_(False).eval()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.classifier(self.roberta["encoder"](self.roberta["embeddings"](input_ids)))

    @property
    def embedding(self) -> nn.Embedding:
        return self.get_submodule("roberta.embeddings.word_embeddings")  # pyrefly: ignore[bad-return]


class Embeddings(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(32, WIDTH)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.word_embeddings(input_ids)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layer:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        attention = {"query": Linear(WIDTH, WIDTH, True), "value": Linear(WIDTH, WIDTH, True)}
        self.attention = nn.ModuleDict({"self": nn.ModuleDict(attention), "output": Output()})

    def forward(self, x: Tensor) -> Tensor:
        own = self.get_submodule("attention.self")
        return x + self.attention["output"](own["query"](x).tanh() * own["value"](x))  # pyrefly: ignore


class Output(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dense = Linear(WIDTH, WIDTH, True)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense(x)


class Head(nn.Module):
    """As in RoBERTa, the first token through two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.out_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.dense(x[:, 0]).tanh())
