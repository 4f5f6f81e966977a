"""The learning rate as a function of the step alone: there is no scheduler whose state could be lost."""

import math

from train.optimizer import OptimizerConfig


def learning_rate(step: int, total_steps: int, config: OptimizerConfig) -> float:
    """Give the rate of update number `step`, counted from 1 as in metrics.jsonl.

    It rises linearly and is full at the last warm-up step. A cosine or a line starts full and would reach its end one
    step after the last, so that no update is wasted on a rate of 0.

    >>> config = OptimizerConfig(learning_rate=1.0, schedule="cosine", warmup_steps=2)
    >>> [round(learning_rate(step, 6, config), 3) for step in range(1, 7)]
    [0.5, 1.0, 1.0, 0.854, 0.5, 0.146]
    """
    if not 1 <= step <= total_steps:
        raise ValueError(f"steps go from 1 to {total_steps}, not {step}")
    warmup = warmup_steps(total_steps, config)
    if step <= warmup:
        return config.learning_rate * (step / warmup)  # exactly the full rate at the last one
    if config.schedule == "constant":
        return config.learning_rate
    passed = (step - 1 - warmup) / (total_steps - warmup)  # 0 to just below 1
    share = (1 + math.cos(math.pi * passed)) / 2 if config.schedule == "cosine" else 1 - passed
    return config.learning_rate * (config.min_ratio + (1 - config.min_ratio) * share)


def warmup_steps(total_steps: int, config: OptimizerConfig) -> int:
    """Give the number of warm-up steps, a started one counting whole.

    >>> config = OptimizerConfig(warmup_ratio=0.03)
    >>> warmup_steps(100, config), warmup_steps(101, config)
    (3, 4)
    """
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(round(config.warmup_ratio * total_steps, 6))  # 0.07 * 100 is 7.000000000000001
