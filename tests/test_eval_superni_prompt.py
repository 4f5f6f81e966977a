"""Tk-Instruct's prompt to the byte: its parts, how many examples there is room for, and what is cut."""

import pytest

import models
from eval.room import Room
from eval.superni.prompt import Encoding, outputs, task_prompt
from tests import tiny, tiny_t5

TASK = {
    "Task": "task1_colours",
    "Definition": ["Say which colour is meant ", "another wording"],
    "Positive Examples": [
        {"input": " of the sky", "output": "blue ", "explanation": "It is"},
        {"input": "Of grass?", "output": "green.", "explanation": "Look!"},
        {"input": "Of blood?", "output": "red"},
    ],
    "Negative Examples": [{"input": "Of tea", "output": "loud", "explanation": "No colour"}],
}
T5, BPE = (models.load_tokenizer(it.TOKENIZER) for it in (tiny_t5, tiny))

DEFINITION = "Definition: Say which colour is meant.\n\n"
FIRST = " Positive Example 1 -\nInput: of the sky.\n Output: blue.\n\n"
SECOND = " Positive Example 2 -\nInput: Of grass?\n Output: green.\n\n"
THIRD = " Positive Example 3 -\nInput: Of blood?\n Output: red.\n\n"
NEGATIVE = " Negative Example 1 -\nInput: Of tea.\n Output: loud.\n\n"
ASKED = "Now complete the following example -\nInput: Of coal.\nOutput: "


def prompt(room=None, given=" Of coal\n", task=TASK, **encoding):
    return task_prompt(task, given, Encoding(**encoding), room)


def test_by_default_there_are_a_definition_and_two_positive_examples():
    assert prompt() == DEFINITION + FIRST + SECOND + ASKED


def test_every_setting_of_the_reference_shows_its_part():
    assert prompt(num_pos_examples=0) == DEFINITION + ASKED
    assert prompt(num_pos_examples=9) == DEFINITION + FIRST + SECOND + THIRD + ASKED
    assert prompt(add_task_definition=False) == FIRST + SECOND + ASKED
    assert prompt(add_task_name=True, num_pos_examples=0) == "task1_colours. " + DEFINITION + ASKED
    assert prompt(num_neg_examples=2) == DEFINITION + FIRST + SECOND + NEGATIVE + ASKED
    explained = prompt(num_pos_examples=3, num_neg_examples=1, add_explanation=True)
    assert (
        explained
        == (
            DEFINITION
            + FIRST[:-1]
            + " Explanation: It is.\n\n"
            + SECOND[:-1]
            + " Explanation: Look!\n\n"
            + THIRD  # which has none
            + NEGATIVE[:-1]
            + " Explanation: No colour.\n\n"
            + ASKED
        )
    )


def test_what_is_empty_gets_its_full_stop_too():
    assert prompt(given="", num_pos_examples=0).endswith("\nInput: .\nOutput: ")
    assert prompt(given="(a)", num_pos_examples=0).endswith("\nInput: (a)\nOutput: ")
    assert prompt(given="»", num_pos_examples=0).endswith("\nInput: ».\nOutput: ")  # only ASCII's punctuation counts


@pytest.mark.parametrize(("tokenizer", "end"), [(T5, 1), (BPE, 0)])
def test_an_example_is_shown_only_while_all_of_the_prompt_fits(tokenizer, end):
    def tokens(text):
        return len(tokenizer.encode(text)) + end

    both, one = DEFINITION + FIRST + SECOND + ASKED, DEFINITION + FIRST + ASKED
    none = DEFINITION + ASKED
    for text, most in ((both, tokens(both)), (one, tokens(both) - 1), (one, tokens(one)), (none, tokens(one) - 1)):
        assert prompt(Room(tokenizer, most, eos=bool(end))) == text
    assert prompt(Room(tokenizer, tokens(none), eos=bool(end))) == none


