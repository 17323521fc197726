"""The score store: what is finished stays finished, and nothing foreign is taken for a score."""

import json
import logging
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
from stores import (
    IDENTITY,
    bits,
    files,
    fill,
    filled,
    from_matrix,
    ids,
    opened,
    reused,
    some_scores,
)

from icprobe.data import paths
from icprobe.scores import engines, store

# --- filling and reading -------------------------------------------------------------------------


def test_round_trip(tmp_path, capsys, caplog):
    caplog.set_level(logging.INFO, "icprobe.scores")
    expected = some_scores(7, 5)
    scores = opened(tmp_path, description="nats; positive helps")
    assert scores.missing() == [0, 1, 2]
    assert not scores.complete
    result = fill(scores, from_matrix(expected), progress=True)
    assert bits(result) == bits(expected) == bits(scores.matrix())
    assert scores.complete
    assert sorted(files(scores.folder)) == [
        "manifest.json",
        "part-00000.parquet",
        "part-00001.parquet",
        "part-00002.parquet",
    ]
    output = capsys.readouterr()
    assert not output.out and "35/35" in output.err
    assert reused(caplog) == {"icp": 0}


def test_stores_filled_together_share_one_computation(tmp_path, caplog):
    caplog.set_level(logging.INFO, "icprobe.scores")
    one, other = (opened(tmp_path, method=name) for name in ("dot", "cosine"))
    expected = some_scores(7, 5)
    one.write(0, expected[:3])  # a killed run got this far
    calls = []

    def both(wanted):
        for rows in wanted:
            calls.append(list(rows))
            yield rows, [expected[list(rows)], None if one.finished(rows) else expected[list(rows)]]

    engines.fill([other, one], both)
    assert bits(one.matrix()) == bits(other.matrix()) == bits(expected)
    assert calls == [[0, 1, 2], [3, 4, 5], [6]]
    assert reused(caplog) == {"dot": 3, "cosine": 0}
    engines.fill([other, one], both)
    assert len(calls) == 3
    ragged = opened(tmp_path, method="ragged", block_size=2)
    with pytest.raises(store.StoreError, match="blocks are not the same"):
        engines.fill([one, ragged], both)


def test_parts_are_plain_tables_that_others_can_read(tmp_path):
    scores = filled(tmp_path)
    table = pq.read_table(scores.part(2))
    assert table.column_names == ["train_id", "query_id", "score"]
    assert table["train_id"].to_pylist() == ["train-6"] * 5
    assert table["query_id"].to_pylist() == ids("query", 5)
    assert bits(table["score"].to_numpy()) == bits(some_scores(7, 5)[6])


def test_manifest_says_what_made_the_scores(tmp_path):
    scores = filled(tmp_path, description="nats; positive helps")
    manifest = json.loads((scores.folder / "manifest.json").read_text())
    assert manifest["identity"] == IDENTITY
    assert manifest["description"] == "nats; positive helps"
    assert (manifest["method"], manifest["block_size"]) == ("icp", 3)
    assert (manifest["train_ids"], manifest["query_ids"]) == (ids("train", 7), ids("query", 5))
    assert manifest["made_with"]["python"].startswith("3.")
    assert re.fullmatch(r"icp-[0-9a-f]{10}", scores.folder.name)


def test_a_part_of_the_laptop_profile_is_a_few_kilobytes(tmp_path):
    scores = filled(tmp_path, N=8, M=48, block_size=8)
    assert scores.part(0).stat().st_size < 4_000


def test_block_size_of_the_manifest_wins(tmp_path):
    expected = some_scores(7, 5)
    opened(tmp_path, block_size=3).write(1, expected[3:6])
    resumed = opened(tmp_path, block_size=5)
    assert resumed.block_size == 3
    assert bits(fill(resumed, from_matrix(expected))) == bits(expected)


def test_a_finished_part_never_changes(tmp_path):
    scores = filled(tmp_path)
    before = files(scores.folder)
    scores.write(0, np.zeros((3, 5)))
    assert files(scores.folder) == before


def test_a_block_that_another_process_finishes_meanwhile_is_not_computed(tmp_path):
    expected, computed = some_scores(7, 5), []
    mine, theirs = opened(tmp_path), opened(tmp_path)

    def score_block(rows):
        theirs.write(1, expected[3:6])
        return from_matrix(expected, computed)(rows)

    assert bits(fill(mine, score_block)) == bits(expected)
    assert computed == [[0, 1, 2], [6]]


