"""What values of parameters must be, beside their types and ranges.

Each function returns a value that is right, or raises ValueError with what is wrong. The library is
imported where it is needed, so that settings.py imports quickly.
"""

import functools
import re
import string
from collections.abc import Callable, Collection

from pydantic import ValidationInfo

from icprobe.data import paths


def _path(check: Callable) -> Callable:
    """Let what the system says of a path be what is wrong: names too long, homes of nobody."""

    @functools.wraps(check)
    def checked(*given: object) -> str:
        try:
            return check(*given)
        except (OSError, RuntimeError) as error:
            raise ValueError(str(error)) from None

    return checked


@_path
def kept(value: str) -> str:
    """Refuse folders to write to in which the repository's own files are."""
    if paths.is_source(value):
        raise ValueError(
            "expected a folder apart from the repository's own, such as figures/mine or "
            "data/scores/mine"
        )
    if paths.resolve(value).is_file():
        raise ValueError("expected a folder, and there is a file")
    return value


@_path
def output(value: str, info: ValidationInfo) -> str:
    """Refuse folders for results that hold data, sources, or results of another profile."""
    place, figures = paths.resolve(value).resolve(), (paths.ROOT / "figures").resolve()
    if place.is_relative_to((paths.ROOT / "data").resolve()):
        raise ValueError("expected a folder of results, such as figures/mine")
    kept(value)
    profile = info.data.get("profile", "")
    if place.is_relative_to(figures):
        folder = place.relative_to(figures).parts[0]
        known = [file.stem for file in (paths.NOTEBOOKS / "profiles").glob("*.yaml")]
        owners = [name for name in known if folder == name or folder.startswith(f"{name}_")]
        if owners and profile not in (*owners, folder):
            raise ValueError(
                f"expected another folder for profile {profile!r}: figures/{folder} has results "
                f"of {owners[0]!r}"
            )
    return value


@_path
def apart(value: str, info: ValidationInfo) -> str:
    """Refuse what is read where it lies in the folder of results, which a run writes to."""
    if not value or "output_dir" not in info.data:
        return value
    file, folder = paths.resolve(value), paths.resolve(info.data["output_dir"]).resolve()
    names = file.resolve(), file.parent.resolve() / file.name  # a link's own name, too
    if file.exists() and any(name.is_relative_to(folder) for name in names):
        raise ValueError(f"expected something outside of output_dir, {info.data['output_dir']}")
    return value


@_path
def file(value: str) -> str:
    """Refuse files that are not there."""
    if not paths.resolve(value).is_file():
        raise ValueError(f"there is no file {paths.resolve(value)}")
    return value


@_path
def folder(value: str) -> str:
    """Refuse folders that are not there."""
    if value and not paths.resolve(value).is_dir():
        raise ValueError(f"there is no folder {paths.resolve(value)}")
    return value


def template(value: str) -> str:
    """Refuse a column's template that cannot be read."""
    list(string.Formatter().parse(value))
    return value


def ranked(value: int) -> int:
    """Refuse fewer subsets than can be ranked."""
    from icprobe.statistics import MIN_OBSERVATIONS

    if 0 < value < MIN_OBSERVATIONS:
        raise ValueError(f"expected 0 for none, or at least {MIN_OBSERVATIONS} to rank")
    return value


@_path
def model(value: str) -> str:
    """Refuse paths at which there is no folder with a model."""
    place = paths.resolve(value)
    if not place.is_dir():
        is_path = value.startswith((".", "~", "/")) or value.partition("@")[0].count("/") > 1
        return folder(value) if is_path else value  # else a hub name
    config = [*place.glob("config.json"), *place.glob("adapter_config.json")]
    if not config or not list(place.glob("*.safetensors")):
        raise ValueError(f"{place} has no config.json or adapter_config.json, or no *.safetensors")
    return value


@_path
def source(value: str) -> str:
    """Refuse what is no suite, no file that is there and no hub name."""
    from icprobe import data

    data.is_suite(value)  # and if not, whether it is a file that is there, or like a hub name
    return value


def suite(value: str) -> str:
    """Refuse what is no suite."""
    from icprobe import data

    return _among([value], data.suites())[0]


def regular_expression(value: str) -> str:
    """Refuse what is no regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise ValueError(f"expected a regular expression: {error}") from None
    return value


def steps(value: list) -> list:
    """Refuse training steps that are not as `training_effect.planned` wants them."""
    from icprobe.methods import training_effect

    training_effect.planned(value)
    return value


def step(value: list) -> list:
    """Refuse what is no optimizer and learning rate."""
    from icprobe.methods import training_effect

    training_effect.read_step(value)
    return value


def baselines(value: list[str]) -> list[str]:
    """Refuse titles that no registered baseline has."""
    from icprobe.methods import registry

    return _among(value, [one.title for one in registry.baselines() if one.title])


def timed_methods(value: list[str]) -> list[str]:
    """Refuse names that the benchmark does not know."""
    from icprobe.artifact.benchmark.methods import METHODS

    return _among(value, METHODS)


def _among(values: list[str], known: Collection[str]) -> list[str]:
    for value in values:
        if value not in known:
            raise ValueError(f"{value!r} is none of {', '.join(map(repr, known))}")
    return values
