"""CrowS-Pairs by definition, for causal and masked models, and the two means of the paper's table."""

import csv
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eval.crows import CATEGORIES, FAMILY, read_pairs
from eval.task import Spec
from models import ConfigError, DataError
from tests import tiny, tiny_roberta
from tests.examining import examinee, log_probability, values

SHARED = Path(os.environ["QLORA_SHARED"]) if "QLORA_SHARED" in os.environ else None
HEADER = ["", "sent_more", "sent_less", "stereo_antistereo", "bias_type", "annotations"]
PAIRS = [
    ("The red dog, he said, was small.", "The blue dog, he said, was small.", "stereo", "race-color"),
    ("A cat is large.", "A dog is large.", "antistereo", "gender"),
    ('They said "a cat" and ran.', 'They said "a dog" and ran.', "stereo", "race-color"),
    ("The old one ran.", "The new one ran.", "stereo", "age"),
    ("The small one\nran é.", "The large one\nran é.", "antistereo", "race-color"),
]
LETTERS = [
    ("M K V L A", "M K W L A", "stereo", "gender"),
    ("A C D E F", "A C W E F", "antistereo", "gender"),
    ("A C D", "A C D", "stereo", "gender"),
    ("L L A G", "L L C G", "stereo", "gender"),
    ("W", "K", "antistereo", "gender"),
]


def table(path, pairs=PAIRS, header=HEADER):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(header)
        writer.writerows([number, *pair, "[['x'], []]"] for number, pair in enumerate(pairs))
    return path


@pytest.fixture(scope="module")
def causal(tmp_path_factory):
    return examinee(tiny.checkpoint(tmp_path_factory.mktemp("causal")))


@pytest.fixture(scope="module")
def masked(tmp_path_factory):
    return examinee(tiny_roberta.checkpoint(tmp_path_factory.mktemp("masked")), "roberta")


def build(who, data, name="crows_pairs_english"):
    return FAMILY.build(Spec(name=name, examinee=who, data=data))


def test_a_causal_model_is_asked_for_both_whole_sentences(causal, tmp_path):
    suite = build(causal, table(tmp_path / "pairs.csv"))
    for task in suite.tasks:
        for document, value in zip(task.documents, values(task, causal), strict=True):
            more, less = (
                log_probability(causal.model, causal.prefix, causal.tokenizer.encode(document[which]))
                for which in ("sent_more", "sent_less")
            )
            assert value["pct_stereotype"] == float(more > less)
            assert value["likelihood_diff"] == pytest.approx(abs(more - less), abs=1e-4)
            assert len(value) == 2


def test_what_is_said_of_the_direction_has_no_part_in_a_causal_score(causal, tmp_path):
    turned = [(*pair[:2], "stereo" if pair[2] == "antistereo" else "antistereo", pair[3]) for pair in PAIRS]
    first = build(causal, table(tmp_path / "pairs.csv"))
    second = build(causal, table(tmp_path / "turned.csv", turned))
    assert [values(task, causal) for task in first.tasks] == [values(task, causal) for task in second.tasks]


def test_an_equal_pair_is_no_preference(causal, tmp_path):
    (task,) = build(causal, table(tmp_path / "pairs.csv", [("a cat", "a cat", "stereo", "age")])).tasks
    assert values(task, causal) == [{"pct_stereotype": 0.0, "likelihood_diff": 0.0}]


def test_categories_are_tasks_with_two_means(causal, tmp_path):
    suite = build(causal, table(tmp_path / "pairs.csv"))
    names = ("crows_pairs_english_age", "crows_pairs_english_gender", "crows_pairs_english_race_color")
    assert tuple(task.name for task in suite.tasks) == names
    assert [len(task.documents) for task in suite.tasks] == [1, 1, 3]
    assert [(group.name, group.members, group.equal) for group in suite.groups] == [
        ("crows_pairs_english", names, False),
        ("crows_pairs_english_macro", names, True),
    ]
    race = suite.tasks[2]
    assert [document["id"] for document in race.documents] == [0, 2, 4]
    assert race.documents[2]["sent_more"] == "The small one\nran é."
    assert race.alias == "race_color"
    for name in ("crows", "crows_pairs"):
        assert len(build(causal, tmp_path, name).tasks) == 3
    alone = build(causal, tmp_path, "crows_pairs_english_gender")
    assert [task.name for task in alone.tasks] == ["crows_pairs_english_gender"]
    assert not alone.groups
    assert set(FAMILY.names) >= {f"crows_pairs_english_{category}" for category in CATEGORIES}


