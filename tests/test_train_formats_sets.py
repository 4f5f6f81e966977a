"""The paper's instruction sets in the layouts that they are published in."""

import json
import random

import pytest

from tests.datafiles import assistant, examples, refused, user, write
from train.data.examples import open_examples
from train.data.formats import FORMATS, detect
from train.data.instruction_formats import ALPACA, ALPACA_INPUT


def test_every_instance_of_a_self_instruct_seed_is_an_example(tmp_path):
    seeds = [
        {"id": "s0", "name": "a", "instruction": "Greet.", "instances": [{"input": "", "output": "Hello."}]},
        {
            "id": "s1",
            "name": "b",
            "instruction": "Add.",
            "instances": [{"input": "1 and 2", "output": "3"}, {"input": "2 and 2", "output": "4"}],
        },
    ]
    found = examples(tmp_path, seeds)
    assert found.format == "self-instruct"
    assert (len(found), found.records) == (3, 2)
    assert [e.prompt for e in found] == [
        ALPACA.format(instruction="Greet."),
        ALPACA_INPUT.format(instruction="Add.", input="1 and 2"),
        ALPACA_INPUT.format(instruction="Add.", input="2 and 2"),
    ]
    assert [e.response for e in found] == ["\nHello.", "\n3", "\n4"]
    assert [e.where.rpartition(":")[2] for e in found] == ["1", "2", "2"]
    assert found[-1].response == "\n4"
    assert [e.response for e in found[1:]] == ["\n3", "\n4"]


def test_self_instruct_pairs_go_by_its_name_if_told(tmp_path):
    pairs = [{"prompt": "Q: 1+1? Output:", "completion": " 2"}]
    assert examples(tmp_path, pairs).format == "prompt-completion"
    found = examples(tmp_path, pairs, format="self-instruct")
    assert (found[0].prompt, found[0].response) == ("Q: 1+1? Output:", " 2")


def test_an_unnatural_instruction_has_its_input_and_its_constraints(tmp_path):
    core = {
        "instruction": "Name the largest.",
        "instances": [
            {
                "instruction_with_input": "Name the largest. 1, 2",
                "input": "1, 2",
                "constraints": "None.",
                "output": "2",
            },
            {"instruction_with_input": "Name the largest. 3, 4", "constraints": "A digit.", "output": "4"},
            {"instruction_with_input": "Name it. A digit. 5", "constraints": "A digit.", "output": "5"},
            {"instruction_with_input": "Name it. 6", "constraints": None, "output": "6"},
        ],
    }
    found = examples(tmp_path, [core])
    assert found.format == "unnatural"
    assert [e.prompt for e in found] == [
        "Name the largest. 1, 2",
        "Name the largest. 3, 4\nA digit.",
        "Name it. A digit. 5",
        "Name it. 6",
    ]
    assert found[1].messages == (user("Name the largest. 3, 4\nA digit."), assistant("4"))
    assert found[1].response == "\n4"


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"instruction": "a", "instances": []}, "instances is an empty list"),
        ({"instruction": "a", "instances": None}, "instances is null; a list is needed"),
        ({"instruction": "a", "instances": ["b"]}, "instances: number 1 is a text, not an object"),
        ({"instruction": "a", "instances": [{"input": "b"}]}, "output is missing"),
        ({"instruction": None, "instances": [{"output": "b"}]}, "instruction is null"),
        ({"instruction": "a", "instances": [{"instruction_with_input": "b", "output": " "}]}, "output is empty"),
        ({"instruction": "a", "instances": [{"instruction_with_input": 1, "output": "b"}]}, "is a number; text"),
        ({"instruction": "a", "instances": [{"instruction_with_input": "b"}, {"output": "b"}]}, "output is missing"),
    ],
)
def test_instances_that_cannot_be_used_are_refused(tmp_path, record, message):
    refused(tmp_path, [record], f"my.jsonl:1: .*{message}")


