"""The tables on synthetic regression: in domain, under shifts, with corrupted labels, in training.

What networks compute for them is kept in score stores, see `Study.tabulate`.
"""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache, partial

import numpy as np
import pandas as pd
from sklearn.metrics import roc_auc_score

from icprobe.regression.influence import (
    FORMS,
    add_one,
    leave_one_out,
    network_gradients,
    tracin_at_base,
    tracin_at_pool,
)
from icprobe.regression.learners import Learner, Ridge
from icprobe.regression.problems import CORRUPTIONS, Prior, Problems, Shift
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
from icprobe.regression.training import Recipe, Trained, train
from icprobe.regression.transformer import Regressor, learner

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

TRACIN, ADD_ONE, LEAVE_ONE_OUT = "TracIn", "add-one, exact", "leave-one-out, exact"
AT_POOL = "TracIn at the pool's fit"
OWN = "network's gradients, "
POSITIVE = f"share of queries with {TRACIN} above 0"
MEAN_GAIN, HELPING, EXCESS = "mean gain", "share of examples that help", "error above ridge"
RHO = ("rho", "rho_clean", "rho_corrupted")


def _at_own_rate(prior: Prior, task: Problems) -> np.ndarray:
    rate = 1 / ((task.x**2).sum(-1).numpy()[..., None] + prior.penalty)
    return rate * tracin_at_base(prior, task)


# each closed form of influence after k pairs, [1, N, M]
INFLUENCE = {
    "TracIn at the zero-shot state": lambda prior, task, _: tracin_at_base(prior, task),
    "TracIn at the context's fit": tracin_at_base,
    "share of queries with this above 0": lambda *base: tracin_at_base(*base) > 0,
    "influence function at the context's fit": partial(tracin_at_base, preconditioned=True),
    ADD_ONE: add_one,
    AT_POOL: lambda prior, task, _: tracin_at_pool(prior, task),
    "influence function at the pool's fit": lambda prior, task, _: tracin_at_pool(
        prior, task, preconditioned=True
    ),
    LEAVE_ONE_OUT: lambda prior, task, _: leave_one_out(prior, task),
}
# what else ranks clean examples above corrupted ones
RANKING = {
    ADD_ONE: add_one,
    TRACIN: tracin_at_base,
    "TracIn at the example's rate": _at_own_rate,
    AT_POOL: tracin_at_pool,
    LEAVE_ONE_OUT: leave_one_out,
}


def in_domain(study: Study, bases: Sequence[tuple[int, int]]) -> pd.DataFrame:
    """Return the agreement of every form of probing with every form of influence.

    The network's own gradients are the first network's, held against its own gains, and are taken
    for single contexts only.

    Args:
        study: See `Study`.
        bases: Pairs k before the example (0 is one-shot), and the number of contexts over which
            probing and influence are averaged; see `probing.gain`.

    Returns:
        One row each: k, contexts, probing, influence, and `interval`'s columns.
    """
    forms = dict.fromkeys((GAIN, SCORE), len(study.networks)) | {BAYES: 1, BAYES_SCORE: 1}
    of_closed = {f"{one} against {other}": n for one, n in forms.items() for other in INFLUENCE}
    of_own = {f"{one} against {OWN}{form}": 1 for one in forms for form in FORMS}

    def compute(base: tuple[int, int], b: int) -> dict[str, np.ndarray]:
        k, C = base
        task = study.problems(K=k, C=C).task(b)
        probing = study.probing(task, k)
        closed = {name: form(study.prior, task, k) for name, form in INFLUENCE.items()}
        if C > 1:
            return agreements(probing, closed)
        own = network_gradients(study.networks[0], task, k)
        of_first = {name: scores[:1] for name, scores in probing.items()}
        return agreements(probing, closed) | agreements(
            of_first, {f"{OWN}{form}": products for form, products in own.items()}
        )

    identities = {(k, C): {"pairs": k, "contexts": C} for k, C in bases}
    columns = {base: of_closed | (of_own if base[1] == 1 else {}) for base in identities}
    rows = []
    found = study.tabulate("in_domain", identities, columns, compute)
    for (k, C), quantities in found.items():
        for quantity, values in quantities.items():
            one, other = quantity.split(" against ")
            row = {"k": k, "contexts": C, "probing": one, "influence": other}
            rows.append(row | interval(values))
    return pd.DataFrame(rows)


