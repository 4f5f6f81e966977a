"""Work that processes do apart from each other, and refusals that all of them have to make together.

What one finds wrong in its part, the others do not see: going on without it, they would wait for it in the next
collective. So each tells what it has found before they go on.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from models.parallel import world

T = TypeVar("T")


@contextmanager
def agreed(together: bool = True) -> Iterator[None]:
    """Around what each process looks at for itself: a ValueError of one, as any refusal is, is raised by all of them.

    Without `together` there is nobody to ask.
    """
    if not together or world.size() == 1:
        yield
        return
    refusal: ValueError | None = None
    try:
        yield
    except ValueError as error:
        refusal = error
    found = [each for each in world.from_all(refusal) if each is not None]
    if found:
        raise found[0] from refusal


def by_turns(
    items: Sequence[str],
    make: Callable[[str], T],
    take: Callable[[str, T | None, int | None], None],
    together: bool = True,
) -> None:
    """Let each item be made by one process, each in its turn, and be taken by all.

    `take` gets the item, what was made of it (None where that was elsewhere), and the process that has it. No process
    has more than one made item at a time. Without `together` this process makes all of them, and takes them with None
    for the process.
    """
    if not together or world.size() == 1:
        for item in items:
            take(item, make(item), None)
        return
    here, size = world.rank(), world.size()
    for first in range(0, len(items), size):
        at_once = items[first : first + size]
        made = None
        with agreed():
            if here < len(at_once):
                made = make(at_once[here])
        for source, item in enumerate(at_once):
            take(item, made if source == here else None, source)
