"""What a notebook's parameters cell declares, and whether values for it make sense.

Each line of the cell says everything about one parameter, for people and for `papermill
--help-notebook`: `n_train: "int or None" = 132  # N, training examples; None takes all`. A type is
str, int, float, bool, dict, list, list[...] or dict[..., ...], or several of them joined by "or",
one of which may be None. Beside its type, a value must keep to the parameter's rule in `RULES`: one
name means the same in all notebooks.
"""

import ast
import difflib
import functools
import importlib
import io
import math
import operator
import re
import string
import tokenize
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from pathlib import Path

import nbformat

from icprobe import paths

# what stands in words for a type; "anything" is that of a None whose line has no words
_SIMPLE = {kind.__name__: kind for kind in (str, int, float, bool, dict, list)}
_SIMPLE["anything"] = object


class ParameterError(ValueError):
    """A parameters cell cannot be read, or values for it are wrong; the message names all."""


@dataclass(frozen=True)
class Parameter:
    """One line of a parameters cell.

    Attributes:
        name: Of the parameter.
        words: Its type in the cell's words, such as "int or None".
        kind: The same for Python, such as int | None.
        default: The value in the cell.
        comment: What the line says about it.
        typed: Whether the line says a type. `RULES` are for such lines only.
    """

    name: str
    words: str
    kind: object
    default: object
    comment: str
    typed: bool = True

    def converted(self, value: object) -> object:
        """Return the value, a whole number for a float as a float: 1 and 1.0 are one setting."""
        kinds = typing.get_args(self.kind) or (self.kind,)
        return float(value) if type(value) is int and float in kinds and int not in kinds else value


# --------------------------------------------------------------------------------- reading a cell


