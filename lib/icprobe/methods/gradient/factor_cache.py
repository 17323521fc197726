"""Keeps the factors of many examples' gradients until their products are taken.

They stay in memory as far as there is room; the rest goes to a temporary file, from which one group
of layers is read at a time.
"""

import os
import shutil
import tempfile
from collections.abc import Sequence
from typing import NamedTuple

import torch

from icprobe.methods.gradient.factors import Factors


class _Place(NamedTuple):
    """Where in the file a group's factors begin, tensors like them without memory, and a device."""

    start: int
    like: Factors
    device: torch.device


class FactorCache:
    """Factors of batch after batch of examples; `free` bytes of memory are left.

    The file has no name: it is gone with the process, however that ends.
    """

    def __init__(self, memory: float) -> None:
        """Make an empty cache; a batch that does not fit in `memory` bytes goes to the file."""
        self.free = memory
        self._file = None
        self._batches: list[list[Factors | _Place]] = []

    def check_room(self, size: float) -> None:
        """Raise OSError if so many more bytes will not fit on the disk, before all are made."""
        disk = shutil.disk_usage(tempfile.gettempdir()).free
        if size - self.free > disk:
            raise _full(f"they take {size / 2**30:.1f} GiB, it has {disk / 2**30:.1f} free")

    def put(self, groups: Sequence[Factors]) -> None:
        """Keep the factors of one batch, or raise OSError if the disk is full."""
        size = sum(group.nbytes for group in groups)
        if size <= self.free:
            self.free -= size
            self._batches.append(list(groups))
        else:
            self._batches.append([self._write(group) for group in groups])

    def read(self, group: int, batches: slice = slice(None)) -> list[Factors]:
        """Return the factors of one group of layers for some of the batches, in order."""
        kept = (batch[group] for batch in self._batches[batches])
        return [self._load(part) if isinstance(part, _Place) else part for part in kept]

    def _write(self, group: Factors) -> _Place:
        if self._file is None:
            self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with the cache
        start = self._file.seek(0, os.SEEK_END)
        try:
            for part in group.tensors:
                left = _bytes(part.contiguous().cpu())
                while left:
                    left = left[self._file.write(left) :]
        except OSError as error:
            raise _full(error.strerror) from error
        return _Place(start, group.map(lambda part: part.to("meta")), group.inputs.device)

    def _load(self, place: _Place) -> Factors:
        self._file.seek(place.start)

        def next_like(part: torch.Tensor) -> torch.Tensor:
            part = torch.empty(part.shape, dtype=part.dtype)
            left = _bytes(part)
            while left:
                left = left[self._file.readinto(left) :]
            return part.to(place.device)

        return place.like.map(next_like)


def _full(reason: str) -> OSError:
    return OSError(
        f"the factors of gradients do not fit in {tempfile.gettempdir()} ({reason}): "
        "set TMPDIR to a larger disk, or raise memory"
    )


def _bytes(tensor: torch.Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU."""
    return memoryview(tensor.view(torch.uint8).numpy()).cast("B")  # numpy knows no bfloat16
