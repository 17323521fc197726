"""Log-likelihoods of all queries after all demonstrations by lm-evaluation-harness."""

import exchange
import numpy as np
from lm_eval.models.huggingface import HFLM

options = exchange.arguments()
work, batch = options.work, options.batch
lm = HFLM(pretrained=work["model"], device="cpu", dtype=work["dtype"], batch_size=batch)


def log_likelihoods(work):
    """Return [N, M]; ids are given as they are, texts (which only name a request) left empty."""
    requests = []
    for context in work["contexts"]:
        for query in work["queries"]:
            start = query["start"]
            before = context + query["ids"][work["begin"] : start]
            requests.append((("", ""), before, query["ids"][start:]))
    found = lm._loglikelihood_tokens(requests, disable_tqdm=True)
    nats = [value for value, _ in found]
    return np.array(nats).reshape(len(work["contexts"]), len(work["queries"]))


exchange.timed("lm_eval", log_likelihoods, options)