def test_chip2_is_told_from_guanaco_by_its_marks(tmp_path):
    found = examples(tmp_path, [{"text": "\n<human>: Name a colour.\n<bot>: Blue.\nOr <bot>: red."}])
    assert found.format == "chip2"
    assert found[0].messages == (user("Name a colour."), assistant("Blue.\nOr <bot>: red."))
    assert (found[0].prompt, found[0].response) == ("<human>: Name a colour.\n<bot>:", " Blue.\nOr <bot>: red.")
    long = "<human>: a\n<bot>: b\n<human>: c\n<bot>: d"
    assert examples(tmp_path, [{"text": long}])[0].messages == (user("a"), assistant("b"), user("c"), assistant("d"))
    assert examples(tmp_path, [{"text": "### Human: <human>: a\n<bot>: b### Assistant: c"}]).format == "guanaco"
    refused(tmp_path, [{"text": long}, {"text": "### Human: a### Assistant: b"}], "my.jsonl:2: text has no '<human>:'")
    refused(tmp_path, [{"text": "\n<human>: a\n<bot>: "}], "the response in turn 2 is empty")


def test_of_hh_rlhf_the_last_chosen_answer_is_learned_and_the_rest_is_context(tmp_path):
    chosen = "\n\nHuman: a\n\nAssistant: b\n\nb\n\nHuman: c\n\nAssistant: d"
    found = examples(tmp_path, [{"chosen": chosen, "rejected": chosen[:-1] + "e"}])
    assert found.format == "hh-rlhf"
    assert found[0].messages == (user("a"), assistant("b\n\nb"), user("c"), assistant("d"))
    assert found[0].last_only
    assert found[0].prompt is not None
    assert found[0].prompt + str(found[0].response) == chosen
    assert found[0].response == " d"
    alone = examples(tmp_path, [{"chosen": chosen}], "alone.jsonl", "hh-rlhf")
    assert alone[0].messages == found[0].messages


