"""The baselines that notebooks hold probing and gradients against, each known by its name.

Notebook 01 scores what is registered, 03 and 08 rank it against what training does, and 04 can
choose data by it. docs/add_a_method.md has an example.
"""

from collections.abc import Mapping

import numpy as np

from icprobe.methods import baselines as built_in
from icprobe.scores.method import Method

# names of what else has a store, and what figures call it: no baseline may take these
TAKEN = (
    *("icp", "icp_neutral", "zero_shot", "training_effect", "gradient_dot", "gradient_cosine"),
    *("projected", "tracin", "ekfac", "clamped_log", "finetuned", "text_tokens", "mean_influence"),
    *("ICP score", "gain", "gain per token", "gain over neutral"),
    *("product", "product per token", "cosine", "TracIn", "gradients"),
)

REGISTERED: dict[str, Method] = {}  # by name, in the order of figures; see `register`


def register(method: Method) -> None:
    """Make a baseline known; `REGISTERED.pop(name)` forgets it, and its scores stay.

    Raises:
        ValueError: If its name or its title is taken.
    """
    for what, value, known in (
        ("name", method.name, REGISTERED),
        ("title", method.title, methods_by_title()),
    ):
        if value in TAKEN or value in known:
            raise ValueError(f"method {method.name!r}: the {what} {value!r} is taken")
    REGISTERED[method.name] = method


def baselines() -> list[Method]:
    """Return all registered methods, for `scores.score` and `scores.load`."""
    return list(REGISTERED.values())


def methods_by_title() -> dict[str, Method]:
    """Return the registered methods by title, without controls, which have none."""
    return {method.title: method for method in REGISTERED.values() if method.title}


def by_title(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the scores of `baselines()`, by name, by their methods' titles; without controls."""
    return {title: scores[method.name] for title, method in methods_by_title().items()}


def in_explorer(scores: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return which scores, of those `by_title`, pages of single pairs show, and their units."""
    shown = [method for title, method in methods_by_title().items() if method.in_explorer]
    units = {one.title: one.unit.partition(";")[0] for one in shown}
    return {title: scores[title] for title in units}, units


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
