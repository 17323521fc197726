"""The baselines that notebooks hold probing and gradients against, each known by its name.

A new one is a small class (see `scores.Method`) and one line, `register(MyMethod())`, like those at
the end of this module. Notebook 01 then scores it, 03 and 08 rank it beside all others against what
training does, and 04 can choose data by it. docs/add_a_method.md has an example.
"""

from collections.abc import Mapping

import numpy as np

from icprobe.methods import baselines as built_in
from icprobe.scores.method import Method

# what else has a store of its own, and what notebooks call it: no baseline may take these
NAMES = (
    *("icp", "icp_neutral", "zero_shot", "training_effect", "gradient_dot", "gradient_cosine"),
    *("projected", "tracin", "ekfac", "clamped_log", "finetuned", "text_tokens"),
)
TITLES = (
    *("ICP score", "gain", "gain per token", "gain over neutral"),
    *("product", "product per token", "cosine", "TracIn", "gradients"),
)

REGISTERED: dict[str, Method] = {}  # by name, in the order of figures; see `register`


def register(method: Method) -> None:
    """Make a baseline known: from here on it is scored and found with all others.

    `REGISTERED.pop(name)` forgets it, as before a notebook cell that registers it is run again; its
    scores stay where they are.

    Raises:
        ValueError: If its name or its title is taken.
    """
    names = {*NAMES, *REGISTERED}
    titles = {*TITLES, *(known.title for known in REGISTERED.values())} - {None}
    for what, value, taken in (("name", method.name, names), ("title", method.title, titles)):
        if value in taken:
            raise ValueError(f"method {method.name!r}: the {what} {value!r} is taken")
    REGISTERED[method.name] = method


def baselines() -> list[Method]:
    """Return all registered methods, for `scores.score` and `scores.load`."""
    return list(REGISTERED.values())


def by_title(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return scores by the registered methods' titles, without controls, which have none.

    Args:
        scores: By name, as `scores.score` returns them.
    """
    return {m.title: scores[m.name] for m in REGISTERED.values() if m.title and m.name in scores}


def in_explorer(scores: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return what pages for looking at single pairs show: the scores, and their units, by title.

    Args:
        scores: By title, see `by_title`.
    """
    shown = [one for one in map(titled, scores) if one.in_explorer]
    units = {one.title: one.unit.partition(";")[0] for one in shown}
    return {title: scores[title] for title in units}, units


def titled(title: str) -> Method:
    """Return the registered method of this title.

    Raises:
        ValueError: If there is none; lists the titles there are.
    """
    known = {method.title: method for method in REGISTERED.values() if method.title}
    if title not in known:
        raise ValueError(f"no method is called {title!r}, there are: {', '.join(known)}")
    return known[title]


for _method in (
    built_in.Length(),
    built_in.CompletionLength(),
    built_in.QueryLength(),
    built_in.Lexical(),
    built_in.Embedding(),
    built_in.SameCompletion(),
    built_in.OwnLoss(),
    built_in.Random(),
):
    register(_method)
