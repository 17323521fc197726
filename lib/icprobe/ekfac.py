"""Influence functions with EK-FAC curvature, through the library kronfluence.

    ekfac_ij = < grad L(z_i), (H + damping)^-1 grad L(q_j) >

where H is the eigenvalue-corrected Kronecker-factored approximation (George et al. 2018) of the
Fisher information of each linear layer's weight, as Grosse et al. 2023 use it for language models.
"""

import itertools
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from icprobe import gradients
from icprobe import lm as language_model
from icprobe.lm import LM, Encoded

CURVATURES = ("ekfac", "kfac", "diagonal", "identity")

# GiB of whole query gradients held at once (4 bytes for each weight of the chosen layers)
MEMORY = 4.0


def ekfac(
    lm: LM,
    train: Iterable,
    queries: Iterable,
    layers: str = "",
    damping: float | None = None,
    curvature: str = "ekfac",
    fit_on: Iterable | None = None,
    seed: int = 0,
    loss_on: str = "completion",
    reduction: str = "sum",
    max_length: int | None = None,
    memory: float = MEMORY,
) -> np.ndarray:
    """Return influence functions for all pairs: float32 [N, M], positive = helps.

    Unit: nats per unit of learning rate, over that of the curvature (nats per squared weight) and
    thus nats; with curvature "identity" it is `influence.gradient_dot`, to which `damping` times
    the scores also tend where the damping is large.

    Args:
        lm: The model; it is left as it was.
        train: N rows with id, prompt, completion (or encoded already).
        queries: M rows like them.
        layers: See `gradients.linear_layers`; weights only, as everywhere.
        damping: Added to every eigenvalue of H. None takes a tenth of each layer's mean eigenvalue,
            as Grosse et al. do.
        curvature: One of `CURVATURES`.
        fit_on: Examples that H is the mean over; the training examples by default.
        seed: Of the labels that H is computed with: drawn from the model's own predictions at the
            tokens of the loss, for each example the same whatever it is batched with.
        loss_on: Loss of the training examples, see `influence.GradientDot.products`.
        reduction: The same.
        max_length: See `lm.encode`.
        memory: GiB of query gradients held at once; the training examples are read again for each.

    Raises:
        ImportError: If kronfluence is not installed; says how.
        ValueError: If an option is unknown, no layer matches, or a completion has no tokens.
        FloatingPointError: If scores are not finite; names the pair.
    """
    if curvature not in CURVATURES:
        raise ValueError(f"curvature is {curvature!r}, expected one of {', '.join(CURVATURES)}")
    try:
        from kronfluence.analyzer import Analyzer, prepare_model
        from kronfluence.arguments import FactorArguments, ScoreArguments
        from kronfluence.utils.dataset import DataLoaderKwargs
    except ImportError as error:
        raise ImportError(
            "EK-FAC needs kronfluence: pip install --no-deps -r requirements-no-deps.txt"
        ) from error
    train, queries = (language_model.encode(lm, rows, max_length) for rows in (train, queries))
    fitted = train if fit_on is None else language_model.encode(lm, fit_on, max_length)
    everything = [(z, loss_on, reduction) for z in (*fitted, *train)]
    everything += [(q, "completion", "sum") for q in queries]
    ends = np.cumsum([0, len(fitted), len(train), len(queries)])
    fit, pool, asked = (
        sorted(range(start, stop), key=lambda i: len(everything[i][0].ids))
        for start, stop in itertools.pairwise(ends.tolist())
    )
    chosen = gradients.linear_layers(lm, layers)
    size = sum(layer.weight.nbytes for layer in chosen.values())
    for_fit, for_train, for_query = (_per_pass(lm, rows) for rows in (fitted, train, queries))
    held = max(1, int(memory * 2**30 / size) // for_query)
    task = _task(lm, list(chosen), everything, seed)
    with _plain_layers(lm, chosen), tempfile.TemporaryDirectory() as folder, _quietly():
        prepare_model(lm.model, task)
        analyzer = Analyzer(
            "ekfac", lm.model, task, cpu=lm.device.type == "cpu", output_dir=folder,
            disable_tqdm=True, log_level=50,
        )  # fmt: skip
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=torch.tensor))
        analyzer.fit_all_factors(
            "factors",
            dataset=fit,
            per_device_batch_size=for_fit,
            factor_args=FactorArguments(strategy=curvature),
        )
        analyzer.compute_pairwise_scores(
            "scores",
            factors_name="factors",
            query_dataset=asked,
            train_dataset=pool,
            per_device_query_batch_size=for_query,
            per_device_train_batch_size=for_train,
            score_args=ScoreArguments(
                damping_factor=damping, query_gradient_accumulation_steps=held
            ),
        )
        found = analyzer.load_pairwise_scores("scores")["all_modules"].T.double().numpy()
    scores = np.empty_like(found)
    scores[np.ix_(np.array(pool) - ends[1], np.array(asked) - ends[2])] = found
    if not np.isfinite(scores).all():
        i, j = np.argwhere(~np.isfinite(scores))[0]
        raise FloatingPointError(f"not finite: {train[i].id!r} on {queries[j].id!r}")
    return scores.astype(np.float32)


def _task(lm: LM, names: list[str], everything: list[tuple[Encoded, str, str]], seed: int):
    """Return what kronfluence asks for: the losses, the layers and where padding is.

    A batch is a tensor of places in `everything`, (example, loss_on, reduction).
    """
    from kronfluence.task import Task

    class LanguageModelling(Task):
        def compute_train_loss(self, batch, model, sample=False):
            items = [everything[i] for i in batch]
            examples, (_, loss_on, reduction) = [item[0] for item in items], items[0]
            ids, rows, columns, targets, weights = gradients.loss_inputs(
                lm, examples, loss_on, reduction
            )
            with language_model.selective_head(lm):
                logits = language_model.logits_at(lm, rows, columns, input_ids=ids.to(lm.device))
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
    longest = max(len(lm.bos) + len(example.ids) for example in examples)
    return max(1, gradients.TOKENS_PER_PASS.get(lm.device.type, 256) // longest)
