"""Prefix tuning: keys and values of tokens that are not there, learned for every layer (Li & Liang 2021).

A prefix of P tokens is one parameter, `prompt_embeddings` (P, layers * 2 * key/value width), laid out as PEFT's: for
each layer keys, then values. The text stands behind it, at positions P, P + 1, ..., as it does in PEFT: so a prefix
that is made of a real text's keys and values does just what that text would do before every input, and this is how it
starts here unless told otherwise (random numbers disturb the model, and are slow to recover from). It is in no weight,
so it cannot be merged. The number of trained parameters is P * layers * 2 * key/value width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.attachment import Attachment, freeze, record, refuse_second
from models.errors import ConfigError
from models.llama import Llama
from models.lora_config import ADAPTER_DTYPES, check_choice, check_dtype
from models.parallel import shares

NAME = "model.prompt_embeddings"
NORMAL_STD = 0.02  # of a start from random numbers; as large as weights of a model usually are


@dataclass(frozen=True, kw_only=True)
class PrefixConfig:
    """How long the prefix is, and how it starts."""

    num_virtual_tokens: int = 20
    """Tokens that it stands for; each is seen by every token of every text."""
    init: str = "tokens"
    """How it starts: tokens (the keys and values that the model has for real tokens) or normal (random numbers)."""
    init_text: str = ""
    """Text whose tokens these are, repeated or cut to the prefix's length; random tokens of the vocabulary if empty."""
    init_ids: tuple[int, ...] = ()
    """The same as ids, as the model's tokenizer gives them."""
    dtype: str = "float32"
    """What it is stored and updated in."""

    def __post_init__(self) -> None:
        if self.num_virtual_tokens < 1:
            raise ValueError(f"prefix: num_virtual_tokens is {self.num_virtual_tokens}; at least 1 is needed")
        check_choice("prefix: init", self.init, ("tokens", "normal"))
        check_dtype("prefix", self.dtype)
        if self.init_text and self.init == "normal":
            raise ValueError("prefix: init_text is given, but init is normal; a text is for init = tokens")


def prepare_prefix(model: nn.Module, config: PrefixConfig) -> Callable[[], None]:
    """Give the model a prefix without values, and freeze all else; what fills it comes back."""
    refuse_second(model)
    shares.refuse_shared(model, "a prefix")
    shape = prefix_shapes(model, config)[NAME]
    if config.init_text and not config.init_ids:
        raise ValueError("prefix: init_text needs init_ids beside it here: tokenizer.encode(init_text)")
    assert isinstance(model, Llama)
    wrong = [i for i in config.init_ids if not 0 <= i < model.config.vocab_size]
    if wrong:
        raise ValueError(f"prefix: init_ids has {wrong[0]}, but ids are at least 0 and below {model.config.vocab_size}")
    before = freeze(model)
    empty = torch.empty(shape, dtype=ADAPTER_DTYPES[config.dtype], device=model.embedding.weight.device)
    model.model.prompt_embeddings = nn.Parameter(empty)
    record(model, config, before)
    return partial(start, model, config)


@torch.no_grad()
def start(model: Llama, config: PrefixConfig) -> None:
    """Give the prefix its first values."""
    shares.refuse_shared(model, "a prefix")
    prefix = model.model.prompt_embeddings
    assert prefix is not None
    if config.init == "normal" or prefix.is_meta:  # where no values are, none can be computed
        prefix.normal_(std=NORMAL_STD)
        return
    P = config.num_virtual_tokens
    ids = torch.tensor(config.init_ids) if config.init_ids else torch.randint(model.config.vocab_size, (P,))
    prefix.copy_(keys_and_values(model, ids.repeat(-(-P // len(ids)))[:P]))


def keys_and_values(model: Llama, ids: Int[Tensor, " P"]) -> Float[Tensor, "P width"]:
    """What every layer keeps of a text, as a prefix has it."""
    own, model.model.prompt_embeddings = model.model.prompt_embeddings, None
    cache = model.new_cache(1, len(ids))
    model.hidden(ids[None].to(model.device), cache=cache)
    model.model.prompt_embeddings = own
    layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # (2, K, P, C) each
    return torch.stack(layers).permute(3, 0, 1, 2, 4).reshape(len(ids), -1)  # (P, layers, 2, K, C)


def prefix_shapes(model: nn.Module, config: PrefixConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of the one tensor."""
    if not isinstance(model, Llama):
        raise ValueError(
            f"prefix: a {type(model).__name__} takes none here; prefixes are for decoders that go on from a text "
            "(LLaMA); lora, ia3 and bitfit train this model"
        )
    c = model.config
    return {NAME: (config.num_virtual_tokens, c.num_hidden_layers * 2 * c.num_key_value_heads * c.head_dim)}


def remove_prefix(model: nn.Module, attachment: Attachment) -> None:
    assert isinstance(model, Llama)
    model.model.prompt_embeddings = None


def refuse_merging(attachment: Attachment) -> None:
    if isinstance(attachment.config, PrefixConfig):
        raise ConfigError(
            "a prefix cannot be merged: it lies before the text in every layer and is in no weight; "
            "keep base and adapter apart"
        )
