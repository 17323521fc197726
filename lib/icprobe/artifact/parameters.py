"""What a notebook's parameters have in common: strict values, and errors that name all wrong ones.

settings.py declares the parameters. Types and ranges in messages, in notebooks' cells and in
docs/parameters.md are put in words from pydantic's JSON schema.
"""

import difflib
import functools
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, ValidationError

TYPES = {
    "string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None",
    "array": "list", "object": "dict",
}  # fmt: skip
LIMITS = {
    "minimum": "from", "exclusiveMinimum": "above", "maximum": "up to",
    "exclusiveMaximum": "below", "multipleOf": "divisible by", "minItems": "of at least",
    "minLength": "of at least", "pattern": "that matches",
}  # fmt: skip


class ParameterError(ValueError):
    """Parameters have wrong values; the message names all.

    Attributes:
        problems: By parameter, a sentence: its value and what was expected.
    """

    def __init__(self, notebook: str, problems: Mapping[str, str]):
        super().__init__("\n  ".join([f"wrong parameters of {notebook}:", *problems.values()]))
        self.problems = dict(problems)


class Parameters(BaseModel):
    """The parameters of a notebook; fields have types, ranges and a sentence each.

    A bool is no number, and a whole number for a float becomes one: 1 and 1.0 must not make two
    score stores. What validators raise completes "expected ...".

    Attributes:
        NOTEBOOK: Name of the repository's notebook.
    """

    model_config = ConfigDict(
        strict=True, allow_inf_nan=False, extra="forbid", use_attribute_docstrings=True
    )
    NOTEBOOK: ClassVar[str] = ""

    @classmethod
    def of(cls, values: MutableMapping[str, object]) -> Self:
        """Take a notebook's parameters, and leave checked values in their place.

        Args:
            values: `globals()` of the notebook; other names are left alone.

        Raises:
            ParameterError: If any are wrong or missing.
        """
        given = {name: values[name] for name in cls.model_fields if name in values}
        settings = cls.checked(given, complete=True)
        values.update({name: getattr(settings, name) for name in given})
        return settings

    @classmethod
    def checked(cls, given: Mapping[str, object], complete: bool = False) -> Self:
        """Return settings with the given values, and defaults for all others.

        Defaults themselves are not checked again, for which there may be much to import.

        Args:
            given: Values of parameters.
            complete: Refuse to fill in defaults.

        Raises:
            ParameterError: If any are wrong.
        """
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        problems, settings = {}, None
        if complete:
            lacking = [name for name in defaults if name not in given]
            said = "has no value: its line in the parameters cell is gone"
            problems = {name: f"{name} {said}" for name in lacking}
        try:
            settings = cls(**{n: x for n, x in given.items() if repr(x) != repr(defaults.get(n))})
        except ValidationError as error:
            for one in error.errors():
                name = str(one["loc"][0])
                reason = str(one["ctx"]["error"]) if one["type"] == "value_error" else ""
                said = cls._expected(name, given.get(name, defaults.get(name)), reason)
                problems.setdefault(name, said)
        if problems:
            raise ParameterError(cls.NOTEBOOK, problems)
        return settings

    @classmethod
    def _expected(cls, name: str, value: object, reason: str) -> str:
        """Return what a wrong value is, what was expected, and what to write."""
        if name not in cls.model_fields:
            return f"{name} is no parameter.{did_you_mean(name, cls.model_fields)}"
        schema = schemas(cls)[name]
        kinds = options(schema)
        names = [one for kind in kinds for one in kind.get("enum", [])]
        default = cls.model_fields[name].default
        expected = reason or f"{described(schema)} (the default is {default!r})"
        if reason and {"type": "null"} in kinds:
            expected = f"None, or {reason}"
        if names and isinstance(value, str):
            expected += did_you_mean(value, names)
        return f"{name} is {value!r}, expected {expected}{cls._hint(name, value)}"

    @classmethod
    def _hint(cls, name: str, value: object) -> str:
        """Return how to write a wrong value, where a usual mistake explains it."""
        words = type_in_words(schemas(cls)[name])
        if "str" not in words:
            for text in filter(_is_number, _texts(value)):
                return f". {text!r} is text, in YAML too: write {_yaml_number(text)}"
        if words == "bool":
            return ". Write true or false (in Python True or False)"
        if words.startswith("list") and not isinstance(value, list):
            try:
                cls(**{name: [value]})
            except ValidationError:
                return ""
            one = f'"{value}"' if isinstance(value, str) else value
            return f". A list of one is written [{one}]"
        return ""


@functools.cache
def schemas(parameters: type[Parameters]) -> dict[str, dict]:
    """Return the JSON schema of each parameter by name."""
    return parameters.model_json_schema()["properties"]


def options(schema: Mapping) -> list[dict]:
    """Return the schemas of which a value must fit one."""
    return schema.get("anyOf", [schema])


def type_in_words(schema: Mapping) -> str:
    """Return a type as parameters cells have it, such as "list[int] or None"."""
    return described(schema, ranges=False)


def described(schema: Mapping, ranges: bool = True) -> str:
    """Return a type with its ranges and names, such as "int from 1 or None"."""
    if "anyOf" in schema:
        return " or ".join(described(one, ranges) for one in schema["anyOf"])
    if ranges and "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    words = TYPES[schema["type"]]
    if schema.get("items"):
        words += f"[{described(schema['items'], ranges)}]"
    limits = [f" {word} {schema[key]}" for key, word in LIMITS.items() if key in schema]
    return words + "".join(limits) if ranges else words


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean ...?" with the known words that are close, or nothing."""
    close = difflib.get_close_matches(word, known)
    return f" Did you mean {' or '.join(close)}?" if close else ""


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
