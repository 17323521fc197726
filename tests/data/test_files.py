"""One's own files and hub data sets, and what the loader says about bad ones."""

import hashlib
import json
import re
from collections import Counter

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from helpers import save_after_reading
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from icprobe import data

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
filled = texts.filter(str.strip)
rows_of_text = st.lists(
    st.fixed_dictionaries(
        {"prompt": texts, "completion": filled},
        optional={"id": filled, "task": filled, "content": filled, "type": filled, "note": texts},
    ),
    min_size=1,
    max_size=8,
    unique_by=lambda row: row.get("id", object()),
)
several_options = st.lists(filled, min_size=2, max_size=5, unique=True)
several_runs = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture
def own(tmp_path):
    """Return a function that writes rows, or bytes, to own.jsonl and returns the file."""

    def write(rows, ascii_only=True):
        if not isinstance(rows, bytes):
            lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
            rows = "".join(lines).encode()
        (tmp_path / "own.jsonl").write_bytes(rows)
        return tmp_path / "own.jsonl"

    return write


def a_row(**changes):
    return {"prompt": "1 + 1 =", "completion": " 2", **changes}


def problems(file, **options):
    """Return [(line, field), ...] of the problems that are said, and the whole text."""
    with pytest.raises(data.DataError) as raised:
        data.load(file, **options)
    said = str(raised.value)
    found = re.findall(r"own\.jsonl:(\d+): (?:(\w+): )?", said)
    return [(int(line), field) for line, field in found], said


# ------------------------------------------------------------------------------------- rows


@several_runs
@given(rows=rows_of_text, ascii_only=st.booleans())
def test_valid_rows_come_back_as_they_are(own, rows, ascii_only):
    loaded = data.load(own(rows, ascii_only)).to_list()
    for number, (row, back) in enumerate(zip(rows, loaded, strict=True), start=1):
        rest = {"id": f"own-{number:05d}", "task": "own", "content": "unknown", "type": "unknown"}
        assert {**rest, **row} == {key: value for key, value in back.items() if value is not None}
        assert list(back)[:7] == [*data.COLUMNS, "options"]


@several_runs
@given(rows=st.lists(st.tuples(several_options, st.integers(0)), min_size=1, max_size=8))
def test_options_come_back_as_they_are_and_need_the_completion(own, rows):
    rows = [a_row(completion=given[i % len(given)], options=given) for given, i in rows]
    loaded = data.load(own([*rows, a_row(), a_row(options=None)]))
    assert list(loaded["options"]) == [*[row["options"] for row in rows], None, None]
    rows[-1]["options"] = [*rows[-1]["options"], "more"]
    rows[-1]["options"].remove(rows[-1]["completion"])
    assert problems(own(rows))[0] == [(len(rows), "options")]


CORRUPT = [
    ("", b'{"prompt": "a", '),
    ("", b'{"prompt": "\xff", "completion": " b"}'),
    ("", b'["prompt", "completion"]'),
    ("", b"  "),
    ("prompt", b'{"completion": " b"}'),
    ("completion", b'{"prompt": "a", "completion": null}'),
    ("completion", b'{"prompt": "a", "completion": " \\n"}'),
    ("prompt", b'{"prompt": 1, "completion": " b"}'),
    ("type", b'{"prompt": "a", "completion": " b", "type": []}'),
    ("prompt", b'{"prompt": "\\ud800", "completion": " b"}'),
    ("options", b'{"prompt": "a", "completion": " b", "options": " b"}'),
    ("options", b'{"prompt": "a", "completion": " b", "options": [" b"]}'),
    ("options", b'{"prompt": "a", "completion": " b", "options": [" b", null]}'),
    ("options", b'{"prompt": "a", "completion": " b", "options": [" b", " "]}'),
    ("options", b'{"prompt": "a", "completion": " b", "options": [" b", " b"]}'),
    ("options", b'{"prompt": "a", "completion": " b", "options": ["b", " c"]}'),
    ("id", b'{"prompt": "a", "completion": " b", "id": "row-0"}'),
]


@several_runs
@given(bad=st.sampled_from(CORRUPT), before=st.integers(1, 9), after=st.integers(1, 9))
def test_one_bad_line_is_named_exactly(own, bad, before, after):
    field, line = bad
    rows = [json.dumps(a_row(id=f"row-{i}")).encode() for i in range(before + after)]
    file = own(b"\n".join([*rows[:before], line, *rows[before:]]) + b"\n\n")
    found, said = problems(file)
    assert found == [(before + 1, field)] and said.startswith("1 problem in ")
    assert field != "id" or "line 1" in said  # the first with this id


