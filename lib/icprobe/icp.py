"""In-context probing: put one training example into the prompt, see what the right answers gain.

The context is the preamble (if any) and the separator, the demonstration's prompt and completion,
and the separator; then come the query's prompt and completion. With l_ij the log-likelihood of
completion j after demonstration i and l0_j the one without any context, the gain is

    G_ij = l_ij - l0_j        [N, M], nats, positive = the training example helps

and the published ICP score of example i is the share of queries that it helps, mean_j 1[G_ij > 0]
(Jiao et al. 2025, after the "golden score" of Li et al. 2023).
"""

import functools
import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd

from icprobe import engines, statistics
from icprobe import lm as language_model
from icprobe.experiment import Experiment
from icprobe.lm import LM, Encoded

PUBLISHED_PREAMBLE = "These examples may be helpful to answer the question"

UNITS = "log-likelihood of the query's completion in nats, summed over its tokens"
SEPARATOR = "\n\n"  # after the preamble and after the demonstration
TEMPLATE_VERSION = 1  # raise it when the same text begins to give other token ids

# training examples in one part of a store; on a GPU, enough for their packing not to count
BLOCK_SIZE = {"cpu": 8, "cuda": 64}

NEUTRAL_STEPS = (16, 4)  # tokens: lengths of replaced inputs and answers are rounded to these

NEUTRAL_FRAME = 2  # raise it when another part of a prompt counts as its frame
TEXTS_TOGETHER = 4  # neutral texts scored in one call, so that several CPU threads have work

# uninformative inputs and answers are cut from this text: fluent, but about nothing in particular
NEUTRAL_TEXT = (
    "This is a piece of text that was put here to fill some space. It goes on for a while and then "
    "it ends, and nothing in it matters for what comes next. There is no need to remember any of "
    "it. The words follow one another as words do, one line after the other, until there are "
    "enough of them. "
)


def context(lm: LM, demonstration: Encoded | None, preamble: str = "") -> tuple[int, ...]:
    """Return the token ids that stand before a query's prompt.

    Each part is followed by the separator; parts without tokens are left out, so an empty
    demonstration without preamble is no context at all.
    """
    end = language_model.text_ids(lm, SEPARATOR)
    parts = [language_model.text_ids(lm, preamble), demonstration.ids if demonstration else ()]
    return tuple(token for part in parts if part for token in (*part, *end))


def log_likelihoods(
    lm: LM,
    queries: Iterable,
    demonstrations: Iterable | None = None,
    preamble: str = "",
    max_length: int | None = None,
) -> np.ndarray:
    """Return log p(completion_j | demonstration_i, prompt_j): sums over completion tokens, nats.

    Args:
        lm: The model.
        queries: M rows with id, prompt, completion (or encoded already).
        demonstrations: N such rows; None for zero-shot, where no preamble stands either.
        preamble: Text before the demonstration; the paper's is `PUBLISHED_PREAMBLE`.
        max_length: Most tokens of one example, see `lm.encode`.

    Returns:
        float32 [N, M], one row per demonstration in the order given; [M] when zero-shot.

    Raises:
        ValueError: If a completion would lose tokens, or a sequence is too long for the model.
    """
    encoded = language_model.encode(lm, queries, max_length)
    if demonstrations is None:
        return language_model.log_likelihoods(lm, encoded)[0]
    shown = language_model.encode(lm, demonstrations, max_length)
    contexts = [context(lm, demonstration, preamble) for demonstration in shown]
    return language_model.log_likelihoods(lm, encoded, contexts)


def neutral_demonstrations(
    lm: LM, demonstrations: Iterable[dict], max_length: int | None = None
) -> list[Encoded]:
    """Return an uninformative demonstration of the same form and about the same length.

    The frame stays: first and last lines of prompts that several demonstrations share (instruction
    and answer label), or else the label of such a line ("Question:"). All other text, and the
    answer, becomes text about nothing. What a query gains from it comes from form and length; what
    it gains beyond, from the content.

    Args:
        lm: The model, for its tokenizer.
        demonstrations: N rows with prompt and completion.
        max_length: Most tokens of one example, see `lm.encode`.

    Returns:
        N encoded texts. Replaced parts have the tokens of the original to the nearest multiple of
        `NEUTRAL_STEPS`, so that few different texts serve all; equal texts have equal ids.
    """
    filler = np.array(language_model.text_ids(lm, NEUTRAL_TEXT))

    def filled(text: str, step: int) -> str:
        length = step * max(1, round(len(language_model.text_ids(lm, text)) / step))
        return " " + lm.tokenizer.decode(np.resize(filler, length)).strip()

    demonstrations = list(demonstrations)
    lines = [row["prompt"].split("\n") for row in demonstrations]
    firsts, lasts = (Counter(prompt[end] for prompt in lines) for end in (0, -1))
    rows = []
    for row, (first, *middle) in zip(demonstrations, lines, strict=True):
        last = middle.pop() if middle else ""
        head, tail = _frame_of(first, firsts), _frame_of(last, lasts)
        body = "\n".join([first[len(head) :], *middle, last[len(tail) :]]).strip()
        neutral = filled(body, NEUTRAL_STEPS[0]).strip() if body else ""
        opening = " ".join([head, neutral]).strip() if head != first else f"{head}\n{neutral}"
        prompt = "\n".join([opening, tail]) if tail else opening
        completion = filled(row["completion"], NEUTRAL_STEPS[1])
        name = hashlib.sha256(f"{prompt}\0{completion}".encode()).hexdigest()[:12]
        rows.append({"id": f"neutral-{name}", "prompt": prompt, "completion": completion})
    return language_model.encode(lm, rows, max_length)


