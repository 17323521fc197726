"""What values of parameters must be, beside their types and ranges.

Each function returns a value that is right, or raises ValueError with what was expected. Heavy
modules are imported where they are needed, so that settings.py imports quickly.
"""

import re
import string
from pathlib import Path

from pydantic import ValidationInfo

from icprobe.artifact.parameters import did_you_mean
from icprobe.data import paths

RANKED = 4  # fewest values that have a rank correlation, `statistics.MIN_OBSERVATIONS`


def kept(value: str) -> str:
    """Refuse folders to write to in which the repository's own files are."""
    if paths.is_source(value):
        raise ValueError(
            "a folder apart from the repository's own, such as figures/mine or data/scores/mine"
        )
    if paths.resolve(value).is_file():
        raise ValueError("a folder, and there is a file")
    return value


def output(value: str, info: ValidationInfo) -> str:
    """Refuse folders for results that hold data, sources, or results of another profile."""
    place, figures = paths.resolve(value).resolve(), (paths.ROOT / "figures").resolve()
    if place.is_relative_to((paths.ROOT / "data").resolve()):
        raise ValueError("a folder of results, such as figures/mine")
    kept(value)
    profile = info.data.get("profile", "")
    if place.is_relative_to(figures):
        folder = place.relative_to(figures).parts[0]
        known = [file.stem for file in (paths.NOTEBOOKS / "profiles").glob("*.yaml")]
        owners = [name for name in known if folder == name or folder.startswith(f"{name}_")]
        if owners and profile not in (*owners, folder):
            raise ValueError(
                f"another folder for profile {profile!r}: figures/{folder} has results of "
                f"{owners[0]!r}"
            )
    return value


def apart(value: str, info: ValidationInfo) -> str:
    """Refuse what is read where it lies in the folder of results, which a run writes to."""
    if not value or "output_dir" not in info.data:
        return value
    file, folder = paths.resolve(value), paths.resolve(info.data["output_dir"]).resolve()
    names = file.resolve(), file.parent.resolve() / file.name  # a link's own name, too
    if file.exists() and any(name.is_relative_to(folder) for name in names):
        raise ValueError(f"something outside of output_dir, {info.data['output_dir']}")
    return value


def source(value: str) -> str:
    """Refuse what is no suite, no file that is there and no hub name."""
    from icprobe import data

    try:
        data.is_suite(value)  # and if not, whether it is a file that is there, or like a hub name
    except data.DataError as error:
        raise ValueError(f"a suite, a file or a hub name: {error}") from None
    return value


def columns(value: dict) -> dict:
    """Refuse mappings of unknown columns, or with templates that cannot be read."""
    from icprobe import data

    known = (*data.COLUMNS, "options")
    for key, template in value.items():
        if key not in known or not isinstance(template, str | None):
            columns = ", ".join(known)
            raise ValueError(f"{{column: name, template or None}} with columns among {columns}")
        try:
            list(string.Formatter().parse(template or ""))
        except ValueError as error:
            raise ValueError(f"a template for {key}, with names in braces: {error}") from None
    return value


def model(value: str) -> str:
    """Refuse folders that are not there or hold no model."""
    folder = paths.resolve(value)
    is_path = Path(value).is_absolute() or value.startswith((".", "~"))
    is_path |= value.partition("@")[0].count("/") > 1
    if is_path and not folder.is_dir():
        raise ValueError(f"a model's name or folder, and there is no folder {folder}")
    if folder.is_dir():
        for names in (("config.json", "adapter_config.json"), ("*.safetensors",)):
            if not any(list(folder.glob(name)) for name in names):
                lacking = f"{folder} has no {' or '.join(names)}"
                raise ValueError(f"a model's name or folder, and {lacking}")
    return value


def file(value: str) -> str:
    """Refuse files that are not there."""
    if not paths.resolve(value).is_file():
        raise ValueError("a file that is there")
    return value


def published(value: str, info: ValidationInfo) -> str:
    """Refuse folders that are not there, or in the folder of results."""
    if value and not paths.resolve(value).is_dir():
        raise ValueError('a folder that is there, or ""')
    return apart(value, info)


def regular_expression(value: str) -> str:
    """Refuse what is no regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"a regular expression: {error}") from None
    return value


def pools(value: dict) -> dict:
    """Refuse unknown suites, and sizes that are not [N, M]."""
    from icprobe import data

    for suite, sizes in value.items():
        if suite not in data.suites():
            raise ValueError(f"suites, which are {', '.join(data.suites())}, not {suite!r}")
        numbers = isinstance(sizes, list) and [type(size) for size in sizes] == [int, int]
        if not numbers or min(sizes) < 1:
            raise ValueError(f"[N, M], two whole numbers from 1, for {suite!r}")
    return value


def steps(value: list) -> list:
    """Refuse training steps that are not as `training_effect.planned` wants them."""
    from icprobe.methods import training_effect

    training_effect.planned(value)  # its error says what is wrong
    return value


def step(value: list) -> list:
    """Refuse a training step that is not an optimizer and its learning rate."""
    from icprobe.methods import training_effect

    training_effect.read_step(value)
    return value


def _among(values: list[str], known: list[str]) -> list[str]:
    for value in values:
        if value not in known:
            names = ", ".join(map(repr, known))
            raise ValueError(f"{names}, not {value!r}.{did_you_mean(value, known)}")
    return values


def baselines(value: list[str]) -> list[str]:
    """Refuse titles that no registered baseline has."""
    from icprobe.methods import registry

    return _among(value, [one.title for one in registry.baselines() if one.title])


def timed_methods(value: list[str]) -> list[str]:
    """Refuse names that the benchmark does not know."""
    from icprobe.artifact.benchmark.methods import METHODS

    return _among(value, list(METHODS))


def subsets(value: int) -> int:
    """Refuse fewer subsets than can be ranked."""
    if 0 < value < RANKED:
        raise ValueError(f"0 for none, or at least {RANKED} to rank")
    return value


def heads(value: int, info: ValidationInfo) -> int:
    """Refuse a number of heads that does not divide the width."""
    width = info.data.get("network_width", value)
    if width % value:
        raise ValueError(f"a divisor of network_width, {width}")
    return value


def bases(value: list, info: ValidationInfo) -> list:
    """Refuse contexts that are longer than the network's."""
    if not all(len(base) == 2 and base[0] >= 0 and base[1] >= 1 for base in value):
        raise ValueError("lists of [pairs from 0, contexts from 1]")
    most = info.data.get("network_pairs", float("inf")) - 2  # the example and the query
    if any(pairs > most for pairs, _ in value):
        raise ValueError(f"up to network_pairs - 2, {most}, pairs before an example")
    return value


def angles(value: list, info: ValidationInfo) -> list:
    """Refuse planes in fewer than four dimensions."""
    dimension = info.data.get("dimension", 4)
    if dimension < 4:
        raise ValueError(f"planes in four dimensions, and dimension is {dimension}")
    return value


def watched(value: list, info: ValidationInfo) -> list:
    """Refuse steps after the end of training."""
    steps = info.data.get("quick_steps", max(value, default=0))
    if max(value, default=0) > steps:
        raise ValueError(f"none above quick_steps, {steps}")
    return value
