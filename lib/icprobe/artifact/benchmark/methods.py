"""What is timed: methods of this library, plain loops and other libraries; and on which pairs."""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from icprobe import data, models
from icprobe.data import assets
from icprobe.methods import baselines, costs, gradient, icp
from icprobe.methods.costs import Cost, Lengths, Shape
from icprobe.methods.gradient import losses
from icprobe.models import LM, Encoded
from icprobe.scores import Examples

NATS, PRODUCTS = "log-likelihoods", "gradient products"
OURS = "icprobe, "  # how the names of our own methods begin
PROJECTION = 16  # rows of each random matrix of projected gradients
MEMORY = 6  # GiB of gradient factors
PLAIN_BATCH = 8
LENGTHS = ("grid", "long")  # of examples: as they are in this suite, or made of several
LONG = 90  # tokens that a long example has at least


class Method(NamedTuple):
    """One way to scores [N, M], or to their means over the queries [N, 1]."""

    kind: str  # methods of one kind do the same work
    quantity: str
    min_cost: Callable[[Shape, Lengths], Cost]
    run: Callable[[LM, list[Encoded], list[Encoded]], np.ndarray] | None = None  # a peer has none
    script: tuple[str, ...] = ()  # in benchmarks/peers, and its arguments
    environment: str = ""  # of another library; "" is the project's own
    holds_full_gradients: bool = False  # of the model's size, for all queries at once


PROBING = "probing", NATS, costs.probing
EXACT = "gradient products", PRODUCTS, costs.gradient_products
PROJECTED = "projected", PRODUCTS, costs.projected  # estimates
QUERY_SET = "query set", "mean gradient product", costs.query_set
HIDDEN_STATES = "hidden states", "similarity", costs.reading


def _projected(lm, train, queries):
    (one,), (other,) = (
        gradient.projected_gradients(lm, rows, [PROJECTION]) for rows in (train, queries)
    )
    return one @ other.T


def _plain_probing(lm, train, queries):
    """Return log-likelihoods as one would write them down: pair by pair, in padded batches."""
    contexts = [icp.context(lm, example) for example in train]
    pairs = [models.sequence(lm, query, shown) for shown in contexts for query in queries]
    padded, nats = functools.partial(pad_sequence, batch_first=True), []
    with torch.inference_mode():
        for start in range(0, len(pairs), PLAIN_BATCH):
            tokens, masks = zip(*pairs[start : start + PLAIN_BATCH], strict=True)
            ids, scored = (padded([torch.tensor(row) for row in part]) for part in (tokens, masks))
            real = padded([torch.ones(len(row), dtype=torch.long) for row in tokens])
            ids, scored, real = (part.to(lm.device) for part in (ids, scored, real))
            logits = lm.model(ids, attention_mask=real).logits[:, :-1]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            chosen = logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
            nats += (chosen * scored[:, 1:]).sum(1).tolist()
    return np.array(nats).reshape(len(train), len(queries))


def _plain_products(lm, train, queries):
    """Return gradient products as one would write them down: autograd, one example at a time."""
    weights = [layer.weight for layer in gradient.linear_layers(lm).values()]
    theirs = [
        torch.empty(len(queries), weight.numel(), dtype=weight.dtype, device=lm.device)
        for weight in weights
    ]
    for j, query in enumerate(queries):
        for rows, part in zip(theirs, losses.full_gradient(lm, query, weights), strict=True):
            rows[j] = part.flatten()
    scores = torch.zeros(len(train), len(queries), dtype=torch.float64)
    for i, example in enumerate(train):
        for rows, part in zip(theirs, losses.full_gradient(lm, example, weights), strict=True):
            scores[i] += (rows @ part.flatten()).double().cpu()
    return scores.numpy()


def _hidden_states(lm, train, queries):
    pool, asked = (Examples([{"id": one.id} for one in part], part) for part in (train, queries))
    embedding = baselines.Embedding()
    return embedding.score(embedding.prepare(lm, asked, pool), pool)


