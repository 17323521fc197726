"""Which notebooks run, with which parameters: profiles, -p, --only and --fresh, all checked."""

import ast
import contextlib
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import papermill
import yaml

from icprobe.artifact import settings
from icprobe.artifact.parameters import ParameterError, Parameters, schemas, type_in_words
from icprobe.data.base import close_names

# begins the names of sections in profiles; papermill's -f makes a variable of each name
SECTION = "for_"


class UsageError(Exception):
    """What the user asked for cannot be done; each function here may raise it."""


@dataclass(frozen=True)
class Notebook:
    """A numbered notebook: its file, the values in its parameters cell, and what checks them.

    `settings` is None for a notebook that uses none of `settings.NOTEBOOKS`.
    """

    path: Path
    defaults: dict[str, object]
    settings: type[Parameters] | None

    @property
    def name(self) -> str:
        """Such as `01_icp_scoring`."""
        return self.path.stem

    @property
    def schemas(self) -> dict[str, dict]:
        """The JSON schema of each parameter; empty where types are not known."""
        return schemas(self.settings) if self.settings else {}

    def checked(self, given: Mapping[str, object]) -> dict[str, object]:
        """Return values for its parameters, converted where they have to be."""
        values = self.defaults | given
        if self.settings:
            self.settings.of(values)
        return {name: values[name] for name in given}


def find_notebooks(root: Path) -> list[Notebook]:
    """Return all numbered notebooks under `root` in order, no copies such as 01_x-Copy1.ipynb."""
    files = sorted((root / "notebooks").glob("*.ipynb"))
    found = [_read(file) for file in files if re.fullmatch(r"\d\d_\w+", file.stem)]
    if not found:
        raise UsageError(f"no notebooks in {root / 'notebooks'}")
    return found


def _read(file: Path) -> Notebook:
    where = file.name
    try:
        defaults = {}
        for name, one in papermill.inspect_notebook(file).items():
            where = f"{file.name}, parameters cell: {name} is {one['default']}"
            defaults[name] = ast.literal_eval(one["default"])
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"{where}: {error}") from None
    return Notebook(file, defaults, settings.used_in(file.read_text(encoding="utf-8")))


def select(notebooks: list[Notebook], only: str | None) -> list[Notebook]:
    """Return the notebooks whose numbers `only` lists (such as "01,03"), or all of them."""
    if only is None:
        return notebooks
    wanted = {number.strip().zfill(2) for number in only.split(",")}
    for number in wanted - {notebook.name[:2] for notebook in notebooks}:
        names = ", ".join(notebook.name for notebook in notebooks)
        raise UsageError(f"--only {only}: there is no notebook {number}. There are: {names}")
    return [notebook for notebook in notebooks if notebook.name[:2] in wanted]


def read_profile(root: Path, profile: str) -> dict[str, object]:
    """Return what `notebooks/profiles/<profile>.yaml` says: values, and sections for a notebook."""
    path = root / "notebooks" / "profiles" / f"{profile}.yaml"
    if not path.is_file():
        known = [other.stem for other in path.parent.glob("*.yaml")]
        raise UsageError(f"unknown profile {profile!r}{close_names(profile, known)}")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path.name} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise UsageError(f"{path.name} must be a mapping of parameter names to values")
    for name, value in values.items():
        if str(name).startswith(SECTION) and not isinstance(value, dict):
            raise UsageError(f"{path.name} {name}: expected a mapping of parameters to values")
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
        name, value = next(words, ""), next(words, None)
        if value is None:
            raise UsageError(f"-p {name}: write -p NAME VALUE")
        overrides[name] = value
    return rest, overrides


def parse(text: str, schema: Mapping) -> object:
    """Return what was typed after -p: text where the parameter is one, else a number or YAML."""
    kinds = type_in_words(schema).split(" or ") if schema else ["None"]
    if not text.strip():  # an unset variable of the shell; YAML would read None, such as all data
        return text
    if text.lower() in ("none", "null") and ("None" in kinds or "str" not in kinds):
        return None
    if "str" in kinds:
        return text
    for read in (int, float, yaml.safe_load):
        with contextlib.suppress(ValueError, yaml.YAMLError):
            return read(text)
    return text


def plan(
    notebooks: list[Notebook],
    chosen: list[Notebook],
    profile: Mapping[str, object],
    source: str,
    overrides: Mapping[str, str],
    fresh: bool = False,
) -> list[dict[str, object]]:
    """Return the checked parameters for each chosen notebook.

    A name in the profile, read from the file `source`, must be declared by one of all notebooks; an
    override, text as typed after -p, by one of those chosen. Overrides win.

    Raises:
        UsageError: If a name is unknown, or values are wrong; names all of these.
    """
    sections = {f"{SECTION}{notebook.name}": notebook.defaults for notebook in notebooks}
    _check_names(source, profile, {*sections, *_declared(notebooks)})
    for section in profile.keys() & sections.keys():
        _check_names(f"{source} {section}", profile[section], sections[section])
    _check_names("-p", overrides, _declared(chosen))
    planned, wrong = [], {}
    for notebook in chosen:
        declared = notebook.defaults
        given = merged(profile, notebook.name, declared)
        given |= {"fresh": True} if fresh and "fresh" in declared else {}
        own = {
            name: parse(text, notebook.schemas.get(name, {}))
            for name, text in overrides.items()
            if name in declared
        }
        try:
            planned.append(notebook.checked(given | own))
        except ParameterError as error:
            for name, problem in error.problems.items():
                origin = "-p" if name in own else source if name in given else notebook.path.name
                wrong.setdefault(f"{origin}: {problem}", []).append(notebook.name)
    if wrong:
        lines = [f"{problem} ({', '.join(where)})" for problem, where in wrong.items()]
        raise UsageError("\n       ".join(lines))
    return planned


def _declared(notebooks: list[Notebook]) -> set[str]:
    return {name for notebook in notebooks for name in notebook.defaults}


def _check_names(where: str, names: Iterable[str], known: Collection[str]) -> None:
    for name in names:
        if name not in known:
            close = close_names(str(name), known)
            raise UsageError(f"{where} {name}: no notebook of this run has such a parameter{close}")


def help_on(chosen: list[Notebook], profile: Mapping[str, object]) -> str:
    """Return the notebooks' parameters: value in the profile, type, and meaning.

    What an earlier notebook has, too, alike in all of these, is only named.
    """
    lines, said = [], set()
    for notebook in chosen:
        lines.append(f"\n{notebook.name}")
        values = notebook.defaults | merged(profile, notebook.name, notebook.defaults)
        repeated = []
        for name, value in values.items():
            text = f"  {name} = {value!r}"
            if schema := notebook.schemas.get(name):
                text += f"\n      {type_in_words(schema, ranges=True)}: {schema['description']}"
            if text in said:
                repeated.append(name)
            else:
                lines.append(text)
                said.add(text)
        if repeated:
            lines.append(f"  as above: {', '.join(repeated)}")
    return "\n".join(lines)