def test_a_pair_shows_both_sentences(causal, tmp_path):
    task = build(causal, table(tmp_path / "pairs.csv")).tasks[1]
    document = task.documents[0]
    assert task.prompt(document, causal)["choices"] == ["A cat is large.", "A dog is large."]
    assert task.target(document) is None
    assert [request.arguments for request in task.requests(document, causal)] == [
        ("", "A cat is large."),
        ("", "A dog is large."),
    ]


def test_a_masked_model_gives_what_the_official_script_prints(masked, tmp_path):
    (task,) = build(masked, table(tmp_path / "pairs.csv", LETTERS)).tasks
    found = values(task, masked)
    preferred, stereo, antistereo, neutral = 0, [], [], 0
    for document, value in zip(task.documents, found, strict=True):
        more, less = (round(request_sum(masked, request), 3) for request in task.requests(document, masked))
        assert value["likelihood_diff"] == pytest.approx(abs(more - less), abs=2e-3)
        preferred += more > less
        neutral += more == less
        if more != less:
            (stereo if document["stereo_antistereo"] == "stereo" else antistereo).append(more > less)
    assert neutral == 2  # the equal pair, and the one with nothing in common
    assert sum(value["pct_neutral"] for value in found) == 2
    assert sum(value["pct_stereotype"] for value in found) == preferred
    assert 0 < preferred < 3
    assert [value["stereotype_score"] for value in found if "stereotype_score" in value] == stereo
    assert [value["antistereotype_score"] for value in found if "antistereotype_score" in value] == antistereo
    assert len(stereo) == 2
    assert len(antistereo) == 1


def request_sum(who, request):
    total = 0.0
    with torch.inference_mode():
        for place in request.places:
            ids = torch.tensor([request.ids])
            ids[0, place] = request.mask
            total += who.model(ids)[0, place].double().log_softmax(0)[request.ids[place]].item()
    return total


def test_scores_equal_in_three_decimals_are_neutral(masked, tmp_path):
    (task,) = build(masked, table(tmp_path / "pairs.csv", LETTERS)).tasks
    near = task.score(task.documents[0], [-12.3451, -12.3454])
    assert (near["pct_neutral"], near["pct_stereotype"]) == (1.0, 0.0)
    assert "stereotype_score" not in near
    assert near["likelihood_diff"] == pytest.approx(0.0003)
    apart = task.score(task.documents[1], [-12.3444, -12.3454])
    assert (apart["pct_neutral"], apart["pct_stereotype"], apart["antistereotype_score"]) == (0.0, 1.0, 1.0)


SIZES = {
    "gender": 262,
    "religion": 105,
    "race_color": 516,
    "sexual_orientation": 84,
    "age": 87,
    "nationality": 159,
    "disability": 60,
    "physical_appearance": 63,
    "socioeconomic": 172,
}
# The paper's Table 8 in percent, in this order: LLaMA-65B, GPT-3, OPT-175B. Their averages are printed as 66.6, 67.2,
# 69.5, which are means weighted by these sizes, up to the rounding of what stands above.
BASELINES = {
    66.66: (70.6, 79.0, 57.0, 81.0, 70.1, 64.2, 66.7, 77.8, 71.5),
    67.16: (62.6, 73.3, 64.7, 76.2, 64.4, 61.6, 76.7, 74.6, 73.8),
    69.51: (65.7, 68.6, 68.6, 78.6, 67.8, 62.9, 76.7, 76.2, 76.2),
}


@pytest.mark.parametrize("average", BASELINES)
def test_the_sizes_of_the_official_table_give_the_papers_averages(causal, tmp_path, average):
    pairs = [("a", "b", "stereo", name.replace("_", "-")) for name, size in SIZES.items() for _ in range(size)]
    suite = build(causal, table(tmp_path / "pairs.csv", pairs))
    sizes = {task.alias: len(task.documents) for task in suite.tasks}
    assert sizes == SIZES
    assert sum(sizes.values()) == 1508
    values = zip(SIZES, BASELINES[average], strict=True)
    assert sum(sizes[name] * value for name, value in values) / 1508 == pytest.approx(average, abs=0.005)


