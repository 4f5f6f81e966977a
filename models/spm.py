"""SentencePiece models (LLaMA, T5), and how one is built from the pieces and scores of a GGUF file.

A `.model` file is one protocol-buffer message: pieces with scores and kinds, how it was trained, and how
text is normalised first. The sentencepiece library does the work; here it is kept from bad input, and the few
fields that a GGUF file holds are written in the same wire format, for which protobuf is not needed.
"""

import struct
from collections.abc import Iterable, Iterator

# The fields of the message, by number, and the kinds of pieces; GGUF's token types are the same numbers.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE_MODEL = 2
SPACE = "▁"


class SentencePieces:
    """A SentencePiece model: its pieces, and text to ids and back."""

    def __init__(self, model: bytes):
        import sentencepiece

        # the library takes a model that was cut between two fields, and an empty one
        absent = {PIECES, TRAINER, NORMALIZER} - _fields(model)
        if absent:
            raise ValueError("it is truncated or no SentencePiece model: parts of it are missing")
        try:
            self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except (RuntimeError, OSError) as error:
            raise ValueError(f"the sentencepiece library cannot read it: {error}") from None

        p = self.processor
        self.size: int = p.get_piece_size()
        self.unk_id: int = p.unk_id()
        self.roles = {"bos": p.bos_id(), "eos": p.eos_id(), "pad": p.pad_id(), "unk": p.unk_id()}
        self.special = {p.id_to_piece(i): i for i in range(self.size) if p.is_control(i) or p.is_unknown(i)}
        self.starts_with_space: bool = p.encode("a", out_type=str)[:1] in ([SPACE + "a"], [SPACE])

    def encode(self, text: str) -> list[int]:
        """Ids of a text; control pieces spelled in it are plain text."""
        return self.processor.encode(text)

    def decode(self, ids: Iterable[int], names: dict[int, str]) -> str:
        """The text of ids, with `names` for those given there; broken UTF-8 shows as U+FFFD."""
        text, run = "", []
        for id in ids:
            if id in names:
                text += self._decode_run(run, first=not text) + names[id]
                run = []
            else:
                run.append(id)
        return text + self._decode_run(run, first=not text)

    def _decode_run(self, run: list[int], first: bool) -> str:
        if not run:
            return ""
        # the library takes off the space that encoding put first; after a special token it is text
        space = " " if not first and self.processor.id_to_piece(run[0]).startswith(SPACE) else ""
        return space + self.processor.decode(run)


def build_model(
    pieces: list[str],
    scores: list[float],
    kinds: list[int],
    roles: dict[str, int],
    *,
    add_dummy_prefix: bool = True,
    remove_extra_whitespaces: bool = False,
) -> bytes:
    """A SentencePiece model file of the BPE kind with these pieces; `roles` has unk, bos, eos and pad ids."""
    trainer = _number(3, BPE_MODEL) + _number(35, int(BYTE in kinds))  # model_type, byte_fallback
    for field, role in ((40, "unk"), (41, "bos"), (42, "eos"), (43, "pad")):
        trainer += _number(field, roles.get(role, -1))
    normalizer = _chunk(1, b"identity") + _number(3, int(add_dummy_prefix))
    normalizer += _number(4, int(remove_extra_whitespaces))

    model = bytearray()
    for piece, score, kind in zip(pieces, scores, kinds, strict=True):
        model += _chunk(PIECES, _chunk(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _number(3, kind))
    return bytes(model + _chunk(TRAINER, trainer) + _chunk(NORMALIZER, normalizer))


def _number(field: int, value: int) -> bytes:
    return _varint(field << 3) + _varint(value & (2**64 - 1))  # negative numbers take all ten bytes


def _chunk(field: int, data: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes(out) + bytes([value])


def _fields(model: bytes) -> set[int]:
    """Numbers of the fields that a message holds in full; in a SentencePiece model all are chunks."""
    return set(_walk(model))


def _walk(model: bytes) -> Iterator[int]:
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while position < len(model) and shift < 64:
            byte = model[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        raise ValueError("it is truncated or no SentencePiece model")

    while position < len(model):
        tag, length = varint(), varint()
        position += length
        if tag & 7 != 2 or position > len(model):
            raise ValueError("it is truncated or no SentencePiece model")
        yield tag >> 3