def test_no_example_is_shown_behind_one_that_does_not_fit():
    task = {**TASK, "Positive Examples": [{"input": "long " * 50, "output": "x"}, *TASK["Positive Examples"]]}
    room = Room(BPE, len(BPE.encode(DEFINITION + FIRST + SECOND + ASKED)))
    assert prompt(room, task=task) == DEFINITION + ASKED


def test_negative_examples_take_what_room_the_positive_ones_leave():
    whole = DEFINITION + FIRST + SECOND + NEGATIVE + ASKED
    counted = DEFINITION + FIRST + " " + SECOND + NEGATIVE + ASKED
    most = len(BPE.encode(counted))
    assert prompt(Room(BPE, most), num_neg_examples=1) == whole
    assert prompt(Room(BPE, most - 1), num_neg_examples=1) == DEFINITION + FIRST + SECOND + ASKED


def test_the_count_has_a_space_between_earlier_examples_as_the_references():
    whole = DEFINITION + FIRST + SECOND + THIRD + ASKED
    counted = DEFINITION + FIRST + " " + SECOND + THIRD + ASKED
    assert len(BPE.encode(whole)) < len(BPE.encode(counted))
    assert prompt(Room(BPE, len(BPE.encode(counted))), num_pos_examples=3) == whole
    assert prompt(Room(BPE, len(BPE.encode(whole))), num_pos_examples=3) == DEFINITION + FIRST + SECOND + ASKED


def test_the_name_is_not_counted_and_so_may_cost_the_end():
    room = Room(BPE, len(BPE.encode(DEFINITION + FIRST + ASKED)))
    whole = "task1_colours. " + DEFINITION + FIRST + ASKED
    cut = BPE.decode(BPE.encode(whole)[: room.max_tokens])
    assert whole.startswith(cut)
    assert prompt(room, num_pos_examples=1, add_task_name=True) == cut != whole


def test_a_prompt_too_long_without_examples_is_cut_to_its_first_tokens():
    given = "one two three four " * 30
    for tokenizer, end in ((BPE, False), (T5, True)):
        found = prompt(Room(tokenizer, 40, eos=end), given=given)
        ids = tokenizer.encode(DEFINITION + f"Now complete the following example -\nInput: {given.strip()}.\nOutput: ")
        assert len(ids) > 40
        assert found == tokenizer.decode(ids[:40])
    assert prompt(Room(BPE, 40), given=given).startswith(DEFINITION + "Now complete")


def test_of_several_outputs_of_an_example_the_first_that_is_not_empty_is_shown():
    task = {**TASK, "Positive Examples": [{"input": "a", "output": ["", None, 7]}]}
    assert prompt(task=task, num_pos_examples=1) == (
        DEFINITION + " Positive Example 1 -\nInput: a.\n Output: 7.\n\n" + ASKED
    )
    assert outputs({"output": [1.5, "a", None]}) == ["1.5", "a"]


def test_what_is_not_shown_is_not_asked_for():
    bare = {"Definition": "Do it"}
    assert prompt(task=bare) == "Definition: Do it.\n\n" + ASKED
    assert prompt(task={**TASK, "Negative Examples": "none"}) == DEFINITION + FIRST + SECOND + ASKED


@pytest.mark.parametrize(
    ("changes", "encoding", "message"),
    [
        ({"Definition": None}, {}, "Definition is empty"),
        ({"Negative Examples": [{"input": "a", "output": ""}]}, {"num_neg_examples": 1}, "Negative.*number 1: output"),
        ({"Positive Examples": [{"input": "a", "output": True}]}, {}, "number 1: output is a truth value"),
        ({"Positive Examples": [{"input": 5, "output": "a"}]}, {}, "number 1: input is a number"),
        (
            {"Positive Examples": [{"input": "a", "output": "b", "explanation": 5}]},
            {"add_explanation": True},
            "number 1: explanation is a number",
        ),
        ({"Task": None}, {"add_task_name": True}, "Task is null"),
    ],
)
def test_what_is_shown_and_missing_is_refused(changes, encoding, message):
    with pytest.raises(ValueError, match=message):
        prompt(task={**TASK, **changes}, **encoding)
