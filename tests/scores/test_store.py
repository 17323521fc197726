"""The score store: what is finished stays finished, and nothing foreign is taken for a score."""

import json
import os
import re
import resource
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stores import IDENTITY, bits, files, fill, filled, from_matrix, ids, opened, some_scores

from icprobe.data import paths
from icprobe.scores import run, store

MATRIX = some_scores(7, 5)
PARTS = [f"part-0000{block}.parquet" for block in range(3)]

# --- filling and reading -------------------------------------------------------------------------


def test_round_trip(tmp_path, capsys):
    kept = opened(tmp_path, description="nats; positive helps")
    assert kept.missing() == [0, 1, 2]
    assert bits(fill(kept, from_matrix(MATRIX))) == bits(MATRIX)
    assert "35/35" in capsys.readouterr().err
    assert sorted(files(kept.folder)) == ["manifest.json", *PARTS]
    assert re.fullmatch(r"icp-[0-9a-f]{10}", kept.folder.name)

    manifest = json.loads((kept.folder / "manifest.json").read_text())
    assert manifest.pop("made_with")["python"].startswith("3.")
    assert manifest == {
        "format": 1, "method": "icp", "description": "nats; positive helps", "block_size": 3,
        "identity": IDENTITY, "train_ids": ids("train", 7), "query_ids": ids("query", 5),
    }  # fmt: skip
    table = pq.read_table(kept.part(2))  # as others read it
    assert table.column_names == ["train_id", "query_id", "score"]
    assert table["train_id"].to_pylist() == ["train-6"] * 5
    assert table["query_id"].to_pylist() == ids("query", 5)
    assert bits(table["score"].to_numpy()) == bits(MATRIX[6])


def test_stores_filled_together_share_one_computation(tmp_path):
    stores = {name: opened(tmp_path, method=name) for name in ("dot", "cosine")}
    stores["dot"].write(0, MATRIX[:3])  # a killed run got this far
    calls = []

    def both(blocks):
        for block in blocks:
            calls.append((block.outputs, list(block.train)))
            yield block.number, {name: MATRIX[list(block.train)] for name in block.outputs}

    for _ in range(2):
        run.fill(stores, range(7), both)
        assert all(bits(kept.matrix()) == bits(MATRIX) for kept in stores.values())
        names = ["dot", "cosine"]
        assert calls == [(["cosine"], [0, 1, 2]), (names, [3, 4, 5]), (names, [6])]


def test_a_finished_part_never_changes_and_block_size_of_the_manifest_wins(tmp_path):
    kept = opened(tmp_path)
    kept.write(1, MATRIX[3:6])
    kept.write(1, np.zeros((3, 5)))
    resumed = opened(tmp_path, block_size=5)
    assert resumed == kept
    assert bits(fill(resumed, from_matrix(MATRIX))) == bits(MATRIX)


def test_a_block_that_another_process_finishes_meanwhile_is_not_computed(tmp_path):
    computed, mine, theirs = [], opened(tmp_path), opened(tmp_path)

    def score_rows(rows):
        theirs.write(1, MATRIX[3:6])
        return from_matrix(MATRIX, computed)(rows)

    assert bits(fill(mine, score_rows)) == bits(MATRIX)
    assert computed == [[0, 1, 2], [6]]


def test_two_that_begin_at_once_share_the_work(tmp_path):
    """In step, they would score every block twice."""
    matrix, computed = some_scores(300, 1), []
    mine, theirs = (opened(tmp_path, N=300, M=1) for _ in range(2))

    def score_rows(rows):
        other = theirs.missing()[0]  # goes through them in order, and is as fast
        theirs.write(other, matrix[3 * other : 3 * other + 3])
        return from_matrix(matrix, computed)(rows)

    assert bits(fill(mine, score_rows)) == bits(matrix)
    assert 50 <= len(computed) < 65


def test_the_key_is_of_method_and_identity_in_any_order(tmp_path):
    first = opened(tmp_path, identity={"a": [1, 2], "b": {"c": 1, "d": 2}})
    assert first == opened(tmp_path, identity={"b": {"d": 2, "c": 1}, "a": (1, 2)})
    others = [
        opened(tmp_path, identity={"a": [1, 2], "b": {"c": 1, "d": 3}}),
        opened(tmp_path, identity=first.identity, method="cosine"),
    ]
    assert len({first.folder, *(other.folder for other in others)}) == 3


