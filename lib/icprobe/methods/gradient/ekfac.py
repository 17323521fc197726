"""Influence functions with EK-FAC curvature, through the library kronfluence.

    ekfac_ij = < grad L(z_i), (H + damping)^-1 grad L(q_j) >

where H is the eigenvalue-corrected Kronecker-factored approximation (George et al. 2018) of the
Fisher information of each linear layer's weight, as Grosse et al. 2023 use it for language models.
"""

import importlib.util
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from icprobe import models
from icprobe.methods.gradient import losses
from icprobe.methods.gradient.layers import linear_layers
from icprobe.models import LM, Encoded

CURVATURE = "ekfac"  # of those that kronfluence knows
# added to every eigenvalue of H; None is a tenth of each layer's mean, as Grosse et al. take it
DAMPING = None

# GiB of whole query gradients held at once (4 bytes for each weight of the chosen layers)
MEMORY = 4.0


class EKFAC:
    """The curvature and the queries of influence functions, ready for any training examples.

    Attributes:
        size: M.
    """

    def __init__(
        self,
        lm: LM,
        queries: Iterable,
        fit_on: Iterable,
        layers: str = "",
        seed: int = 0,
        loss_on: str = "completion",
        max_length: int | None = None,
        memory: float = MEMORY,
    ) -> None:
        """Fit the curvature.

        Args:
            lm: The model; it is left as it was.
            queries: M rows with id, prompt, completion (or encoded already).
            fit_on: Rows like them that H is the mean over, usually (a sample of) the pool.
            layers: See `layers.linear_layers`; weights only, as everywhere.
            seed: Of the labels that H is computed with: drawn from the model's own predictions at
                the tokens of the loss, for each example the same whatever it is batched with.
            loss_on: Loss of the training examples, see `dot.GradientDot.products`.
            max_length: See `models.encode`.
            memory: GiB of query gradients held at once; the training examples are read again for
                each.

        Raises:
            ImportError: If kronfluence is not installed; says how.
            ValueError: If an option is unknown, no layer matches, there are no examples, or a
                completion has no tokens.
        """
        _check_installed()
        from kronfluence.arguments import FactorArguments

        self._lm, self._seed, self._max_length, self._loss_on = lm, seed, max_length, loss_on
        self._layers = linear_layers(lm, layers)
        self._queries = models.encode(lm, queries, max_length)
        self.size = len(self._queries)
        fit_on = models.encode(lm, fit_on, max_length)
        weights = sum(layer.weight.nbytes for layer in self._layers.values())
        self._queries_per_pass = _per_pass(lm, self._queries)
        self._passes_held = max(1, int(memory * 2**30 / weights) // self._queries_per_pass)
        self._folder = tempfile.TemporaryDirectory(prefix="icprobe-")  # removed with this object
        with self._analyzer([(z, loss_on) for z in fit_on]) as analyzer:
            analyzer.fit_all_factors(
                "factors",
                dataset=_by_length(fit_on),
                per_device_batch_size=_per_pass(lm, fit_on),
                factor_args=FactorArguments(strategy=CURVATURE),
            )

    def scores(self, train: Iterable) -> np.ndarray:
        """Return influence functions for all pairs: float32 [N, M], positive = helps.

        In nats: nats per unit of learning rate, over the curvature's nats per squared weight.

        Args:
            train: N rows like the queries.

        Raises:
            ValueError: If there are no examples, or a completion has no tokens.
            FloatingPointError: If scores are not finite; names the pair.
        """
        from kronfluence.arguments import ScoreArguments

        train, queries = models.encode(self._lm, train, self._max_length), self._queries
        everything = [(z, self._loss_on) for z in train]
        everything += [(q, "completion") for q in queries]
        rows, columns = _by_length(train), _by_length(queries)
        with self._analyzer(everything) as analyzer:
            analyzer.compute_pairwise_scores(
                "scores",
                factors_name="factors",
                query_dataset=[len(train) + j for j in columns],
                train_dataset=rows,
                per_device_query_batch_size=self._queries_per_pass,
                per_device_train_batch_size=_per_pass(self._lm, train),
                score_args=ScoreArguments(
                    damping_factor=DAMPING,
                    query_gradient_accumulation_steps=self._passes_held,
                ),
                overwrite_output_dir=True,
            )
            found = analyzer.load_pairwise_scores("scores")["all_modules"].T.double().numpy()
        scores = np.empty_like(found)
        scores[np.ix_(rows, columns)] = found
        if not np.isfinite(scores).all():
            i, j = np.argwhere(~np.isfinite(scores))[0]
            raise FloatingPointError(f"not finite: {train[i].id!r} on {queries[j].id!r}")
        return scores.astype(np.float32)

    @contextmanager
    def _analyzer(self, everything: list[tuple[Encoded, str]]) -> Iterator:
        """Prepare the model and yield kronfluence's analyzer for places in `everything`."""
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.utils.dataset import DataLoaderKwargs

        lm = self._lm
        task = _task(lm, list(self._layers), everything, self._seed)
        with _plain_layers(lm, self._layers), _quietly():
            prepare_model(lm.model, task)
            analyzer = Analyzer(
                "ekfac", lm.model, task, cpu=lm.device.type == "cpu", disable_tqdm=True,
                output_dir=self._folder.name, log_level=50,
            )  # fmt: skip
            analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=torch.tensor))
            yield analyzer


