"""Which notebooks run, with which parameters: profiles, -p, --only and --fresh, all checked."""

import ast
import contextlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml
from papermill.translators import PythonTranslator

from icprobe.artifact import settings
from icprobe.artifact.parameters import (
    ParameterError,
    Parameters,
    described,
    did_you_mean,
    options,
    schemas,
)

# begins the names of sections in profiles; papermill's -f makes a variable of each name
SECTION = "for_"


class UsageError(Exception):
    """What the user asked for cannot be done; the message says why and what to write instead."""


@dataclass(frozen=True)
class Notebook:
    """A numbered notebook.

    Attributes:
        path: Its file.
        defaults: The values in its parameters cell, by name.
        settings: What checks them; None for a notebook that uses none of `settings.NOTEBOOKS`.
    """

    path: Path
    defaults: dict[str, object]
    settings: type[Parameters] | None

    @property
    def name(self) -> str:
        """File name without the suffix, such as `01_icp_scoring`."""
        return self.path.stem

    @property
    def number(self) -> int:
        """The number that the file name starts with."""
        return int(self.name[:2])

    def checked(self, given: Mapping[str, object]) -> dict[str, object]:
        """Return values for its parameters, converted where they have to be.

        Raises:
            ParameterError: If any are wrong.
        """
        if self.settings is None:
            return dict(given)
        found = self.settings.checked(self.defaults | given)
        return {name: getattr(found, name) for name in given}


def find_notebooks(root: Path) -> list[Notebook]:
    """Return all numbered notebooks under `root` in order, no copies such as 01_x-Copy1.ipynb.

    Raises:
        UsageError: If there is none, or one cannot be read.
    """
    files = sorted((root / "notebooks").glob("*.ipynb"))
    found = [_read(file) for file in files if re.fullmatch(r"\d\d_\w+", file.stem)]
    if not found:
        raise UsageError(f"no notebooks in {root / 'notebooks'}")
    return found


def _read(file: Path) -> Notebook:
    try:
        cells = [one for one in nbformat.read(file, as_version=4).cells if one.cell_type == "code"]
    except nbformat.reader.NotJSONError:
        raise UsageError(f"{file.name} is not a notebook (it is not valid JSON)") from None
    tagged = [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]
    defaults = {}
    for one in PythonTranslator.inspect(tagged[0]) if tagged else []:
        try:
            defaults[one.name] = ast.literal_eval(one.default)
        except (SyntaxError, ValueError):
            raise UsageError(
                f"{file.name}, parameters cell: {one.name} is {one.default}, expected a literal"
            ) from None
    code = "\n".join(cell.source for cell in cells)
    return Notebook(file, defaults, settings.used_in(code))


def select(notebooks: list[Notebook], only: str | None) -> list[Notebook]:
    """Return the notebooks whose numbers `only` lists (such as "01,03"), or all of them."""
    if only is None:
        return notebooks
    known = {notebook.number for notebook in notebooks}
    wanted = set()
    for number in only.split(","):
        if not number.strip().isdecimal() or int(number) not in known:
            names = ", ".join(notebook.name for notebook in notebooks)
            raise UsageError(f"--only {only}: there is no notebook '{number}'. There are: {names}")
        wanted.add(int(number))
    return [notebook for notebook in notebooks if notebook.number in wanted]


def profiles(root: Path) -> list[str]:
    """Return the names of all profiles."""
    return sorted(path.stem for path in (root / "notebooks" / "profiles").glob("*.yaml"))


def read_profile(root: Path, profile: str) -> dict[str, object]:
    """Return what `notebooks/profiles/<profile>.yaml` says.

    That is values that differ from the notebooks' defaults and, in a section `for_<notebook>`, a
    mapping of those that one notebook gets instead; see `merged`.
    """
    known = profiles(root)
    if profile not in known:
        close = did_you_mean(profile, known)
        raise UsageError(f"unknown profile '{profile}'.{close} There are: {', '.join(known)}")
    path = root / "notebooks" / "profiles" / f"{profile}.yaml"
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise UsageError(f"{path.name} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path.name} must be a mapping of parameter names to values")
    return values


def merged(profile: Mapping, notebook: str, declared: Collection[str]) -> dict[str, object]:
    """Return what a profile gives to a notebook: its section, and what it declares of the rest."""
    shared = {name: value for name, value in profile.items() if name in declared}
    return shared | profile.get(f"{SECTION}{notebook}", {})


