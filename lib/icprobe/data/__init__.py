"""Examples in common forms, suites, and the pinned archives that they come from.

Every data set has the columns id, prompt, completion, task, content, type (all strings, id
unique) and options (the completions to choose from, or None), whatever else the source has beside
them. Prompt and completion are TRL's form, so a selected subset trains as it is. data/README.md
describes suites and files.
"""

from icprobe.data.base import COLUMNS, DataError, plain_text
from icprobe.data.examples import Source, check_disjoint, identity, is_suite, load
from icprobe.data.suites import SPLITS, Suite, Task, read_suite, suites

__all__ = [
    "COLUMNS", "SPLITS", "DataError", "Source", "Suite", "Task", "check_disjoint", "identity",
    "is_suite", "load", "plain_text", "read_suite", "suites",
]  # fmt: skip
