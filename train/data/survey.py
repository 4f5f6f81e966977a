"""One pass over the examples, of which a few numbers each are kept: about 20 bytes, and none of the text.

What decides a run before it starts (the split, the batches, what its manifest says) follows from these numbers,
so a data file may be larger than memory; its examples are tokenized again when their batch comes.
"""

from array import array
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np
from jaxtyping import Bool, Int, UInt

from train.data.tokenized import Tokenized

CUT_PROMPT, CUT_RESPONSE, ENDS = 1, 2, 4  # flags of an example


@dataclass(frozen=True, eq=False)
class Survey:
    """The numbers of each example, in the file's order."""

    inputs: Int[np.ndarray, " examples"]
    """Tokens of its input."""
    targets: Int[np.ndarray, " examples"]
    """Tokens of a target of its own, else 0."""
    labels: Int[np.ndarray, " examples"]
    """Tokens to learn; none means that it is dropped."""
    openings: UInt[np.ndarray, " examples"]
    """A hash of what it begins with; one without an opening is like no other."""
    flags: UInt[np.ndarray, " examples"]
    """Whether its prompt or a response was cut, and whether an end is learned."""

    @property
    def sizes(self) -> Int[np.ndarray, "examples 2"]:
        return np.stack([self.inputs, self.targets], axis=1)

    def having(self, flag: int) -> Bool[np.ndarray, " examples"]:
        return (self.flags & flag) != 0

    def __getitem__(self, places: Int[np.ndarray, " taken"]) -> "Survey":
        """The numbers of some of the examples."""
        columns = (self.inputs, self.targets, self.labels, self.openings, self.flags)
        return Survey(*(column[places] for column in columns))


def survey(examples: Iterable[Tokenized], ends: Collection[int]) -> Survey:
    """Go over the examples once; `ends` are the ids that end a response."""
    inputs, targets, labels, openings, flags = array("i"), array("i"), array("i"), array("Q"), array("B")
    for e in examples:
        inputs.append(len(e.input_ids))
        targets.append(e.target_length)
        labels.append(e.label_count)
        openings.append(hashed(e.opening or e.where))
        learns_end = any(end in e.labels for end in ends)
        flags.append(CUT_PROMPT * e.cut_prompt | CUT_RESPONSE * e.cut_response | ENDS * learns_end)
    return Survey(
        np.array(inputs, np.int32),
        np.array(targets, np.int32),
        np.array(labels, np.int32),
        np.array(openings, np.uint64),
        np.array(flags, np.uint8),
    )


def hashed(text: str) -> int:
    """64 bits of a text: two of a million texts are alike by chance in one file of 40 million."""
    return int.from_bytes(blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")
