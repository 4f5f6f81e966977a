"""The fields of a record: the text or the list that stands under a key, or what is wrong with it."""

from eval.data.records import Record, kind


def text_of(record: Record, key: str, *, optional: bool = False, blank: bool = False) -> str:
    """A field's text; it may be absent or null only where it is optional, and blank only where that is allowed."""
    value = record.get(key)
    if value is None and optional:
        return ""
    if key not in record:
        raise ValueError(f"{key} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{key} is {kind(value)}; text is needed")
    if not (value.strip() or blank or optional):
        raise ValueError(f"{key} is empty; write one or remove the record")
    return value


def objects(record: Record, key: str) -> list[Record]:
    """A field's list of objects; it may not be empty."""
    value = record.get(key)
    if not isinstance(value, list):
        raise ValueError(f"{key} is {kind(value)}; a list is needed")
    if not value:
        raise ValueError(f"{key} is an empty list; write at least one or remove the record")
    for number, item in enumerate(value, 1):
        if not isinstance(item, dict):
            raise ValueError(f"{key}: number {number} is {kind(item)}, not an object")
    return value