def test_two_that_begin_at_once_share_the_work(tmp_path):
    """In step, they would score every block twice."""
    matrix, computed = some_scores(300, 1), []
    mine, theirs = (opened(tmp_path, N=300, M=1) for _ in range(2))

    def score(rows):
        other = theirs.missing()[0]  # goes through them in order, and is as fast
        theirs.write(other, matrix[3 * other : 3 * other + 3])
        return from_matrix(matrix, computed)(rows)

    assert bits(fill(mine, score)) == bits(matrix)
    assert 50 <= len(computed) < 65


def test_other_parameters_go_to_another_folder(tmp_path):
    first = filled(tmp_path)
    before = files(first.folder)
    changed = {**IDENTITY, "model": {**IDENTITY["model"], "dtype": "bfloat16"}}
    others = [filled(tmp_path, identity=changed), filled(tmp_path, method="cosine")]
    assert len({first.folder, *(other.folder for other in others)}) == 3
    assert files(first.folder) == before


def test_the_order_of_fields_and_tuples_do_not_change_the_key(tmp_path):
    first = opened(tmp_path, identity={"a": [1, 2], "b": {"c": 1, "d": 2}})
    again = opened(tmp_path, identity={"b": {"d": 2, "c": 1}, "a": (1, 2)})
    assert first == again


def test_fresh_removes_exactly_this_store(tmp_path):
    other = filled(tmp_path, method="cosine")
    scores = filled(tmp_path)
    leftover = scores.folder / f"part-00001.parquet.{'0' * 32}.tmp"
    leftover.write_bytes(b"half")
    for name in ("notes.txt", "part-of-my-notes.parquet"):
        (scores.folder / name).write_text("mine")
    fresh = opened(tmp_path, block_size=4, fresh=True)
    assert sorted(files(fresh.folder)) == ["manifest.json", "notes.txt", "part-of-my-notes.parquet"]
    assert fresh.block_size == 4
    assert other.complete


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


def as_part(scores, block, matrix, train_ids=None) -> bytes:
    """Return a part with this store's own tag, but other contents."""
    rows = scores.rows(block)
    train_ids = train_ids or [scores.train_ids[row] for row in rows]
    columns = {
        "train_id": np.repeat(train_ids, len(scores.query_ids)),
        "query_id": np.tile(scores.query_ids, len(rows)),
        "score": np.asarray(matrix, dtype=np.float32).ravel(),
    }
    tag = {"icprobe.store": scores.folder.name, "icprobe.block": str(block)}
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(columns).replace_schema_metadata(tag), buffer, store_schema=True)
    return buffer.getvalue().to_pybytes()


def truncated(scores):
    return scores.part(1).read_bytes()[:-20]


def emptied(scores):
    return b""


def no_parquet(scores):
    return b"train_id,query_id,score\n"


def swapped(scores):
    return scores.part(0).read_bytes()


def of_another_store(scores):
    return filled(scores.folder.parent, method="cosine").part(1).read_bytes()


def by_somebody_else(scores):
    table = pq.read_table(scores.part(1)).replace_schema_metadata(None)
    buffer = pa.BufferOutputStream()
    pq.write_table(table, buffer)
    return buffer.getvalue().to_pybytes()


def of_other_blocks(scores):
    other = filled(scores.folder.parent / "elsewhere", block_size=2)
    return other.part(1).read_bytes()


def wrong_ids(scores):
    return as_part(scores, 1, some_scores(3, 5), train_ids=["train-4", "train-3", "train-5"])


def with_nan(scores):
    return as_part(scores, 1, np.full((3, 5), np.nan))


