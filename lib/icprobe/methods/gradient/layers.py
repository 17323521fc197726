"""Which linear layers gradients are taken over: those of the transformer blocks, by name."""

import re
import warnings

import numpy as np
from torch import nn
from transformers.pytorch_utils import Conv1D

from icprobe.models import LM

LINEAR = (nn.Linear, Conv1D)  # whose weights are [d_out, d_in] and [d_in, d_out]

# a block's number in the name of a layer, such as model.layers.3.mlp.up_proj
BLOCK = re.compile(r"\.(\d+)\.")

# see `parts`: runs of neighbouring blocks, and the part of other layers, such as OPT's projections
BANDS = 6
OUTSIDE = "outside the blocks"

# fraction of the blocks' weights in no linear layer above which there is a warning
LEFT_OUT = 0.01


def linear_layers(lm: LM, layers: str = "") -> dict[str, nn.Module]:
    """Return the linear layers of the transformer blocks by name: all but the output head.

    `layers` is a regular expression that the name must contain, such as "mlp" or "layers.29".
    Without it, a UserWarning says if much of the blocks' weights is in no linear layer, as in
    mixtures of experts.

    Raises:
        ValueError: If there is none (lists the module types found), or two share their weight.
    """
    head = lm.model.get_output_embeddings()
    modules = dict(lm.model.named_modules())
    found = {
        name: module
        for name, module in modules.items()
        if isinstance(module, LINEAR) and module is not head and re.search(layers, name)
    }
    if not found:
        kinds = sorted({type(module).__name__ for module in modules.values()})
        raise ValueError(
            f"{lm.identity['name']}: no linear layer matches {layers!r}; module types: "
            f"{', '.join(kinds)}"
        )
    owners: dict[nn.Parameter, str] = {}
    for name, module in found.items():
        if module.weight in owners:
            raise ValueError(f"layers {owners[module.weight]} and {name} share their weight")
        owners[module.weight] = name
    if not layers:
        parameters = lm.model.named_parameters()
        matrices = [p for name, p in parameters if BLOCK.search(name) and p.ndim > 1]
        whole = sum(p.numel() for p in matrices)
        out = sum(p.numel() for p in matrices if p not in owners)
        if out > LEFT_OUT * whole:
            warnings.warn(
                f"{lm.identity['name']}: {out / whole:.0%} of the blocks' weights are in no linear "
                "layer; gradients leave them out",
                stacklevel=2,
            )
    return found


def last_blocks(lm: LM, count: int, layers: str = "") -> str:
    """Return the regular expression that chooses the last transformer blocks among `layers`.

    Raises ValueError if there are not so many blocks.
    """
    chosen = linear_layers(lm, layers)
    numbers = {int(number) for name in chosen for number in BLOCK.findall(name)}
    if not 1 <= count <= len(numbers):
        raise ValueError(f"last {count} blocks: the model has {len(numbers)}")
    last = rf"\.({'|'.join(map(str, sorted(numbers)[-count:]))})\."
    return f"^(?=.*(?:{layers})).*{last}" if layers else last


def parts(lm: LM, layers: str = "") -> dict[str, str]:
    """Return the kinds of layers and bands of blocks: by name, the regular expression for each.

    Both, with the layers outside of the numbered blocks where a model has some, cut the layers into
    parts whose dot products add up to the whole.
    """
    names = list(linear_layers(lm, layers))
    outside = [name for name in names if not BLOCK.search(name)]
    kinds = sorted({BLOCK.split(name)[-1] for name in names if name not in outside})
    numbers = sorted({int(number) for name in names for number in BLOCK.findall(name)})
    by_name = {kind: rf"\.\d+\.{re.escape(kind)}$" for kind in kinds}
    if outside:
        by_name[OUTSIDE] = f"^({'|'.join(map(re.escape, outside))})$"
    for band in np.array_split(numbers, min(BANDS, len(numbers))):
        by_name[f"blocks {band[0]:02}-{band[-1]:02}"] = rf"\.({'|'.join(map(str, band))})\."
    return by_name