def test_fresh_removes_exactly_this_store(tmp_path):
    other, kept = filled(tmp_path, method="cosine"), filled(tmp_path)
    (kept.folder / f"{PARTS[1]}.{'0' * 32}.tmp").write_bytes(b"half")
    mine = ["notes.txt", "part-of-my-notes.parquet"]
    for name in mine:
        (kept.folder / name).write_text("mine")
    fresh = opened(tmp_path, block_size=4, fresh=True)
    assert sorted(files(fresh.folder)) == ["manifest.json", *mine]
    assert fresh.block_size == 4
    assert not other.missing()


def test_relative_folders_start_at_the_repository_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(store.ScoresNotFound, match="no icp scores at data/no-such-folder/icp-"):
        store.find(["data/no-such-folder"], "icp", IDENTITY)
    inside = os.path.relpath(tmp_path, paths.ROOT)
    assert opened(inside).folder.resolve().parent == tmp_path.resolve()


# --- the law: any way of filling gives the same bytes ---------------------------------------------

finite_bits = st.one_of(
    st.integers(0, 2**32 - 1).filter(lambda b: b >> 23 & 0xFF != 0xFF),
    st.sampled_from([0x80000000, 1, 0x80000001, 0x007FFFFF, 0x7F7FFFFF]),  # -0.0, denormals, max
)
names = st.text(st.characters(codec="utf-8"), max_size=8)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_any_way_of_filling_gives_the_same_matrix_and_bytes(data):
    train_ids = data.draw(st.lists(names, min_size=1, max_size=10, unique=True))
    query_ids = data.draw(st.lists(names, min_size=1, max_size=6, unique=True))
    N, M = len(train_ids), len(query_ids)
    block_size = data.draw(st.integers(1, N + 2))
    drawn = data.draw(st.lists(finite_bits, min_size=N * M, max_size=N * M))
    expected = np.array(drawn, dtype=np.uint32).view(np.float32).reshape(N, M)

    with tempfile.TemporaryDirectory() as here, tempfile.TemporaryDirectory() as there:
        straight = store.open(here, "icp", IDENTITY, train_ids, query_ids, block_size)
        fill(straight, from_matrix(expected))

        winding = store.open(there, "icp", IDENTITY, train_ids, query_ids, block_size)
        order = data.draw(st.permutations(range(winding.n_blocks)))
        for block in order[: data.draw(st.integers(0, len(order)))]:
            winding.write(block, expected[list(winding.rows(block))].astype(np.float64))
        for stop_after in data.draw(st.lists(st.integers(0, 3), max_size=3)):
            n_missing, computed = len(winding.missing()), []
            try:
                fill(winding, from_matrix(expected, computed, stop_after))
            except KeyboardInterrupt:
                assert len(winding.missing()) == n_missing - stop_after
            winding = store.open(
                there, "icp", IDENTITY, train_ids, query_ids, data.draw(st.integers(1, N + 2))
            )
        result = fill(winding, from_matrix(expected))

        assert bits(result) == bits(expected)
        assert files(winding.folder) == files(straight.folder)


# --- damaged, foreign, tampered ------------------------------------------------------------------


def as_part(kept, matrix, train_ids=("train-3", "train-4", "train-5")) -> bytes:
    """Return a part with the tag of this store's block 1, but other contents."""
    columns = {
        "train_id": np.repeat(train_ids, 5),
        "query_id": np.tile(kept.query_ids, 3),
        "score": np.asarray(matrix, dtype=np.float32).ravel(),
    }
    tag = {"icprobe.store": kept.folder.name, "icprobe.block": "1"}
    return as_file(pa.table(columns).replace_schema_metadata(tag))


def as_file(table: pa.Table) -> bytes:
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer, store_schema=True)
    return buffer.getvalue().to_pybytes()


def by_somebody_else(kept):
    return as_file(pq.read_table(kept.part(1)).replace_schema_metadata(None))


def of(folder, **changed):
    """Return block 1 of another store."""
    return filled(folder, **changed).part(1).read_bytes()


