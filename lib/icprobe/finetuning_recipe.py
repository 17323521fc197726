"""How a model is fine-tuned, as data: needs no torch."""

import math
import numbers
from dataclasses import dataclass

# transformers' names; after the warm-up, down to zero after the last step but for the constant one
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True)
class Recipe:
    """How a model is trained: AdamW on weights in float32, no weight decay or clipping.

    Attributes:
        epochs: Passes over the examples.
        batch_size: Examples in one step, whose loss is the mean over their tokens.
        rate: Learning rate at its highest.
        schedule: One of `SCHEDULES`.
        warmup: Share of the steps in which the rate rises to this, from 0 to below 1.
        lora_rank: Rank of the adapters that are trained beside all linear layers of the blocks
            (LoRA, Hu et al. 2021, scaled by 2); 0 trains all weights instead.
        saves: Checkpoints beside the start, evenly spaced, the last one is the end; 0 for none,
            not even the start.
        seed: Of the order of the examples, of adapters' start, and of dropout.

    Raises:
        ValueError: If a field is out of range; names it.
    """

    epochs: int = 1
    batch_size: int = 8
    rate: float = 1e-4
    schedule: str = "linear"
    warmup: float = 0.0
    lora_rank: int = 0
    saves: int = 0
    seed: int = 0

    def __post_init__(self):
        least = {"epochs": 1, "batch_size": 1, "lora_rank": 0, "saves": 0, "seed": 0}
        for name, low in least.items():
            value = getattr(self, name)
            if type(value) is not int or not low <= value < 2**32:
                raise ValueError(f"{name} is {value!r}, expected a whole number from {low}")
        for name, fits, expected in (
            ("rate", lambda value: 0 < value < math.inf, "a positive number"),
            ("warmup", lambda value: 0 <= value < 1, "a share from 0 to below 1"),
        ):
            value = getattr(self, name)
            number = isinstance(value, numbers.Real) and not isinstance(value, bool)
            if not number or not fits(value):
                raise ValueError(f"{name} is {value!r}, expected {expected}")
            object.__setattr__(self, name, float(value))  # 1 and 1.0 are one recipe
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule is {self.schedule!r}, expected one of {SCHEDULES}")

    def save_steps(self, n: int) -> list[int]:
        """Return after which steps (counted from 1) on n examples a checkpoint is saved.

        Raises:
            ValueError: If there are fewer steps than checkpoints.
        """
        steps = self.steps(n)
        if self.saves > steps:
            raise ValueError(
                f"saves is {self.saves} checkpoints, but {n} examples make {steps} steps with "
                f"epochs={self.epochs} and batch_size={self.batch_size}"
            )
        return [math.ceil(steps * k / self.saves) for k in range(1, self.saves + 1)]

    def steps(self, n: int) -> int:
        """Return how many steps there are on n examples."""
        return self.epochs * math.ceil(n / self.batch_size)
