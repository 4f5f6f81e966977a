"""The check that the tests put on every annotated function: beartype, taking an int for a float as Python does."""

from beartype import BeartypeConf, beartype

check = beartype(conf=BeartypeConf(is_pep484_tower=True))
