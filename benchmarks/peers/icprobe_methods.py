"""Our own methods and plain loops, in the project's environment."""

import exchange

from icprobe import models
from icprobe.artifact.benchmark.methods import METHODS
from icprobe.models import Encoded

options = exchange.arguments()
work, method = options.work, METHODS[options.method]
lm = models.load(work["model"], work["dtype"], work["device"])


def encoded(rows):
    """Return examples as the library has them: without a beginning-of-sequence token."""
    begin = work["begin"]
    return [
        Encoded(str(k), tuple(row["ids"][begin : row["start"]]), tuple(row["ids"][row["start"] :]))
        for k, row in enumerate(rows)
    ]


def scores(work):
    """Return the method's scores [N, M], in the CPU's memory, so a GPU has finished."""
    return method.run(lm, encoded(work["train"]), encoded(work["queries"]))


exchange.timed("", scores, options)
