"""How a model is fine-tuned, as data: needs no torch."""

import math
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

# transformers' names; after the warm-up, down to zero after the last step but for the constant one
SCHEDULES = ("linear", "cosine", "constant")


@dataclass(frozen=True, config={"strict": True})
class Recipe:
    """How a model is trained: AdamW on weights in float32, no weight decay or clipping.

    Attributes:
        epochs: Passes over the examples.
        batch_size: Examples in one step, whose loss is the mean over their tokens.
        rate: Learning rate at its highest.
        schedule: One of `SCHEDULES`.
        warmup: Fraction of the steps in which the rate rises to this, from 0 to below 1.
        lora_rank: Rank of the adapters that are trained beside all linear layers of the blocks
            (LoRA, Hu et al. 2021, scaled by 2); 0 trains all weights instead.
        saves: Checkpoints beside the start, evenly spaced, the last one is the end; 0 for none,
            not even the start.
        seed: Of the order of the examples, of adapters' start, and of dropout.

    Raises:
        pydantic.ValidationError: A ValueError, if a field is out of range; names it.
    """

    epochs: int = Field(1, ge=1)
    batch_size: int = Field(8, ge=1)
    rate: float = Field(1e-4, gt=0, allow_inf_nan=False)
    schedule: Literal[SCHEDULES] = "linear"
    warmup: float = Field(0.0, ge=0, lt=1)
    lora_rank: int = Field(0, ge=0)
    saves: int = Field(0, ge=0)
    seed: int = Field(0, ge=0, lt=2**32)

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
