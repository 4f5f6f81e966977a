"""SentencePiece models (LLaMA, T5), and how one is built from the pieces and scores of a GGUF file.

A `.model` file is one protocol-buffer message: pieces with scores and kinds, how it was trained, and how
text is normalised first. The sentencepiece library does the work; here it is kept from bad input, and the few
fields that a GGUF file holds are written in the same wire format, for which protobuf is not needed.
"""

import struct
from collections.abc import Iterable, Iterator
from functools import cached_property
from typing import NoReturn

# The fields of the message, by number, and the kinds of pieces; GGUF's token types are the same numbers.
PIECES, TRAINER, NORMALIZER = 1, 2, 3
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
BPE_MODEL = 2
SPACE, LINE_END = "▁", "<0x0A>"


class SentencePieces:
    """A SentencePiece model: its pieces, and text to ids and back."""

    def __init__(self, model: bytes):
        import sentencepiece

        # the library takes a model that was cut between two fields, and an empty one
        parts = _fields(model)
        if {PIECES, TRAINER, NORMALIZER} - parts.keys():
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
        self.merges = _model_type(parts[TRAINER]) == BPE_MODEL
        self.starts_with_space: bool = p.encode("a", out_type=str)[:1] in ([SPACE + "a"], [SPACE])

    @cached_property
    def lines_apart(self) -> bool:
        """Is nothing ever joined across a line end? So it is in BPE that writes it as a byte, and in no piece."""
        p = self.processor
        begin = [SPACE] if self.starts_with_space else []
        alone = p.encode("\n\n", out_type=str) == [*begin, LINE_END, LINE_END]
        return alone and self.merges and not any("\n" in p.id_to_piece(i) for i in range(self.size))

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


def _fields(model: bytes) -> dict[int, bytes]:
    """The fields that a message holds in full, by number, of each the last; in a SentencePiece model all are chunks."""
    return {field: value if isinstance(value, bytes) else _broken() for field, value in _walk(model)}


def _model_type(trainer: bytes) -> int:
    """The kind of a model, which is UNIGRAM where nothing is said."""
    return next((int(value) for field, value in _walk(trainer) if field == 3 and isinstance(value, int)), 1)


def _walk(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field: bytes for a chunk, and any number as a whole one."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while position < len(message) and shift < 64:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
        return _broken()

    while position < len(message):
        tag = varint()
        field, kind = tag >> 3, tag & 7
        if kind == 0:
            yield field, varint()
            continue
        length = varint() if kind == 2 else {1: 8, 5: 4}.get(kind) or _broken()
        position += length
        if position > len(message):
            _broken()
        value = message[position - length : position]
        yield field, value if kind == 2 else int.from_bytes(value, "little")


def _broken() -> NoReturn:
    raise ValueError("it is truncated or no SentencePiece model")
