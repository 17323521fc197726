"""The scoring methods that notebooks hold probing and gradients against, each known by its name.

A new method is one function that returns a float matrix [N, M] (positive = helps) and one line,
`register(Method(...))`, like those at the end of this module. Notebook 01 then scores it, 03 and 08
rank it beside all others against what training does, and 04 can choose data by it (`rivals`).
docs/add_a_method.md has an example.
"""

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

import datasets
import numpy as np

from icprobe import baselines, store
from icprobe import lm as language_model
from icprobe.experiment import Experiment
from icprobe.lm import LM, Encoded

# what else has a store of its own, and what notebooks call it: no method may take these names
NAMES = (
    *("icp", "icp_neutral", "zero_shot", "training_effect", "gradient_dot", "gradient_cosine"),
    *("projected", "projected_gradients", "tracin", "ekfac", "clamped_log", "finetuned"),
    "text_tokens",
)
TITLES = (
    *("ICP score", "gain", "gain per token", "gain over neutral"),
    *("product", "product per token", "cosine", "TracIn", "gradients"),
)

ALL_AT_ONCE = 1024  # training examples in one part of the store of a method that sees all at once


@dataclass(frozen=True)
class Pairs:
    """What a method may read to score N training examples for M queries.

    Attributes:
        lm: The model (`lm.model`, `lm.tokenizer`, `lm.device`).
        train: N rows with columns id, prompt, completion, task, content, type.
        queries: M rows like them.
        encoded: The same N and M as the model's tokens, cut to the notebook's `max_length`.
    """

    lm: LM
    train: datasets.Dataset
    queries: datasets.Dataset
    encoded: tuple[list[Encoded], list[Encoded]]

    @property
    def shape(self) -> tuple[int, int]:
        """(N, M)."""
        return len(self.train), len(self.queries)

    def rows(self, rows: range) -> "Pairs":
        """Return the pairs of some training examples with all queries."""
        train, queries = self.encoded
        encoded = train[rows.start : rows.stop], queries
        return replace(self, train=self.train.select(rows), encoded=encoded)


@dataclass(frozen=True)
class Method:
    """A scoring method: a function, and how files, tables and figures call it.

    Attributes:
        name: Of its score stores and of 01's tables; letters, digits, dots, dashes, underscores.
        title: What figures and 04's `rivals` call it; None for a control, which is scored and not
            ranked with the rest.
        unit: The unit of a score, a semicolon, and what its sign means, such as "nats; positive =
            the training example helps".
        score: `score(pairs, **options)` returns the scores, float [N, M]; see `Pairs`.
        options: What else it takes. They belong to the scores' key: others make scores of their
            own, beside the old ones.
        version: Raise it when the function is changed, so that scores made before are not taken for
            its own; it belongs to the key, too.
        at_once: How many training examples the function is given in one call, after which their
            scores are kept, so that an interrupted run goes on there. None if it must see all of
            them to score one, or is quick.
        browsed: Whether pages for looking at single pairs show it, see `browsed`.

    Raises:
        ValueError: If a field is not what it should be; names it.
    """

    name: str
    title: str | None
    unit: str
    score: Callable[..., np.ndarray]
    options: Mapping = field(default_factory=dict)
    version: int = 1
    at_once: int | None = None
    browsed: bool = True

    def __post_init__(self):
        whole = {"version": self.version, "at_once": 1 if self.at_once is None else self.at_once}
        for name, value in whole.items():
            if type(value) is not int or value < 1:
                raise ValueError(f"method {self.name!r}: {name} is {value!r}, expected 1 or more")
        if not callable(self.score):
            raise ValueError(f"method {self.name!r}: score is {self.score!r}, expected a function")
        for name in ("title", "unit"):
            value = getattr(self, name)
            if not (isinstance(value, str) and value) and (name, value) != ("title", None):
                raise ValueError(f"method {self.name!r}: {name} is {value!r}, expected a text")
        if "version" in self.options:
            raise ValueError(f"method {self.name!r}: version is a field of its own, no option")
        try:
            store.key(self.name, {"options": self.key_options})
        except (TypeError, ValueError) as error:
            raise ValueError(f"method {self.name!r}: {error}") from error

    @property
    def key_options(self) -> dict:
        """What of the scores' key is the method's: its version and options."""
        return {"version": self.version, **self.options}

    def scores(self, pairs: Pairs) -> np.ndarray:
        """Return the checked scores of these pairs: float [N, M].

        Raises:
            ValueError: If the function returns anything else than finite floats of this shape; says
                what, and names the method.
        """
        found = self.score(pairs, **self.options)
        fault = f"method {self.name!r} returned "
        wanted = f"expected an array of floats {list(pairs.shape)}"
        if not isinstance(found, np.ndarray):
            raise ValueError(f"{fault}{type(found).__name__}, {wanted}")
        if found.shape != pairs.shape:
            raise ValueError(
                f"{fault}shape {list(found.shape)}, {wanted}: a row for each training example, "
                "a column for each query"
            )
        if found.dtype.kind != "f":
            raise ValueError(f"{fault}{found.dtype} numbers, {wanted}: end with .astype(float)")
        if not np.isfinite(found).all():
            i, j = np.argwhere(~np.isfinite(found))[0]
            raise ValueError(
                f"{fault}{found[i, j]} for training example {pairs.train[int(i)]['id']!r} and "
                f"query {pairs.queries[int(j)]['id']!r}, expected finite scores"
            )
        return found


REGISTERED: dict[str, Method] = {}  # by name, in the order of figures; see `register`


