"""Gradient methods as `scores.score` and `scores.load` take them; loading needs no torch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from icprobe.scores import run
from icprobe.scores.experiment import Experiment
from icprobe.scores.method import Examples, Method, Output, setting

if TYPE_CHECKING:
    from icprobe.methods.gradient.dot import GradientDot
    from icprobe.methods.gradient.ekfac import EKFAC
    from icprobe.models import LM

PRODUCT = "nats per unit of learning rate; positive = helps"
COSINE = "cosine of the gradients, without unit; positive = helps"

FITTED = 1024  # examples that are enough for EK-FAC's curvature


@dataclass(frozen=True)
class GradientProducts(Method):
    """Gradient dot products and cosines, from one pass, and what parts of the layers contribute.

    Attributes:
        layers: See `layers.linear_layers`.
        loss_on: See `dot.GradientDot.products`.
        parts: By name, a regular expression that chooses some of the layers (such as
            `layers.parts`); each part's products are an output of this name.
        memory: See `dot.GradientDot`; with Ray, of each worker.
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
        """gradient_dot, gradient_cosine, and the parts by name."""
        units = {"gradient_dot": PRODUCT, "gradient_cosine": COSINE}
        parts = {
            name: {**self.options, "part": {"name": name, "layers": part}}
            for name, part in dict(self.parts).items()
        }
        return {
            **{name: Output(name, self.options, unit) for name, unit in units.items()},
            **{name: Output("gradient_dot", options, PRODUCT) for name, options in parts.items()},
        }

    @property
    def worker_gib(self) -> float:
        """Gradient factors that a worker holds."""
        from icprobe.methods.gradient.dot import MEMORY

        return MEMORY if self.memory is None else self.memory

    def only(self, names: Sequence[str]) -> GradientProducts:
        """Return it without parts that are not wanted."""
        parts = {name: part for name, part in dict(self.parts).items() if name in names}
        return replace(self, parts=parts)

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError if no layer matches, or none of a part."""
        from icprobe.methods.gradient.layers import linear_layers

        chosen = linear_layers(lm, self.layers)
        for part in dict(self.parts).values():
            if not any(re.search(part, name) for name in chosen):
                raise ValueError(
                    f"no layer among {self.layers or 'all'!r} matches the part {part!r}"
                )

    def prepare(self, lm: LM, queries: Examples, pool: None) -> GradientDot:
        """Compute the queries' gradients."""
        from icprobe.methods.gradient.dot import GradientDot

        return GradientDot(lm, queries.tokens, self.layers, memory=self.memory)

    def score(self, prepared: GradientDot, train: Examples) -> dict[str, np.ndarray]:
        """Return products, cosines and the parts' products [n, M]."""
        parts = dict(self.parts).values()
        found = prepared.products(train.tokens, self.loss_on, parts=list(parts))
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


@dataclass(frozen=True)
class ProjectedProducts(Method):
    """Products of gradients that are projected to several sizes, see `projected`.

    Attributes:
        sizes: Of the projections; each has an output "projected <size>".
        layers: See `layers.linear_layers`.
        loss_on: See `dot.GradientDot.products`.
        seed: See `projected.projected_gradients`.
    """

    name = "projected"
    unit = PRODUCT
    notebook = "02"
    block_size = 8

    sizes: Sequence[int] = setting((16,))
    layers: str = ""
    loss_on: str = "completion"
    seed: int = 0

    @property
    def outputs(self) -> dict[str, Output]:
        """An output for each size."""
        return {
            f"{self.name} {size}": Output(self.name, {**self.options, "size": size}, self.unit)
            for size in self.sizes
        }

    def only(self, names: Sequence[str]) -> ProjectedProducts:
        """Return it with fewer sizes."""
        sizes = [size for size in self.sizes if f"{self.name} {size}" in names]
        return replace(self, sizes=tuple(sizes))

    def prepare(self, lm: LM, queries: Examples, pool: None) -> tuple[LM, dict[int, np.ndarray]]:
        """Project the queries' gradients."""
        from icprobe.methods.gradient import projected

        found = projected.of_sizes(lm, queries.tokens, self.sizes, self.seed, self.layers)
        return lm, dict(zip(self.sizes, found, strict=True))

    def score(
        self, prepared: tuple[LM, dict[int, np.ndarray]], train: Examples
    ) -> dict[str, np.ndarray]:
        """Return the products [n, M] of each size."""
        from icprobe.methods.gradient import projected

        lm, queries = prepared
        found = projected.of_sizes(
            lm, train.tokens, self.sizes, self.seed, self.layers, self.loss_on
        )
        sizes = zip(self.sizes, found, strict=True)
        return {f"{self.name} {size}": one @ queries[size].T for size, one in sizes}


@dataclass(frozen=True)
class ClampedLog(Method):
    """The published clamp-and-log estimator, see `clamped_log`; slow.

    Attributes:
        layers: See `layers.linear_layers`.
        loss_on: Of the training examples: "text" (as published) or "completion".
    """

    name = "clamped_log"
    unit = "no unit; positive = helps"
    notebook = "02"
    block_size = 12
    local_only = True

    layers: str = ""
    loss_on: str = "text"

    def score(self, prepared: tuple[LM, Examples], train: Examples) -> np.ndarray:
        """Return the estimates [n, M]."""
        from icprobe.methods.gradient.clamped_log import clamped_log

        lm, queries = prepared
        return clamped_log(lm, train.tokens, queries.tokens, self.layers, self.loss_on)


@dataclass(frozen=True)
class EKFACInfluence(Method):
    """Influence functions with EK-FAC curvature over the last transformer blocks, see `ekfac`.

    The curvature is fitted once for all blocks of training examples: to the pool, or to one to two
    thousand of it.

    Attributes:
        blocks: How many of the last transformer blocks, see `layers.last_blocks`.
        layers: Which of their layers.
        loss_on: See `ekfac.EKFAC`.
        seed: See `ekfac.EKFAC`.
    """

    name = "ekfac"
    unit = "nats; positive = helps"
    notebook = "02"
    needs_pool = True
    local_only = True

    blocks: int
    layers: str = ""
    loss_on: str = "completion"
    seed: int = 0

    def check(self, lm: LM, pool: Examples, queries: Examples) -> None:
        """Raise ValueError if there are not so many blocks, or no layer matches."""
        from icprobe.methods.gradient.layers import last_blocks

        last_blocks(lm, self.blocks, self.layers)

    def prepare(self, lm: LM, queries: Examples, pool: Examples) -> EKFAC:
        """Fit the curvature."""
        from icprobe.methods.gradient.ekfac import EKFAC
        from icprobe.methods.gradient.layers import last_blocks

        chosen = last_blocks(lm, self.blocks, self.layers)
        fit_on = pool.tokens[:: max(1, len(pool) // FITTED)]
        return EKFAC(lm, queries.tokens, fit_on, chosen, seed=self.seed, loss_on=self.loss_on)

    def score(self, prepared: EKFAC, train: Examples) -> np.ndarray:
        """Return the influences [n, M]."""
        return prepared.scores(train.tokens)
