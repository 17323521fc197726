"""What the synthetic notebook asks of `regression` and `regressor`: tables over many tasks.

Agreement is, as for language models, Spearman's correlation over the N examples of a task between
two methods' means over its M queries. Each task gives one; tables have their mean over B tasks,
with 95 % intervals of Student's t. Of several networks the mean is taken task by task, and the
standard deviation between networks stands beside it (network_sd): intervals are for new tasks, and
for these networks.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from scipy import stats
from sklearn.metrics import roc_auc_score

from icprobe import regression, statistics
from icprobe.regression import CORRUPTIONS, LinearAttention, Prior, Problems, Ridge, Shift
from icprobe.regressor import Recipe, Regressor, Trained, learner, own_gradients, step_seconds

# how far examples and queries are apart where claims look; others are held against the first
IN_DOMAIN = "in domain"
CONDITIONS = {
    IN_DOMAIN: Shift(),
    "unrelated task": Shift(cosine=0),
    "opposite task": Shift(cosine=-1),
    "covariates 3 times as wide": Shift(scale=3),
    "mean covariates 4 apart": Shift(offset=2),
}
FAR = {"tasks far from the prior": Shift(far=-1)}

GAIN, SHARE, BAYES, BAYES_SHARE = "gain", "ICP score", "gain of Bayes", "ICP score of Bayes"
TRACIN, ADD_ONE, LEAVE_ONE_OUT = "TracIn", "add-one, exact", "leave-one-out, exact"


@dataclass(frozen=True, kw_only=True)
class Study:
    """Networks, and the problems that they are asked about.

    Attributes:
        prior: Of the problems' tasks, and of those the networks were trained on.
        networks: Trained alike, but for the seed.
        B: Tasks of every table.
        N: Training examples of each.
        M: Queries of each.
        seed: Of the problems. All conditions have the same tasks, noise and directions.
    """

    prior: Prior
    networks: Sequence[Regressor]
    B: int = 20
    N: int = 200
    M: int = 100
    seed: int = 0

    def problems(self, shift: Shift | None = None, K: int = 0, C: int = 1) -> Problems:
        """Draw the problems; see `regression.draw`."""
        rng = np.random.default_rng(self.seed)
        return regression.draw(self.prior, rng, self.B, self.N, self.M, shift, K, C)

    def probed(self, problems: Problems, k: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return each network's gains, and whether they are positive: [networks, B, N, M] each."""
        found = [regression.gain_and_share(learner(net), problems, k) for net in self.networks]
        return tuple(map(np.stack, zip(*found, strict=True)))

    def bayes(self, problems: Problems, k: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Return the same of the Bayes learner: [1, B, N, M] each."""
        return tuple(x[None] for x in regression.gain_and_share(Ridge(self.prior), problems, k))

    def in_domain(self, bases: Sequence[tuple[int, int]]) -> pd.DataFrame:
        """Return the agreement of every form of probing with every form of influence.

        The network's own gradients are the first network's, held against its own gains, and are
        taken for single contexts only.

        Args:
            bases: Pairs k before the example (0 is one-shot), and the number of contexts over which
                probing and influence are averaged; see `regression.gain`.

        Returns:
            One row each: k, contexts, probing, influence, and `interval`'s columns.
        """
        rows = []
        for k, C in bases:
            problems = self.problems(K=k, C=C)
            gains, shares = self.probed(problems, k)
            bayes, bayes_shares = self.bayes(problems, k)
            probing = {GAIN: gains, SHARE: shares, BAYES: bayes, BAYES_SHARE: bayes_shares}
            base = self.prior, problems, k
            at_base = regression.at_base(*base)
            influence = {
                "TracIn at the zero-shot state": regression.at_base(self.prior, problems),
                "TracIn at the context's fit": at_base,
                "share of queries with this above 0": (at_base > 0).astype(float),
                "influence function at the context's fit": regression.at_base(*base, True),
                ADD_ONE: regression.add_one(*base),
                "TracIn at the pool's fit": regression.at_pool(self.prior, problems),
                "influence function at the pool's fit": regression.at_pool(
                    self.prior, problems, True
                ),
                LEAVE_ONE_OUT: regression.leave_one_out(self.prior, problems),
            }
            every = itertools.product(probing.items(), influence.items())
            if C == 1:
                own = own_gradients(self.networks[0], problems, k).items()
                forms = [(f"network's gradients, {form}", scores) for form, scores in own]
                first = {name: scores[:1] for name, scores in probing.items()}
                every = itertools.chain(every, itertools.product(first.items(), forms))
            for (name, mine), (other, theirs) in every:
                row = {"k": k, "contexts": C, "probing": name, "influence": other}
                rows.append(row | interval(agreement(mine, theirs[None])))
        return pd.DataFrame(rows)

    def under(self, shifts: Mapping[str, Shift]) -> pd.DataFrame:
        """Return one-shot agreements, and the level of gains, under each shift.

        Args:
            shifts: By the condition's name; the first is the one that others are held against.

        Returns:
            One row each: condition, quantity, `interval`'s columns, and less, less_low, less_high:
            by how much the first condition's value is above it (of the same tasks). Quantities are
            agreements "<one> against <other>" (TracIn at the zero-shot state), by how much the
            networks' agreement is above the Bayes learner's, the networks' mean gain, and the share
            of examples whose mean gain is positive.
        """
        rows, first = [], {}
        for name, shift in shifts.items():
            problems = self.problems(shift)
            gains, shares = self.probed(problems)
            bayes, bayes_shares = self.bayes(problems)
            tracin = regression.at_base(self.prior, problems)[None]
            found = {
                f"{GAIN} against {TRACIN}": agreement(gains, tracin),
                f"{SHARE} against {TRACIN}": agreement(shares, tracin),
                f"{BAYES} against {TRACIN}": agreement(bayes, tracin),
                f"{BAYES_SHARE} against {TRACIN}": agreement(bayes_shares, tracin),
                f"{GAIN} against {BAYES}": agreement(gains, bayes),
                f"{SHARE} against share of queries with {TRACIN} above 0": agreement(
                    shares, tracin > 0
                ),
            }
            for one, exact in ((GAIN, BAYES), (SHARE, BAYES_SHARE)):
                above = found[f"{one} against {TRACIN}"] - found[f"{exact} against {TRACIN}"]
                found[f"{one} less {exact}, against {TRACIN}"] = above
            found["mean gain"] = gains.mean((2, 3))
            found["share of examples that help"] = (gains.mean(3) > 0).mean(2)
            for quantity, values in found.items():
                less = interval(first.setdefault(quantity, values) - values)
                less = {
                    "less": less["estimate"],
                    "less_low": less["low"],
                    "less_high": less["high"],
                }
                rows.append({"condition": name, "quantity": quantity} | interval(values) | less)
        return pd.DataFrame(rows)

    def corrupted(self) -> pd.DataFrame:
        """Return how well each method ranks clean examples above those with corrupted labels.

        The Bayes learner's one-shot gain is rate_i T - rate_i^2 / 2 r_i^2 (x_i . x_q)^2 with
        rate_i = 1 / (|x_i|^2 + penalty): beside TracIn T stand "TracIn at the example's rate", the
        first of these terms, and the exact add-one, both.

        Returns:
            One row each: corruption, method, `interval`'s columns (area under the ROC curve of
            "clean", 0.5 is chance); less, less_low, less_high, by how much the gain's area is above
            it; and rho, rho_clean, rho_corrupted, agreement with the networks' gain among all,
            clean and corrupted examples (means over tasks).
        """
        rows = []
        for corruption in CORRUPTIONS:
            problems = self.problems(Shift(corruption=corruption))
            gains, shares = self.probed(problems)
            tracin = regression.at_base(self.prior, problems)
            rate = 1 / ((problems.x**2).sum(-1).numpy()[..., None] + self.prior.penalty)
            own = own_gradients(self.networks[0], problems)
            methods = {
                GAIN: gains,
                SHARE: shares,
                ADD_ONE: regression.add_one(self.prior, problems)[None],
                TRACIN: tracin[None],
                "TracIn at the example's rate": (rate * tracin)[None],
                "TracIn at the pool's fit": regression.at_pool(self.prior, problems)[None],
                LEAVE_ONE_OUT: regression.leave_one_out(self.prior, problems)[None],
                "network's gradients, raw": own["raw"][None],
                "network's gradients, centred": own["centred"][None],
            }
            hit = problems.corrupted.numpy()
            parts = {"rho": np.ones_like(hit), "rho_clean": ~hit, "rho_corrupted": hit}
            best = _areas(gains, hit)
            for name, scores in methods.items():
                areas = _areas(scores, hit)
                less = interval(best - areas)
                rho = {part: agreement(gains, scores, mask).mean() for part, mask in parts.items()}
                rows.append(
                    {"corruption": corruption, "method": name, **interval(areas)}
                    | {"less": less["estimate"], "less_low": less["low"], "less_high": less["high"]}
                    | rho
                )
        return pd.DataFrame(rows)


def interval(values: np.ndarray) -> dict[str, float]:
    """Return the mean over tasks with its interval, and how much networks differ.

    Args:
        values: [networks, B], or [1, B] where no network is involved.

    Returns:
        estimate; low and high, not numbers with a single task, or where a task's value is not one;
        network_sd, the standard deviation of networks' means, not a number for one.
    """
    of_tasks = np.mean(values, axis=0)
    estimate, B = float(of_tasks.mean()), len(of_tasks)
    error = stats.sem(of_tasks) if B > 1 else np.nan
    half = stats.t.ppf(0.975, max(B - 1, 1)) * error
    sd = np.mean(values, axis=1).std(ddof=1) if len(values) > 1 else np.nan
    return {"estimate": estimate, "low": estimate - half, "high": estimate + half, "network_sd": sd}


def _areas(scores: np.ndarray, hit: np.ndarray) -> np.ndarray:
    """Return areas under the ROC curve [networks, B] of clean examples, those not hit [B, N]."""
    return np.array(
        [
            [roc_auc_score(~h, means) for h, means in zip(hit, of_network.mean(2), strict=True)]
            for of_network in scores
        ]
    )


def agreement(first: np.ndarray, second: np.ndarray, kept: np.ndarray | None = None) -> np.ndarray:
    """Return Spearman's correlation of means over queries, network by network and task by task.

    Args:
        first: [networks or 1, B, N, M].
        second: The same.
        kept: [B, N] which examples count; all by default.

    Returns:
        [networks, B]; not a number where a method does not tell examples apart.

    Raises:
        ValueError: If there are neither equally many networks, nor one.
    """
    networks = np.broadcast_shapes(first.shape[:1], second.shape[:1])[0]
    B, N = first.shape[1:3]
    kept = np.ones((B, N), dtype=bool) if kept is None else kept
    found = np.empty((networks, B))
    for s in range(networks):
        for b in range(B):
            both = (x[s % len(x), b][kept[b]] for x in (first, second))
            measure = statistics.agreement(*both, level="example")
            found[s, b] = measure(np.arange(kept[b].sum()), np.arange(first.shape[3]))
    return found


def findings(table: pd.DataFrame, n: int, about: str = "") -> pd.DataFrame:
    """Return agreements under shifts as findings that claims are judged by.

    Args:
        table: See `Study.under`.
        n: Tasks.
        about: Stands before each quantity.

    Returns:
        For each agreement, its value in the first condition, and by how much it is above that in
        each other one: quantity, unit, estimate, low, high, n.
    """
    rows = []
    first = table["condition"].iloc[0]
    for row in table[table["quantity"].str.contains("against ")].itertuples():
        if row.condition == first:
            rows.append((f"{about}{row.quantity}, {first}", row.estimate, row.low, row.high))
        else:
            name = f"{about}{row.quantity}, {first} less {row.condition}"
            rows.append((name, row.less, row.less_low, row.less_high))
    frame = pd.DataFrame(rows, columns=["quantity", "estimate", "low", "high"])
    frame.insert(1, "unit", "Spearman")
    return frame.assign(n=n)


def by_hand(prior: Prior, network: Regressor, problems: Problems, i: int, j: int) -> pd.DataFrame:
    """Return one example and one query of the first problem, number by number: what, value.

    Args:
        prior: Of the problems.
        network: Which is shown the example.
        problems: See `regression.draw`.
        i: Of the example.
        j: Of the query.
    """
    one = problems.select(slice(0, 1))
    x, y, asked, answer = one.x[0, i], one.y[0, i], one.queries[0, j], one.answers[0, j]
    centre, who = prior.centre, learner(network)
    nothing = one.base_x[:, 0, :0], one.base_y[:, 0, :0]
    r, r_q = y - x @ centre, answer - asked @ centre
    rate = 1 / (x @ x + prior.penalty)
    before, after = (
        who(*context, asked[None, None])[0, 0]
        for context in (nothing, (x[None, None], y[None, None]))
    )
    values = {
        "label of the example, less its zero-shot prediction: r_i": r,
        "label of the query, less its zero-shot prediction: r_q": r_q,
        "how alike their covariates are: x_i . x_q": x @ asked,
        "TracIn: r_i r_q x_i . x_q": r * r_q * (x @ asked),
        "rate of the Bayes learner's step: 1 / (|x_i|^2 + penalty)": rate,
        "gain of Bayes: rate T - rate^2 / 2 r_i^2 (x_i . x_q)^2": rate * r * r_q * (x @ asked)
        - rate**2 / 2 * (r * (x @ asked)) ** 2,
        "the network's prediction without the example": before,
        "the network's prediction after the example": after,
        "the network's gain": ((answer - before) ** 2 - (answer - after) ** 2) / 2,
    }
    return pd.DataFrame({"value": {name: float(value) for name, value in values.items()}})


def lines(table: pd.DataFrame, x: str, series: str) -> pd.DataFrame:
    """Return a table as `figures.bands` takes it: x (as numbers), series, estimate, low, high."""
    named = table.rename(columns={x: "x", series: "series"})
    named = named.assign(x=named["x"].astype(float)).sort_values("x", kind="stable")
    return named[["x", "series", "estimate", "low", "high"]]


def anchor(
    prior: Prior, rates: Sequence[float], rng: np.random.Generator, B: int, N: int, M: int, k: int
) -> tuple[pd.DataFrame, float]:
    """Return how the exact one-step attention agrees with TracIn, by its rate, and its error.

    Args:
        prior: Of tasks; steps start at zero.
        rates: Of the step.
        rng: Draws the problems.
        B: Problems.
        N: Examples.
        M: Queries.
        k: Pairs before the example where the formula is checked a second time.

    Returns:
        One row a rate and quantity: rate, quantity, and `interval`'s columns, one-shot; and the
        largest difference of a gain, one-shot or after k pairs, from `regression.step_gain`:
        rate * T - rate^2 / 2 * r_i^2 (x_i . x_q)^2.
    """
    problems = regression.draw(prior, rng, B, N, M, K=k)
    start = torch.zeros(prior.dimension, dtype=torch.float64)
    w = start.expand(B, -1)
    product = regression.tracin(problems, w)[None]
    rows, error = [], 0.0
    for rate in rates:
        attention = LinearAttention(rate, start)
        gain, share = (x[None] for x in regression.gain_and_share(attention, problems))
        after = regression.moved_by_one_step(problems, k, attention)
        for found, asked in ((gain[0], problems), (regression.gain(attention, problems, k), after)):
            error = max(error, np.abs(found - regression.step_gain(asked, w, rate)).max())
        found = {
            "gain and TracIn": agreement(gain, product),
            "ICP score and TracIn": agreement(share, product),
            "ICP score and share of queries with TracIn above 0": agreement(share, product > 0),
        }
        rows += [{"rate": rate, "quantity": name, **interval(rho)} for name, rho in found.items()]
    return pd.DataFrame(rows), error


def emergence(runs: Sequence[Trained], study: Study) -> pd.DataFrame:
    """Return loss and one-shot agreement after each snapshot of some trainings.

    Args:
        runs: With snapshots after the same steps.
        study: Whose problems are scored (its networks are not).

    Returns:
        One row each: steps, quantity, `interval`'s columns. The error is that of a label
        after five pairs or half the context, whichever is less, less that of ridge regression.
    """
    problems = study.problems()
    tracin = regression.at_base(study.prior, problems)[None]
    bayes = study.bayes(problems)[0]
    rows = []
    for step in runs[0].snapshots:
        networks = [run.after(step) for run in runs]
        gains, shares = replace(study, networks=networks).probed(problems)
        found = {
            f"{GAIN} against {TRACIN}": agreement(gains, tracin),
            f"{SHARE} against {TRACIN}": agreement(shares, tracin),
            f"{GAIN} against {BAYES}": agreement(gains, bayes),
            "error above ridge": np.array([_excess(net, study) for net in networks]),
        }
        rows += [
            {"steps": step, "quantity": name, **interval(values)} for name, values in found.items()
        ]
    return pd.DataFrame(rows)


def _excess(network: Regressor, study: Study, n: int = 100) -> np.ndarray:
    """Return [B] mean squared errors in the middle of a context less those of ridge regression."""
    k = min(5, network.shape.pairs // 2)
    rng = np.random.default_rng([study.seed, 1])
    x, y = study.prior.prompts(rng, study.B * n, k + 1)
    seen = x[:, :k], y[:, :k], x[:, k:]
    errors = [
        ((y[:, k] - predict(*seen)[:, 0]) ** 2).numpy()
        for predict in (learner(network), Ridge(study.prior))
    ]
    return (errors[0] - errors[1]).reshape(study.B, n).mean(1)


def cost(
    dimensions: Sequence[int], recipe: Recipe, steps: int, B: int, N: int, M: int
) -> pd.DataFrame:
    """Return what training and scoring cost at each dimension, contexts being 2 D + 1 pairs long.

    Args:
        dimensions: D.
        recipe: Whose shape and batch are kept.
        steps: Of training, whose median time counts.
        B: Problems that are scored.
        N: Examples of each.
        M: Queries of each.

    Returns:
        One row each, times in milliseconds: dimension, pairs, weights, training step; and for each
        problem, one-shot: gain, own gradients, TracIn, add-one (the last two in closed form).
    """
    rows = []
    for D in dimensions:
        prior = replace(recipe.prior, dimension=D, variances=())
        sized = replace(recipe, prior=prior, shape=replace(recipe.shape, pairs=2 * D + 1))
        network = Regressor(D, sized.shape)
        problems = regression.draw(prior, np.random.default_rng(0), B, N, M)
        rows.append(
            {
                "dimension": D,
                "pairs": 2 * D + 1,
                "weights": sum(weight.numel() for weight in network.parameters()),
                "training step": 1000 * step_seconds(sized, steps),
                "gain": _timed(regression.gain, learner(network), problems) / B,
                "own gradients": _timed(own_gradients, network, problems) / B,
                "TracIn": _timed(regression.at_base, prior, problems) / B,
                "add-one": _timed(regression.add_one, prior, problems) / B,
            }
        )
    return pd.DataFrame(rows)


def _timed(work: Callable, *arguments) -> float:
    """Return the milliseconds that a call takes the second time."""
    work(*arguments)
    start = time.perf_counter()
    work(*arguments)
    return 1000 * (time.perf_counter() - start)