def register(method: Method) -> None:
    """Make a method known: from here on it is measured and found with all others.

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


def by_title(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return scores by the registered methods' titles, without controls, which have none.

    Args:
        scores: By name, see `measure`.
    """
    return {m.title: scores[m.name] for m in REGISTERED.values() if m.title and m.name in scores}


def browsed(scores: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Return what pages for looking at single pairs show: the scores, and their units, by title.

    Args:
        scores: By title, see `by_title`.
    """
    among = [titled(title) for title in scores]
    units = {one.title: one.unit.partition(";")[0] for one in among if one.browsed}
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


def measure(
    experiment: Experiment, lm: LM, wanted: Iterable[Method] | None = None, fresh: bool = False
) -> dict[str, np.ndarray]:
    """Score all pairs of the experiment with every registered method, through their stores.

    Finished scores are reused.

    Args:
        experiment: What is scored (its pool of N, its M queries) and where the scores lie.
        lm: The experiment's model.
        wanted: Methods to take instead of all registered ones; they need not be registered.
        fresh: Compute everything anew.

    Returns:
        float32 [N, M] for each method, by its name.

    Raises:
        ValueError: If the model is not the experiment's, or an example has no prompt or is too long
            for it, before anything is computed; or if a method's function returns something else
            than finite floats [N, M].
        FloatingPointError: If a hidden state or a loss is not finite; names the example.
    """
    encoded = experiment.encode(lm)
    language_model.check_packing(lm)
    baselines.check_readable(lm, encoded[1])
    language_model.check_lengths(lm, encoded[0], [()])
    pairs = Pairs(lm, *experiment.load_data(), encoded)
    return {method.name: _fill(experiment, method, pairs, fresh) for method in _wanted(wanted)}


def find(
    experiment: Experiment, made_by: str, wanted: Iterable[Method] | None = None
) -> dict[str, np.ndarray]:
    """Return finished scores; needs neither the model nor the data.

    Args:
        experiment: What was scored.
        made_by: What to run if the scores are not there, for the error message.
        wanted: See `measure`.

    Returns:
        As `measure`.

    Raises:
        store.ScoresNotFound: If they are not there.
    """
    return {
        method.name: experiment.find(method.name, method.key_options, made_by).matrix()
        for method in _wanted(wanted)
    }


def _wanted(wanted: Iterable[Method] | None) -> list[Method]:
    return list(REGISTERED.values() if wanted is None else wanted)


def _fill(experiment: Experiment, method: Method, pairs: Pairs, fresh: bool) -> np.ndarray:
    """Return a method's scores, float32 [N, M], of which only what is missing is computed."""
    kept = experiment.store(
        method.name,
        *(list(rows["id"]) for rows in (pairs.train, pairs.queries)),
        method.key_options,
        fresh=fresh,
        block_size=method.at_once or ALL_AT_ONCE,
        description=method.unit,
    )
    if method.at_once:
        return kept.fill(lambda rows: method.scores(pairs.rows(rows)))
    # made whole, at the first missing block
    whole = functools.cache(lambda: method.scores(pairs))
    return kept.fill(lambda rows: whole()[rows.start : rows.stop])


# ------------------------------------------------------------- the rivals, in the order of figures

register(
    Method(
        "length",
        "length",
        "tokens of the training example; positive = presumed to help",
        lambda pairs, part: baselines.length(pairs.lm, *pairs.encoded, part=part),
        {"part": "text"},
        browsed=False,
    )
)
register(
    Method(
        "completion_length",
        "completion length",
        "tokens of its completion; positive = presumed to help",
        lambda pairs, part: baselines.length(pairs.lm, *pairs.encoded, part=part),
        {"part": "completion"},
        browsed=False,
    )
)
register(
    Method(
        "query_length",
        None,
        "tokens of the query's completion; a control, no rival: the same for all rows",
        lambda pairs: baselines.query_length(pairs.lm, *pairs.encoded),
    )
)
register(
    Method(
        "lexical",
        "words (TF-IDF)",
        "cosine; of TF-IDF vectors, 0 to 1, positive = presumed to help",
        lambda pairs, **tfidf: baselines.lexical(pairs.train, pairs.queries, **tfidf),
        baselines.TFIDF,
    )
)
register(
    Method(
        "embedding",
        "hidden states",
        "cosine; of mean hidden states, positive = presumed to help",
        lambda pairs, **options: baselines.embedding(pairs.lm, *pairs.encoded, **options),
        {"layer": None, "centre": True},
    )
)
register(
    Method(
        "same_completion",
        "same completion",
        "1 where the completions are equal, else 0; positive = presumed to help",
        lambda pairs: baselines.same_completion(pairs.train, pairs.queries),
        browsed=False,
    )
)
register(
    Method(
        "own_loss",
        "own loss",
        "the training example's own loss, nats per token; positive = presumed to help",
        lambda pairs: baselines.own_loss(pairs.lm, *pairs.encoded),
        browsed=False,
    )
)
register(
    Method(
        "random",
        "random",
        "standard normal, without unit; no reason to help",
        lambda pairs, seed: baselines.random(*pairs.shape, np.random.default_rng(seed)),
        {"seed": 0},
        browsed=False,
    )
)

# where the loss is on the text, what a product is divided by to be one per token; not registered,
# since elsewhere nobody needs it
TEXT_TOKENS = Method(
    "text_tokens",
    None,
    "tokens that a loss on the training example's text is over; a control, no rival",
    lambda pairs: np.repeat(
        baselines.trained_tokens(pairs.lm, pairs.encoded[0], "text").astype(np.float32)[:, None],
        len(pairs.queries),
        axis=1,
    ),
)
