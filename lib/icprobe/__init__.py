"""In-context probing for data attribution.

    import icprobe

    lm = icprobe.load_model("smollm2-135m-instruct")
    pool, queries = icprobe.load_data("pool.jsonl"), icprobe.load_data("queries.jsonl")
    gains = icprobe.probe(lm, pool, queries)
    products = icprobe.attribute(lm, pool, queries)
    chosen = icprobe.select(pool, gains, n=16)

Every attribution method here answers with the same object: a float32 matrix [N, M], one row per
training example in the order given, one column per query. Positive always means that the training
example helps: it makes the query's completion likelier. Log-likelihoods are in nats.

Letters used in every docstring:

    N   training examples (demonstrations)
    M   queries
    T   tokens of one sequence
    V   vocabulary size
    H   hidden size
    P   parameters
"""

import importlib

__version__ = "0.1.0"

_NAMES = {  # imported when they are used: torch takes seconds
    "load_data": ("icprobe.data", "load"),
    "load_model": ("icprobe.models", "load"),
    "probe": ("icprobe.methods.direct", "probe"),
    "attribute": ("icprobe.methods.direct", "attribute"),
    "select": ("icprobe.finetuning.selection", "select"),
}
__all__ = ["attribute", "load_data", "load_model", "probe", "select"]


def __getattr__(name: str) -> object:
    if name not in _NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, attribute = _NAMES[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return [*globals(), *_NAMES]