def test_hh_rlhf_texts_without_an_answer_are_passed_over_and_counted(tmp_path):
    good = {"chosen": "\n\nHuman: a\n\nAssistant:\n\nHuman: b\n\nAssistant: c", "rejected": ""}
    bad = {"chosen": "\n\nHuman: a\n\nAssistant: ", "rejected": ""}
    cut = {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": ""}
    found = examples(tmp_path, [bad, good, cut])
    assert found[0].messages == (user("a"), user("b"), assistant("c"))
    assert (len(found), found.records) == (1, 3)
    (skipped,) = found.skipped
    assert (skipped.count, skipped.first.rpartition(":")[2]) == (2, "1")
    refused(tmp_path, [bad], "is empty; at least one record is needed: passed over were 1 chosen texts that do not")
    refused(tmp_path, [{"chosen": "a", "rejected": "b"}], "chosen has no 'Human:' and 'Assistant:'")


def test_longform_and_flan_are_pairs_by_their_names(tmp_path):
    record = {"input": "Write about tea.", "output": "Tea is a drink."}
    assert examples(tmp_path, [record]).format == "prompt-completion"
    found = examples(tmp_path, [record], format="longform")
    assert (found.format, found[0].response) == ("longform", " Tea is a drink.")
    refused(tmp_path, [{"a": 1}], r"expected keys input\+output \(longform\); found a", format="longform")
    flan = [{"inputs": "Is it tea?", "targets": "yes", "task": "t"}]
    assert examples(tmp_path, flan).format == "flan"
    assert examples(tmp_path, flan)[0].messages == (user("Is it tea?"), assistant("yes"))
    assert examples(tmp_path, [record], format="flan")[0].response == " Tea is a drink."


def test_dolly_is_alpaca_by_other_names(tmp_path):
    record = {"instruction": "Add.", "context": "1 and 2", "response": "3", "category": "maths"}
    found = examples(tmp_path, [record, {**record, "context": ""}])
    assert found.format == "dolly"
    assert [e.prompt for e in found] == [
        ALPACA_INPUT.format(instruction="Add.", input="1 and 2"),
        ALPACA.format(instruction="Add."),
    ]


# OASST1


def row(id, parent, text, rank=None, **more):
    role = "prompter" if text.startswith("q") else "assistant"
    return {"message_id": id, "parent_id": parent, "role": role, "text": text, "rank": rank, **more}


ROWS = [
    row("1", None, "q1"),
    row("1a", "1", "a, second", 1),
    row("1b", "1", "a, best", 0, review_result=True, deleted=False),
    row("1c", "1", "a, better but deleted", -1, deleted=True),
    row("1d", "1", "a, better but rejected", -1, review_result=False),
    row("1e", "1", "a, better but not reviewed", -1, review_result=None, review_count=0),
    row("1aq", "1a", "q to the second"),
    row("1bq", "1b", "q nobody answered"),
    row("1br", "1b", "q answered", review_result=None, review_count=3),
    row("1bra", "1br", "a, last", 0),
    row("1braq", "1bra", "q at the end"),
    row("2", None, "q2 without an answer"),
    row("3", None, "q3"),
    row("3a", "3", "a, of unknown rank"),
    row("3b", "3", "a, ranked", 5),
    row("9", "none", "q whose tree is not there"),
]


@pytest.mark.parametrize("seed", range(5))
def test_of_a_tree_of_messages_the_best_ranked_path_is_learned_in_any_order_of_rows(tmp_path, seed):
    rows = list(ROWS)
    random.Random(seed).shuffle(rows)
    # Rows of one rank go by their order, and none do here.
    found = examples(tmp_path, rows)
    assert found.format == "oasst1"
    by_question = {e.messages[0]["content"]: e for e in found}
    assert by_question.keys() == {"q1", "q3"}
    best = ["q1", "a, best", "q answered", "a, last"]
    assert [m["content"] for m in by_question["q1"].messages] == best
    assert [m["content"] for m in by_question["q3"].messages] == ["q3", "a, ranked"]
    assert not by_question["q1"].last_only
    place = next(n for n, it in enumerate(rows, 1) if it["message_id"] == "1")
    assert by_question["q1"].where == f"{found.path}:{place}"
    assert {s.reason: s.count for s in found.skipped} == {
        "messages that were deleted or did not pass review": 3,
        "questions without an answer": 1,
        "replies to messages that the file does not have": 1,
    }
    assert found.records == len(ROWS)


def test_whole_trees_give_the_same_conversations(tmp_path):
    def node(id):
        (mine,) = [r for r in ROWS if r["message_id"] == id]
        return {**mine, "replies": [node(r["message_id"]) for r in ROWS if r["parent_id"] == id]}

    rows = [r for r in ROWS if r["message_id"] != "2"]
    trees = [{"message_tree_id": id, "prompt": node(id)} for id in ("1", "3")]
    found = examples(tmp_path, trees)
    assert found.format == "oasst1-trees"
    assert [e.messages for e in found] == [e.messages for e in examples(tmp_path, rows, "rows.jsonl")]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("1", None, "q"), row("1", None, "q")], "my.jsonl:2: message_id '1' is there twice"),
        ([row("1", None, "q"), row("2", "1", "a", "best")], "my.jsonl:2: rank is a text; a number or null"),
        ([row("1", 5, "q")], "my.jsonl:1: parent_id is a number"),
        ([{**row("1", None, "q"), "role": "bot"}], "my.jsonl:1: role is 'bot'; known are prompter, assistant"),
        ([row("1", None, "q"), row("2", "1", " ")], "my.jsonl:2: text is empty"),
        ([row("1", None, "q")], "is empty; .*passed over were 1 questions without an answer .first: .*my.jsonl:1"),
        ([row("1", "1", "q")], "is empty; at least one record is needed"),
        ([{"prompt": {"role": "prompter", "text": "q", "replies": []}}], "prompt has no response by the assistant"),
        ([{"prompt": {"role": "prompter", "text": "q", "replies": "a"}}], "replies is a text; a list is needed"),
    ],
)
def test_messages_that_make_no_conversation_are_refused(tmp_path, rows, message):
    refused(tmp_path, rows, message)