def _peers(name, batches, kind, script, projection=0, whole=False):
    """Return a peer's methods by name, one for each batch size."""
    library = name.partition(",")[0]
    environment = "" if library == "kronfluence" else library  # the project's has that
    arguments = script, "--projection", str(projection), "--batch"
    options = {"environment": environment, "holds_full_gradients": whole}
    return {
        f"{name}, batch {batch}": Method(*kind, script=(*arguments, str(batch)), **options)
        for batch in batches
    }


METHODS = {
    "icprobe, probing": Method(
        *PROBING, lambda lm, train, queries: icp.log_likelihoods(lm, queries, train)
    ),
    "transformers, plain loop": Method(*PROBING, _plain_probing),
    **_peers("lm-eval", (1, 8, 32), PROBING, "lm_eval_probing.py"),
    "icprobe, gradient products": Method(
        *EXACT, functools.partial(gradient.gradient_dot, memory=MEMORY)
    ),
    "autograd, one by one": Method(*EXACT, _plain_products, holds_full_gradients=True),
    **_peers("kronfluence", (4, 16), EXACT, "kronfluence_identity.py"),
    **_peers("bergson", (1, 4), EXACT, "bergson_products.py", whole=True),
    **_peers("captum", (1, 4), EXACT, "captum_tracin.py", whole=True),
    "icprobe, projected": Method(*PROJECTED, _projected),
    **_peers("bergson, projected", (4, 16), PROJECTED, "bergson_products.py", PROJECTION),
    **_peers("dattri, projected", (4, 16), PROJECTED, "dattri_logra.py", PROJECTION),
    "icprobe, query set": Method(*QUERY_SET, lambda *work: gradient.mean_influence(*work)[:, None]),
    "icprobe, hidden states": Method(*HIDDEN_STATES, _hidden_states),
}

# what everything is compared with, in float64
PLAIN = {NATS: "transformers, plain loop", PRODUCTS: "autograd, one by one"}


def examples(lm: LM, lengths: str, n: int, m: int) -> tuple[list[Encoded], list[Encoded]]:
    """Return N training examples and M queries of grid, or long ones joined from its rows.

    A split that is too small is gone through again.
    """
    found = []
    for split, size in (("train", n), ("query", m)):
        rows = list(data.load("grid", split, seed=0))
        rows = _joined(lm, rows, size) if lengths == "long" else rows[:size]
        found.append(list(itertools.islice(itertools.cycle(models.encode(lm, rows)), size)))
    return found[0], found[1]


def _joined(lm: LM, rows: list[dict], size: int) -> list[dict]:
    """Return the first rows, each with as many of the next ones of its task as make it long."""
    tokens = [len(encoded.ids) for encoded in models.encode(lm, rows)]
    step = len({row["task"] for row in rows})  # every so many rows, a task comes again
    joined = []
    for start in range(min(size, len(rows))):
        part, length = [], 0
        while length < LONG:
            k = (start + len(part) * step) % len(rows)
            part.append(rows[k])
            length += tokens[k]
        joined.append({
            "id": "+".join(row["id"] for row in part),
            "prompt": "\n".join(row["prompt"] for row in part),
            "completion": "".join(row["completion"] for row in part),
        })  # fmt: skip
    return joined


def exchange(model: str, lm: LM, train: Sequence[Encoded], queries: Sequence[Encoded]) -> dict:
    """Return what a method needs to know as JSON: a folder or hub name, settings and token ids.

    Ids include the beginning-of-sequence token, if the model has one (`begin` says how many);
    `start` is the position of the first completion token.
    """
    begin = len(lm.bos)

    def told(rows: Sequence[Encoded]) -> list[dict]:
        return [{"ids": [*lm.bos, *row.ids], "start": begin + len(row.prompt)} for row in rows]

    return {
        "model": assets.model_path(model),
        "dtype": lm.identity["dtype"],
        "device": lm.device.type,
        "threads": torch.get_num_threads(),
        "begin": begin,
        "contexts": [[*lm.bos, *icp.context(lm, example)] for example in train],
        "train": told(train),
        "queries": told(queries),
    }