def read(path: Path) -> dict[str, Parameter]:
    """Return what the notebook's cell tagged `parameters` declares, by name, in its order.

    A line that says no type has that of its default.

    Raises:
        ParameterError: There is not exactly one such cell, or it holds anything but literals with
            names, or unknown types; names notebook and line.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
    except nbformat.reader.NotJSONError:
        raise ParameterError(f"{path.name} is not a notebook (it is not valid JSON)") from None
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ParameterError(
            f"{path.name} has {len(cells)} cells tagged 'parameters', it needs one"
        )
    where = f"{path.name}, parameters cell"
    try:
        body = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise ParameterError(f"{where}: {error}") from None
    tokens = tokenize.generate_tokens(io.StringIO(cells[0].source).readline)
    comments = {at.start[0]: at.string[1:] for at in tokens if at.type == tokenize.COMMENT}
    found = {}
    for line in body:
        parameter = _parameter(line, comments.get(line.end_lineno, "").strip(), where)
        found[parameter.name] = parameter
    return found


def _parameter(line: ast.stmt, comment: str, where: str) -> Parameter:
    """Return what one statement of a parameters cell declares; for errors see `read`."""
    match line:
        case ast.AnnAssign(
            target=ast.Name(id=name), annotation=ast.Constant(value=str(words)), value=ast.expr()
        ):
            pass
        case ast.Assign(targets=[ast.Name(id=name)]):
            words = ""
        case _:
            name = None
    try:
        default = ast.literal_eval(line.value) if name else None
    except (TypeError, ValueError):
        name = None
    if name is None:
        raise ParameterError(
            f'{where}: expected NAME = literal, or NAME: "type" = literal, found '
            f"'{ast.unparse(line)}'"
        )
    typed = bool(words)
    words = words or ("anything" if default is None else type(default).__name__)
    try:
        kind = _kind(ast.parse(words, mode="eval").body)
    except (SyntaxError, ValueError):
        raise ParameterError(
            f"{where}, {name}: {words!r} is no type. Types are {', '.join(_SIMPLE)}, list[...] and "
            'dict[..., ...], joined by "or", and None'
        ) from None
    return Parameter(name, words, kind, default, comment, typed)


def _kind(words: ast.expr) -> object:
    """Return the Python type that parsed words such as "list[str] or None" stand for.

    Raises:
        ValueError: If they stand for none.
    """
    match words:
        case ast.BoolOp(op=ast.Or(), values=several):
            return functools.reduce(operator.or_, map(_kind, several))
        case ast.Constant(value=None):
            return types.NoneType
        case ast.Name(id=name) if name in _SIMPLE:
            return _SIMPLE[name]
        case ast.Subscript(value=ast.Name(id="list"), slice=each):
            return list[_kind(each)]
        case ast.Subscript(value=ast.Name(id="dict"), slice=ast.Tuple(elts=[key, value])):
            return dict[_kind(key), _kind(value)]
    raise ValueError(ast.unparse(words))


def is_notebook(path: Path) -> bool:
    """Tell whether a file is a numbered notebook, and no copy of one such as 01_x-Copy1.ipynb."""
    return re.fullmatch(r"\d\d_\w+", path.stem) is not None


def of_notebook(number: str) -> dict[str, Parameter]:
    """Return what the repository's notebook of this number, such as "01", declares; see `read`.

    Raises:
        ParameterError: If there is no such notebook, or as `read`.
    """
    found = [f for f in sorted(paths.NOTEBOOKS.glob(f"{number}_*.ipynb")) if is_notebook(f)]
    if len(found) != 1:
        raise ParameterError(f"{len(found)} notebooks begin with {number}_, expected one")
    return read(found[0])


# -------------------------------------------------------------------------------- checking values


def check(notebook: str, values: MutableMapping[str, object]) -> None:
    """Make sure that a notebook's parameters have values that make sense, before it uses them.

    A whole number where a float is expected becomes one in `values`: 1 and 1.0 must not make two
    score stores.

    Args:
        notebook: Its number, such as "01".
        values: What its parameters are now, `globals()`; other names are left alone.

    Raises:
        ParameterError: If any are wrong or missing; names all of them, what was given, and what
            was expected.
    """
    declared = of_notebook(notebook)
    missing = [name for name in declared if name not in values]
    wrong = [f"{name} has no value: its line in the parameters cell is gone" for name in missing]
    wrong += problems(declared, values, [name for name in declared if name in values]).values()
    if wrong:
        head = f"wrong parameters of notebook {notebook}:"
        raise ParameterError("\n  ".join([head, *wrong]))
    values.update({name: one.converted(values[name]) for name, one in declared.items()})


def problems(
    declared: Mapping[str, Parameter], values: Mapping[str, object], names: Iterable[str]
) -> dict[str, str]:
    """Return what is wrong with values, a sentence for each wrong one by its name.

    Args:
        declared: What the notebook declares.
        values: Values of all its parameters, or of as many as there are.
        names: The parameters to judge; others serve only for rules about two of them.
    """
    names = list(names)
    found = {}
    for name in names:
        expected = _misfit(declared[name], values[name])
        if expected:
            found[name] = f"{name} is {values[name]!r}, expected {expected}"
    right = {name for name in declared if declared[name].typed and name not in found}
    for name, other, rule in TOGETHER:
        both = {name, other}
        if both <= right and both & set(names):
            expected = rule(values[name], values[other])
            if expected:
                found[name] = f"{name} is {values[name]!r}, expected {expected}"
    return found


def fits(value: object, kind: object) -> bool:
    """Tell whether a value has a declared type: a bool is no number, an int will do for a float.

    Args:
        value: Any.
        kind: See `Parameter.kind`.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is types.UnionType:
        return any(fits(value, one) for one in inner)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(part, one) for pair in value.items() for part, one in zip(pair, inner, strict=True)
        )
    if origin is list:
        return isinstance(value, list | tuple) and all(fits(one, inner[0]) for one in value)
    if kind is float:
        return type(value) in (int, float)
    return kind is object or type(value) is kind


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the known words that are close, or nothing."""
    close = difflib.get_close_matches(word, known)
    return f" Did you mean {' or '.join(close)}?" if close else ""


def _misfit(parameter: Parameter, value: object) -> str:
    """Return what was expected in place of a value, with what to write; "" if it is right."""
    if not fits(value, parameter.kind):
        expected = f"{parameter.words} (the default is {parameter.default!r})"
    elif value is not None and parameter.typed and parameter.name in RULES:
        expected = RULES[parameter.name](value)
        if expected and fits(None, parameter.kind):
            expected = f"None, or {expected}"
    else:
        return ""
    return f"{expected}{_hint(parameter, value)}" if expected else ""


def _hint(parameter: Parameter, value: object) -> str:
    """Return how to write a wrong value, where a usual mistake explains it."""
    if "str" not in parameter.words:
        for text in filter(_is_number, _texts(value)):
            return f". {text!r} is text, in YAML too: write {_yaml_number(text)}"
    if not isinstance(value, list) and fits([value], parameter.kind):
        text = f'["{value}"]' if isinstance(value, str) else f"[{value}]"
        return f". A list of one is written {text}"
    if parameter.kind is bool:
        return ". Write true or false (in Python True or False)"
    return ""


def _texts(value: object) -> Iterator[str]:
    """Yield a text, or the texts in lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for one in value:
            yield from _texts(one)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _yaml_number(text: str) -> str:
    """Return `text` as PyYAML wants it: 1e-4 needs a dot and a signed exponent, 1.0e-4."""
    mantissa, _, exponent = text.lower().partition("e")
    if not exponent:
        return f"{text} without quotes"
    return f"{mantissa}{'' if '.' in mantissa else '.0'}e{int(exponent):+d}"