def with_a_flipped_bit(scores):
    data = bytearray(scores.part(1).read_bytes())
    data[len(data) // 3] ^= 1
    return bytes(data)


IN_THE_FOOTER = {
    truncated: "",
    emptied: "",
    no_parquet: "",
    swapped: r"it belongs to icp-\w{10} block 0",
    of_another_store: r"it belongs to cosine-\w{10} block 1",
    by_somebody_else: "it belongs to .unknown.",
    of_other_blocks: "it has 10 rows instead of 15",
}
ON_READING = {
    wrong_ids: "ids are not those of the manifest",
    with_nan: "not finite",
    with_a_flipped_bit: "",
}


@pytest.mark.parametrize("damage", [*IN_THE_FOOTER, *ON_READING], ids=lambda f: f.__name__)
def test_damaged_or_foreign_part_is_named_and_can_be_computed_again(tmp_path, damage):
    scores = filled(tmp_path)
    intact = files(scores.folder)
    scores.part(1).write_bytes(damage(scores))
    reason = {**IN_THE_FOOTER, **ON_READING}[damage]
    with pytest.raises(store.StoreError, match=rf"part-00001.*{reason}.*Delete this file"):
        store.find([tmp_path], "icp", IDENTITY).matrix()

    scores.part(2).unlink()
    if damage in IN_THE_FOOTER:  # noticed before any work is done
        with pytest.raises(store.StoreError, match=rf"part-00001.*{reason}.*Delete this file"):
            fill(opened(tmp_path), pytest.fail)

    scores.part(1).unlink()
    computed = []
    fill(opened(tmp_path), from_matrix(some_scores(7, 5), computed))
    assert computed == [[3, 4, 5], [6]]
    assert files(scores.folder) == intact


def test_parts_of_a_renamed_store_are_read_and_foreign_ones_are_not(tmp_path):
    kept, other = filled(tmp_path), filled(tmp_path, method="cosine")
    new = {**IDENTITY, "template": 1}
    manifest = json.loads((kept.folder / "manifest.json").read_text())
    folder = kept.folder.rename(tmp_path / store.key("icp", new))
    tampered_fields = {**manifest, "identity": new, "parts_of": kept.name}
    (folder / "manifest.json").write_text(json.dumps(tampered_fields))
    found = store.find([tmp_path], "icp", new)
    assert bits(found.matrix()) == bits(some_scores(7, 5))
    found.part(1).write_bytes(other.part(1).read_bytes())
    with pytest.raises(store.StoreError, match="belongs to cosine-"):
        found.matrix()


def test_the_first_folder_that_has_complete_scores_counts(tmp_path):
    mine, reference = tmp_path / "mine", tmp_path / "reference"
    filled(reference)
    opened(mine).write(0, np.zeros((3, 5)))
    assert store.find([mine, reference], "icp", IDENTITY).folder.parent == reference
    fill(opened(mine), from_matrix(np.zeros((7, 5))))
    assert store.find([mine, reference], "icp", IDENTITY).folder.parent == mine


def test_the_parts_made_for_these_tests_are_otherwise_accepted(tmp_path):
    scores = filled(tmp_path)
    scores.part(1).write_bytes(as_part(scores, 1, np.ones((3, 5))))
    assert scores.matrix()[3:6].tolist() == np.ones((3, 5)).tolist()


def test_no_flipped_bit_changes_a_score(tmp_path):
    scores = filled(tmp_path, N=2, M=3)
    expected, data, found = some_scores(2, 3), scores.part(0).read_bytes(), 0
    for position in range(len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << position % 8
        scores.part(0).write_bytes(flipped)
        try:
            assert bits(scores.matrix()) == bits(expected)
        except store.StoreError:
            found += 1
    assert found > len(data) / 2


def tampered(scores, **fields) -> None:
    path = scores.folder / "manifest.json"
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
        ({"method": "gain"}, "method: stored 'gain', asked 'icp'"),
        ({"format": 99}, "format: stored 99, asked 1"),
        ({"block_size": 0}, "block_size"),
        ({"block_size": "8"}, "block_size"),
        ({"surplus": 1}, "surplus"),
    ],
)
def test_tampered_manifest_names_the_field(tmp_path, fields, message):
    tampered(filled(tmp_path), **fields)
    with pytest.raises(store.StoreError, match=message):
        opened(tmp_path)


def test_other_block_size_in_a_tampered_manifest_is_noticed(tmp_path):
    tampered(filled(tmp_path), block_size=4)
    with pytest.raises(store.StoreError, match="it has 15 rows instead of 20"):
        opened(tmp_path).matrix()


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '"x"'])
def test_unreadable_manifest_is_named(tmp_path, text):
    scores = filled(tmp_path)
    (scores.folder / "manifest.json").write_text(text)
    for use in (opened, lambda folder: store.find([folder], "icp", IDENTITY)):
        with pytest.raises(store.StoreError, match=r"manifest.json cannot be used.*fresh=True"):
            use(tmp_path)
    assert filled(tmp_path, fresh=True).complete


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_scores_that_are_not_finite_are_refused_with_their_ids(tmp_path, value):
    scores, block = opened(tmp_path), np.zeros((3, 5))
    block[1, 2] = value
    with pytest.raises(store.StoreError, match=r"1 scores of block 1.*'train-4'.*'query-2'"):
        scores.write(1, block)
    assert sorted(files(scores.folder)) == ["manifest.json"]


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (5, 3), (15,), (3, 5, 1), ()])
def test_wrong_shape_is_refused(tmp_path, shape):
    scores = opened(tmp_path)
    with pytest.raises(store.StoreError, match=r"block 0 must have shape \[3, 5\], not"):
        scores.write(0, np.zeros(shape))
    assert scores.missing() == [0, 1, 2]