def test_all_problems_are_listed_in_the_order_of_lines_or_counted(own):
    found, _ = problems(own(b"\n".join(line for _, line in CORRUPT)))
    # the last is no problem here: its id is used once
    assert found == [(i, field) for i, (field, _) in enumerate(CORRUPT[:-1], start=1)]
    found, said = problems(own([a_row(completion="")] * 1000))
    assert found == [(i, "completion") for i in range(1, 21)]
    assert "1000 problems" in said and "980 more" in said


def test_windows_line_ends_and_byte_order_mark(own):
    line = json.dumps(a_row()).encode()
    file = own(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\r\n\r\n")
    assert data.load(file)["prompt"] == [a_row()["prompt"]] * 2


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("mime.jsonl", r"mime\.jsonl: .*/mime\.jsonl; close: .*mine\.jsonl"),
        ("mine.csv", r"mine\.csv.*\.jsonl.*\.parquet"),
        ("mine.jsonl", r"mine\.jsonl: no examples"),
        ("bad.parquet", r"bad\.parquet.*Parquet"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, source, said):
    (tmp_path / "mine.jsonl").write_bytes(b"\n \n")
    (tmp_path / "mine.csv").touch()
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(data.DataError, match=said):
        data.load(tmp_path / source)


def test_parquet_gives_the_same_as_jsonl(own, tmp_path):
    rows = [a_row(note=i, options=[" 2", f" {i + 3}"] if i else None) for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "own.parquet")
    assert data.load(tmp_path / "own.parquet").to_list() == data.load(own(rows)).to_list()


# ------------------------------------------------------------------------------------- columns


def test_columns_are_renamed_or_filled_into_templates(own):
    rows = [{"q": "a", "more": f"b{{{i}}}", "reply": "c", "n": i, "s": 0.5} for i in range(3)]
    columns = {"prompt": "{{Q}} {q}\n{more}:", "completion": " {reply}", "type": "q", "id": "{n}"}
    row = data.load(own(rows), columns=columns)[2]
    assert row["prompt"] == "{Q} a\nb{2}:"
    assert (row["completion"], row["type"], row["id"], row["n"]) == (" c", "a", "2", 2)
    formatted = {"prompt": "{{ {n:03d} {q!r}{q:>4}:", "completion": " {s:.1%}"}
    row = data.load(own(rows), columns=formatted)[1]
    assert {key: row[key] for key in formatted} == {
        key: template.format(**rows[1]) for key, template in formatted.items()
    }


ASKED = {"prompt": "{q}", "completion": " {reply}"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"completion": "{repl}"}, r"own\.jsonl: columns: .*'repl'; close: .*reply"),
        ({"completions": "reply"}, r"own\.jsonl: columns: .*'completions'"),
        ({"prompt": "{q"}, r"own\.jsonl: columns: prompt: '\{q'"),
        ({"prompt": "{q:03d}"}, r"own\.jsonl:1: prompt: '\{q:03d\}'"),
        ({"options": "{reply}"}, r"own\.jsonl:1: options: .*str.*'options': None"),
        ({"options": "label"}, r"own\.jsonl:1: options: .*dict.*'options': None"),
    ],
)
def test_wrong_columns_are_named(own, changes, said):
    file = own([{"q": "a", "reply": "b", "label": {"label": ["A", "B"]}}])
    with pytest.raises(data.DataError, match=said):
        data.load(file, columns=ASKED | changes)


def test_fields_of_templates_are_texts_or_numbers(own):
    replies = ["b", ["c", "d"], {"text": "e"}, 7, None]
    found, said = problems(own([{"q": "a", "reply": reply} for reply in replies]), columns=ASKED)
    assert dict.fromkeys(found).keys() == {(i, "completion") for i in (2, 3, 5)}
    assert "list" in said and "dict" in said


def test_a_column_that_no_row_has_is_said_once(own):
    found, said = problems(own([{"question": "a", "answer": "b"}] * 30))
    assert not found and "prompt and completion" in said and "train_columns" in said
    assert "['answer', 'question']" in said
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}]
    found, said = problems(own(rows), columns={"prompt": "question", "completion": "answer"})
    assert found == [(2, "completion")] and "train_columns" not in said


def test_options_are_renamed_or_left_out(own):
    rows = [a_row(choices=[" 2", " 3"]), a_row(choices=None)]
    renamed = data.load(own(rows), columns={"options": "choices"})
    assert list(renamed["options"]) == [[" 2", " 3"], None]
    of_another_form = own([a_row(options={"label": ["A", "B"]})])
    assert data.load(of_another_form, columns={"options": None})["options"][0] is None


