"""What kronfluence asks for: the losses, the layers as it knows them, and where padding is."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs
from torch import nn

from icprobe.methods.gradient import losses
from icprobe.models import LM, Encoded

Losses = list[tuple[Encoded, str]]  # examples, and what of each the loss is on


@contextmanager
def analyzer(
    lm: LM, layers: dict[str, nn.Module], everything: Losses, seed: int, folder: str
) -> Iterator[Analyzer]:
    """Prepare the model and yield an analyzer for places in `everything`; it writes to a folder."""
    task = _LanguageModelling(lm, list(layers), everything, seed)
    with _plain_layers(lm, layers), warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        prepare_model(lm.model, task)
        made = Analyzer(
            "ekfac", lm.model, task, cpu=lm.device.type == "cpu", disable_tqdm=True,
            output_dir=folder, log_level=50,
        )  # fmt: skip
        made.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=torch.tensor))
        yield made


class _LanguageModelling(Task):
    """A batch is a tensor of places in `everything`."""

    def __init__(self, lm: LM, names: list[str], everything: Losses, seed: int) -> None:
        self.lm, self.names, self.everything, self.seed = lm, names, everything, seed

    def compute_train_loss(self, batch, model, sample=False):
        """Return the summed loss of a batch in nats, of sampled labels if asked for."""
        examples, loss_on = zip(*(self.everything[i] for i in batch), strict=True)
        *places, targets = losses.loss_inputs(self.lm, examples, loss_on[0])
        logits = losses.logits_of(self.lm, *places)
        if sample:
            targets = _sampled(logits.detach(), places[1], batch.tolist(), self.seed)
        return nn.functional.cross_entropy(logits, targets, reduction="none").double().sum()

    def compute_measurement(self, batch, model):
        """Return the summed loss of a batch of queries in nats."""
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        """Return the names of the layers."""
        return [f"{name}.linear" for name in self.names]

    def get_attention_mask(self, batch):
        """Return 1 where tokens are real, 0 at padding: [n, T]."""
        sizes = [len(self.lm.bos) + len(self.everything[i][0].ids) - 1 for i in batch]
        lengths = torch.tensor(sizes)
        return (torch.arange(max(sizes)) < lengths[:, None]).long().to(self.lm.device)


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
        """Return the outputs, the constant bias added."""
        output = self.linear(x)
        return output if self.bias is None else output + self.bias


@contextmanager
def _plain_layers(lm: LM, layers: dict[str, nn.Module]) -> Iterator[None]:
    """Put plain layers in the place of the chosen ones, and these back at the end."""
    learning = {p: p.requires_grad for p in lm.model.parameters()}
    try:
        for name, layer in layers.items():
            lm.model.set_submodule(name, _Plain(layer))
        yield
    finally:
        for name, layer in layers.items():
            lm.model.set_submodule(name, layer)
        for parameter, requires_grad in learning.items():
            parameter.requires_grad_(requires_grad)
