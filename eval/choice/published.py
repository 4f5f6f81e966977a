"""Records of the data sets whose zero-shot mean the paper's Figure 3 shows, worded as the harness words them.

Each function takes a record as its authors published it, or as the Hugging Face hub has it, and gives a document.
"""

import re

from eval.choice.reading import brief, chosen, text, texts, whole
from eval.task import Document


def winogrande(record: Document) -> Document:
    """{"sentence" with a blank "_", "option1", "option2", "answer": "1" or "2"}.

    What follows the blank is scored, after the sentence's beginning with either option in the blank.
    """
    sentence = text(record, "sentence")
    before, blank, after = sentence.partition("_")
    if not blank:
        raise ValueError(f"its sentence has no blank '_': {brief(sentence)}")
    if not after.strip():
        raise ValueError(f"nothing follows the blank '_', so nothing can be scored: {brief(sentence)}")
    options = [text(record, "option1"), text(record, "option2")]
    answer = record.get("answer")
    number = whole(answer)
    gold = chosen(options, None if number is None else number - 1, answer, "1 or 2")
    return {"choices": [before + option for option in options], "continuation": after.strip(), "gold": gold}


def hellaswag(record: Document) -> Document:
    """{"activity_label", "ctx_a", "ctx_b" (or "ctx"), "endings", "label": 0 to 3}."""
    if "ctx_a" in record and "ctx_b" in record:
        context = f"{text(record, 'ctx_a')} {text(record, 'ctx_b').capitalize()}"
    else:
        context = text(record, "ctx")
    choices = [without_marks(ending) for ending in texts(record, "endings")]
    label = record.get("label")
    gold = chosen(choices, whole(label), label, f"0 to {len(choices) - 1}")
    return {
        "query": without_marks(f"{text(record, 'activity_label')}: {context}"),
        "choices": choices,
        "gold": gold,
    }


def without_marks(value: str) -> str:
    """A text without WikiHow's marks in brackets.

    >>> without_marks("How to rest [title] Lie down. [step] Sleep  well.")
    'How to rest. Lie down. Sleep well.'
    """
    value = re.sub(r"\[.*?\]", "", value.strip().replace(" [title]", ". "))
    return value.replace("  ", " ")


def piqa(record: Document) -> Document:
    """{"goal", "sol1", "sol2"} and "label", 0 or 1, which is published in a file of its own."""
    choices = [text(record, "sol1"), text(record, "sol2")]
    label = record.get("label")
    gold = chosen(choices, whole(label), label, "0 or 1 (from NAME-labels.lst beside NAME.jsonl)")
    return {"query": f"Question: {text(record, 'goal')}\nAnswer:", "choices": choices, "gold": gold}


def arc(record: Document) -> Document:
    """{"question": {"stem", "choices": [{"text", "label"}]}, "answerKey"}.

    The hub has {"question": stem, "choices": {"text": [...], "label": [...]}, "answerKey"}.
    """
    question = record.get("question")
    if isinstance(question, dict):
        items = question.get("choices")
        if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
            raise ValueError("its question's 'choices' are not a list of objects")
        stem = text(question, "stem")
        choices, labels = [text(item, "text") for item in items], [text(item, "label") for item in items]
    else:
        stem, columns = text(record, "question"), record.get("choices")
        if not isinstance(columns, dict):
            raise ValueError(f"its 'choices' are not an object of 'text' and 'label' ({brief(columns)} came)")
        choices, labels = texts(columns, "text"), texts(columns, "label")
        if len(choices) != len(labels):
            raise ValueError(f"has {len(choices)} choices but {len(labels)} labels")
    key = record.get("answerKey")
    gold = labels.index(key) if key in labels else None
    gold = chosen(choices, gold, key, f"one of {', '.join(labels)}")
    return {"query": f"Question: {stem}\nAnswer:", "choices": choices, "gold": gold}