@pytest.mark.parametrize("block", [-1, 3])
def test_there_are_no_other_blocks(tmp_path, block):
    with pytest.raises(IndexError, match="3 blocks"):
        opened(tmp_path).write(block, np.zeros((3, 5)))


@pytest.mark.parametrize(
    ("train_ids", "query_ids", "message"),
    [
        (["a", "b", "a"], ["q"], "duplicates in train_ids: 1 values .'a'"),
        (["a"], ["q", "q"], "duplicates in query_ids"),
        ([], ["q"], "train_ids is empty"),
        (["a"], [], "query_ids is empty"),
        (["a", 1], ["q"], "train_ids must be strings"),
    ],
)
def test_ids_must_be_unique_strings(tmp_path, train_ids, query_ids, message):
    with pytest.raises(store.StoreError, match=message):
        store.open(tmp_path, "icp", IDENTITY, train_ids, query_ids)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("method", ["", "../icp", "a/b", "icp *", "-icp"])
def test_a_method_name_is_a_file_name(tmp_path, method):
    with pytest.raises(store.StoreError, match="method name"):
        opened(tmp_path, method=method)


def test_incomplete_scores_are_not_read(tmp_path):
    scores = opened(tmp_path)
    scores.write(0, some_scores(7, 5)[:3])
    with pytest.raises(store.StoreError, match="incomplete: 3 of 7 rows are finished"):
        scores.matrix()


# --- finding --------------------------------------------------------------------------------------


def test_find_in_an_empty_folder_says_how_to_make_the_scores(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        store.find([tmp_path / "none"], "icp", IDENTITY, how_to_make="run 01 with n_train=7")
    assert "There are no icp scores in" in str(caught.value)
    assert "run 01 with n_train=7" in str(caught.value)


def test_find_names_the_nearest_store_first_and_the_fields_that_differ(tmp_path):
    def changed(**fields):
        return {**IDENTITY, "model": {**IDENTITY["model"], **fields}}

    far = filled(tmp_path, identity={**changed(name="large", dtype="bfloat16"), "data": {}})
    near = opened(tmp_path, identity=changed(dtype="bfloat16"))
    near.write(0, some_scores(7, 5)[:3])
    filled(tmp_path, method="icp-control")
    with pytest.raises(store.ScoresNotFound) as caught:
        store.find([tmp_path], "icp", IDENTITY, how_to_make="run notebooks/01")
    message = str(caught.value)
    assert f"{near.folder.name} (3 of 7 rows are finished)" in message
    assert "identity.model.dtype: stored 'bfloat16', asked 'float32'" in message
    assert "identity.data.train: stored nothing, asked 'tttt" in message
    assert message.index(near.folder.name) < message.index(far.folder.name)
    assert "icp-control" not in message


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
    scores, expected = opened(tmp_path), some_scores(7, 5)
    scores.write(0, expected[:3])
    before = files(scores.folder)
    with (
        no_file_longer_than(500),
        pytest.raises(store.StoreError, match=r"cannot write .*part-00001.parquet: File too large"),
    ):
        scores.write(1, expected[3:6])
    assert files(scores.folder) == before
    assert bits(fill(scores, from_matrix(expected))) == bits(expected)


def test_read_only_folder_is_named_and_finished_scores_can_be_read():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # for anybody to enter
        expected, scores = filled(folder).matrix(), opened(folder, method="cosine")
        scores.write(0, expected[:3])
        scores.folder.chmod(0o555)
        with as_nobody():
            with pytest.raises(store.StoreError, match=r"cannot write .*: Permission denied"):
                scores.write(1, expected[3:6])
            reopened = opened(folder)
            assert bits(fill(reopened, pytest.fail)) == bits(expected)
        scores.folder.chmod(0o755)
        assert sorted(files(scores.folder)) == ["manifest.json", "part-00000.parquet"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    folder = opened(tmp_path).folder
    (folder / "manifest.json").unlink()
    folder.rmdir()
    folder.write_text("not a folder")
    with pytest.raises(store.StoreError, match=r"cannot write .*manifest.json"):
        opened(tmp_path)