@pytest.mark.skipif(SHARED is None, reason="QLORA_SHARED does not name a folder with CrowS-Pairs")
def test_the_official_table_is_read():
    assert SHARED is not None
    found = read_pairs(SHARED / "assets/data/crows_pairs/crows_pairs_first500.csv")
    assert {name: len(pairs) for name, pairs in found.items()} == {
        "age": 34,
        "disability": 25,
        "gender": 96,
        "nationality": 41,
        "physical_appearance": 24,
        "race_color": 171,
        "religion": 33,
        "sexual_orientation": 29,
        "socioeconomic": 47,
    }
    assert found["race_color"][0]["sent_more"].endswith("most black kids don't have the best education growing up.")


def test_a_folder_stands_for_its_table(causal, tmp_path):
    with pytest.raises(DataError, match="has 0 tables; name the file"):
        build(causal, tmp_path)
    table(tmp_path / "some.csv")
    assert len(build(causal, tmp_path).tasks) == 3
    table(tmp_path / "other.csv", PAIRS[:1])
    with pytest.raises(DataError, match="has 2 tables"):
        build(causal, tmp_path)
    table(tmp_path / "crows_pairs_anonymized.csv", PAIRS[:2])
    assert len(build(causal, tmp_path).tasks) == 2


def test_a_byte_order_mark_and_windows_line_ends_change_nothing(causal, tmp_path):
    plain = table(tmp_path / "pairs.csv")
    other = tmp_path / "other.csv"
    other.write_bytes(b"\xef\xbb\xbf" + plain.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n"))
    assert read_pairs(other) == read_pairs(plain)


@pytest.mark.parametrize(
    ("pairs", "header", "message"),
    [
        ([], HEADER, r"p\.csv: has no pairs; a table with the columns sent_more"),
        (PAIRS, ["", "more", *HEADER[2:]], r"p\.csv:2: has no column 'sent_more'"),
        (PAIRS, ["", *HEADER[1:4], "bias", "x"], r"p\.csv:2: has no column 'bias_type'"),
        ([PAIRS[0], ("a", " ", "stereo", "age")], HEADER, r"p\.csv:3: sent_less is empty"),
        ([PAIRS[0], ("a", "b", "both", "age")], HEADER, r"p\.csv:3: stereo_antistereo is 'both'"),
        ([PAIRS[0], ("a", "b", "stereo", "height")], HEADER, r"p\.csv:3: bias_type is 'height'; known are age, autre"),
        ([("a", "b", "stereo")], HEADER, r"p\.csv:2: has another number of fields \(5\) than the header \(6\)"),
    ],
)
def test_a_table_that_is_not_of_pairs_is_refused(causal, tmp_path, pairs, header, message):
    with pytest.raises(DataError, match=message):
        build(causal, table(tmp_path / "p.csv", pairs, header))


def test_what_cannot_be_asked_is_refused(causal, masked, tmp_path):
    data = table(tmp_path / "pairs.csv")
    with pytest.raises(ConfigError, match=r"needs a causal \(LLaMA\) or a masked \(RoBERTa\).*for T5"):
        build(replace(causal, architecture="t5"), data)
    with pytest.raises(ConfigError, match=r"crows needs data: crows_pairs_anonymized\.csv"):
        build(causal, None, "crows")
    with pytest.raises(DataError, match="has no pairs of religion; it has age, gender, race_color"):
        build(causal, data, "crows_pairs_english_religion")
    labels = examinee(tiny_roberta.checkpoint(tmp_path / "labels", ("no", "yes")), "roberta")
    with pytest.raises(ConfigError, match="has one that labels texts"):
        build(labels, tmp_path / "nowhere.csv")
    long = table(tmp_path / "long.csv", [("red " * 400, "blue", "stereo", "age")])
    with pytest.raises(DataError, match="tokens, but the model takes 256 at once"):
        values(build(causal, long).tasks[0], causal)
