"""The tables of notebook 05: by hand, at the exact anchor, in domain, in training, under shifts.

What networks compute for most of them is kept, see `Study.tabulate`.
"""

import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score
from tqdm import tqdm

from icprobe.regression import influence, probing
from icprobe.regression.learners import Learner, LinearAttention, Ridge
from icprobe.regression.problems import CORRUPTIONS, Prior, Problems, Shift, draw
from icprobe.regression.study import (
    BAYES,
    BAYES_SCORE,
    GAIN,
    SCORE,
    Study,
    agreement,
    agreements,
    difference,
    interval,
)
from icprobe.regression.training import Recipe, train
from icprobe.regression.transformer import learner

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

TRACIN, AT_POOL, OWN = "TracIn", "TracIn at the pool's fit", "network's gradients, "
ADD_ONE, LEAVE_ONE_OUT = "add-one, exact", "leave-one-out, exact"
POSITIVE = f"share of queries with {TRACIN} above 0"
MEAN_GAIN, HELPING, EXCESS = "mean gain", "share of examples that help", "error above ridge"
COST_STEPS = 20  # of training, whose mean time is taken
EXCESS_SEQUENCES = 100  # for each task


def by_hand(study: Study, i: int, j: int) -> pd.DataFrame:
    """Return example i and query j of the first task, number by number: value, by what it is."""
    prior, problems, predict = study.prior, study.problems(), learner(study.networks[0])
    x, y = problems.x[0, i], problems.y[0, i]
    query, answer = problems.queries[0, j], problems.answers[0, j]
    r, r_q = y - x @ prior.centre, answer - query @ prior.centre
    rate, tracin = 1 / (x @ x + prior.penalty), r * r_q * (x @ query)
    pairs = x[None, None], y[None, None]
    before, after = (
        predict(*(part[:, :k] for part in pairs), query[None, None])[0, 0] for k in (0, 1)
    )
    values = {
        "label of the example, less its zero-shot prediction: r_i": r,
        "label of the query, less its zero-shot prediction: r_q": r_q,
        "how alike their covariates are: x_i . x_q": x @ query,
        "TracIn: r_i r_q x_i . x_q": tracin,
        "rate of the Bayes learner's step: 1 / (|x_i|^2 + penalty)": rate,
        "gain of Bayes: rate T - rate^2 / 2 r_i^2 (x_i . x_q)^2": (
            rate * tracin - rate**2 / 2 * (r * (x @ query)) ** 2
        ),
        "the network's prediction without the example": before,
        "the network's prediction after the example": after,
        "the network's gain": ((answer - before) ** 2 - (answer - after) ** 2) / 2,
    }
    return pd.DataFrame({"value": {name: float(value) for name, value in values.items()}})


def anchor(study: Study, rates: Sequence[float], k: int) -> tuple[pd.DataFrame, float]:
    """Return how the exact one-step attention agrees with TracIn, by rate and quantity, one-shot.

    And the largest difference of a gain, one-shot or after k pairs, from `influence.step_gain`.
    """
    problems = study.problems(K=k)
    start = torch.zeros(study.prior.dimension, dtype=torch.float64)
    w = start.expand(study.B, -1)
    products = influence.tracin(problems, w)
    rows, error = [], 0.0
    for rate in rates:
        attention = LinearAttention(rate, start)
        gains, scores = probing.gain_and_score(attention, problems)
        moved = influence.after_attention_step(problems, k, attention)
        later = probing.gain(attention, problems, k)
        for found, expected in ((gains, problems), (later, moved)):
            error = max(error, np.abs(found - influence.step_gain(expected, w, rate)).max())
        compared = {
            "gain and TracIn": (gains, products),
            "ICP score and TracIn": (scores, products),
            "ICP score and share of queries with TracIn above 0": (scores, products > 0),
        }
        for quantity, pair in compared.items():
            rho = agreement(*pair)[None]  # of tasks rather than networks
            rows.append({"rate": rate, "quantity": quantity, **interval(rho)})
    return pd.DataFrame(rows), error


