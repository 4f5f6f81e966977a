"""What to train on, and what of it: the settings of data, which are also flags of the command line."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """What to train on, and what of it."""

    path: str
    """File of records, or a directory of such files: JSON, JSONL, CSV or TSV. A clone of allenai/natural-instructions
    stands for its training tasks."""
    format: str | None = None
    """Layout of the records; found from their keys by default."""
    template: Literal["plain", "chat"] = "plain"
    """How a prompt and its response are joined: as they are, or as a chat. Conversations are always chats."""
    chat_style: Literal["chatml", "guanaco"] | None = None
    """Form of a chat: the tokenizer's own by default, Guanaco's for Guanaco's records."""
    train_on_source: bool = False
    """Learn the prompt too."""
    max_len: int | None = None
    """Tokens of an example; what is beyond is cut."""
    source_max_len: int | None = None
    """Tokens before the first response; their beginning is cut, since their end is nearest to the answer."""
    target_max_len: int | None = None
    """Tokens of a response, its end-of-text id included; what is beyond is cut."""
    per_task: int | None = None
    """Instances that a Super-NaturalInstructions task is learned from, drawn by the seed; all by default."""
    eval_size: int | float = 0.1
    """Examples held out: a share below 1, or a number."""
    group_by_length: bool = True
    """Put examples of like length together, which saves padding."""
    pack: bool = False
    """Fill rows of max_len tokens with several examples each, which attend to themselves alone; such rows are of
    like length already. For causal models."""
    seed: int = 42
    """Decides which examples are held out, and their order."""

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path must name a data file")
        for name in ("max_len", "source_max_len", "target_max_len"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name} is {value}; at least 2 tokens are needed")
        if self.per_task is not None and self.per_task < 1:
            raise ValueError(f"per_task is {self.per_task}; a task needs at least 1 instance")
        if self.pack and self.max_len is None:
            raise ValueError("pack needs max_len, the length of the rows to fill")
        if not self.eval_size >= 0:
            raise ValueError(f"eval_size is {self.eval_size}; it must be 0 or more")
        if self.eval_size >= 1 and self.eval_size != int(self.eval_size):
            raise ValueError(f"eval_size is {self.eval_size}; give a share below 1 or a whole number")
