"""A page on which the answers of one or several systems to the same probes are read side by side.

    python -m eval.lemons.report evals/a evals/b --out report.html

It can be filtered by category, to what failed and to what the systems differ in, and printed (eval/lemons/page.py).
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from eval.data.records import RecordFile
from eval.lemons.page import Row, Sheet, as_html, sheet_name
from models.errors import ConfigError, DataError, Refusal, WriteError
from models.files import write_whole

FILE = "lemons.jsonl"
KINDS: dict[str, type] = {
    "category": str,
    "id": str,
    "messages": list,
    "note": str,
    "answer": str,
    "passed": bool,
    "checks": list,
}


def read_sheet(given: str) -> Sheet:
    """A system's answers: `lemons.jsonl`, or a directory that holds it, perhaps in `eval`; or NAME=PATH."""
    name, _, path = given.rpartition("=") if not Path(given).exists() else ("", "", given)
    places = [Path(path), Path(path) / FILE, Path(path) / "eval" / FILE]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise DataError(f"{path}: neither a file of answers nor a directory with {FILE}; `qlora eval` leaves one there")
    return Sheet(name or sheet_name(file.parent), list(read_rows(file)))


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, each with all that the page needs."""
    file, names = RecordFile(path), set()
    for number, row in enumerate(file.scan()):
        problem = str(row) if isinstance(row, ValueError) else wrong(row)
        if problem:
            raise DataError(f"{file.where(number)}: {problem}")
        assert not isinstance(row, ValueError)
        if (row["category"], row["id"]) in names:
            raise DataError(f"{file.where(number)}: the probe {row['id']} comes twice")
        names.add((row["category"], row["id"]))
        yield row
    if not names:
        raise DataError(f"{path}: has no answers")


def wrong(row: Row) -> str:
    """What is wrong with a row; nothing, if it is as it should be."""
    for name, kind in KINDS.items():
        if not isinstance(row.get(name), kind):
            return f"{name} is {row.get(name)!r:.60}; is this a file that `qlora eval --task lemons` left?"
    for it in row["messages"]:
        if not isinstance(it, dict) or not all(isinstance(it.get(name), str) for name in ("role", "content")):
            return "a message lacks its role or its content"
    size = len(row["answer"])
    for it in row["checks"]:
        if not isinstance(it, dict) or not isinstance(it.get("check"), str) or not isinstance(it.get("passed"), bool):
            return "a check is not as it should be"
        found = it.get("found")
        if found is not None and not (
            isinstance(found, list) and [type(n) for n in found] == [int, int] and 0 <= found[0] <= found[1] <= size
        ):
            return f"a check has found {found!r:.60}, which is no part of the answer"
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page; the exit code is that of the refusal, if there is one."""
    parser = argparse.ArgumentParser(prog="python -m eval.lemons.report", description="answers to probes, side by side")
    parser.add_argument("answers", nargs="+", help=f"{FILE}, or a directory or run with it; or NAME=PATH")
    parser.add_argument("--out", required=True, type=Path, help="the page, an HTML file")
    options = parser.parse_args(argv)
    try:
        sheets = [read_sheet(given) for given in options.answers]
        names = [sheet.system for sheet in sheets]
        if len(set(names)) < len(names):
            raise ConfigError(f"two systems have the same name among {', '.join(names)}; give NAME=PATH")
        page = as_html(sheets)
        try:
            write_whole(options.out, page)
        except OSError as error:
            raise WriteError(f"{options.out}: cannot be written ({error.strerror})") from error
    except Refusal as refusal:
        print(f"report: {refusal}", file=sys.stderr)
        return refusal.exit_code
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
