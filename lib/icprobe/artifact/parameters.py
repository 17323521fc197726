"""What a notebook's parameters have in common: strict values, and one error for all wrong ones.

settings.py declares the parameters. Their types in notebooks' cells, in --help and in
docs/parameters.md are those of pydantic's JSON schema, in Python's words.
"""

import functools
import re
from collections.abc import Mapping, MutableMapping
from typing import Self

from pydantic import BaseModel, ConfigDict, ValidationError

QUOTED_NUMBER = re.compile(r"'[+-]?\d[\d.]*(e[+-]?\d+)?'")
TYPES = {
    "string": "str", "integer": "int", "number": "float", "boolean": "bool", "null": "None",
    "array": "list", "object": "dict",
}  # fmt: skip
LIMITS = {
    "minimum": "from", "exclusiveMinimum": "above", "maximum": "up to",
    "exclusiveMaximum": "below", "multipleOf": "divisible by",
}  # fmt: skip


class ParameterError(ValueError):
    """Parameters have wrong values; the message names all.

    Attributes:
        problems: By parameter, a sentence: its value and what was expected.
    """

    def __init__(self, problems: Mapping[str, str]):
        super().__init__("\n  ".join(["wrong parameters:", *problems.values()]))
        self.problems = problems


class Parameters(BaseModel):
    """The parameters of a notebook; fields have types, ranges and a sentence each.

    A bool is no number, and a whole number for a float becomes one: 1 and 1.0 must not make two
    score stores.
    """

    model_config = ConfigDict(strict=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @classmethod
    def of(cls, values: MutableMapping[str, object]) -> Self:
        """Take parameters from a notebook's `globals()`, and leave checked values in their place.

        Raises:
            ParameterError: If any are wrong or missing.
        """
        given = {name: values[name] for name in cls.model_fields if name in values}
        problems = {
            name: f"{name} has no value: its line in the parameters cell is gone"
            for name in cls.model_fields
            if name not in given
        }
        try:
            settings = cls(**given)
        except ValidationError as error:
            for sentence in map(_sentence, error.errors()):
                problems.setdefault(re.match(r"\w+", sentence)[0], sentence)
        if problems:
            raise ParameterError(problems)
        values.update(dict(settings))
        return settings


def _sentence(error: Mapping) -> str:
    """Return what is wrong; the parameter is the first word."""
    reason = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:  # a rule about several parameters
        return reason
    name, *within = error["loc"]
    place = "".join(f"[{part!r}]" for part in within if part != "[key]")
    value = repr(error["input"])
    hint = ""
    if error["type"] in ("dict_type", "list_type"):
        hint = "; in YAML, {name: value} or [a, b], with every quote and bracket closed"
    elif QUOTED_NUMBER.search(value):
        hint = "; a number in quotes is text, and so is 1e-4 in YAML: write 1.0e-4"
    return f"{name}{place} is {value}: {reason}{hint}"


@functools.cache
def schemas(parameters: type[Parameters]) -> dict[str, dict]:
    """Return the JSON schema of each parameter by name."""
    return parameters.model_json_schema()["properties"]


def type_in_words(schema: Mapping, ranges: bool = False) -> str:
    """Return a type as "list[int] or None", or with ranges as "list[int from 1] or None"."""
    if "anyOf" in schema:
        return " or ".join(type_in_words(one, ranges) for one in schema["anyOf"])
    if ranges and "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    items = schema.get("items")
    words = TYPES[schema["type"]] + (f"[{type_in_words(items, ranges)}]" if items else "")
    limits = [f" {word} {schema[key]}" for key, word in LIMITS.items() if ranges and key in schema]
    return words + "".join(limits)
