"""A language model, one tokenisation for everybody, and log-likelihoods of completions.

Names are loaded when they are used, so that whoever needs none of torch's does not wait for it.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["identities", "likelihoods", "packing", "passes", "tokens"],
    submod_attrs={
        "identities": ["DTYPES", "identity"],
        "likelihoods": [
            "check_lengths",
            "check_packing",
            "log_likelihoods",
            "token_log_likelihoods",
        ],
        "model": ["LM", "load"],
        "passes": [
            "Result",
            "by_device",
            "fitting",
            "logits_at",
            "selective_head",
            "side_by_side",
            "within_memory",
        ],
        "tokens": ["Encoded", "encode", "sequence", "text_ids", "training_rows"],
    },
)
