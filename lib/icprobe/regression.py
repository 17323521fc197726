"""Synthetic linear regression: what a demonstration and a training step do, both in closed form.

A task is a vector w; its pairs are x with label y = w . x + noise. A learner reads a context S of
pairs and predicts the labels of queries, whose loss is half the squared error,

    L_q = (y_q - prediction_q)^2 / 2,

in nats up to a constant if labels had unit variance. As with language models, positive helps:

    gain_iq = L_q(S) - L_q(S, i)             in-context probing: example i joins the context
    T_iq    = <grad L_i(w), grad L_q(w)>     TracIn, = r_i r_q x_i . x_q with residuals r at w

Letters: B tasks, N training examples, M queries, K pairs of a context, D dimensions. Everything is
batched over tasks, in float64 but for what a network computes.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

# takes contexts x [R, K, D] and y [R, K] and queries [R, M, D], returns predictions [R, M]
Learner = Callable[[Tensor, Tensor, Tensor], Tensor]

CORRUPTIONS = {
    "flip": "the label's sign is turned",
    "random": "the label is that of another draw, without any task",
    "outlier": "the label is moved far up or down",
}
OUTLIER = 3.5  # how far, in standard deviations of the task's labels
ROWS = 2**22  # numbers of queries that are held at once, for contexts by queries by dimensions


# ------------------------------------------------------------------------------ tasks and pairs


@dataclass(frozen=True)
class Prior:
    """Where tasks and pairs come from: what a network is trained on, and the Bayes learner knows.

    Attributes:
        dimension: D.
        noise: Standard deviation of labels around w . x.
        mean: Of every coordinate of w.
        spread: Standard deviation of every coordinate of w.
        variances: Of the coordinates of x, one each; all 1 by default. (Turned covariates would
            change nothing: tasks have no direction of their own, but for the mean.)

    Raises:
        ValueError: If a field is out of range; names it.
    """

    dimension: int = 5
    noise: float = 0.5
    mean: float = 0.0
    spread: float = 1.0
    variances: tuple[float, ...] = ()

    def __post_init__(self):
        if type(self.dimension) is not int or self.dimension < 1:
            raise ValueError(f"dimension is {self.dimension!r}, expected a whole number from 1")
        for name in ("noise", "spread"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} is {getattr(self, name)!r}, expected a positive number")
        if self.variances and len(self.variances) != self.dimension:
            raise ValueError(
                f"variances are {len(self.variances)} numbers, expected {self.dimension} or none"
            )
        if any(not variance > 0 for variance in self.variances):
            raise ValueError(f"variances are {self.variances}, expected positive numbers")

    @property
    def penalty(self) -> float:
        """The Bayes learner's ridge penalty: variance of the noise over that of tasks."""
        return (self.noise / self.spread) ** 2

    @property
    def centre(self) -> Tensor:
        """The mean task [D]."""
        return torch.full((self.dimension,), float(self.mean), dtype=torch.float64)

    def tasks(self, rng: np.random.Generator, B: int) -> Tensor:
        """Draw tasks [B, D]."""
        return self.centre + self.spread * _normal(rng, B, self.dimension)

    def covariates(self, rng: np.random.Generator, *shape: int) -> Tensor:
        """Draw covariates [*shape, D]."""
        x = _normal(rng, *shape, self.dimension)
        return x * torch.tensor(self.variances, dtype=x.dtype).sqrt() if self.variances else x

    def labels(self, rng: np.random.Generator, x: Tensor, tasks: Tensor) -> Tensor:
        """Draw labels [B, n] of covariates [B, n, D] by tasks [B, D]."""
        return _dot(x, tasks) + self.noise * _normal(rng, *x.shape[:-1])

    def prompts(self, rng: np.random.Generator, B: int, K: int) -> tuple[Tensor, Tensor]:
        """Draw sequences of K pairs, each of a task of its own: x [B, K, D], y [B, K]."""
        x = self.covariates(rng, B, K)
        return x, self.labels(rng, x, self.tasks(rng, B))