# what is in the place of a part, and what is said
DAMAGES = {
    "truncated": (lambda kept: kept.part(1).read_bytes()[:-20], ""),
    "empty": (lambda kept: b"", ""),
    "no parquet": (lambda kept: b"train_id,query_id,score\n", ""),
    "swapped": (lambda kept: kept.part(0).read_bytes(), r"belongs to icp-\w{10} block 0"),
    "of another store": (
        lambda kept: of(kept.folder.parent, method="cosine"),
        r"belongs to cosine-\w{10} block 1",
    ),
    "by somebody else": (by_somebody_else, "belongs to .unknown."),
    "of other blocks": (
        lambda kept: of(kept.folder.parent / "elsewhere", block_size=2),
        "10 rows instead of 15",
    ),
    "wrong ids": (
        lambda kept: as_part(kept, MATRIX[3:6], ["train-4", "train-3", "train-5"]),
        "ids are not those of the manifest",
    ),
    "nan": (lambda kept: as_part(kept, np.full((3, 5), np.nan)), "not finite"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_or_foreign_part_is_named_and_can_be_computed_again(tmp_path, damage):
    kept = filled(tmp_path)
    intact = files(kept.folder)
    content, reason = DAMAGES[damage]
    kept.part(1).write_bytes(content(kept))
    with pytest.raises(store.StoreError, match=rf"part-00001.*{reason}.*Delete this file"):
        store.find([tmp_path], "icp", IDENTITY).matrix()
    kept.part(1).write_bytes(as_part(kept, MATRIX[3:6]))  # nothing else was wrong with it
    assert bits(kept.matrix()) == bits(MATRIX)
    kept.part(1).unlink()
    computed = []
    fill(opened(tmp_path), from_matrix(MATRIX, computed))
    assert computed == [[3, 4, 5]]
    assert files(kept.folder) == intact


def test_parts_of_a_renamed_store_are_read_and_foreign_ones_are_not(tmp_path):
    kept, other = filled(tmp_path), filled(tmp_path, method="cosine")
    new = {**IDENTITY, "template": 1}
    tamper(kept, identity=new, parts_of=kept.folder.name)
    kept.folder.rename(tmp_path / store.key("icp", new))
    found = store.find([tmp_path], "icp", new)
    assert bits(found.matrix()) == bits(MATRIX)
    found.part(1).write_bytes(other.part(1).read_bytes())
    with pytest.raises(store.StoreError, match="belongs to cosine-"):
        found.matrix()


def test_no_flipped_bit_changes_a_score(tmp_path):
    kept = filled(tmp_path, N=2, M=3)
    expected, data, found = some_scores(2, 3), kept.part(0).read_bytes(), 0
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        kept.part(0).write_bytes(flipped)
        try:
            assert bits(kept.matrix()) == bits(expected)
        except store.StoreError:
            found += 1
    assert found > len(data) / 2


def tamper(kept, **fields) -> None:
    path = kept.folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"identity": {**IDENTITY, "model": {"name": "tiny", "dtype": "bfloat16"}}},
            r"identity.model.dtype: stored 'bfloat16', asked 'float32'\n"
            r"  identity.model.weights: stored nothing, asked 'abab",
        ),
        ({"train_ids": ids("train", 6)}, "train_ids: stored 6 values .*, asked 7 values"),
        ({"query_ids": ids("Query", 5)}, r"query_ids\[0\]: stored 'Query-0', asked 'query-0'"),
        ({"format": 99}, "format: stored 99, asked 1"),
        ({"block_size": 4}, "it has 15 rows instead of 20"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_tampered_manifest_names_the_field(tmp_path, fields, message):
    tamper(filled(tmp_path), **fields)
    with pytest.raises(store.StoreError, match=message):
        opened(tmp_path).matrix()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"'])
def test_unreadable_manifest_is_named(tmp_path, text):
    kept = filled(tmp_path)
    (kept.folder / "manifest.json").write_text(text)
    for use in (opened, lambda folder: store.find([folder], "icp", IDENTITY)):
        with pytest.raises(store.StoreError, match=r"manifest.json cannot be used.*fresh=True"):
            use(tmp_path)
    assert not filled(tmp_path, fresh=True).missing()


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_scores_that_are_not_finite_are_refused_with_their_ids(tmp_path, value):
    kept, block = opened(tmp_path), np.zeros((3, 5))
    block[1, 2] = value
    with pytest.raises(store.StoreError, match=r"1 scores of block 1.*'train-4'.*'query-2'"):
        kept.write(1, block)
    assert sorted(files(kept.folder)) == ["manifest.json"]


@pytest.mark.parametrize("shape", [(2, 5), (5, 3), (15,), (3, 5, 1)])
def test_wrong_shape_is_refused(tmp_path, shape):
    kept = opened(tmp_path)
    with pytest.raises(store.StoreError, match=r"block 0 must have shape \[3, 5\], not"):
        kept.write(0, np.zeros(shape))
    assert kept.missing() == [0, 1, 2]


@pytest.mark.parametrize("method", ["", "../icp", "a/b", "icp *", "-icp"])
def test_a_method_name_is_a_file_name(tmp_path, method):
    with pytest.raises(store.StoreError, match="method name"):
        opened(tmp_path, method=method)


# --- finding --------------------------------------------------------------------------------------


def test_the_first_folder_that_has_complete_scores_counts(tmp_path):
    mine, reference = tmp_path / "mine", tmp_path / "reference"
    filled(reference)
    begun = opened(mine)
    begun.write(0, np.zeros((3, 5)))
    with pytest.raises(store.StoreError, match="incomplete: 3 of 7 rows are finished"):
        begun.matrix()
    assert store.find([mine, reference], "icp", IDENTITY).folder.parent == reference
    fill(begun, from_matrix(np.zeros((7, 5))))
    assert store.find([mine, reference], "icp", IDENTITY).folder.parent == mine


def test_find_names_the_nearest_store_and_the_fields_that_differ(tmp_path):
    def changed(**fields):
        return {**IDENTITY, "model": {**IDENTITY["model"], **fields}}

    with pytest.raises(FileNotFoundError, match="There are no icp scores in"):
        store.find([tmp_path], "icp", IDENTITY)
    far = filled(tmp_path, identity={**changed(name="large", dtype="bfloat16"), "data": {}})
    near = opened(tmp_path, identity=changed(dtype="bfloat16"))
    near.write(0, MATRIX[:3])
    filled(tmp_path, method="icp-control")
    with pytest.raises(store.ScoresNotFound) as caught:
        store.find([tmp_path], "icp", IDENTITY, how_to_make="run notebooks/01")
    message = str(caught.value)
    assert f"{near.folder.name} (3 of 7 rows are finished)" in message
    assert "identity.model.dtype: stored 'bfloat16', asked 'float32'" in message
    assert "identity.data" not in message
    assert far.folder.name not in message and "icp-control" not in message
    assert "run notebooks/01" in message


# --- disks that refuse ----------------------------------------------------------------------------


@contextmanager
def no_file_longer_than(n_bytes: int):
    """Let the kernel refuse longer files, as a full disk would, half-way through writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def as_nobody():
    """Permissions do not bind root: be somebody else for a moment."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)


def test_full_disk_leaves_finished_parts_and_no_temporary(tmp_path):
    kept = opened(tmp_path)
    kept.write(0, MATRIX[:3])
    before = files(kept.folder)
    with (
        no_file_longer_than(500),
        pytest.raises(store.StoreError, match=r"cannot write .*part-00001.parquet: File too large"),
    ):
        kept.write(1, MATRIX[3:6])
    assert files(kept.folder) == before
    assert bits(fill(kept, from_matrix(MATRIX))) == bits(MATRIX)


def test_read_only_folder_is_named_and_finished_scores_can_be_read():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # for anybody to enter
        filled(folder)
        begun = opened(folder, method="cosine")
        begun.write(0, MATRIX[:3])
        begun.folder.chmod(0o555)
        with as_nobody():
            with pytest.raises(store.StoreError, match=r"cannot write .*: Permission denied"):
                begun.write(1, MATRIX[3:6])
            assert bits(fill(opened(folder), pytest.fail)) == bits(MATRIX)
        begun.folder.chmod(0o755)
        assert sorted(files(begun.folder)) == ["manifest.json", PARTS[0]]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    (tmp_path / store.key("icp", IDENTITY)).write_text("not a folder")
    with pytest.raises(store.StoreError, match=r"cannot write .*manifest.json"):
        opened(tmp_path)
