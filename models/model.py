"""What LLaMA, T5 and RoBERTa have in common, so that loading, training and saving are written once.

A model's parameters carry the names of the released checkpoints. Which of its layers can be stored in 4 bits and
carry adapters is said by their class: `models.linear.Linear` for those of the blocks, torch's own modules for
embeddings, norms and heads, which stay in 16 bits.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from models.parallel.shares import home
from models.whole import computed_dtype


@runtime_checkable
class Config(Protocol):
    """What every model's configuration can be asked."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def pad_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> tuple[int, ...]: ...

    @property
    def max_tokens(self) -> int | None:
        """The longest input; None where positions are relative and nothing but memory is in the way."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json in the released field names."""
        ...


class Model(nn.Module):
    """A network with one embedding of tokens, and the contract that the three architectures keep."""

    config: Any
    """Sizes and switches, a `Config`."""
    source: Path | None = None
    """The checkpoint that it was loaded from."""
    task_type: str | None = None
    """What PEFT calls the model's task, in the adapters that are saved of it."""
    heads: tuple[str, ...] = ("lm_head",)
    """Layers that other readers build as the head, dense in 4-bit files even where it is the embedding itself."""
    always_dense: tuple[str, ...] = ()
    """Leaf names of block linears that other readers of 4-bit files never take in 4 bits."""
    entries: tuple[str, ...] = ("loss",)
    """Methods that run the network from outside, beside forward: shared weights are put together around them."""
    fresh_head: bool = False
    """Does a head start from random weights, because the checkpoint has none?"""
    attachment: Any = None
    """What `models.lora` keeps of the adapters that it has put on."""

    def loss(self, *, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None = None) -> Float[Tensor, ""]:
        """Mean over the labels that are not -100, in float32."""
        raise NotImplementedError

    @staticmethod
    def label_count(labels: Tensor) -> int:
        """How many labels `loss` averages over."""
        return int((labels != -100).sum())

    @property
    def embedding(self) -> nn.Embedding:
        """The table of tokens, from which device and compute dtype are read."""
        raise NotImplementedError

    @property
    def max_tokens(self) -> int | None:
        """The longest input, None for any."""
        return self.config.max_tokens

    def parameter_named(self, name: str) -> str | None:
        """The parameter that a tensor of a released file is for; None for one that the config already tells.

        A copy of another parameter, as files hold of tied embeddings, has the name of the one that is copied.
        """
        return name

    def initial(self, name: str, shape: tuple[int, ...]) -> Tensor | None:
        """What a parameter starts from that the checkpoint lacks; None: it must be there."""
        return None

    def check_dtype(self, dtype: torch.dtype) -> None:
        """Refuse a precision that the architecture cannot be computed in."""

    @property
    def dtype(self) -> torch.dtype:
        """What activations are computed in."""
        return computed_dtype(self.embedding, "weight")

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return home(next(self.embedding.parameters()))  # its weight may have to be rounded first

    @property
    def gradient_checkpointing(self) -> bool:
        """Do blocks keep only their input for backward, and compute the rest again? Setting it asks them to."""
        return any(stack.gradient_checkpointing for stack in self.modules() if isinstance(stack, Stack))

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, on: bool) -> None:
        for stack in self.modules():
            if isinstance(stack, Stack):
                stack.gradient_checkpointing = on


class Stack(nn.Module):
    """A run of blocks, one after the other: what gradient checkpointing cuts at."""

    def __init__(self) -> None:
        super().__init__()
        self.gradient_checkpointing = False

    @property
    def blocks(self) -> Iterable[nn.Module]:
        """The blocks in the order in which they run."""
        raise NotImplementedError

    @property
    def common(self) -> Iterable[nn.Module]:
        """Modules within a block that are called outside of it as well."""
        return ()