def _frame_of(line: str, occurrences: Counter) -> str:
    """Return what of a prompt's first or last line is form: all of it, its label, or nothing."""
    if occurrences[line] > 1:
        return line
    label = re.match(r"[\w ]{1,30}:", line)
    return label[0] if label else ""


@dataclass(frozen=True)
class Probe:
    """What probing gives, in nats: sums over the completion tokens of each query.

    Attributes:
        zero_shot: [M] log-likelihoods without any context, l0.
        demonstrated: [N, M] log-likelihoods after one demonstration, l.
        neutral: [N, M] log-likelihoods after a neutral demonstration of the same form; None where
            they were not asked for.
    """

    zero_shot: np.ndarray
    demonstrated: np.ndarray
    neutral: np.ndarray | None = None

    @property
    def gain(self) -> np.ndarray:
        """[N, M] gain of each demonstration."""
        return gain(self.demonstrated, self.zero_shot)

    @property
    def neutral_gain(self) -> np.ndarray:
        """[N, M] gain of the neutral demonstration in its place; ValueError if there is none."""
        if self.neutral is None:
            raise ValueError("neutral demonstrations were not scored")
        return gain(self.neutral, self.zero_shot)


def probe(
    experiment: Experiment,
    lm: LM,
    preamble: str = "",
    neutral: bool = True,
    fresh: bool = False,
    engine: str = engines.LOCAL,
) -> Probe:
    """Score all pairs of the experiment through its store: finished blocks are reused.

    Args:
        experiment: What is scored (its pool of N, its M queries) and where the scores lie.
        lm: The experiment's model.
        preamble: See `log_likelihoods`.
        neutral: Whether to score the neutral twins, too.
        fresh: Compute everything anew.
        engine: Where, see `engines`.

    Raises:
        ValueError: If the model is not the experiment's, or something is too long for it; before
            anything is computed.
    """
    experiment.check_model(lm)
    language_model.check_packing(lm)
    demonstrations, queries = experiment.load_data()
    twins = neutral_demonstrations(lm, demonstrations, experiment.max_length) if neutral else []
    queries = language_model.encode(lm, queries, experiment.max_length)
    shown = language_model.encode(lm, demonstrations, experiment.max_length)
    shown, twins = (
        [(one.id, context(lm, one, preamble)) for one in texts] for texts in (shown, twins)
    )
    language_model.check_lengths(lm, queries, [tokens for _, tokens in (*shown, *twins)])
    together = _together(twins)
    block_size = language_model.by_device(BLOCK_SIZE, lm.device)
    settings = {"block_size": block_size, "fresh": fresh, "description": UNITS}

    arguments = {
        "zero_shot": lambda _: ([()],),
        "icp": lambda rows: ([tokens for _, tokens in shown[rows.start : rows.stop]],),
        "icp_neutral": lambda rows: (
            [(name, together[name]) for name, _ in twins[rows.start : rows.stop]],
        ),
    }
    query_ids = [query.id for query in queries]
    scores = {}
    for method, options in _options(preamble, neutral).items():
        train_ids = ["zero-shot"] if method == "zero_shot" else [name for name, _ in shown]
        kept = experiment.store(method, train_ids, query_ids, options, **settings)
        start = functools.partial(_each_once if method == "icp_neutral" else _each, queries)
        (scores[method],) = engines.fill(engine, experiment, lm, [kept], start, arguments[method])
    return Probe(scores["zero_shot"][0], scores["icp"], scores.get("icp_neutral"))


Contexts = list[tuple[str, tuple[int, ...]]]  # ids and tokens


def _each(queries: list[Encoded], lm: LM) -> engines.Score:
    """Return a function from contexts, their tokens, to the queries' log-likelihoods."""
    return lambda contexts: [language_model.log_likelihoods(lm, queries, contexts)]


