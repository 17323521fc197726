"""Gradient products by captum: TracInCP with one checkpoint of weight one."""

import exchange
import torch
from captum.influence import TracInCP
from torch.utils.data import DataLoader

options = exchange.arguments()
work, batch = options.work, options.batch
model = exchange.model(work)
names = exchange.linear_layers(model)


class Logits(torch.nn.Module):
    """Takes inputs one by one and returns logits, as captum wants it."""

    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask):
        return self.model(input_ids=input_ids, attention_mask=attention_mask).logits


class Loss(torch.nn.Module):
    """The summed loss, which says so."""

    reduction = "sum"

    def forward(self, logits, labels):
        return exchange.loss(logits, labels)


def batches(rows):
    """Return a loader of tuples, labels last."""
    labelled = [exchange.labelled(row) for row in rows]
    return DataLoader(
        labelled, batch_size=batch, collate_fn=lambda some: tuple(exchange.padded(some).values())
    )


def products(work):
    """Return [N, M]."""
    tracin = TracInCP(
        Logits().eval(),
        batches(work["train"]),
        checkpoints=["the only one"],
        checkpoints_load_func=lambda model, path: 1.0,
        layers=[f"model.{name}" for name in names],
        loss_fn=Loss(),
        sample_wise_grads_per_batch=True,
    )
    return tracin.influence(batches(work["queries"])).T.detach().numpy()


exchange.timed("captum", products, options)