def split_overrides(argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Take every `-p NAME VALUE` out of `argv`; return the rest, and the overrides as text.

    Not left to argparse, which refuses values that start with a dash, such as -1e-3 or "---".
    """
    rest, overrides = [], {}
    words = iter(argv)
    for word in words:
        if word not in ("-p", "--parameter"):
            rest.append(word)
            continue
        name, value = next(words, None), next(words, None)
        if value is None:
            raise UsageError(f"-p {name or ''}".rstrip() + ": write -p NAME VALUE")
        overrides[name] = value
    return rest, overrides


def plan(
    notebooks: list[Notebook],
    chosen: list[Notebook],
    profile: Mapping[str, object],
    source: str,
    overrides: Mapping[str, str],
    fresh: bool = False,
) -> list[dict[str, object]]:
    """Return the parameters for each chosen notebook; all names and values are checked first.

    Args:
        notebooks: All notebooks: a name in the profile must be declared by one of them.
        chosen: The notebooks to run: an override must be declared by one of these.
        profile: What the profile says; each notebook gets the shared values that it declares, and
            those in its own section in their place.
        source: File name of the profile, for messages.
        overrides: Values as typed after -p; they win over the profile.
        fresh: Pass `fresh=True` to each notebook that declares it.

    Raises:
        UsageError: If a name is unknown, or values are wrong; names all of these.
    """
    _check_names(profile, notebooks, chosen, source, overrides)
    planned, wrong = {}, {}
    for notebook in notebooks:
        given = merged(profile, notebook.name, notebook.defaults)
        origin = dict.fromkeys(given, source)
        if notebook in chosen:
            if fresh and "fresh" in notebook.defaults:
                given["fresh"] = True
            own = {name: text for name, text in overrides.items() if name in notebook.defaults}
            given |= {name: parse(text, _schema(notebook, name)) for name, text in own.items()}
            origin |= dict.fromkeys(own, "-p")
        try:
            planned[notebook.name] = notebook.checked(given)
        except ParameterError as error:
            for name, problem in error.problems.items():
                line = f"{origin.get(name, notebook.path.name)}: {problem}"
                wrong.setdefault(line, []).append(notebook.name)
    if wrong:
        lines = [f"{problem} ({', '.join(where)})" for problem, where in wrong.items()]
        raise UsageError("\n       ".join(lines))
    return [planned[notebook.name] for notebook in chosen]


def _schema(notebook: Notebook, name: str) -> Mapping:
    """Return a parameter's JSON schema, an empty one where its type is not known."""
    return schemas(notebook.settings).get(name, {}) if notebook.settings else {}


def parse(text: str, schema: Mapping) -> object:
    """Return what was typed after -p as a value of the parameter's type, where that is possible.

    Where text is allowed it is kept as it is. Anything that does not fit comes back as the most
    natural type, so that the check can say what was given.
    """
    kinds = [one.get("type") for one in options(schema)]
    nothing = text.lower() in ("none", "null")
    if "string" in kinds:
        return None if nothing and "null" in kinds else text
    if nothing:
        return None
    for number in (int, float):
        with contextlib.suppress(ValueError):
            return number(text)
    with contextlib.suppress(yaml.YAMLError):
        return yaml.safe_load(text)
    return text


def _check_names(
    profile: Mapping[str, object],
    notebooks: list[Notebook],
    chosen: list[Notebook],
    source: str,
    overrides: Mapping[str, str],
) -> None:
    """Raise UsageError where a profile or -p names what there is not."""
    sections = {f"{SECTION}{notebook.name}": notebook for notebook in notebooks}
    declared = sorted({name for notebook in notebooks for name in notebook.defaults})
    for key, value in profile.items():
        if not str(key).startswith(SECTION):
            _check_known(f"{source} {key}", "no notebook declares this parameter", key, declared)
            continue
        _check_known(f"{source} {key}", "there is no such notebook", key, sections)
        if not isinstance(value, dict):
            raise UsageError(f"{source} {key}: expected a mapping of its parameters to values")
        for name in value:
            where = f"{source} {key}"
            _check_known(where, f"it does not declare {name}", name, sections[key].defaults)
    for name in overrides:
        _check_known(f"-p {name}", "no notebook declares this parameter", name, declared)
        if not any(name in notebook.defaults for notebook in chosen):
            elsewhere = [notebook.name for notebook in notebooks if name in notebook.defaults]
            raise UsageError(
                f"-p {name}: none of the notebooks chosen with --only declares it; of the others: "
                f"{', '.join(elsewhere)}"
            )


def _check_known(where: str, problem: str, name: object, known: Collection[str]) -> None:
    if name not in known:
        close = did_you_mean(str(name), known)
        raise UsageError(f"{where}: {problem}.{close} There are: {', '.join(known)}")


def help_on(chosen: list[Notebook], profile: Mapping[str, object]) -> str:
    """Return the notebooks' parameters: type, value in the profile, and meaning."""
    lines = []
    for notebook in chosen:
        lines.append(f"\n{notebook.name}")
        values = notebook.defaults | merged(profile, notebook.name, notebook.defaults)
        for name, value in values.items():
            schema = _schema(notebook, name)
            kind = f" ({described(schema)})" if schema else ""
            lines.append(f"  {name} = {value!r}{kind}")
            if schema:
                lines.append(f"      {schema['description']}")
    return "\n".join(lines)
