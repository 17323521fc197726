"""One part of a store: a parquet file with train_id, query_id, score of one block.

A part's metadata ties it to its store and its place there; checksums find damage.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from icprobe.scores.keys import StoreError

COLUMNS = pa.schema({"train_id": pa.string(), "query_id": pa.string(), "score": pa.float32()})


class Place(NamedTuple):
    """Where a part belongs: the store's name, the block's number, its n and M ids."""

    store: str
    block: int
    train_ids: list[str]
    query_ids: list[str]

    @property
    def tag(self) -> dict[bytes, bytes]:
        """The metadata that ties a part to its store and its block."""
        return {b"icprobe.store": self.store.encode(), b"icprobe.block": str(self.block).encode()}

    @property
    def ids(self) -> dict[str, list[str]]:
        """The id columns: every query in order for each training example."""
        return {
            "train_id": [train_id for train_id in self.train_ids for _ in self.query_ids],
            "query_id": self.query_ids * len(self.train_ids),
        }


def encode(scores: np.ndarray, place: Place) -> bytes:
    """Return the file of a block's scores, float32 [n, M]."""
    buffer = pa.BufferOutputStream()
    with pq.ParquetWriter(
        buffer,
        COLUMNS,
        compression="zstd",
        use_dictionary=["train_id", "query_id"],
        write_page_checksum=True,
        write_statistics=False,  # a third of a small part, and nobody filters by them
        store_schema=False,
    ) as writer:
        writer.write_table(pa.table({**place.ids, "score": scores.reshape(-1)}, schema=COLUMNS))
        writer.add_key_value_metadata(place.tag)
    return buffer.getvalue().to_pybytes()


def decode(path, place: Place) -> np.ndarray:
    """Read and check a part: float32 [n, M].

    Raises:
        StoreError: If it is of another place or has other ids, or scores that are not finite.
        OSError: If it is damaged; or another error of pyarrow.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        _check_footer(file.metadata, place)
        table = file.read(use_threads=False)
    if not table.drop_columns("score").equals(pa.table(place.ids)):
        raise StoreError("its training or query ids are not those of the manifest")
    scores = table["score"].to_numpy()
    if not np.isfinite(scores).all():
        raise StoreError("it holds scores that are not finite")
    return scores.reshape(-1, len(place.query_ids))


def _check_footer(footer: pq.FileMetaData, place: Place) -> None:
    found, tag = footer.metadata or {}, place.tag
    if any(found.get(name) != value for name, value in tag.items()):
        owner = " block ".join(found.get(name, b"(unknown)").decode() for name in tag)
        raise StoreError(f"it belongs to {owner}")
    if not footer.schema.to_arrow_schema().equals(COLUMNS):
        raise StoreError(f"its columns are not {', '.join(COLUMNS.names)} (float32)")
    n_rows = len(place.train_ids) * len(place.query_ids)
    if footer.num_rows != n_rows:
        raise StoreError(f"it has {footer.num_rows} rows instead of {n_rows}")
