"""Our own methods and plain loops, in the project's environment."""

import exchange

from icprobe import lm as language_model
from icprobe.artifact.benchmark.methods import METHODS
from icprobe.artifact.benchmark.work import received

options = exchange.arguments()
work, method = options.work, METHODS[options.method]
lm = language_model.load(work["model"], work["dtype"], work["device"])


def scores(work):
    """Return the method's scores [N, M], in the CPU's memory, so a GPU has finished."""
    return method.run(lm, received(work, "train"), received(work, "queries"))


exchange.timed("", scores, options)
