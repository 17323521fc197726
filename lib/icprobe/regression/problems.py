"""Tasks, pairs, and attribution problems: where they come from, and how they shift."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal, get_args

import numpy as np
import torch
from pydantic import Field, FiniteFloat
from pydantic.dataclasses import dataclass as validated
from torch import Tensor

Positive = Annotated[FiniteFloat, Field(gt=0)]

# flip: the label's sign changes; random: the label of another draw, without any task;
# outlier: the label is moved far up or down
Corruption = Literal["flip", "random", "outlier"]
CORRUPTIONS = get_args(Corruption)
CORRUPTED = 0.2  # fraction of the examples
OUTLIER = 3.5  # distance that an outlier moves, in standard deviations of the task's labels


@validated(frozen=True, kw_only=True)
class Prior:
    """The distribution of tasks and pairs that a network is trained on and the Bayes learner knows.

    ValueError names a field that is out of range.
    """

    dimension: int = Field(5, ge=1, strict=True)
    noise: Positive = 0.5  # standard deviation of labels around w . x
    mean: FiniteFloat = 0.0  # of every coordinate of w
    spread: Positive = 1.0  # standard deviation of every coordinate of w
    # of the coordinates of x, all 1 by default; rotated covariates would change nothing
    variances: tuple[Positive, ...] = ()

    def __post_init__(self):
        if self.variances and len(self.variances) != self.dimension:
            raise ValueError(
                f"variances has {len(self.variances)} numbers, expected {self.dimension} or none"
            )

    @property
    def penalty(self) -> float:
        """The Bayes learner's ridge penalty: variance of the noise over that of tasks."""
        return (self.noise / self.spread) ** 2

    @property
    def centre(self) -> Tensor:
        """The mean task [D]."""
        return torch.full((self.dimension,), self.mean, dtype=torch.float64)

    def tasks(self, rng: np.random.Generator, B: int) -> Tensor:
        """Draw tasks [B, D]."""
        return self.centre + self.spread * _normal(rng, B, self.dimension)

    def covariates(self, rng: np.random.Generator, *shape: int) -> Tensor:
        """Draw covariates [*shape, D]."""
        x = _normal(rng, *shape, self.dimension)
        return x * torch.tensor(self.variances, dtype=x.dtype).sqrt() if self.variances else x

    def labels(self, rng: np.random.Generator, x: Tensor, tasks: Tensor) -> Tensor:
        """Draw labels [B, n] of covariates [B, n, D] by tasks [B, D]."""
        return linear(x, tasks) + self.noise * _normal(rng, *x.shape[:-1])

    def prompts(self, rng: np.random.Generator, B: int, K: int) -> tuple[Tensor, Tensor]:
        """Draw sequences of K pairs, each of a task of its own: x [B, K, D], y [B, K]."""
        x = self.covariates(rng, B, K)
        return x, self.labels(rng, x, self.tasks(rng, B))


@validated(frozen=True, kw_only=True)
class Shift:
    """How far training examples are from the queries, and both from the prior.

    ValueError names a field that is out of range.
    """

    # of the examples' task with the queries', as deviations from the prior mean of equal length
    cosine: float = Field(1.0, ge=-1, le=1)
    scale: Positive = 1.0  # factor of the examples' covariates
    # distance of mean covariates from 0: the examples' on one side, the queries' on the other
    offset: FiniteFloat = 0.0
    # between two planes in which examples and queries lie, in every direction (at 90 no example
    # would say anything of any query); by default they fill the space
    degrees: Annotated[float, Field(ge=0, lt=90)] | None = None
    far: FiniteFloat = 1.0  # factor of the prior mean for all tasks; -1 is its other side
    corruption: Corruption | None = None  # of the labels of a fraction of the examples