def _task(lm: LM, names: list[str], everything: list[tuple[Encoded, str]], seed: int):
    """Return what kronfluence asks for: the losses, the layers and where padding is.

    A batch is a tensor of places in `everything`, (example, loss_on).
    """
    from kronfluence.task import Task

    class LanguageModelling(Task):
        def compute_train_loss(self, batch, model, sample=False):
            items = [everything[i] for i in batch]
            examples, (_, loss_on) = [item[0] for item in items], items[0]
            ids, rows, columns, targets, weights = losses.loss_inputs(lm, examples, loss_on)
            with models.selective_head(lm):
                logits = models.logits_at(lm, rows, columns, input_ids=ids.to(lm.device))
            if sample:
                targets = _sampled(logits.detach(), rows, batch.tolist(), seed)
            nats = nn.functional.cross_entropy(logits, targets, reduction="none")
            return (nats * weights).sum()

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return [f"{name}.linear" for name in names]

        def get_attention_mask(self, batch):
            lengths = torch.tensor([len(lm.bos) + len(everything[i][0].ids) - 1 for i in batch])
            return (torch.arange(int(lengths.max())) < lengths[:, None]).long().to(lm.device)

    return LanguageModelling()


def _sampled(
    logits: torch.Tensor, rows: torch.Tensor, indices: Sequence[int], seed: int
) -> torch.Tensor:
    """Draw a label for each position [S] from logits [S, V]; each example has its own stream."""
    draws = torch.empty(len(rows), dtype=torch.float64)
    for row, index in enumerate(indices):
        stream = np.random.default_rng((seed, index))
        draws[rows == row] = torch.from_numpy(stream.random(int((rows == row).sum())))
    levels = logits.double().softmax(-1).cumsum(-1)
    labels = torch.searchsorted(levels, draws.to(logits.device)[:, None] * levels[:, -1:])
    return labels[:, 0].clamp(max=logits.shape[-1] - 1)


class _Plain(nn.Module):
    """A linear layer as kronfluence knows them and without the bias, which stays a constant."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        weight = layer.weight if isinstance(layer, nn.Linear) else layer.weight.T
        self.linear = nn.Linear(1, 1, bias=False, device="meta")
        self.linear.weight = nn.Parameter(weight.detach())
        self.linear.out_features, self.linear.in_features = weight.shape
        self.bias = layer.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output = self.linear(x)
        return output if self.bias is None else output + self.bias


@contextmanager
def _plain_layers(lm: LM, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Put plain layers in the place of the chosen ones, and these back at the end."""
    learning = {p: p.requires_grad for p in lm.model.parameters()}
    places = {name: name.rpartition(".") for name in layers}
    try:
        for name, layer in layers.items():
            parent, _, attribute = places[name]
            setattr(lm.model.get_submodule(parent), attribute, _Plain(layer))
        yield
    finally:
        for name, layer in layers.items():
            parent, _, attribute = places[name]
            setattr(lm.model.get_submodule(parent), attribute, layer)
        for parameter, requires_grad in learning.items():
            parameter.requires_grad_(requires_grad)


@contextmanager
def _quietly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def _per_pass(lm: LM, examples: Sequence[Encoded]) -> int:
    """Return how many examples of any length fit in one forward and backward pass."""
    if not examples:
        raise ValueError("there are no examples")
    longest = max(len(lm.bos) + len(example.ids) for example in examples)
    return max(1, losses.tokens_per_pass(lm) // longest)


def _by_length(examples: Sequence[Encoded]) -> list[int]:
    """Return the examples' numbers, the shortest first, so that little is padded."""
    return sorted(range(len(examples)), key=lambda i: len(examples[i].ids))


def _check_installed() -> None:
    if importlib.util.find_spec("kronfluence") is None:
        raise ImportError(
            "EK-FAC needs kronfluence: pip install --no-deps -r requirements-no-deps.txt"
        )
