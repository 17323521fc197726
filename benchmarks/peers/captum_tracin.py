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
    """Takes inputs one by one and returns logits of the last positions, as captum wants it."""

    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, input_ids, attention_mask, needed):
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, logits_to_keep=int(needed[0])
        ).logits


class Loss(torch.nn.Module):
    """The summed loss, which says so."""

    reduction = "sum"

    def forward(self, logits, labels):
        return exchange.loss(logits, labels)


def batches(rows):
    """Return a loader of tuples, labels last."""

    def collated(some):
        ids, mask, labels = exchange.padded(some).values()
        return ids, mask, torch.full((len(ids),), exchange.needed(labels)), labels

    labelled = [exchange.labelled(row) for row in rows]
    return DataLoader(labelled, batch_size=batch, collate_fn=collated)


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


exchange.timed("captum", exchange.by_length(products), options)
