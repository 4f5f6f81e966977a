"""Cut the released vocabularies down to what the tests need: `python derive.py ASSETS`.

A few rows of expected ids are kept, and of each vocabulary the bytes, the special tokens, the first 1,000
merges and every merge that those rows use, all with their released ids. A merge that no row uses cannot
change a row by its absence, so the rows' ids remain those of the full vocabulary. Of RoBERTa's dictionary
the first 3,000 lines are kept; the ids of the others become <unk>. Of T5's SentencePiece file the first 12,000 pieces
are kept, and the rows that use no others: a piece that is not in the most probable cut of a text cannot change that
cut by its absence.
"""

import json
import shutil
import sys
from pathlib import Path

ROWS = (11, 20, 28, 29, 34, 35, 38, 47, 53, 57, 58, 69)  # odd spaces, digits, scripts, emoji, special tokens
FIELDS = ("text", "gpt2", "roberta", "smollm2")
FIRST_MERGES = 1000
DICTIONARY_LINES = 3000
T5_PIECES = 12_000


def main(assets: Path, here: Path) -> None:
    lines = (assets / "expected/tokenization.jsonl").read_text().splitlines()
    rows = [json.loads(lines[number]) for number in ROWS]
    kept = [json.dumps({field: row[field] for field in FIELDS}, ensure_ascii=False) for row in rows]
    (here / "expected.jsonl").write_text("\n".join(kept) + "\n")

    source = assets / "tokenizers"
    shrink(source / "smollm2", here / "smollm2", ("vocab.json", "merges.txt"), [r["smollm2"] for r in rows])
    shrink(source / "gpt2", here / "gpt2", ("encoder.json", "vocab.bpe"), [r["gpt2"] for r in rows])
    shutil.copyfile(source / "smollm2/chat_template.jinja", here / "smollm2/chat_template.jinja")
    dictionary = (source / "roberta/dict.txt").read_text().splitlines()[:DICTIONARY_LINES]
    (here / "roberta").mkdir(exist_ok=True)
    (here / "roberta/dict.txt").write_text("\n".join(dictionary) + "\n")

    (here / "t5").mkdir(exist_ok=True)
    (here / "t5/spiece.model").write_bytes(first_pieces((source / "t5/spiece.model").read_bytes(), T5_PIECES))
    covered = [{field: row[field] for field in ("text", "t5")} for row in rows if max(row["t5"]) < T5_PIECES]
    kept = [json.dumps(row, ensure_ascii=False) for row in covered]
    (here / "t5/expected.jsonl").write_text("\n".join(kept) + "\n")


def shrink(source: Path, target: Path, names: tuple[str, str], used: list[list[int]]) -> None:
    vocab = json.loads((source / names[0]).read_text())
    lines = (source / names[1]).read_text().split("\n")
    header = [line for line in lines[:1] if line.startswith("#version")]
    merges = [line for line in lines[len(header) :] if line]

    made_by = {line.replace(" ", ""): line for line in merges}
    token_of = {id: token for token, id in vocab.items()}
    wanted = set(merges[:FIRST_MERGES])
    pending = [token_of[id] for ids in used for id in ids]
    while pending:  # a token's merge, and the merges of its halves
        line = made_by.get(pending.pop())
        if line and line not in wanted:
            wanted.add(line)
            pending += line.split(" ")

    kept_merges = [line for line in merges if line in wanted]
    made = {line.replace(" ", "") for line in kept_merges}
    kept = {token: id for token, id in vocab.items() if token in made or token not in made_by}
    target.mkdir(exist_ok=True)
    (target / names[0]).write_text(json.dumps(kept, ensure_ascii=False))
    (target / names[1]).write_text("\n".join([*header, *kept_merges, ""]))


def first_pieces(model: bytes, count: int) -> bytes:
    """A SentencePiece file with the first pieces only: a message whose fields are all chunks, pieces the first kind."""
    kept, pieces, position = b"", 0, 0
    while position < len(model):
        length, start, shift = 0, position + 1, 0
        while True:
            length |= (model[start] & 0x7F) << shift
            start, shift = start + 1, shift + 7
            if model[start - 1] < 0x80:
                break
        is_piece = model[position] >> 3 == 1
        pieces += is_piece
        if not is_piece or pieces <= count:
            kept += model[position : start + length]
        position = start + length
    return kept


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(__file__).parent)
