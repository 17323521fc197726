"""Tasks, pairs, and attribution problems: where they come from, and how they shift."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
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
OUTLIER = 3.5  # distance that an outlier moves, in standard deviations of the task's labels


@validated(frozen=True, kw_only=True)
class Prior:
    """The distribution of tasks and pairs that a network is trained on and the Bayes learner knows.

    Attributes:
        dimension: D.
        noise: Standard deviation of labels around w . x.
        mean: Mean of every coordinate of w.
        spread: Standard deviation of every coordinate of w.
        variances: Variances of the coordinates of x, all 1 by default. (Rotated covariates would
            change nothing, since tasks have no direction of their own but for the mean.)

    Raises:
        ValueError: If a field is out of range; names it.
    """

    dimension: int = Field(5, ge=1, strict=True)
    noise: Positive = 0.5
    mean: FiniteFloat = 0.0
    spread: Positive = 1.0
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

    Attributes:
        cosine: Cosine of the examples' task with the queries', as deviations from the prior mean,
            which have equal length. 1 is the same task, 0 an unrelated one, -1 the opposite one.
        scale: Factor of the examples' covariates.
        offset: Distance of mean covariates from zero, along one random direction: the examples' on
            one side, the queries' on the other, so that they are twice this apart.
        degrees: Examples and queries lie in two planes with this angle in every direction (below
            90, where no example says anything of any query); by default they fill the space.
            Needs four dimensions.
        far: Factor of the prior mean for all tasks drawn; -1 puts them on its other side. Without
            a prior mean it has no effect.
        corruption: What happens to the labels of a fraction of the examples: "flip" changes the
            sign, "random" is the label of another draw, "outlier" moves it far up or down.
        share: This fraction.

    Raises:
        ValueError: If a field is out of range; names it.
    """

    cosine: float = Field(1.0, ge=-1, le=1)
    scale: Positive = 1.0
    offset: FiniteFloat = 0.0
    degrees: Annotated[float, Field(ge=0, lt=90)] | None = None
    far: FiniteFloat = 1.0
    corruption: Corruption | None = None
    share: float = Field(0.2, gt=0, lt=1)


@dataclass(frozen=True)
class Problems:
    """B attribution problems: N examples that may help a learner on M queries.

    Attributes:
        x, y: Training examples [B, N, D], [B, N].
        queries, answers: [B, M, D], [B, M].
        base_x, base_y: C contexts of up to K pairs that stand before an example, drawn like the
            clean training examples: [B, C, K, D], [B, C, K].
        corrupted: Which labels are corrupted: [B, N] bool.
        tasks, query_tasks: The tasks behind the examples and the queries: [B, D] each.
    """

    x: Tensor
    y: Tensor
    queries: Tensor
    answers: Tensor
    base_x: Tensor
    base_y: Tensor
    corrupted: Tensor
    tasks: Tensor = field(repr=False)
    query_tasks: Tensor = field(repr=False)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(B, N, M)."""
        return (*self.y.shape, self.answers.shape[1])

    def base_contexts(self, k: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the first k pairs of each context: x [B, k, D], y [B, k].

        Without pairs (k = 0) all contexts are the same, and there is one.

        Raises:
            ValueError: If contexts are shorter.
        """
        C, K = self.base_y.shape[1:]
        if not 0 <= k <= K:
            raise ValueError(f"k is {k!r}, expected 0 to {K}, the pairs that contexts have")
        for c in range(C if k else 1):
            yield self.base_x[:, c, :k], self.base_y[:, c, :k]

    def task(self, b: int) -> "Problems":
        """Return the problem of one task, as the only one (B = 1)."""
        return Problems(**{each.name: getattr(self, each.name)[b : b + 1] for each in fields(self)})


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
    """Draw attribution problems.

    Args:
        prior: Of the tasks.
        rng: The source of all randomness. Every part has a stream of its own, so equal generators
            give the same tasks, noise and directions under any shift: conditions are paired.
        B: Problems, each of a task of its own.
        N: Training examples of each.
        M: Queries of each.
        shift: How examples and queries differ; not at all by default.
        K: Most pairs of a base context.
        C: Base contexts.

    Raises:
        ValueError: If planes or a cosine need more dimensions, or all or no labels are corrupted.
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
    y, corrupted = _corrupted(streams[5], clean, shift)
    return Problems(
        x=x,
        y=y,
        queries=queries,
        answers=answers,
        base_x=base_x.reshape(B, C, K, D),
        base_y=base_y.reshape(B, C, K),
        corrupted=corrupted,
        tasks=tasks,
        query_tasks=query_tasks,
    )


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


def _corrupted(rng: np.random.Generator, y: Tensor, shift: Shift) -> tuple[Tensor, Tensor]:
    """Return labels [B, N], and which of them are corrupted."""
    B, N = y.shape
    hit = torch.zeros(B, N, dtype=torch.bool)
    if shift.corruption is None:
        return y, hit
    count = round(shift.share * N)
    if not 0 < count < N:
        raise ValueError(f"share is {shift.share!r}, which makes {count} of {N} examples")
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(N), (B, 1)), axis=1))
    hit.scatter_(1, order[:, :count], value=True)
    sign = torch.from_numpy(rng.choice([-1.0, 1.0], size=(B, N)))
    spread = y.std(dim=1, keepdim=True)
    random = spread * _normal(rng, B, N)
    changed = {"flip": -y, "random": random, "outlier": y + OUTLIER * spread * sign}
    return torch.where(hit, changed[shift.corruption], y), hit