# ------------------------------------------------------------------------------------------ rules

# takes a value of the declared type; returns what was expected instead, or "" if it is right
Rule = Callable[[object], str]


def _number(
    least: float = -math.inf, most: float = math.inf, open_below: bool = False, below: bool = False
) -> Rule:
    """Return the rule of a number in a range, of which either end may be left out."""

    def rule(value) -> str:
        inside = (least < value if open_below else least <= value) and (
            value < most if below else value <= most
        )
        return "" if inside and math.isfinite(value) else f"a number {said}"

    ends = [f"{'above' if open_below else 'from'} {least:g}"] if least > -math.inf else []
    ends += [f"{'below' if below else 'up to'} {most:g}"] if most < math.inf else []
    said = ", ".join(ends) or "that is finite"
    return rule


def _one_of(module: str, *constants: str) -> Rule:
    """Return the rule of a name that constants of a module have, each one name or several.

    The module is imported when it is needed: that may take seconds.
    """

    def rule(value) -> str:
        known = [getattr(importlib.import_module(f"icprobe.{module}"), name) for name in constants]
        return _among(value, [n for one in known for n in ([one] if isinstance(one, str) else one)])

    return rule


def _among(value: str, names: list[str]) -> str:
    if value in names:
        return ""
    return f"one of {', '.join(map(repr, names))}.{did_you_mean(value, names)}".removesuffix(".")


def _each(rule: Rule, least: int = 0) -> Rule:
    """Return the rule of a list of at least so many values, each of which keeps to a rule."""

    def of_all(values) -> str:
        if len(values) < least:
            return f"a list of at least {least}"
        wrong = next(((value, rule(value)) for value in values if rule(value)), None)
        return f"in place of {wrong[0]!r} {wrong[1]}" if wrong else ""

    return of_all


def _some_text(value) -> str:
    return "" if value.strip() else "some text"


def _regular_expression(value) -> str:
    try:
        re.compile(value)
    except re.error as error:
        return f"a regular expression: {error}"
    return ""


def _source(value) -> str:
    from icprobe import data

    try:
        data.is_suite(value)  # and if not, whether it is a file that is there, or like a hub name
    except data.DataError as error:
        return f"a suite, a file or a hub name: {error}"
    return ""


def _columns(value) -> str:
    from icprobe import data

    known = (*data.COLUMNS, "options")
    if not all(key in known and fits(source, str | None) for key, source in value.items()):
        return f"{{column: name, template or None}} with columns among {', '.join(known)}"
    for key, source in value.items():
        try:
            list(string.Formatter().parse(source or ""))
        except ValueError as error:
            return f"a template for {key}, with column names in braces: {error}"
    return ""


def _model(value) -> str:
    is_path = Path(value).is_absolute() or value.startswith((".", "~"))
    is_path |= value.partition("@")[0].count("/") > 1
    folder = paths.resolve(value)
    if is_path and not folder.is_dir():
        return f"a model's name or folder, and there is no folder {folder}"
    if value.strip() and folder.is_dir():
        for names in (("config.json", "adapter_config.json"), ("*.safetensors",)):
            if not any(list(folder.glob(name)) for name in names):
                return f"a model's name or folder, and {folder} has no {' or '.join(names)}"
    return _some_text(value)


def _file(value) -> str:
    return "" if paths.resolve(value).is_file() else "a file that is there"


def _folder(value) -> str:
    return "" if not value or paths.resolve(value).is_dir() else 'a folder that is there, or ""'


def _address(value) -> str:
    right = not value or value.startswith(("http://", "https://"))
    return "" if right else 'http://... or https://..., or "" for none'


def _pools(value) -> str:
    from icprobe import data

    for suite, sizes in value.items():
        if suite not in data.suites():
            return f"suites, which are {', '.join(data.suites())}, in place of {suite!r}"
        if not fits(sizes, list[int]) or len(sizes) != 2 or min(sizes) < 1:
            return f"[N, M], two whole numbers from 1, for {suite!r}"
    return ""


def _steps(value) -> str:
    from icprobe import retraining

    try:
        retraining.planned(value)
    except ValueError as error:
        return f"steps of training: {error}"
    return ""


def _step(value) -> str:
    from icprobe import retraining

    try:
        retraining.Step(*value)
    except (TypeError, ValueError) as error:
        return f"[optimizer, rate]: {error}"
    return ""


def _rival(value) -> str:
    from icprobe import methods

    return _among(value, [one.title for one in methods.REGISTERED.values() if one.title])