@dataclass(frozen=True)
class Problems:
    """B attribution problems: N examples that may help a learner on M queries.

    C contexts of up to K pairs, drawn like the clean examples, stand before an example.
    """

    x: Tensor  # [B, N, D]
    y: Tensor  # [B, N]
    queries: Tensor  # [B, M, D]
    answers: Tensor  # [B, M]
    base_x: Tensor  # [B, C, K, D]
    base_y: Tensor  # [B, C, K]
    corrupted: Tensor  # which labels are: [B, N] bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, N, M)."""
        return (*self.y.shape, self.answers.shape[1])

    def base_contexts(self, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the first k pairs of each context: x [B, k, D], y [B, k].

        Without pairs (k = 0) all contexts are the same, and there is one. Raises ValueError if
        contexts have fewer than k pairs.
        """
        C, K = self.base_y.shape[1:]
        if not 0 <= k <= K:
            raise ValueError(f"k is {k!r}, expected 0 to {K}, the pairs that contexts have")
        for c in range(C if k else 1):
            yield self.base_x[:, c, :k], self.base_y[:, c, :k]

    def task(self, b: int) -> "Problems":
        """Return the problem of one task, as the only one (B = 1)."""
        return Problems(**{name: part[b : b + 1] for name, part in vars(self).items()})


def draw(
    prior: Prior,
    rng: np.random.Generator,
    B: int,
    N: int,
    M: int,
    shift: Shift | None = None,
    K: int = 0,
    C: int = 1,
) -> Problems:
    """Draw B attribution problems [N, M], each of a task of its own, with C contexts of K pairs.

    Every part has a stream of its own, so equal generators give the same tasks, noise and
    directions under any shift: conditions are paired.

    Raises:
        ValueError: Planes or a cosine need more dimensions, or no labels are corrupted.
    """
    shift = shift or Shift()
    D = prior.dimension
    streams = rng.spawn(6)
    query_tasks = prior.tasks(streams[0], B)
    deviations = _at_cosine(query_tasks - prior.centre, shift.cosine, _normal(streams[1], B, D))
    query_tasks = query_tasks + (shift.far - 1) * prior.centre
    tasks = shift.far * prior.centre + deviations
    planes = _planes(streams[2], B, D, shift.degrees)
    direction = _unit(_normal(streams[3], B, D))[:, None]
    examples, of_queries, of_base = streams[4].spawn(3)

    def pairs(stream, n: int, w: Tensor, plane: Tensor | None, scale: float, offset: float):
        x = prior.covariates(stream, B, n)
        if plane is not None:
            x = x[..., :2] @ plane
        x = scale * x + offset * direction
        return x, prior.labels(stream, x, w)

    here = tasks, planes[0], shift.scale, shift.offset
    x, clean = pairs(examples, N, *here)
    queries, answers = pairs(of_queries, M, query_tasks, planes[1], 1.0, -shift.offset)
    base_x, base_y = pairs(of_base, C * K, *here)
    y, corrupted = _corrupted(streams[5], clean, shift.corruption)
    base_x, base_y = base_x.reshape(B, C, K, D), base_y.reshape(B, C, K)
    return Problems(x, y, queries, answers, base_x, base_y, corrupted)


def linear(x: Tensor, w: Tensor) -> Tensor:
    """Return w . x [B, n] from x [B, n, D] and w [B, D]."""
    return (x @ w[..., None])[..., 0]


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape))


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _at_cosine(vectors: Tensor, cosine: float, others: Tensor) -> Tensor:
    """Return vectors [B, D] as long as these, with this cosine, towards the others' side."""
    if abs(cosine) == 1:  # no rounding, and no other direction where there is but one
        return cosine * vectors
    if vectors.shape[-1] == 1:
        raise ValueError(f"cosine is {cosine}, which needs two dimensions, the prior has 1")
    unit = _unit(vectors)
    across = _unit(others - (others * unit).sum(-1, keepdim=True) * unit)
    rotated = cosine * unit + np.sqrt(1 - cosine**2) * across
    return rotated * vectors.norm(dim=-1, keepdim=True)


def _planes(rng: np.random.Generator, B: int, D: int, degrees: float | None) -> tuple:
    """Return bases [B, 2, D] of random planes and of others at this angle to them."""
    if degrees is None:
        return None, None
    if D < 4:
        raise ValueError(f"planes at an angle need four dimensions, the prior has {D}")
    frame = torch.linalg.qr(_normal(rng, B, D, 4))[0].mT
    angle = np.deg2rad(degrees)
    return frame[:, :2], np.cos(angle) * frame[:, :2] + np.sin(angle) * frame[:, 2:]


def _corrupted(
    rng: np.random.Generator, y: Tensor, corruption: Corruption | None
) -> tuple[Tensor, Tensor]:
    """Return labels [B, N], and which of them are corrupted."""
    B, N = y.shape
    hit = torch.zeros(B, N, dtype=torch.bool)
    if corruption is None:
        return y, hit
    count = round(CORRUPTED * N)
    if not count:
        raise ValueError(f"{N} examples are too few to corrupt the labels of {CORRUPTED:.0%}")
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(N), (B, 1)), axis=1))
    hit.scatter_(1, order[:, :count], value=True)
    sign = torch.from_numpy(rng.choice([-1.0, 1.0], size=(B, N)))
    spread = y.std(dim=1, keepdim=True)
    random = spread * _normal(rng, B, N)
    changed = {"flip": -y, "random": random, "outlier": y + OUTLIER * spread * sign}
    return torch.where(hit, changed[corruption], y), hit
