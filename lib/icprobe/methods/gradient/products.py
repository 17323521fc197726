"""Gradient dot products and cosines as `scores.score` takes them; loading them needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from icprobe.methods import gradient
from icprobe.scores import run
from icprobe.scores.experiment import Experiment
from icprobe.scores.method import Examples, Method, Output, setting

if TYPE_CHECKING:
    from icprobe.methods.gradient.dot import GradientDot
    from icprobe.models import LM

PRODUCT = "nats per unit of learning rate; positive = helps"
COSINE = "cosine of the gradients, without unit; positive = helps"


@dataclass(frozen=True)
class GradientProducts(Method):
    """Gradient dot products and cosines, from one pass, and what parts of the layers contribute.

    Attributes:
        layers: A regular expression, see `layers.linear_layers`.
        loss_on: Of the training examples: "completion", or "text" to train on the prompt, too.
        parts: By name, a regular expression that chooses some of the layers (such as
            `layers.parts`); each part's products are an output of this name.
        memory: GiB of factors, see `dot.GradientDot`; with Ray, of each worker.
    """

    name = "gradient_dot"
    unit = PRODUCT
    notebook = "02"
    block_size: ClassVar = {"cpu": 64, "cuda": 256}  # on a GPU, enough to fill its passes

    layers: str = ""
    loss_on: str = "completion"
    parts: Mapping[str, str] = setting(())
    memory: float | None = setting()

    @property
    def outputs(self) -> dict[str, Output]:
        units = {"gradient_dot": PRODUCT, "gradient_cosine": COSINE}
        outputs = {name: Output(name, self.options, unit) for name, unit in units.items()}
        for name, layers in dict(self.parts).items():
            options = {**self.options, "part": {"name": name, "layers": layers}}
            outputs[name] = Output("gradient_dot", options, PRODUCT)
        return outputs

    @property
    def worker_gib(self) -> float:
        return gradient.dot.MEMORY if self.memory is None else self.memory

    def only(self, names: Sequence[str]) -> GradientProducts:
        parts = {name: part for name, part in dict(self.parts).items() if name in names}
        return replace(self, parts=parts)

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        chosen = gradient.linear_layers(lm, self.layers)
        for part in dict(self.parts).values():
            if not any(re.search(part, name) for name in chosen):
                raise ValueError(
                    f"no layer among {self.layers or 'all'!r} matches the part {part!r}"
                )

    def prepare(self, lm: LM, queries: Examples, pool: None) -> GradientDot:
        return gradient.GradientDot(lm, queries.tokens, self.layers, self.memory)

    def score(self, prepared: GradientDot, train: Examples) -> dict[str, np.ndarray]:
        parts = list(dict(self.parts).values())
        found = prepared.products(train.tokens, self.loss_on, parts)
        return dict(zip(self.outputs, found, strict=True))


def load_parts(experiment: Experiment, method: GradientProducts) -> dict[str, np.ndarray]:
    """Return the finished products of all parts of layers, by name: float32 [N, M] each.

    Raises:
        ValueError: If two different parts have the same name.
    """
    found = {}
    for options, scores in run.variants(experiment, method.outputs["gradient_dot"]):
        part = options.pop("part", None)
        if part and options == method.options:
            if part["name"] in found:
                raise ValueError(f"two parts {part['name']!r} in {experiment.scores_dir}")
            found[part["name"]] = scores
    return dict(sorted(found.items()))