def in_domain(study: Study, bases: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Return the agreement of every form of probing with every form of influence.

    Bases are pairs k before the example (0 is one-shot), and the number of contexts over which
    probing and influence are averaged. The network's own gradients are the first network's, held
    against its own gains, and are taken for single contexts only. One row each: k, contexts,
    probing, influence, and `interval`'s columns.
    """

    def compute(base: tuple[int, int], tasks: range) -> Iterator[dict]:
        k, C = base
        for task in map(study.problems(K=k, C=C).task, tasks):
            scores = study.probing(task, k)
            found = agreements(scores, closed_forms(study.prior, task, k))
            if C == 1:
                of_first = {name: values[:1] for name, values in scores.items()}
                own = influence.network_gradients(study.networks[0], task, k)
                found |= agreements(of_first, {f"{OWN}{form}": own[form] for form in own})
            yield found

    identities = {(k, C): {"pairs": k, "contexts": C} for k, C in bases}
    rows = []
    for (k, C), quantities in study.tabulate("in_domain", identities, compute).items():
        for quantity, values in quantities.items():
            one, other = quantity.split(" against ")
            row = {"k": k, "contexts": C, "probing": one, "influence": other}
            rows.append(row | interval(values))
    return pd.DataFrame(rows)


def closed_forms(prior: Prior, task: Problems, k: int) -> dict[str, np.ndarray]:
    """Return every form of influence that has a closed one, after k pairs: [1, N, M] each."""
    at_fit = influence.tracin_at_base(prior, task, k)
    return {
        "TracIn at the zero-shot state": influence.tracin_at_base(prior, task),
        "TracIn at the context's fit": at_fit,
        "share of queries with this above 0": at_fit > 0,
        "influence function at the context's fit": influence.tracin_at_base(
            prior, task, k, preconditioned=True
        ),
        ADD_ONE: influence.add_one(prior, task, k),
        AT_POOL: influence.tracin_at_pool(prior, task),
        "influence function at the pool's fit": influence.tracin_at_pool(
            prior, task, preconditioned=True
        ),
        LEAVE_ONE_OUT: influence.leave_one_out(prior, task),
    }


def in_training(study: Study, recipes: Sequence[Recipe], steps: Sequence[int]) -> pd.DataFrame:
    """Return loss and one-shot agreement of other networks after some steps of their training.

    They are trained only where numbers are missing. One row each: steps, quantity, `interval`'s
    columns.
    """
    trained = []

    def compute(step: int, tasks: range) -> Iterator[dict]:
        if not trained:
            trained.extend(train(recipe, snapshots=steps) for recipe in recipes)
        networks = [run.snapshots[step] for run in trained]
        problems, watched = study.problems(), replace(study, networks=networks)
        for b in tasks:
            task = problems.task(b)
            scores = watched.probing(task)
            tracin = influence.tracin_at_base(study.prior, task)
            yield {
                f"{GAIN} against {TRACIN}": agreement(scores[GAIN], tracin),
                f"{SCORE} against {TRACIN}": agreement(scores[SCORE], tracin),
                f"{GAIN} against {BAYES}": agreement(scores[GAIN], scores[BAYES]),
                EXCESS: _excess(watched, b),
            }

    recipes_of = {"recipes": [recipe.name for recipe in recipes]}
    identities = {step: {"steps": step} | recipes_of for step in steps}
    found = replace(study, networks=()).tabulate("in_training", identities, compute)
    return pd.DataFrame(
        {"steps": step, "quantity": quantity} | interval(values)
        for step, quantities in found.items()
        for quantity, values in quantities.items()
    )


def _excess(study: Study, b: int) -> list[float]:
    """Return networks' errors less ridge regression's, after five pairs or half the context."""
    k, n = min(5, study.networks[0].shape.pairs // 2), EXCESS_SEQUENCES
    x, y = study.prior.prompts(np.random.default_rng([study.seed, 1]), study.B * n, k + 1)
    x, y = x[b * n : (b + 1) * n], y[b * n : (b + 1) * n]

    def errors(predict: Learner) -> np.ndarray:
        return ((y[:, k] - predict(x[:, :k], y[:, :k], x[:, k:])[:, 0]) ** 2).numpy()

    of_ridge = errors(Ridge(study.prior))
    return [(errors(learner(network)) - of_ridge).mean() for network in study.networks]


def under_shifts(study: Study, shifts: Mapping[Hashable, Shift]) -> pd.DataFrame:
    """Return one-shot agreements, and the level of gains, under each shift.

    Quantities are agreements "<one> against <other>" (TracIn at the zero-shot state), by how much
    the networks' are above the Bayes learner's, the networks' mean gain, and the fraction of
    examples whose mean gain is positive. One row each: condition, quantity, `interval`'s columns,
    and less, less_low, less_high: by how much the first condition's value is above it.
    """

    def compute(condition: Hashable, tasks: range) -> Iterator[dict]:
        for task in map(study.problems(shifts[condition]).task, tasks):
            scores = study.probing(task)
            gains, tracin = scores[GAIN], influence.tracin_at_base(study.prior, task)
            yield agreements(scores, {TRACIN: tracin}) | {
                f"{GAIN} against {BAYES}": agreement(gains, scores[BAYES]),
                f"{SCORE} against {POSITIVE}": agreement(scores[SCORE], tracin > 0),
                MEAN_GAIN: gains.mean((1, 2)),
                HELPING: (gains.mean(2) > 0).mean(1),
            }

    identities = {name: {"shift": asdict(shift)} for name, shift in shifts.items()}
    rows, first = [], {}
    for name, found in study.tabulate("one_shot", identities, compute).items():
        levels = {quantity: found.pop(quantity) for quantity in (MEAN_GAIN, HELPING)}
        for one, exact in ((GAIN, BAYES), (SCORE, BAYES_SCORE)):
            above = found[f"{one} against {TRACIN}"] - found[f"{exact} against {TRACIN}"]
            found[f"{one} less {exact}, against {TRACIN}"] = above
        for quantity, values in (found | levels).items():
            row = {"condition": name, "quantity": quantity} | interval(values)
            rows.append(row | difference(first.setdefault(quantity, values), values))
    return pd.DataFrame(rows)


def with_corrupted_labels(study: Study) -> pd.DataFrame:
    """Return how well each method ranks clean examples above those with corrupted labels.

    The Bayes learner's one-shot gain is rate_i T - rate_i^2 / 2 r_i^2 (x_i . x_q)^2 with
    rate_i = 1 / (|x_i|^2 + penalty): beside TracIn T stand "TracIn at the example's rate", the
    first of these terms, and the exact add-one, both.

    One row each: corruption, method, `interval`'s columns (area under the ROC curve of "clean", 0.5
    is chance); less, less_low, less_high, by how much the gain's area is above it; rho, rho_clean,
    rho_corrupted, the mean agreement with the networks' gain among all, clean and corrupted ones.
    """

    def compute(corruption: str, tasks: range) -> Iterator[dict]:
        for task in map(study.problems(Shift(corruption=corruption)).task, tasks):
            scores, prior = study.probing(task), study.prior
            own = influence.network_gradients(study.networks[0], task)
            tracin = influence.tracin_at_base(prior, task)
            rate = 1 / ((task.x**2).sum(-1).numpy()[..., None] + prior.penalty)
            methods = {
                GAIN: scores[GAIN],
                SCORE: scores[SCORE],
                ADD_ONE: influence.add_one(prior, task),
                TRACIN: tracin,
                "TracIn at the example's rate": rate * tracin,
                AT_POOL: influence.tracin_at_pool(prior, task),
                LEAVE_ONE_OUT: influence.leave_one_out(prior, task),
                f"{OWN}raw": own["raw"],
                f"{OWN}centred": own["centred"],
            }
            clean = ~task.corrupted[0].numpy()
            parts = {"rho": np.ones_like(clean), "rho_clean": clean, "rho_corrupted": ~clean}
            found = {}
            for method, values in methods.items():
                found[f"area, {method}"] = [roc_auc_score(clean, row) for row in values.mean(2)]
                for rho, part in parts.items():
                    pair = scores[GAIN][:, part], values[:, part]
                    found[f"{rho}, {method}"] = agreement(*pair)
            yield found

    identities = {name: {"shift": asdict(Shift(corruption=name))} for name in CORRUPTIONS}
    rows = []
    for corruption, found in study.tabulate("corrupted", identities, compute).items():
        areas = {name.removeprefix("area, "): found[name] for name in found if "area, " in name}
        for method, area in areas.items():
            row = {"corruption": corruption, "method": method} | interval(area)
            row |= difference(areas[GAIN], area)
            rhos = ("rho", "rho_clean", "rho_corrupted")
            rows.append(row | {rho: found[f"{rho}, {method}"].mean() for rho in rhos})
    return pd.DataFrame(rows)


def cost(dimensions: Sequence[int], recipe: Recipe, N: int, M: int) -> pd.DataFrame:
    """Return what training and scoring cost at each dimension D, contexts being 2 D + 1 pairs long.

    Times are milliseconds, those of scores for a problem [N, M], one-shot.
    """
    rows = []
    for D in tqdm(dimensions, desc="cost", unit=" dimensions"):
        prior = replace(recipe.prior, dimension=D)
        shape = replace(recipe.shape, pairs=2 * D + 1)
        trained = train(replace(recipe, prior=prior, shape=shape, steps=COST_STEPS))
        network = trained.network
        problems = draw(prior, np.random.default_rng(0), 1, N, M)
        row = {"dimension": D, "pairs": 2 * D + 1}
        row["weights"] = sum(weight.numel() for weight in network.parameters())
        row["training step"] = 1000 * trained.seconds / COST_STEPS
        works = {
            "gain": (probing.gain, learner(network)),
            "own gradients": (influence.network_gradients, network),
            "TracIn": (influence.tracin_at_base, prior),
            "add-one": (influence.add_one, prior),
        }
        for name, (work, of) in works.items():
            work(of, problems)  # the first call is slower
            start = time.perf_counter()
            work(of, problems)
            row[name] = 1000 * (time.perf_counter() - start)
        rows.append(row)
    return pd.DataFrame(rows)


def findings(table: pd.DataFrame, n: int, about: str = "") -> pd.DataFrame:
    """Return agreements of `under_shifts` (of n tasks) as findings that claims are judged by.

    For each its value in the first condition, and by how much it is above that in each other one.
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


def lines(table: pd.DataFrame, x: str, series: str) -> pd.DataFrame:
    """Return a table as `figures.bands` takes it: x (as numbers), series, estimate, low, high."""
    named = table.rename(columns={x: "x", series: "series"})
    named = named.assign(x=named["x"].astype(float)).sort_values("x", kind="stable")
    return named[["x", "series", "estimate", "low", "high"]]
