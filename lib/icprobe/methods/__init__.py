"""Attribution methods, one file each; `registry` lists the baselines that figures show."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["baselines", "costs", "direct", "gradient", "icp", "registry", "training_effect"],
)
