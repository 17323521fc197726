"""What is scored, and finished scores: `score` makes matrices [N, M], `load` reads them.

Reading needs neither torch nor transformers.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["experiment", "method", "store"],
    submod_attrs={
        "experiment": ["Experiment"],
        "method": ["Examples", "Method", "Output", "setting"],
        "run": ["compute", "load", "score", "variants"],
        "store": ["ScoreStore", "ScoresNotFound", "StoreError"],
    },
)