def _each_once(queries: list[Encoded], lm: LM) -> engines.Score:
    """Return the same for contexts of which many are equal; see `_together`."""
    known: dict[str, np.ndarray] = {}

    def score(wanted: list[tuple[str, Contexts]]) -> list[np.ndarray]:
        for name, group in wanted:
            if name not in known:
                found = language_model.log_likelihoods(lm, queries, [tokens for _, tokens in group])
                known.update(zip((other for other, _ in group), found, strict=True))
        return [np.stack([known[name] for name, _ in wanted])]

    return score


def _together(contexts: Contexts) -> dict[str, Contexts]:
    """Return with which others each distinct context is scored, by its id.

    Always the same ones, so a resumed run gives the same bytes.
    """
    distinct = list(dict(contexts).items())
    starts = range(0, len(distinct), TEXTS_TOGETHER)
    groups = [distinct[start : start + TEXTS_TOGETHER] for start in starts]
    return {name: group for group in groups for name, _ in group}


def find(
    experiment: Experiment,
    made_by: str,
    preamble: str = "",
    neutral: bool = True,
) -> Probe:
    """Return finished scores; needs neither the model nor the data.

    Args:
        experiment: What was scored.
        made_by: What to run if the scores are not there, for the error message.
        preamble: See `log_likelihoods`.
        neutral: Whether the neutral twins are wanted, too.

    Raises:
        store.ScoresNotFound: If they are not there.
    """
    scores = {
        method: experiment.find(method, options, made_by).matrix()
        for method, options in _options(preamble, neutral).items()
    }
    return Probe(scores["zero_shot"][0], scores["icp"], scores.get("icp_neutral"))


def _options(preamble: str, neutral: bool) -> dict[str, dict]:
    """Return the options that determine each method's scores, beside the experiment."""
    frame = {"template": TEMPLATE_VERSION, "preamble": preamble, "separator": SEPARATOR}
    twins = {**frame, "text": NEUTRAL_TEXT, "steps": NEUTRAL_STEPS, "frame": NEUTRAL_FRAME}
    options = {"zero_shot": {"template": TEMPLATE_VERSION}, "icp": frame, "icp_neutral": twins}
    return options if neutral else {k: v for k, v in options.items() if k != "icp_neutral"}


def gain(log_likelihoods: np.ndarray, zero_shot: np.ndarray) -> np.ndarray:
    """Return G = l - l0: [N, M] nats from [N, M] and [M]; positive = the demonstration helps."""
    return log_likelihoods - zero_shot


def icp_score(gain: np.ndarray) -> np.ndarray:
    """Return the published score, the share of queries helped: [N] in [0, 1] from gains [N, M].

    A tie (a gain of exactly zero) does not count as help.
    """
    return (gain > 0).mean(axis=1)


def gain_per_token(gain: np.ndarray, completion_tokens: np.ndarray) -> np.ndarray:
    """Return gains in nats per completion token: [N, M] from [N, M] and token counts [M]."""
    return gain / np.asarray(completion_tokens)


def reference(lm: LM, query: Encoded, demonstration: Encoded, preamble: str = "") -> float:
    """Return one pair's log-likelihood in nats from one plain forward pass: slow, for checks."""
    before = context(lm, demonstration, preamble)
    return float(language_model.token_log_likelihoods(lm, query, before).sum())


def findings(
    probe: Probe, same_task: np.ndarray, tokens: np.ndarray, rng: np.random.Generator
) -> pd.DataFrame:
    """Return the headline numbers with 95 % intervals over training examples and queries.

    Args:
        probe: The scores.
        same_task: [N, M] bool, whether the pair shares its task.
        tokens: [N] length of each training example.
        rng: For the bootstrap.

    Returns:
        One row per quantity: quantity, unit, estimate, low, high, n.
    """
    gain, neutral = probe.gain, probe.neutral_gain
    helped, every_pair = (gain > 0).astype(float), np.ones_like(same_task)
    length = np.broadcast_to(tokens[:, None], gain.shape).astype(float)
    means = {
        ("pairs with a gain", "share"): (helped, every_pair),
        ("mean gain, same task", "nats"): (gain, same_task),
        ("mean gain, other tasks", "nats"): (gain, ~same_task),
        ("mean neutral gain, same task", "nats"): (neutral, same_task),
        ("mean neutral gain, other tasks", "nats"): (neutral, ~same_task),
        ("mean gain over neutral, same task", "nats"): (gain - neutral, same_task),
        ("mean gain over neutral, other tasks", "nats"): (gain - neutral, ~same_task),
    }
    agreements = {
        ("ICP score against mean gain", "Spearman"): (helped, gain),
        ("length against ICP score", "Spearman"): (length, helped),
        ("length against mean gain", "Spearman"): (length, gain),
    }
    return statistics.findings(means, agreements, rng)
