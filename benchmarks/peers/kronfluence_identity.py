"""Gradient products by kronfluence: pairwise scores with the identity for its curvature.

As many queries as there is memory for are one batch; each of these reads all training examples.
"""

import tempfile

import exchange
import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments
from kronfluence.task import Task
from kronfluence.utils.dataset import DataLoaderKwargs

TOGETHER = 24  # queries whose gradients are held, each of the model's size

options = exchange.arguments()
work, batch = options.work, options.batch
model = exchange.model(work)
names = exchange.linear_layers(model)


class Completion(Task):
    """The negative log-likelihood of completions, for training examples and queries."""

    def compute_train_loss(self, batch, model, sample=False):
        logits = model(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            logits_to_keep=exchange.needed(batch["labels"]),
        ).logits
        return exchange.loss(logits, batch["labels"])

    def compute_measurement(self, batch, model):
        return self.compute_train_loss(batch, model)

    def get_influence_tracked_modules(self):
        return names

    def get_attention_mask(self, batch):
        return batch["attention_mask"]


class Rows(torch.utils.data.Dataset):
    """Labelled rows."""

    def __init__(self, rows):
        self.rows = [exchange.labelled(row) for row in rows]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


task = Completion()
model = prepare_model(model, task)


def products(work):
    """Return [N, M]."""
    train, queries = Rows(work["train"]), Rows(work["queries"])
    with tempfile.TemporaryDirectory() as folder:
        analyzer = Analyzer(
            "peer", model, task, cpu=True, output_dir=folder, disable_tqdm=True,
            disable_model_save=True,
        )  # fmt: skip
        analyzer.set_dataloader_kwargs(DataLoaderKwargs(collate_fn=exchange.padded))
        analyzer.fit_all_factors(
            "f", train, per_device_batch_size=batch, factor_args=FactorArguments("identity")
        )
        analyzer.compute_pairwise_scores(
            "s", "f", queries, train,
            per_device_query_batch_size=min(len(queries), TOGETHER),
            per_device_train_batch_size=batch,
        )  # fmt: skip
        return analyzer.load_pairwise_scores("s")["all_modules"].T.float().numpy()


exchange.timed("kronfluence", exchange.by_length(products), options)
