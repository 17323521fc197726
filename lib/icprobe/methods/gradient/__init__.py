"""Gradient-based influence, exact and approximate: over the linear layers of the blocks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["layers", "losses", "factors", "projected"],
    submod_attrs={
        "clamped_log": ["clamped_log"],
        "dot": ["GradientDot", "finite_difference", "gradient_dot"],
        "ekfac": ["EKFAC"],
        "factors": ["norm_shares"],
        "forward_mode": ["MeanGradient", "mean_influence"],
        "layers": ["last_blocks", "linear_layers"],
        "methods": [
            "ClampedLog",
            "EKFACInfluence",
            "GradientProducts",
            "ProjectedProducts",
            "load_parts",
        ],
        "projected": ["projected_gradients"],
        "tracin": ["tracin"],
    },
)