def under_shifts(study: Study, shifts: Mapping[Hashable, Shift]) -> pd.DataFrame:
    """Return one-shot agreements, and the level of gains, under each shift.

    Args:
        study: See `Study`.
        shifts: By the condition's name; the first is the one that others are held against.

    Returns:
        One row each: condition, quantity, `interval`'s columns, and less, less_low, less_high: by
        how much the first condition's value is above it (of the same tasks). Quantities are
        agreements "<one> against <other>" (TracIn at the zero-shot state), by how much the
        networks' agreement is above the Bayes learner's, the networks' mean gain, and the fraction
        of examples whose mean gain is positive.
    """

    def one_shot(condition: Hashable, b: int) -> dict[str, np.ndarray]:
        task = study.problems(shifts[condition]).task(b)
        probing = study.probing(task)
        gains, tracin = probing[GAIN], tracin_at_base(study.prior, task)
        return agreements(probing, {TRACIN: tracin}) | {
            f"{GAIN} against {BAYES}": agreement(gains, probing[BAYES]),
            f"{SCORE} against {POSITIVE}": agreement(probing[SCORE], tracin > 0),
            MEAN_GAIN: gains.mean((1, 2)),
            HELPING: (gains.mean(2) > 0).mean(1),
        }

    S = len(study.networks)
    columns = {
        f"{GAIN} against {TRACIN}": S,
        f"{SCORE} against {TRACIN}": S,
        f"{BAYES} against {TRACIN}": 1,
        f"{BAYES_SCORE} against {TRACIN}": 1,
        f"{GAIN} against {BAYES}": S,
        f"{SCORE} against {POSITIVE}": S,
        MEAN_GAIN: S,
        HELPING: S,
    }
    identities = {name: {"shift": asdict(shift)} for name, shift in shifts.items()}
    rows, first = [], {}
    for name, found in study.tabulate(
        "one_shot", identities, dict.fromkeys(identities, columns), one_shot
    ).items():
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

    Returns:
        One row each: corruption, method, `interval`'s columns (area under the ROC curve of "clean",
        0.5 is chance); less, less_low, less_high, by how much the gain's area is above it; and rho,
        rho_clean, rho_corrupted, agreement with the networks' gain among all, clean and corrupted
        examples (means over tasks).
    """
    shifts = {name: Shift(corruption=name) for name in CORRUPTIONS}

    def ranked(corruption: str, b: int) -> dict[str, np.ndarray]:
        task = study.problems(shifts[corruption]).task(b)
        probing, own = study.probing(task), network_gradients(study.networks[0], task)
        methods = {GAIN: probing[GAIN], SCORE: probing[SCORE]}
        methods |= {name: form(study.prior, task) for name, form in RANKING.items()}
        methods |= {f"{OWN}{form}": own[form] for form in ("raw", "centred")}
        hit = task.corrupted[0].numpy()
        found = {}
        for method, scores in methods.items():
            found[f"area, {method}"] = [roc_auc_score(~hit, means) for means in scores.mean(2)]
            for part, kept in zip(RHO, (None, ~hit, hit), strict=True):
                found[f"{part}, {method}"] = agreement(methods[GAIN], scores, kept)
        return found

    S = len(study.networks)
    others = (*RANKING, f"{OWN}raw", f"{OWN}centred")
    methods = {GAIN: S, SCORE: S} | dict.fromkeys(others, 1)
    columns = {f"area, {method}": n for method, n in methods.items()}
    columns |= {f"{part}, {method}": S for method in methods for part in RHO}
    identities = {name: {"shift": asdict(shift)} for name, shift in shifts.items()}
    rows = []
    for corruption, found in study.tabulate(
        "corrupted", identities, dict.fromkeys(identities, columns), ranked
    ).items():
        for method in methods:
            area = found[f"area, {method}"]
            row = {"corruption": corruption, "method": method} | interval(area)
            row |= difference(found[f"area, {GAIN}"], area)
            rows.append(row | {part: found[f"{part}, {method}"].mean() for part in RHO})
    return pd.DataFrame(rows)


def in_training(study: Study, recipes: Sequence[Recipe], steps: Sequence[int]) -> pd.DataFrame:
    """Return loss and one-shot agreement of other networks while they are trained.

    They are trained only where numbers are missing.

    Args:
        study: Whose problems are scored (its networks are not).
        recipes: Of the networks, alike but for the seed.
        steps: After how many steps to look.

    Returns:
        One row each: steps, quantity, `interval`'s columns. The error is that of a label after five
        pairs or half the context, whichever is less, less that of ridge regression.
    """

    @cache
    def trained() -> list[Trained]:
        return [train(recipe, snapshots=steps) for recipe in recipes]

    def after(step: int, b: int) -> dict[str, np.ndarray]:
        networks = [run.snapshots[step] for run in trained()]
        task = study.problems().task(b)
        probing = replace(study, networks=networks).probing(task)
        gains, tracin = probing[GAIN], tracin_at_base(study.prior, task)
        return {
            f"{GAIN} against {TRACIN}": agreement(gains, tracin),
            f"{SCORE} against {TRACIN}": agreement(probing[SCORE], tracin),
            f"{GAIN} against {BAYES}": agreement(gains, probing[BAYES]),
            EXCESS: _excess(networks, study, b),
        }

    quantities = (f"{GAIN} against {TRACIN}", f"{SCORE} against {TRACIN}")
    columns = dict.fromkeys((*quantities, f"{GAIN} against {BAYES}", EXCESS), len(recipes))
    identities = {step: {"steps": step} for step in steps}
    names = [recipe.name for recipe in recipes]
    columns = dict.fromkeys(steps, columns)
    found = study.tabulate("in_training", identities, columns, after, names)
    return pd.DataFrame(
        {"steps": step, "quantity": quantity} | interval(values)
        for step, quantities in found.items()
        for quantity, values in quantities.items()
    )


def _excess(networks: Sequence[Regressor], study: Study, b: int, n: int = 100) -> list[float]:
    """Return mean squared errors in the middle of a context less those of ridge regression."""
    k = min(5, networks[0].shape.pairs // 2)
    x, y = study.prior.prompts(np.random.default_rng([study.seed, 1]), study.B * n, k + 1)
    x, y = x[b * n : (b + 1) * n], y[b * n : (b + 1) * n]

    def errors(predict: Learner) -> np.ndarray:
        return ((y[:, k] - predict(x[:, :k], y[:, :k], x[:, k:])[:, 0]) ** 2).numpy()

    of_ridge = errors(Ridge(study.prior))
    return [(errors(learner(network)) - of_ridge).mean() for network in networks]


def findings(table: pd.DataFrame, n: int, about: str = "") -> pd.DataFrame:
    """Return agreements under shifts as findings that claims are judged by.

    Args:
        table: See `under_shifts`.
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


def lines(table: pd.DataFrame, x: str, series: str) -> pd.DataFrame:
    """Return a table as `figures.bands` takes it: x (as numbers), series, estimate, low, high."""
    named = table.rename(columns={x: "x", series: "series"})
    named = named.assign(x=named["x"].astype(float)).sort_values("x", kind="stable")
    return named[["x", "series", "estimate", "low", "high"]]
