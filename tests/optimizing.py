"""Parameters, gradients and steps for the tests of optimizers."""

import torch

from train.paged import AdamW, AdamW8bit, Lion, PagedAdamW, PagedAdamW8bit

CLASSES = [AdamW, AdamW8bit, PagedAdamW, PagedAdamW8bit, Lion]
ADAMWS = CLASSES[:-1]
SHAPES = ((33, 70), (1,), (0,), (257,), (3, 5, 7), (), (2048,))


def parameters(shapes=SHAPES, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def give_gradients(params, seed, scale=0.1):
    """The same gradients for parameters of the same shapes, whatever the seed's history."""
    generator = torch.Generator().manual_seed(seed)
    for p in params:
        p.grad = (torch.randn(p.shape, generator=generator) * scale).to(p.dtype)


def steps(optimizer, count, start=0):
    """Make steps on gradients that depend on the step's number alone."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for number in range(start, start + count):
        give_gradients(params, number)
        optimizer.step()
    return params


def equal(params, others):
    return all(torch.equal(p, q) for p, q in zip(params, others, strict=True))


def states_equal(optimizer, other):
    one, two = optimizer.state_dict()["state"], other.state_dict()["state"]
    return one.keys() == two.keys() and all(
        one[k].keys() == two[k].keys() and all(torch.equal(one[k][name], two[k][name]) for name in one[k]) for k in one
    )