# Telling layouts apart


@pytest.mark.parametrize(
    ("record", "format"),
    [
        ({"text": "### Human: a### Assistant: b", "label": "x", "score": 1}, "guanaco"),
        ({"text": "a plain text", "label": "x"}, "classification"),
        ({"instruction": "a", "input": "", "output": "b", "text": "### Human: c", "label": 1}, "alpaca"),
        ({"prompt": "a", "completion": "b", "label": True}, "prompt-completion"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "hh-rlhf"),
        ({"prompt": {"text": "a"}, "completion": "b"}, "prompt-completion"),
        ({"messages": [], "prompt": "a", "completion": "b"}, "chat"),
        ({"sentence": "a", "label": 0}, "classification"),
        ({"index": 0, "sentence1": "a", "sentence2": "b", "label": "entailment"}, "classification"),
    ],
)
def test_the_more_telling_keys_decide(record, format):
    assert detect(record) == format


@pytest.mark.parametrize(
    ("record", "near"),
    [
        ({"promt": "a", "completion": "b"}, "prompt+completion (prompt-completion)"),
        ({"Instruction": "a", "Output": "b"}, "instruction+output (alpaca)"),
        ({"conversation": []}, "conversations (chat)"),
        ({"chosen": "a"}, "chosen+rejected (hh-rlhf)"),
        ({"title": "a"}, "has the keys of no format; found title. Known are chat, oasst1, "),
    ],
)
def test_keys_that_fit_nothing_are_told_with_what_is_nearest(record, near):
    with pytest.raises(ValueError, match="found ") as refusal:
        detect(record)
    assert near in str(refusal.value)


def test_the_first_record_decides_and_the_others_must_fit(tmp_path):
    refused(tmp_path, [{"title": "a"}, {"prompt": "a", "completion": "b"}], "my.jsonl:1: has the keys of no format")
    mixed = [{"prompt": "a", "completion": "b"}, {"instruction": "a", "output": "b"}]
    refused(
        tmp_path, mixed, r"my.jsonl:2: expected keys prompt\+completion \(prompt-completion\) or .*found instruction"
    )


def test_every_layout_says_what_its_records_look_like():
    for layout in FORMATS.values():
        assert layout.shape
        assert layout.keys or layout.named


# Directories


def test_a_directory_is_all_its_files_in_the_order_of_their_names(tmp_path):
    write(tmp_path, [{"prompt": "b", "completion": "1"}] * 2, "b.jsonl")
    write(tmp_path, json.dumps([{"prompt": "a", "completion": "0"}]), "a.json")
    write(tmp_path, "prompt,completion\nc,2\n", "c.csv")
    write(tmp_path, "not data", "README.txt")
    write(tmp_path, "not data", ".hidden.json")
    found = open_examples(tmp_path)
    assert [e.prompt for e in found] == ["a", "b", "b", "c"]
    assert [e.where for e in found] == [f"{tmp_path}/{it}" for it in ("a.json:1", "b.jsonl:1", "b.jsonl:2", "c.csv:2")]
    assert [file.name for file in found.files] == ["a.json", "b.jsonl", "c.csv"]
    assert [file.bytes for file in found.files] == [(tmp_path / file.name).stat().st_size for file in found.files]
    assert len({file.sha256 for file in found.files}) == 3
    write(tmp_path, [{"prompt": "d"}], "d.jsonl")
    with pytest.raises(ValueError, match=r"d.jsonl:1: expected keys"):
        open_examples(tmp_path)


def test_a_directory_of_parts_of_one_set_is_not_mixed(tmp_path):
    for name in ("train.jsonl", "dev.jsonl"):
        write(tmp_path, [{"prompt": "a", "completion": "b"}], name)
    with pytest.raises(ValueError, match=r"dev.jsonl and train.jsonl; name the file to train on"):
        open_examples(tmp_path)
