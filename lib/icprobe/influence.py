"""Gradient-based influence: what a training step on one example does to the queries' losses.

Everything is [N, M] for N training examples and M queries, positive = the training example helps: a
small step on it lowers the query's loss. With L the negative log-likelihood of a completion in nats
and the gradients by the weights w of the blocks' linear layers,

    gradient_dot_ij = < grad_w L(z_i), grad_w L(q_j) >

is the first-order decrease of L(q_j) per unit of learning rate in one step of gradient descent on
z_i: TracIn at one checkpoint (Pruthi et al. 2020), which Jiao et al. 2025 compare probing with.
"""

from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from icprobe import gradients
from icprobe import lm as language_model
from icprobe.lm import LM, Encoded

# tokens in one forward and backward pass, padding included; more would only cost memory
TOKENS_PER_PASS = {"cpu": 512, "cuda": 8192}


class GradientDot:
    """The queries' gradients, ready for any number of training examples.

    Attributes:
        size: M.
    """

    def __init__(
        self, lm: LM, queries: Iterable, layers: str = "", max_length: int | None = None
    ) -> None:
        """Compute the factors of the queries' gradients: one forward and backward pass each.

        Args:
            lm: The model.
            queries: M rows with id, prompt, completion (or encoded already).
            layers: See `gradients.linear_layers`.
            max_length: Most tokens of one example, see `lm.encode`.

        Raises:
            ValueError: If no layer matches, or a query has no completion tokens.
            FloatingPointError: If a gradient is not finite; names the queries.
        """
        self.lm, self.layers, self.max_length = lm, layers, max_length
        encoded = language_model.encode(lm, queries, max_length)
        self.size = len(encoded)
        self._parts = [
            (batch, gradients.factors(lm, [encoded[j] for j in batch], layers))
            for batch in _batches(lm, encoded)
        ]

    def products(
        self,
        train: Iterable,
        loss_on: str = "completion",
        reduction: str = "sum",
        cosine: bool = False,
    ) -> np.ndarray:
        """Return the gradient dot products: float32 [N, M], in nats per unit of learning rate.

        Each training example needs one forward and one backward pass, whatever M is.

        Args:
            train: N rows like the queries.
            loss_on: "completion", or "text" to train on the prompt, too (as published).
            reduction: "sum" or "mean" of the training loss over these tokens; queries are summed.
            cosine: Divide by both gradients' norms: without unit, in [-1, 1].

        Raises:
            ValueError: If an example has no completion tokens.
            FloatingPointError: If a gradient is not finite; names the examples.
        """
        encoded = language_model.encode(self.lm, train, self.max_length)
        scores = np.zeros((len(encoded), self.size))
        for rows in _batches(self.lm, encoded):
            examples = [encoded[i] for i in rows]
            mine = gradients.factors(self.lm, examples, self.layers, loss_on, reduction)
            norms = gradients.squared_norms(mine).sqrt().cpu().numpy() if cosine else 1.0
            for columns, theirs in self._parts:
                block = gradients.products(mine, theirs).cpu().numpy()
                scores[np.ix_(rows, columns)] = (block.T / norms).T
        if cosine:
            scores /= self._norms()
        return scores.astype(np.float32)

    def _norms(self) -> np.ndarray:
        """Return the norms of the queries' gradients: [M]."""
        norms = np.zeros(self.size)
        for columns, theirs in self._parts:
            norms[columns] = gradients.squared_norms(theirs).sqrt().cpu().numpy()
        return norms


def gradient_dot(
    lm: LM,
    train: Iterable,
    queries: Iterable,
    layers: str = "",
    loss_on: str = "completion",
    reduction: str = "sum",
    cosine: bool = False,
    max_length: int | None = None,
) -> np.ndarray:
    """Return <grad L(z_i), grad L(q_j)> for all pairs: float32 [N, M], positive = helps.

    Exact: products of the layers' inputs and output gradients (see `gradients`), which are kept for
    all queries; a query of T tokens takes about T times a megabyte for SmolLM2-135M. See
    `GradientDot` for the arguments and errors, and to score a pool block by block.
    """
    influence = GradientDot(lm, queries, layers, max_length)
    return influence.products(train, loss_on, reduction, cosine)


def _batches(lm: LM, examples: Sequence[Encoded]) -> Iterator[list[int]]:
    """Cut examples into batches of like length, so that little is padded: lists of indices."""
    budget = TOKENS_PER_PASS.get(lm.device.type, 512)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    batch: list[int] = []
    for i in order:
        if batch and (len(batch) + 1) * len(examples[i].ids) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
