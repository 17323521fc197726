"""One part of a store: a parquet file with train_id, query_id, score of one block.

A part's metadata ties it to its store and its place there; checksums find damage.
"""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from icprobe.scores.keys import StoreError

COLUMNS = pa.schema({"train_id": pa.string(), "query_id": pa.string(), "score": pa.float32()})


def encode(scores: np.ndarray, train_ids: list[str], query_ids: list[str], tag: dict) -> bytes:
    """Return the file of a block's scores.

    Args:
        scores: float32 [n, M].
        train_ids: n ids.
        query_ids: M ids.
        tag: See `tag`.
    """
    columns = {**_ids(train_ids, query_ids), "score": scores.reshape(-1)}
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
        writer.write_table(pa.table(columns, schema=COLUMNS))
        writer.add_key_value_metadata(tag)
    return buffer.getvalue().to_pybytes()


def decode(path, train_ids: list[str], query_ids: list[str], tag: dict) -> np.ndarray:
    """Read and check a part: float32 [n, M]; arguments as for `encode`.

    Raises:
        StoreError: If it is of another place or has other ids, or scores that are not finite.
        OSError: If it is damaged; or another error of pyarrow.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        check_footer(file.metadata, len(train_ids) * len(query_ids), tag)
        table = file.read(use_threads=False)
    if not table.drop_columns("score").equals(pa.table(_ids(train_ids, query_ids))):
        raise StoreError("its training or query ids are not those of the manifest")
    scores = table["score"].to_numpy()
    if not np.isfinite(scores).all():
        raise StoreError("it holds scores that are not finite")
    return scores.reshape(-1, len(query_ids))


def check_footer(footer: pq.FileMetaData, n_rows: int, tag: dict) -> None:
    """Raise StoreError if a part is of another place, or has other columns or another size."""
    found = footer.metadata or {}
    if any(found.get(name) != value for name, value in tag.items()):
        owner = " block ".join(found.get(name, b"(unknown)").decode() for name in tag)
        raise StoreError(f"it belongs to {owner}")
    if not footer.schema.to_arrow_schema().equals(COLUMNS):
        raise StoreError(f"its columns are not {', '.join(COLUMNS.names)} (float32)")
    if footer.num_rows != n_rows:
        raise StoreError(f"it has {footer.num_rows} rows instead of {n_rows}")


def tag(store: str, block: int) -> dict[bytes, bytes]:
    """Return the metadata that ties a part to its store and its place there."""
    return {b"icprobe.store": store.encode(), b"icprobe.block": str(block).encode()}


def _ids(train_ids: list[str], query_ids: list[str]) -> dict[str, list[str]]:
    """Return the id columns: every query in order for each training example."""
    return {
        "train_id": [train_id for train_id in train_ids for _ in query_ids],
        "query_id": query_ids * len(train_ids),
    }
