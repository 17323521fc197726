"""Products of projected gradients by dattri: LoGra with the identity for its curvature.

Its other way to gradient products (TracInAttributor) makes a pass over all weights for each weight
matrix, which does not end in reasonable time.
"""

import tempfile

import exchange
import torch
from dattri.algorithm.logra import LoGraAttributor
from dattri.task import AttributionTask
from torch.utils.data import DataLoader

options = exchange.arguments()
work = options.work
net = exchange.model(work)
layers = exchange.linear_layers(net)
size = options.projection**2  # numbers a layer


class Completion(torch.nn.Module):
    """The model with the loss of completions in its output, from where LoGra takes it."""

    def __init__(self):
        super().__init__()
        self.model = net

    def forward(self, input_ids, attention_mask, labels):
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            logits_to_keep=exchange.needed(labels),
        )
        # the mean over the batch, by whose size LoGra multiplies gradients again
        output["loss"] = exchange.loss(output.logits, labels) / len(labels)
        return output


def batches(rows):
    """Return a loader of padded batches."""
    labelled = [exchange.labelled(row) for row in rows]
    return DataLoader(labelled, batch_size=options.batch, collate_fn=exchange.padded)


model = Completion()
task = AttributionTask(
    loss_func=lambda model, batch, device: model(**batch).loss,
    model=model,
    checkpoints=model.state_dict(),
)


def products(work):
    """Return [N, M]."""
    with tempfile.TemporaryDirectory() as folder:
        attributor = LoGraAttributor(
            task=task, layer_names=[f"model.{name}" for name in layers], hessian="Identity",
            device="cpu", proj_dim=size, offload="none", cache_dir=folder,
        )  # fmt: skip
        train = batches(work["train"])
        attributor.cache(train)
        return attributor.attribute(train, batches(work["queries"])).detach().float().numpy()


exchange.timed("dattri", exchange.by_length(products), options)
