"""A folder of GLUE as it is published, in small: the official names, headers and quirks, and sentences of our own."""

from pathlib import Path

PAIRS = "index\tsentence1\tsentence2"
MNLI = (
    "index\tpromptID\tpairID\tgenre\tsentence1_binary_parse\tsentence2_binary_parse\tsentence1_parse\t"
    "sentence2_parse\tsentence1\tsentence2"
)
MNLI_ROW = "{0}\t{0}\t{0}e\tfiction\t( a )\t( b )\t(ROOT a)\t(ROOT b)\tA C {0}\tD"
STSB = "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2"
STSB_ROW = "{0}\tnews\tf\t2012\t{0}\tnone\tnone\tA C\tA D E"
ENTAILED = ("entailment", "not_entailment")
THREE = ("entailment", "neutral", "contradiction")

# Folder: header and row of labelled files, labels in turn, header and row of test files.
TABLES = {
    "CoLA": (None, "gj04\t{1}\t{2}\tA C", ("1", "0"), "index\tsentence", "{0}\tA C"),
    "SST-2": ("sentence\tlabel", "A C \t{1}", ("0", "1"), "index\tsentence", "{0}\tA C"),
    "MRPC": (
        "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "{1}\t7\t8\tA C\tD",
        ("1", "0"),
        "\ufeffindex\t#1 ID\t#2 ID\t#1 String\t#2 String",
        "{0}\t7\t8\tA C\tD",
    ),
    "STS-B": (f"{STSB}\tscore", STSB_ROW + "\t{1}", ("0.000", "5.000", "3.733"), STSB, STSB_ROW),
    "QQP": (
        "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
        "{0}\t1\t2\tA\tC\t{1}",
        ("0", "1"),
        "id\tquestion1\tquestion2",
        "{0}\tA\tC",
    ),
    "QNLI": (
        "index\tquestion\tsentence\tlabel",
        "{0}\tA\tC D\t{1}",
        ENTAILED,
        "index\tquestion\tsentence",
        "{0}\tA\tC",
    ),
    "RTE": (f"{PAIRS}\tlabel", "{0}\tA C\tD\t{1}", ENTAILED, PAIRS, "{0}\tA C\tD"),
    "WNLI": (f"{PAIRS}\tlabel", "{0}\tA C\tD\t{1}", ("1", "0"), PAIRS, "{0}\tA C\tD"),
    "MNLI": (f"{MNLI}\tlabel1\tgold_label", MNLI_ROW + "\tneutral\t{1}", THREE, MNLI, MNLI_ROW),
}
FILES = {"MNLI": {"dev": ("dev_matched", "dev_mismatched"), "test": ("test_matched", "test_mismatched")}}


def write(folder: Path, *names: str, rows: int = 6) -> Path:
    """Write train, dev and test files of some tasks, or of all, and of the diagnostics."""
    for name in names or TABLES:
        header, row, labels, test_header, test_row = TABLES[name]
        for split in ("train", "dev", "test"):
            known = split != "test"
            lines = [header if known else test_header]
            for number in range(rows):
                label = labels[number % len(labels)] if known else ""
                lines.append((row if known else test_row).format(number, label, "*" if label == "0" else ""))
            text = "".join(f"{line}\n" for line in lines if line is not None)
            for file in FILES.get(name, {}).get(split, (split,)):
                put(folder / name / f"{file}.tsv", text)
    if not names:
        put(folder / "AX" / "diagnostic.tsv", f"{PAIRS}\n" + "".join(f"{n}\tA\tC\n" for n in range(rows)))
    return folder


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8", newline="")
    return path
