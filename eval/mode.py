"""A model that is measured for a while and then trained on, as if nobody had looked."""

from collections.abc import Iterator
from contextlib import contextmanager

from models import Model
from models.parallel.shares import let_go


@contextmanager
def evaluating(model: Model) -> Iterator[None]:
    """The time in which a model is in evaluation mode; afterwards it is in the mode it was in.

    If it is shared, nothing of it stays whole: without a backward pass the root's weights would.
    """
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        let_go(model)