@dataclass(frozen=True)
class Shift:
    """How far training examples are from the queries, and both from the prior.

    Attributes:
        cosine: Of the examples' task with the queries', as deviations from the prior mean, which
            have one length. 1 is the same task, 0 an unrelated one, -1 the opposite one.
        scale: Of the examples' covariates.
        offset: How far from zero mean covariates are, along one random direction: the examples' on
            one side, the queries' on the other, so that they are twice this apart.
        degrees: Examples and queries lie in two planes with this angle in every direction (below
            90, where no example says anything of any query); by default they fill the space.
            Needs four dimensions.
        far: What the prior mean is multiplied by for all tasks drawn; -1 puts them on its other
            side. Without a prior mean it has no effect.
        corruption: What happens to the labels of a share of the examples, see `CORRUPTIONS`.
        share: This share.

    Raises:
        ValueError: If a field is out of range; names it.
    """

    cosine: float = 1.0
    scale: float = 1.0
    offset: float = 0.0
    degrees: float | None = None
    far: float = 1.0
    corruption: str = ""
    share: float = 0.2

    def __post_init__(self):
        if not -1 <= self.cosine <= 1:
            raise ValueError(f"cosine is {self.cosine!r}, expected -1 to 1")
        if not self.scale > 0:
            raise ValueError(f"scale is {self.scale!r}, expected a positive number")
        if self.degrees is not None and not 0 <= self.degrees < 90:
            raise ValueError(f"degrees is {self.degrees!r}, expected 0 to below 90")
        if self.corruption and self.corruption not in CORRUPTIONS:
            raise ValueError(
                f"corruption is {self.corruption!r}, expected one of {list(CORRUPTIONS)} or ''"
            )
        if not 0 < self.share < 1:
            raise ValueError(f"share is {self.share!r}, expected a share between 0 and 1")


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

    @property
    def asked(self) -> tuple[Tensor, Tensor]:
        """Queries and answers."""
        return self.queries, self.answers

    def bases(self, k: int) -> Iterator[tuple[Tensor, Tensor]]:
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

    def select(self, rows: slice) -> "Problems":
        """Return some of the problems."""
        return Problems(**{name: getattr(self, name)[rows] for name in self.__dataclass_fields__})


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
        ValueError: If planes, or a cosine, need more dimensions than there are, or a share of N
            examples to corrupt is none or all of them.
    """
    shift = shift or Shift()
    D = prior.dimension
    streams = rng.spawn(6)
    query_tasks = prior.tasks(streams[0], B)
    deviations = _at_cosine(query_tasks - prior.centre, shift.cosine, _normal(streams[1], B, D))
    query_tasks = query_tasks + (shift.far - 1) * prior.centre
    tasks = shift.far * prior.centre + deviations
    turn, turned = _planes(streams[2], B, D, shift.degrees)
    direction = _unit(_normal(streams[3], B, D))[:, None]
    counts = {"pool": N, "queries": M, "base": C * K}
    drawn = {}
    for (name, n), stream in zip(counts.items(), streams[4].spawn(3), strict=True):
        asked = name == "queries"
        x = prior.covariates(stream, B, n)
        if shift.degrees is not None:
            x = x[..., :2] @ (turned if asked else turn)
        x = (x if asked else shift.scale * x) + (-1 if asked else 1) * shift.offset * direction
        drawn[name] = x, prior.labels(stream, x, query_tasks if asked else tasks)
    x, clean = drawn["pool"]
    y, corrupted = _corrupted(streams[5], prior, x, clean, shift)
    base_x, base_y = drawn["base"]
    return Problems(
        x=x,
        y=y,
        queries=drawn["queries"][0],
        answers=drawn["queries"][1],
        base_x=base_x.reshape(B, C, K, D),
        base_y=base_y.reshape(B, C, K),
        corrupted=corrupted,
        tasks=tasks,
        query_tasks=query_tasks,
    )


def _normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.standard_normal(shape))


def _dot(x: Tensor, w: Tensor) -> Tensor:
    """Return [B, n] from x [B, n, D] and w [B, D]."""
    return (x @ w[..., None])[..., 0]


def _unit(vectors: Tensor) -> Tensor:
    return vectors / vectors.norm(dim=-1, keepdim=True)


def _at_cosine(vectors: Tensor, cosine: float, others: Tensor) -> Tensor:
    """Return vectors [B, D] as long as these, with this cosine, towards the others' side."""
    unit = _unit(vectors)
    across = _unit(others - (others * unit).sum(-1, keepdim=True) * unit)
    if vectors.shape[-1] == 1 and abs(cosine) < 1:
        raise ValueError("a cosine between -1 and 1 needs two dimensions")
    if abs(cosine) == 1:  # no rounding, and no other direction where there is but one
        return cosine * vectors
    turned = cosine * unit + np.sqrt(1 - cosine**2) * across
    return turned * vectors.norm(dim=-1, keepdim=True)


