"""Rename committed stores of the first key format to the present one: parts keep their bytes.

    ./run_all.sh python data/rename_stores.py OLD NEW

OLD is a folder of stores (such as data/scores/laptop), NEW the one that gets them. Identities gain
the version of the template, and options that of the method; a manifest then names the store that
its parts were written for. Records of trainings move unchanged. Needs git; run it once.
"""

import json
import subprocess
import sys
from pathlib import Path

from icprobe.finetuning.tracin import TracIn
from icprobe.methods import icp, registry, training_effect
from icprobe.methods.gradient import ClampedLog, EKFACInfluence, GradientProducts, ProjectedProducts
from icprobe.models.identities import TEMPLATE_VERSION
from icprobe.scores.store import MANIFEST, key

METHODS = [
    icp.ZeroShot, icp.ICP, icp.NeutralControl, training_effect.TrainingEffect, TracIn,
    ClampedLog, EKFACInfluence, GradientProducts, ProjectedProducts,
    *map(type, registry.baselines()),
]  # fmt: skip
VERSIONS = {method.name: method.version for method in METHODS}
VERSIONS["gradient_cosine"] = GradientProducts.version
# options that are now constants, under the method's version
CONSTANT = {"template", "separator", "reduction", "text", "steps", "frame", "fitted", "part"}
OF_BASELINES = {"layer", "centre", "seed"}  # all that they have


def present(method: str, options: dict) -> dict:
    """Return a store's options in the present format."""
    kept = {name: value for name, value in options.items() if name not in CONSTANT}
    if "part" in options and method == "gradient_dot":
        kept["part"] = options["part"]
    if method in registry.REGISTERED:
        kept = {name: value for name, value in kept.items() if name in OF_BASELINES}
    return {**kept, "version": VERSIONS[method]}


def main(old: Path, new: Path) -> None:
    """Move all stores, and the records of trainings."""
    new.mkdir(parents=True, exist_ok=True)
    for path in sorted(old.glob(f"*/{MANIFEST}")):
        fields = json.loads(path.read_text())
        options = present(fields["method"], fields["identity"]["options"])
        fields["identity"] |= {"template": TEMPLATE_VERSION, "options": options}
        fields["identity"] = dict(sorted(fields["identity"].items()))
        fields["parts_of"] = path.parent.name
        folder = new / key(fields["method"], fields["identity"])
        subprocess.run(["git", "mv", path.parent, folder], check=True)
        (folder / MANIFEST).write_text(json.dumps(fields, indent=1) + "\n")
    if (old / "finetuned").exists():
        subprocess.run(["git", "mv", old / "finetuned", new / "finetuned"], check=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
