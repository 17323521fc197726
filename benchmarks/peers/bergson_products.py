"""Gradient products by bergson: collected in memory, projected if asked for.

It sorts by length itself; its own loss needs the head at every position.
"""

import tempfile
from pathlib import Path

import exchange
import torch
from bergson import CollectorComputer, GradientProcessor, IndexConfig, InMemoryCollector, Scorer
from bergson.data import allocate_batches
from bergson.score.score_writer import InMemorySequenceScoreWriter
from datasets import Dataset

PRECISION = {"float32": "fp32", "bfloat16": "bf16"}

options = exchange.arguments()
work, batch = options.work, options.batch
model = exchange.model(work)


def rows(part):
    """Return a data set with lengths."""
    labelled = [exchange.labelled(row) for row in part]
    columns = {name: [row[name] for row in labelled] for name in ("input_ids", "labels")}
    return Dataset.from_dict({**columns, "length": [len(row) for row in columns["input_ids"]]})


def products(work):
    """Return [N, M]."""
    train, queries = rows(work["train"]), rows(work["queries"])
    tokens = batch * max(*train["length"], *queries["length"])
    with tempfile.TemporaryDirectory() as folder:
        settings = IndexConfig(
            run_path=f"{folder}/run", model=work["model"], precision=PRECISION[work["dtype"]],
            projection_dim=options.projection, token_batch_size=tokens, max_batch_size=batch,
            loss_fn="ce", loss_reduction="sum",
        )  # fmt: skip
        Path(settings.partial_run_path).mkdir(parents=True)

        def collected(data, scorer=None):
            collector = InMemoryCollector(
                model=model.base_model, data=data, cfg=settings, scorer=scorer,
                processor=GradientProcessor(projection_dim=options.projection or None),
            )  # fmt: skip
            CollectorComputer(
                model=model, data=data, collector=collector, cfg=settings,
                batches=allocate_batches(data["length"][:], tokens, max_batch_size=batch),
            ).run_with_collector_hooks(desc="gradients")  # fmt: skip
            return collector

        theirs = collected(queries).gradients
        writer = InMemorySequenceScoreWriter(len(train), len(queries), dtype=torch.float32)
        scorer = Scorer(
            query_grads=theirs, modules=list(theirs), writer=writer, device=torch.device("cpu"),
            dtype=torch.float32,
        )  # fmt: skip
        collected(train, scorer)
        return writer.scores.numpy()


exchange.timed("bergson", products, options)