def _planes(rng: np.random.Generator, B: int, D: int, degrees: float | None) -> tuple:
    """Return bases [B, 2, D] of random planes and of others at this angle to them."""
    if degrees is None:
        return None, None
    if D < 4:
        raise ValueError(f"planes at an angle need four dimensions, the prior has {D}")
    frame = torch.linalg.qr(_normal(rng, B, D, 4))[0].mT
    angle = np.deg2rad(degrees)
    return frame[:, :2], np.cos(angle) * frame[:, :2] + np.sin(angle) * frame[:, 2:]


def _corrupted(rng, prior: Prior, x: Tensor, y: Tensor, shift: Shift) -> tuple[Tensor, Tensor]:
    """Return labels [B, N], and which of them are corrupted."""
    B, N = y.shape
    hit = torch.zeros(B, N, dtype=torch.bool)
    if not shift.corruption:
        return y, hit
    count = round(shift.share * N)
    if not 0 < count < N:
        raise ValueError(f"share is {shift.share!r}, which makes {count} of {N} examples")
    order = torch.from_numpy(rng.permuted(np.tile(np.arange(N), (B, 1)), axis=1))
    hit.scatter_(1, order[:, :count], value=True)
    sign = torch.from_numpy(rng.choice([-1.0, 1.0], size=(B, N)))
    spread = y.std(dim=1, keepdim=True)
    other = spread * _normal(rng, B, N)
    changed = {"flip": -y, "random": other, "outlier": y + OUTLIER * spread * sign}[
        shift.corruption
    ]
    return torch.where(hit, changed, y), hit


# ------------------------------------------------------------------------------------- learners


