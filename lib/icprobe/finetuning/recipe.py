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

    The rate is the highest; it rises in a fraction warmup of the steps. A step's loss is the mean
    over the tokens of its batch. With a LoRA rank, adapters beside all linear layers of the blocks
    are trained (Hu et al. 2021, scaled by 2), with 0 all weights. `saves` (without LoRA) is how
    many checkpoints are kept beside the start, evenly spaced, the last one at the end; 0 keeps
    none, not even the start. The seed is that of the order of examples, of adapters' start, and of
    dropout.

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