def _subsets(value) -> str:
    from icprobe import statistics

    right = value == 0 or value >= statistics.LEAST
    return "" if right else f"0 for none, or at least {statistics.LEAST} to rank"


def _base(value) -> str:
    right = len(value) == 2 and value[0] >= 0 and value[1] >= 1
    return "" if right else "[pairs from 0, contexts from 1]"


_FROM_0, _FROM_1, _POSITIVE = _number(0), _number(1), _number(0, open_below=True)
_SHARE = _number(0, 1, open_below=True)

RULES: dict[str, Rule] = {
    **dict.fromkeys(("profile", "output_dir", "scores_dir", "networks_dir"), _some_text),
    **dict.fromkeys(("train", "queries", "evaluation"), _source),
    **dict.fromkeys(("train_split", "query_split", "evaluation_split"), _some_text),
    **dict.fromkeys(("train_columns", "query_columns", "evaluation_columns"), _columns),
    **dict.fromkeys(("seed", "lora_rank", "checkpoints", "n_answered", "memory"), _FROM_0),
    **dict.fromkeys(
        (
            "n_train", "n_query", "max_length", "ekfac_blocks", "n_compared", "m_compared",
            "tracin_epochs", "tracin_checkpoints", "n_trained", "m_trained", "n_evaluation",
            "answer_tokens", "seeds", "sweep_seeds", "epochs", "batch_size", "subset_seeds",
            "dimension", "network_width", "network_layers", "network_heads", "network_steps",
            "network_seeds", "n_examples", "n_queries", "quick_steps", "n_timed", "timing_repeats",
            "m_sample",
        ),
        _FROM_1,
    ),
    **dict.fromkeys(("resamples", "n_tasks", "network_pairs"), _number(2)),
    **dict.fromkeys(("rate", "network_rate", "noise", "prior_spread"), _POSITIVE),
    **dict.fromkeys(("margin", "tolerance"), _POSITIVE),
    "n_sample": _number(4),  # statistics.LEAST, to rank
    **dict.fromkeys(("budget", "near"), _SHARE),
    "budget_unit": _one_of("finetuning.selection", "UNITS"),
    "model": _model,
    "dtype": _one_of("lm", "DTYPES"),
    "engine": _one_of("engines", "ENGINES"),
    "condition_pools": _pools,
    "layers": _regular_expression,
    "loss_on": _one_of("gradients", "LOSSES"),
    "steps": _steps,
    "rivals": _each(_rival),
    "budgets": _each(_SHARE),
    "schedule": _one_of("finetuning.recipe", "SCHEDULES"),
    "warmup": _number(0, 1, below=True),
    "subsets": _subsets,
    "subset_share": _number(0, 1, open_below=True, below=True),
    "judge_url": _address,
    "prior_mean": _number(),
    "bases": _each(_base, least=1),
    "cosines": _each(_number(-1, 1), least=1),
    "scales": _each(_POSITIVE, least=1),
    "offsets": _each(_number(), least=1),
    "angles": _each(_number(0, 90, below=True), least=1),
    # the quick networks of notebook 05 have two heads
    "quick_width": lambda value: "" if value > 0 and value % 2 == 0 else "an even number from 2",
    "watched": _each(_FROM_0, least=1),
    "rates": _each(_POSITIVE, least=1),
    "cost_dimensions": _each(_FROM_1, least=1),
    "compared": _file,
    "methods": _each(_one_of("benchmark", "METHODS")),
    "m_timed": _each(_FROM_1, least=1),
    "published_dir": _folder,
    "step": _step,
    "method": _one_of("advice", "ICP", "GRADIENTS", "SIMILARITY"),
    "choice": _one_of("selection", "IN_TURN", "TOP"),
}  # fmt: skip

# a parameter, another one, and what the first must be beside the other
TOGETHER: tuple[tuple[str, str, Callable[[object, object], str]], ...] = (
    (
        "network_width",
        "network_heads",
        lambda width, heads: "" if width % heads == 0 else f"a multiple of network_heads, {heads}",
    ),
    (
        "watched",
        "quick_steps",
        lambda watched, steps: "" if max(watched) <= steps else f"none above quick_steps, {steps}",
    ),
    (
        "bases",
        "network_pairs",  # the context's pairs, the example and the query
        lambda bases, most: "" if max(k for k, _ in bases) <= most - 2 else (
            f"up to network_pairs - 2, {most - 2}, pairs before an example"
        ),
    ),
    (
        "angles",
        "dimension",
        lambda _, dimension: "" if dimension >= 4 else (
            f"planes at angles to have four dimensions, and dimension is {dimension}"
        ),
    ),
)  # fmt: skip