def test_mixed_kinds_in_an_extra_column_are_an_error(own):
    with pytest.raises(data.DataError, match="'note'"):
        data.load(own([a_row(note=1), a_row(note="one")]))


# --------------------------------------------------------------------------- limit and identity


def test_a_limit_samples_in_order_without_replacement(own):
    file = own([a_row(id=f"{i:03d}") for i in range(50)])
    ids = data.load(file, limit=20)["id"]
    assert len(set(ids)) == 20
    assert sorted(ids) == list(ids) == list(data.load(file, limit=20)["id"])
    assert data.load(file, limit=20, seed=1)["id"] != ids
    assert len(data.load(file, limit=50)) == len(data.load(file)) == 50
    for limit in (51, 0, -1):
        with pytest.raises(data.DataError, match=rf"own\.jsonl: {limit} .* 50 "):
            data.load(file, limit=limit)


def test_identity_of_a_file_follows_what_determines_the_rows(own):
    file = own([a_row(id=str(i)) for i in range(9)])
    calls = [{}, {"limit": 3}, {"limit": 4}, {"limit": 3, "seed": 1}, {"columns": {"id": "prompt"}}]
    said = [json.dumps(data.identity(file, **call)) for call in calls]
    assert len(set(said)) == len(said)
    assert data.identity(file, "train", seed=1) == data.identity(file)  # neither changes the rows
    own([a_row(id=str(i)) for i in range(10)])
    assert json.dumps(data.identity(file)) != said[0]


@pytest.mark.parametrize("name", ["own.jsonl", "own.parquet"])
def test_the_bytes_of_a_file_that_are_hashed_are_those_that_are_parsed(tmp_path, monkeypatch, name):
    file, contents = tmp_path / name, {}
    for text in ("second", "first"):
        table = datasets.Dataset.from_list([a_row(content=text)])
        table.to_parquet(file) if file.suffix == ".parquet" else table.to_json(file)
        contents[text] = file.read_bytes()
    save_after_reading(monkeypatch, file, contents["second"])
    rows, who = data.Source(file).load()
    assert rows["content"] == ["first"]
    assert who["sha256"] == hashlib.sha256(contents["first"]).hexdigest()
    assert data.identity(file)["sha256"] == hashlib.sha256(contents["second"]).hexdigest()


def test_a_hub_data_set_is_pinned_and_mapped(monkeypatch):
    commit = "0123456789" * 4

    def load_dataset(name, revision):  # stands in for the network, nothing else
        assert (name, revision) == ("owner/name", commit)
        return datasets.DatasetDict(parts)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    table = datasets.Dataset.from_list([{"text": f"a{i}", "target": f" b{i}"} for i in range(9)])
    source, columns = f"owner/name@{commit}", {"prompt": "{text}:", "completion": "target"}
    parts = {"test": table}
    rows = data.load(source, "query", limit=4, columns=columns)
    assert len(rows) == 4
    assert all(row["prompt"] == f"a{int(row['id'][-5:]) - 1}:" for row in rows)
    assert rows["task"] == ["name"] * 4
    assert data.identity(source, "query", 4, columns=columns)["revision"] == commit
    parts = {"one": table, "two": table.select(range(2))}
    assert len(data.load(source, "two", columns=columns)) == 2
    with pytest.raises(data.DataError, match=r"\['one', 'two'\].*'query'"):
        data.load(source, "query", columns=columns)


def test_check_disjoint_names_the_ids():
    def table(*rows):
        rest = dict.fromkeys(("task", "content", "type"), "")
        return datasets.Dataset.from_list(
            [
                {"id": name, "prompt": prompt, "completion": end, **rest}
                for name, prompt, end in rows
            ]
        )

    train = table(("t1", "a b\nAnswer:", " c"), ("t2", "x", " y"))
    data.check_disjoint(train, table(("q1", "a b\nAnswer:", " d")))
    same = table(("q1", "a", " d"), ("q2", "a  b Answer:", " c\n"))
    with pytest.raises(data.DataError, match="'q2' = training example 't1'") as raised:
        data.check_disjoint(train, same)
    assert "q1" not in str(raised.value)
    with pytest.warns(UserWarning, match="'q2'"):
        data.check_disjoint(train, same, warn=True)


def test_the_demo_file():
    table = data.load("data/demo.jsonl")
    assert set(Counter(table["task"]).values()) == {8}
    assert len(set(table["prompt"])) == len(table) == 48
    for row in table:
        assert row["prompt"].endswith("Answer:")
        assert re.match(r" \S.*\S$", row["completion"])