class Linear(ABC):
    """A learner that predicts w . x, with w from the context."""

    @abstractmethod
    def weights(self, x: Tensor, y: Tensor) -> Tensor:
        """Return w [R, D] after contexts x [R, K, D], y [R, K]."""

    def __call__(self, x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        """See `Learner`."""
        return _dot(queries, self.weights(x, y))


@dataclass(frozen=True)
class PriorMean(Linear):
    """Predicts with the prior mean, which is zero by default, whatever the context says."""

    prior: Prior

    def weights(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Linear`."""
        return self.prior.centre.to(x).expand(len(x), -1)


class LeastSquares(Linear):
    """Ordinary least squares; of all that fit, the solution of the smallest norm."""

    def weights(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Linear`."""
        return (torch.linalg.pinv(x) @ y[..., None])[..., 0]


@dataclass(frozen=True)
class Ridge(Linear):
    """The Bayes learner: the posterior mean of w, which is ridge regression around the prior mean.

    Its gain is exact add-one retraining. On tasks of another prior it is no longer the best.
    """

    prior: Prior

    def weights(self, x: Tensor, y: Tensor) -> Tensor:
        """See `Linear`."""
        centre = self.prior.centre.to(x)
        right = (y - x @ centre)[..., None]
        found = torch.linalg.solve(hessian(self.prior, x), x.mT @ right)
        return centre + found[..., 0]


@dataclass(frozen=True)
class LinearAttention:
    """One layer of linear self-attention, its weights set by hand to take one gradient step.

    Tokens are (x_j, y_j), the query's is (x_q, -w0 . x_q). Keys and queries are the covariates,
    values (0, w0 . x_j - y_j), the output is scaled by the rate (von Oswald et al. 2023,
    Transformers learn in-context by gradient descent, proposition 1). What is left in the query's
    last slot is -w1 . x_q with w1 = w0 + rate * sum_j r_j x_j, one step on sum_j r_j^2 / 2.

    Attributes:
        rate: Of the step.
        start: w0 [D].
    """

    rate: float
    start: Tensor

    def __call__(self, x: Tensor, y: Tensor, queries: Tensor) -> Tensor:
        """See `Learner`."""
        D = x.shape[-1]
        start = self.start.to(x)
        key = torch.zeros(D + 1, D + 1).to(x)
        key[:D, :D] = torch.eye(D)
        value = torch.zeros(D + 1, D + 1).to(x)
        value[D, :D], value[D, D] = start, -1
        tokens = torch.cat([x, y[..., None]], dim=-1)
        asked = torch.cat([queries, -(queries @ start)[..., None]], dim=-1)
        scores = (asked @ key.T) @ (tokens @ key.T).mT
        asked = asked + self.rate * scores @ (tokens @ value.T)
        return -asked[..., D]


# ---------------------------------------------------------------------------- in-context probing


def losses(learner: Learner, x: Tensor, y: Tensor, queries: Tensor, answers: Tensor) -> Tensor:
    """Return the losses [R, M] of queries [R, M, D] after contexts x [R, K, D], y [R, K]."""
    return (answers - learner(x, y, queries)) ** 2 / 2


def gain(learner: Learner, problems: Problems, k: int = 0) -> np.ndarray:
    """Return how much each example lowers each query's loss when it joins a context of k pairs.

    The example stands last. With several base contexts, the mean over them; see `gain_and_share`.

    Args:
        learner: See `Learner`.
        problems: B problems.
        k: Pairs of each base context.

    Returns:
        [B, N, M], positive = helps.
    """
    return gain_and_share(learner, problems, k)[0]


def gain_and_share(
    learner: Learner, problems: Problems, k: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Return means over base contexts of gains, and of whether they are positive.

    The mean over queries of the latter is the published ICP score. Arguments are those of `gain`.

    Returns:
        [B, N, M] each.
    """
    B, N, M = problems.shape
    D = problems.x.shape[-1]
    together = max(1, ROWS // (M * D))  # contexts
    task = torch.arange(B).repeat_interleave(N)
    found = []
    for base_x, base_y in problems.bases(k):
        before = losses(learner, base_x, base_y, problems.queries, problems.answers)
        x = torch.cat([base_x[:, None].expand(-1, N, -1, -1), problems.x[:, :, None]], dim=2)
        y = torch.cat([base_y[:, None].expand(-1, N, -1), problems.y[:, :, None]], dim=2)
        x, y = x.reshape(B * N, k + 1, D), y.reshape(B * N, k + 1)
        after = torch.cat(
            [
                losses(learner, x[part], y[part], *(q[task[part]] for q in problems.asked))
                for part in torch.arange(B * N).split(together)
            ]
        )
        found.append(before[:, None] - after.reshape(B, N, M))
    gains = torch.stack(found)
    return gains.mean(0).numpy(), (gains > 0).double().mean(0).numpy()


# -------------------------------------------------------------------------------------- influence


def hessian(prior: Prior, x: Tensor) -> Tensor:
    """Return the Hessian [R, D, D] of ridge regression on covariates [R, K, D]."""
    return x.mT @ x + prior.penalty * torch.eye(x.shape[-1]).to(x)


def tracin(problems: Problems, w: Tensor, inverse: Tensor | None = None) -> np.ndarray:
    """Return gradient inner products at weights w: T_iq = r_i r_q x_i . x_q, [B, N, M].

    Args:
        problems: B problems.
        w: [B, D], where gradients are taken.
        inverse: [B, D, D], of a Hessian: with it influence functions, r_i r_q x_i . H^-1 x_q.
    """
    r = problems.y - _dot(problems.x, w)
    r_q = problems.answers - _dot(problems.queries, w)
    x = problems.x if inverse is None else problems.x @ inverse
    return (r[:, :, None] * r_q[:, None] * (x @ problems.queries.mT)).numpy()


def at_base(
    prior: Prior, problems: Problems, k: int = 0, preconditioned: bool = False
) -> np.ndarray:
    """Return TracIn at ridge regression's fit to the base contexts, the mean over them: [B, N, M].

    Without pairs (k = 0) that is the prior mean, the learner's zero-shot state.

    Args:
        prior: Its mean and penalty are the fit's.
        problems: B problems.
        k: Pairs of each base context.
        preconditioned: With the inverse of the fit's Hessian: an influence function.
    """
    found = []
    for x, y in problems.bases(k):
        inverse = torch.linalg.inv(hessian(prior, x)) if preconditioned else None
        found.append(tracin(problems, Ridge(prior).weights(x, y), inverse))
    return np.mean(found, axis=0)


def at_pool(prior: Prior, problems: Problems, preconditioned: bool = False) -> np.ndarray:
    """Return TracIn at ridge regression's fit to all training examples: [B, N, M].

    Arguments are those of `at_base`.
    """
    inverse = torch.linalg.inv(hessian(prior, problems.x)) if preconditioned else None
    return tracin(problems, Ridge(prior).weights(problems.x, problems.y), inverse)


def add_one(prior: Prior, problems: Problems, k: int = 0) -> np.ndarray:
    """Return by how much retraining with one more example lowers queries' losses: [B, N, M].

    Ridge regression on k pairs, and on these and the example, the mean over base contexts; by
    Sherman and Morrison, w changes by H^-1 x_i r_i / (1 + x_i . H^-1 x_i).
    """
    found = []
    for x, y in problems.bases(k):
        found.append(-_retrained(problems, Ridge(prior).weights(x, y), hessian(prior, x), 1))
    return np.mean(found, axis=0)


def leave_one_out(prior: Prior, problems: Problems) -> np.ndarray:
    """Return by how much retraining without an example raises queries' losses: [B, N, M].

    Ridge regression on all N examples, and on all but one; w changes by
    -H^-1 x_i r_i / (1 - x_i . H^-1 x_i).
    """
    x, y = problems.x, problems.y
    return _retrained(problems, Ridge(prior).weights(x, y), hessian(prior, x), -1)


def _retrained(problems: Problems, w: Tensor, hessian: Tensor, sign: int) -> np.ndarray:
    """Return how queries' losses change as w is fitted with (1) or without (-1) each example."""
    solved = torch.linalg.solve(hessian, problems.x.mT).mT
    leverage = (problems.x * solved).sum(-1)
    r = problems.y - _dot(problems.x, w)
    r_q = (problems.answers - _dot(problems.queries, w))[:, None]
    moved = (solved @ problems.queries.mT) * (sign * r / (1 + sign * leverage))[..., None]
    return (((r_q - moved) ** 2 - r_q**2) / 2).numpy()


def step_gain(problems: Problems, w: Tensor, rate: float) -> np.ndarray:
    """Return by how much one gradient step of this rate on an example lowers queries' losses.

    rate * T_iq - rate^2 / 2 * r_i^2 (x_i . x_q)^2: of second order, and exact.

    Args:
        problems: B problems.
        w: [B, D], where the step starts.
        rate: Of the step.

    Returns:
        [B, N, M].
    """
    r = (problems.y - _dot(problems.x, w)).numpy()
    second = (r[..., None] * (problems.x @ problems.queries.mT).numpy()) ** 2
    return rate * tracin(problems, w) - rate**2 / 2 * second


def moved_by_one_step(problems: Problems, k: int, attention: LinearAttention) -> Problems:
    """Return the problems as `LinearAttention` sees them after k base pairs (of one context).

    It takes all its steps from one start, so an example's residual stays that at the start, and the
    query's is that after the step on the base pairs: `step_gain` with these labels is its gain.
    """
    ((x, y),) = problems.bases(k)
    before = attention(x, y, problems.queries)
    shown = problems.queries @ attention.start.to(x)
    return replace(problems, answers=problems.answers - before + shown)
