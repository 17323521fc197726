"""Gradient-based influence, exact and approximate: over the linear layers of the blocks."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=["dot", "factor_cache", "factors", "forward_mode", "layers", "losses", "projected"],
    submod_attrs={
        "clamped_log": ["ClampedLog"],
        "dot": ["GradientDot", "GradientProducts", "MeanInfluence", "gradient_dot", "load_parts"],
        "ekfac": ["EKFACInfluence"],
        "factors": ["norm_shares"],
        "forward_mode": ["mean_influence"],
        "layers": ["last_blocks", "linear_layers"],
        "losses": ["finite_difference"],
        "projected": ["ProjectedProducts", "projected_gradients"],
    },
)
