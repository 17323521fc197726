"""The key of a store: a hash of everything that determines its scores; and how two differ."""

import hashlib
import json
import re
import reprlib
from collections.abc import Iterator


class StoreError(ValueError):
    """A store or a part that is not what it should be, or cannot be written."""


def plain(value):
    """Return the value as JSON gives it back: lists for tuples, fields in order of name."""
    return json.loads(json.dumps(value, allow_nan=False, sort_keys=True))


def key(method: str, identity: dict) -> str:
    """Return `<method>-<hash of method and identity>`.

    Raises:
        StoreError: If the method's name has other signs than letters, digits, dots, dashes.
    """
    if not re.fullmatch(r"\w[\w.-]*", method, re.ASCII):
        raise StoreError(f"{method!r} is no method name: letters, digits, dots, dashes only")
    canonical = json.dumps(plain([method, identity]), sort_keys=True, separators=(",", ":"))
    return f"{method}-{hashlib.sha256(canonical.encode()).hexdigest()[:10]}"


def differences(stored, asked, path: str = "") -> Iterator[str]:
    """Yield a line for every leaf in which two JSON values differ, named by its dotted path."""
    if isinstance(stored, dict) and isinstance(asked, dict):
        for name in sorted(stored.keys() | asked.keys()):
            values = stored.get(name, ...), asked.get(name, ...)  # ... is not None: not there
            yield from differences(*values, f"{path}.{name}" if path else name)
    elif isinstance(stored, list) and isinstance(asked, list) and len(stored) == len(asked):
        for index, values in enumerate(zip(stored, asked, strict=True)):
            yield from differences(*values, f"{path}[{index}]")
    elif type(stored) is not type(asked) or stored != asked:  # 1, 1.0 and True are three things
        yield f"{path}: stored {_shown(stored)}, asked {_shown(asked)}"


def _shown(value) -> str:
    if value is ...:
        return "nothing"
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    count = f"{len(value)} values " if isinstance(value, list) else ""
    return count + short.repr(value)


def listed(differing: list[str]) -> str:
    """Return at most ten lines of `differences`, one below the other."""
    rest = [f"and {len(differing) - 10} more"] if len(differing) > 10 else []
    return "".join(f"\n  {line}" for line in differing[:10] + rest)
