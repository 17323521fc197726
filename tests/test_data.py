"""Suites, one's own files, and what the loader says about bad ones."""

import hashlib
import json
import re
import string
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from icprobe import assets, data, paths

# ---------------------------------------------------------------------------------- own files

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


def write(file, rows, ascii_only=True):
    lines = [json.dumps(row, ensure_ascii=ascii_only) + "\n" for row in rows]
    file.write_text("".join(lines), "utf-8", newline="")
    return file


def a_row(**changes):
    return {"prompt": "1 + 1 =", "completion": " 2", **changes}


@several_runs
@given(rows=rows_of_text, ascii_only=st.booleans())
def test_valid_rows_come_back_as_they_are(tmp_path, rows, ascii_only):
    loaded = data.load(write(tmp_path / "own.jsonl", rows, ascii_only)).to_list()
    for number, (row, back) in enumerate(zip(rows, loaded, strict=True), start=1):
        rest = {"id": f"own-{number:05d}", "task": "own", "content": "unknown", "type": "unknown"}
        assert {**rest, **row} == {key: value for key, value in back.items() if value is not None}
        assert list(back)[:6] == list(data.COLUMNS)


@several_runs
@given(rows=st.lists(st.tuples(several_options, st.integers(0)), min_size=1, max_size=8))
def test_options_come_back_as_they_are_and_need_the_completion(tmp_path, rows):
    rows = [a_row(completion=given[i % len(given)], options=given) for given, i in rows]
    free = [a_row(), a_row(options=None)]
    loaded = data.load(write(tmp_path / "own.jsonl", [*rows, *free]))
    assert list(loaded["options"]) == [*[row["options"] for row in rows], None, None]
    rows[-1]["options"] = [*rows[-1]["options"], "more"]
    rows[-1]["options"].remove(rows[-1]["completion"])
    with pytest.raises(data.DataError, match=rf"own\.jsonl:{len(rows)}: options: the completion"):
        data.load(write(tmp_path / "own.jsonl", rows))


def test_without_options_the_column_is_empty(tmp_path):
    loaded = data.load(write(tmp_path / "own.jsonl", [a_row()] * 3))
    assert loaded.column_names == [*data.COLUMNS, "options"]
    assert list(loaded["options"]) == [None] * 3


CORRUPT = {
    "not JSON": b'{"prompt": "a", ',
    "not UTF-8": b'{"prompt": "\xff", "completion": " b"}',
    "not a JSON object": b'["prompt", "completion"]',
    "blank line": b"  ",
    "prompt: missing": b'{"completion": " b"}',
    "completion: missing": b'{"prompt": "a", "completion": null}',
    "completion: empty": b'{"prompt": "a", "completion": " \\n"}',
    "prompt: not a string but int": b'{"prompt": 1, "completion": " b"}',
    "type: not a string but list": b'{"prompt": "a", "completion": " b", "type": []}',
    "prompt: not valid Unicode": b'{"prompt": "\\ud800", "completion": " b"}',
    "options: not a list but str": b'{"prompt": "a", "completion": " b", "options": " b"}',
    "options: fewer than two": b'{"prompt": "a", "completion": " b", "options": [" b"]}',
    "options: one is missing": b'{"prompt": "a", "completion": " b", "options": [" b", null]}',
    "options: one is empty": b'{"prompt": "a", "completion": " b", "options": [" b", " "]}',
    "options: one is there twice": b'{"prompt": "a", "completion": " b", "options": [" b", " b"]}',
    "options: the completion is not among them (spaces count)": (
        b'{"prompt": "a", "completion": " b", "options": ["b", " c"]}'
    ),
    "id: 'row-0' is also the id of line 1": b'{"prompt": "a", "completion": " b", "id": "row-0"}',
}


@several_runs
@given(reason=st.sampled_from(sorted(CORRUPT)), before=st.integers(1, 9), after=st.integers(1, 9))
def test_one_bad_line_is_named_exactly(tmp_path, reason, before, after):
    rows = [json.dumps(a_row(id=f"row-{i}")).encode() for i in range(before + after)]
    lines = [*rows[:before], CORRUPT[reason], *rows[before:]]
    (tmp_path / "own.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    with pytest.raises(data.DataError) as raised:
        data.load(tmp_path / "own.jsonl")
    said = str(raised.value).splitlines()
    assert len(said) == 2
    assert said[0].startswith("1 problem in ")
    assert f"own.jsonl:{before + 1}: {reason}" in said[1]


def test_all_problems_are_listed_in_the_order_of_lines(tmp_path):
    (tmp_path / "own.jsonl").write_bytes(b"\n".join(CORRUPT.values()))
    with pytest.raises(data.DataError) as raised:
        data.load(tmp_path / "own.jsonl")
    numbers = re.findall(r"own\.jsonl:(\d+): ", str(raised.value))
    # the last is no problem here: its id is used once
    assert [int(number) for number in numbers] == list(range(1, len(CORRUPT)))


def test_many_problems_are_counted(tmp_path):
    write(tmp_path / "own.jsonl", [a_row(completion="")] * 1000)
    with pytest.raises(data.DataError, match="1000 problems") as raised:
        data.load(tmp_path / "own.jsonl")
    assert str(raised.value).count("completion: empty") == 20
    assert "and 980 more" in str(raised.value)


def test_windows_line_ends_and_byte_order_mark(tmp_path):
    line = json.dumps(a_row()).encode()
    (tmp_path / "own.jsonl").write_bytes(b"\xef\xbb\xbf" + line + b"\r\n" + line + b"\r\n\r\n")
    assert data.load(tmp_path / "own.jsonl")["prompt"] == [a_row()["prompt"]] * 2


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_an_error(tmp_path, content):
    (tmp_path / "own.jsonl").write_bytes(content)
    with pytest.raises(data.DataError, match="no examples"):
        data.load(tmp_path / "own.jsonl")


def test_sources_that_are_not_there(tmp_path):
    write(tmp_path / "mine.jsonl", [a_row()])
    (tmp_path / "mine.csv").touch()
    with pytest.raises(data.DataError, match=r"no such file, looked for /.*; close: .*mine\.jsonl"):
        data.load(tmp_path / "mime.jsonl")
    with pytest.raises(data.DataError, match=r"end in \.jsonl or \.parquet"):
        data.load(tmp_path / "mine.csv")
    with pytest.raises(data.DataError, match=r"'gird' is no suite.*grid"):
        data.load("gird", "train")


def test_parquet_gives_the_same_as_jsonl(tmp_path):
    rows = [a_row(note=i, options=[" 2", f" {i + 3}"] if i else None) for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "own.parquet")
    same = data.load(write(tmp_path / "own.jsonl", rows)).to_list()
    assert data.load(tmp_path / "own.parquet").to_list() == same
    (tmp_path / "own.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(data.DataError, match="not readable as Parquet"):
        data.load(tmp_path / "own.parquet")


def test_columns_are_renamed_or_filled_into_templates(tmp_path):
    rows = [{"q": "a", "more": f"b{{{i}}}", "reply": "c", "n": i} for i in range(3)]
    file = write(tmp_path / "own.jsonl", rows)
    columns = {"prompt": "{{Q}} {q}\n{more}:", "completion": " {reply}", "type": "q", "id": "{n}"}
    row = data.load(file, columns=columns)[2]
    assert row["prompt"] == "{Q} a\nb{2}:"
    assert (row["completion"], row["type"], row["id"], row["n"]) == (" c", "a", "2", 2)
    with pytest.raises(data.DataError, match=r"no column 'repl'; close: .*reply"):
        data.load(file, columns={**columns, "completion": "{repl}"})
    with pytest.raises(data.DataError, match="unknown column 'completions'"):
        data.load(file, columns={**columns, "completions": "reply"})
    file = write(file, [*rows, {"q": None, "more": "b", "reply": "c", "n": 3}])
    with pytest.raises(data.DataError, match=r"own\.jsonl:4: prompt: missing"):
        data.load(file, columns={key: columns[key] for key in ("prompt", "completion")})


def test_a_template_formats_its_fields_as_python_does(tmp_path):
    row = {"q": "a", "n": 3, "s": 0.5}
    file = write(tmp_path / "own.jsonl", [row])
    columns = {"prompt": "{{ {n:03d} {q!r}{q:>4}:", "completion": " {s:.1%}"}
    found = data.load(file, columns=columns)[0]
    assert {key: found[key] for key in columns} == {k: v.format(**row) for k, v in columns.items()}
    with pytest.raises(data.DataError, match=r"own\.jsonl:1: prompt: '\{q:03d\}' does not fit"):
        data.load(file, columns={**columns, "prompt": "{q:03d}"})


def test_a_template_takes_texts_and_numbers_only(tmp_path):
    rows = [{"q": "a", "reply": reply} for reply in ("b", ["c", "d"], {"text": "e"}, 7)]
    columns = {"prompt": "{q}", "completion": " {reply}"}
    with pytest.raises(data.DataError) as raised:
        data.load(write(tmp_path / "own.jsonl", rows), columns=columns)
    said = str(raised.value)
    for line, kind in ((2, "list"), (3, "dict")):
        assert f"own.jsonl:{line}: completion: its column 'reply' is a {kind}, expected" in said
    assert "2 problems" in said
    with pytest.raises(
        data.DataError, match=r"columns: prompt: '\{q' is no template: expected '}'"
    ):
        data.load(tmp_path / "own.jsonl", columns={"prompt": "{q"})


def test_a_column_that_no_row_has_is_said_once(tmp_path):
    file = write(tmp_path / "own.jsonl", [{"question": "a", "answer": "b"}] * 30)
    with pytest.raises(data.DataError) as raised:
        data.load(file)
    said = str(raised.value)
    assert (
        "No row has prompt and completion: say which of the columns ['answer', 'question']" in said
    )
    assert "own.jsonl:1" not in said and "train_columns" in said
    rows = [{"question": "a", "answer": "b"}, {"question": "a", "answer": None}]
    columns = {"prompt": "question", "completion": "answer"}
    with pytest.raises(data.DataError) as raised:
        data.load(write(file, rows), columns=columns)
    assert "own.jsonl:2: completion: missing" in str(raised.value)
    assert "No row has" not in str(raised.value)


def test_options_are_renamed_but_not_made_from_a_template(tmp_path):
    rows = [a_row(choices=[" 2", " 3"]), a_row(choices=None)]
    file = write(tmp_path / "own.jsonl", rows)
    loaded = data.load(file, columns={"options": "choices"})
    assert list(loaded["options"]) == [[" 2", " 3"], None]
    with pytest.raises(data.DataError, match=r"own\.jsonl:1: options: not a list but str"):
        data.load(file, columns={"options": "{choices}"})
    of_another_form = write(tmp_path / "other.jsonl", [a_row(options={"label": ["A", "B"]})])
    with pytest.raises(data.DataError, match=r"not a list but dict .*\{'options': None\} leaves"):
        data.load(of_another_form)
    assert data.load(of_another_form, columns={"options": None})["options"][0] is None


def test_mixed_kinds_in_an_extra_column_are_an_error(tmp_path):
    file = write(tmp_path / "own.jsonl", [a_row(note=1), a_row(note="one")])
    with pytest.raises(data.DataError, match="'note' mixes kinds"):
        data.load(file)


def test_a_limit_samples_in_order_without_replacement(tmp_path):
    file = write(tmp_path / "own.jsonl", [a_row(id=f"{i:03d}") for i in range(50)])
    ids = data.load(file, limit=20)["id"]
    assert len(set(ids)) == 20
    assert sorted(ids) == list(ids)
    assert data.load(file, limit=20)["id"] == ids
    assert data.load(file, limit=20, seed=1)["id"] != ids
    assert len(data.load(file, limit=50)) == len(data.load(file)) == 50
    for limit in (51, 0, -1):
        with pytest.raises(data.DataError, match=f"{limit} examples asked for, 50 are there"):
            data.load(file, limit=limit)


def test_identity_of_a_file_follows_what_determines_the_rows(tmp_path):
    file = write(tmp_path / "own.jsonl", [a_row(id=str(i)) for i in range(9)])
    calls = [{}, {"limit": 3}, {"limit": 4}, {"limit": 3, "seed": 1}, {"columns": {"id": "prompt"}}]
    said = [json.dumps(data.identity(file, **call)) for call in calls]
    assert len(set(said)) == len(said)
    assert data.identity(file, "train", seed=1) == data.identity(file)  # neither changes the rows
    write(file, [a_row(id=str(i)) for i in range(10)])
    assert json.dumps(data.identity(file)) != said[0]


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
    with pytest.raises(
        data.DataError, match=r"split should be one of \['one', 'two'\], got 'query'"
    ):
        data.load(source, "query", columns=columns)


def test_check_disjoint_names_the_ids():
    def table(*rows):
        keys = ("id", "prompt", "completion")
        full = [
            {**dict(zip(keys, row, strict=True)), "task": "", "content": "", "type": ""}
            for row in rows
        ]
        return datasets.Dataset.from_list(full)

    train = table(("t1", "a b\nAnswer:", " c"), ("t2", "x", " y"))
    data.check_disjoint(train, table(("q1", "a b\nAnswer:", " d")))
    same = table(("q1", "a", " d"), ("q2", "a  b Answer:", " c\n"))
    with pytest.raises(data.DataError, match="'q2' = training example 't1'") as raised:
        data.check_disjoint(train, same)
    assert "q1" not in str(raised.value)
    with pytest.warns(UserWarning, match="1 text is .*\n.*'q2'"):
        data.check_disjoint(train, same, warn=True)


def test_the_demo_file():
    table = data.load("data/demo.jsonl")
    assert Counter(table["task"]).keys() == {row["task"] for row in table}
    assert set(Counter(table["task"]).values()) == {8}
    assert len(set(table["prompt"])) == len(table) == 48
    for row in table:
        assert row["prompt"].endswith("Answer:")
        assert re.match(r" \S.*\S$", row["completion"])


# ------------------------------------------------------------------------------------- suites

SUITE = {
    "description": "made up",
    "seed": 3,
    "splits": {"train": 8, "query": 4, "evaluation": 4},
    "input_chars": [1, 100],
    "completion_chars": [1, 20],
    "passage": ".+",
    "types": {
        "ask": {"instruction": "Ask.", "label": "Question:"},
        "reply": {"instruction": "Reply.", "label": "Answer:"},
    },
    "tasks": {
        "asking": {"bigbench": "one", "content": "letters", "type": "ask"},
        "replying": {"bigbench": "group/two", "content": "letters", "type": "reply"},
        "judging": {
            "bigbench": "three", "content": "numbers", "type": "reply", "balance": True,
            "instruction": "Judge.",
        },
    },
}  # fmt: skip


WORDS = [f"{first}{second}" for first in string.ascii_letters for second in "xyz"]


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Put made-up tasks into the cache, and the suite "made" into the suites folder."""
    monkeypatch.setenv("ICPROBE_CACHE", str(tmp_path / "cache"))
    tasks = {
        "one": [{"input": f"Fact: {word}. \n", "target": ["", f"what {word}?"]} for word in WORDS],
        "group/two": [
            {"input": f"Fact: {word}.  \nQuestion: what {end}?", "target": word}
            for word in WORDS
            for end in "12"
        ],
        "three": [
            {"input": f"Fact: {word}!", "target_scores": {"no": i % 5 > 0, "yes": i % 5 == 0}}
            for i, word in enumerate(WORDS)
        ],
    }
    for name, examples in tasks.items():
        write_task(name, examples)
    monkeypatch.setattr(paths, "SUITES", tmp_path / "suites")
    (tmp_path / "suites").mkdir()
    write_suite(SUITE)


def write_task(name, examples):
    folder = assets.cache_dir() / "bigbench-1.0.0" / name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "task.json").write_text(json.dumps({"examples": examples}))


def write_suite(suite, **options):
    (paths.SUITES / "made.yaml").write_text(yaml.safe_dump(suite, **options))


def changed(**changes):
    """Return the suite with values changed at paths such as tasks__asking__type."""
    suite = json.loads(json.dumps(SUITE))
    for path, value in changes.items():
        *above, key = path.split("__")
        place = suite
        for step in above:
            place = place[step]
        if value is None:
            del place[key]
        else:
            place[key] = value
    return suite


def all_splits(name="made", **options):
    return {split: data.load(name, split, **options) for split in data.SPLITS}


def test_suite_rows_have_the_frame_and_the_columns(bench):
    tables = all_splits()
    assert {split: len(table) for split, table in tables.items()} == {
        "train": 24, "query": 12, "evaluation": 12
    }  # fmt: skip
    for table in tables.values():
        assert table.column_names == [*data.COLUMNS, "options"]
        for row in table:
            frame = {
                "asking": r"Ask\.\nFact: (\w+)\.\nQuestion:",
                "replying": r"Reply\.\nFact: (\w+)\.\nQuestion: what \d\?\nAnswer:",
                "judging": r"Judge\.\nFact: (\w+)!\nAnswer:",
            }[row["task"]]
            word = re.fullmatch(frame, row["prompt"])[1]
            answers = {"asking": {f" what {word}?"}, "replying": {f" {word}"}}
            assert row["completion"] in answers.get(row["task"], {" yes", " no"})
            assert row["options"] == ([" no", " yes"] if row["task"] == "judging" else None)


@pytest.mark.parametrize("n", [1, 2, 10, 11])
def test_few_answers_of_a_task_are_its_options(bench, n):
    answers = [f"answer {i:02d}" for i in range(n)]
    entries = zip(WORDS, reversed(answers * len(WORDS)), strict=False)
    examples = [{"input": f"Fact: {word}.", "target": ["", f"{end} "]} for word, end in entries]
    write_task("one", examples)
    options = [f" {answer}" for answer in answers] if 2 <= n <= 10 else None
    for table in all_splits().values():
        asked = [row for row in table if row["task"] == "asking"]
        assert {row["completion"] for row in asked} <= {f" {answer}" for answer in answers}
        assert all(row["options"] == options for row in asked)


@pytest.mark.parametrize(
    ("scores", "options"),
    [
        ({"b": 0, "a": 1, "c": 0}, [" b", " a", " c"]),
        ({" b": 0, "a\n": 1, "b ": 0, "": 0}, [" b", " a"]),
        ({"a": 1, " a": 0}, None),
        ({"a": 1}, None),
        ({}, None),
    ],
)
def test_scored_answers_are_the_options(bench, scores, options):
    # every second example has other scores: an example's options are its own, not the task's
    scored = [{"target_scores": {"a": 1, "d": 0}}, {"target_scores": scores, "target": "a"}]
    examples = [{"input": f"Fact: {word}.", **scored[i % 2]} for i, word in enumerate(WORDS)]
    write_task("one", examples)
    asked = [row for row in data.load("made", "train") if row["task"] == "asking"]
    odd = [int(row["id"].rpartition("-")[2]) % 2 for row in asked]
    assert set(odd) == {0, 1}
    assert [row["options"] for row in asked] == [options if i else [" a", " d"] for i in odd]


def check_suite(tables, suite):
    """Check what holds for every suite: disjoint by passage, no repetition, balanced prefixes."""
    where = {}
    for split, table in tables.items():
        assert len(set(table["id"])) == len(set(table["prompt"])) == len(table)
        assert Counter(table["task"]) == {name: t.splits[split] for name, t in suite.tasks.items()}
        least = min(task.splits[split] for task in suite.tasks.values())
        for n in range(1, least * len(suite.tasks) + 1):
            counts = Counter(table["task"][:n])
            assert max(counts.values()) - min(counts[name] for name in suite.tasks) <= 1
        files = assets.bigbench_tasks([task.bigbench for task in suite.tasks.values()])
        raw = {name: json.loads(file.read_bytes())["examples"] for name, file in files.items()}
        for row in table:
            task = suite.tasks[row["task"]]
            example = task.example(raw[task.bigbench][int(row["id"].rpartition("-")[2])])
            assert example["prompt"] == row["prompt"]
            assert where.setdefault(example["passage"], split) == split
            assert row["prompt"] == row["prompt"].rstrip()
            assert re.match(r" \S", row["completion"])
            if (options := row["options"]) is not None:
                assert row["completion"] in options
                assert len(set(options)) == len(options) >= 2
                assert all(re.fullmatch(r" \S(.*\S)?", option) for option in options)
    data.check_disjoint(tables["train"], tables["query"])
    data.check_disjoint(tables["train"], tables["evaluation"])
    return where


@pytest.mark.parametrize("suite_seed", [0, 1, 2])
def test_suites_are_disjoint_and_balanced(bench, suite_seed):
    write_suite(changed(seed=suite_seed))
    where = check_suite(all_splits(), data.read_suite("made"))
    shared = 24 + 12 + 12 - len(where)
    assert shared > 0  # passages do occur in several tasks, or the test would say nothing


def test_balanced_labels(bench):
    for table in all_splits().values():
        judged = [row["completion"] for row in table if row["task"] == "judging"]
        assert Counter(judged) == {" yes": len(judged) // 2, " no": len(judged) // 2}
        assert set(judged[:2]) == {" yes", " no"}


def test_fresh_passages_come_first(bench):
    write_suite(changed(splits={"train": 36, "query": 12, "evaluation": 12}))  # nearly all
    replies = [row["prompt"] for row in data.load("made", "train") if row["task"] == "replying"]
    assert len({prompt.split("\n")[1] for prompt in replies}) == len(replies)


def test_a_limit_is_a_prefix_and_a_seed_moves_nothing_between_splits(bench):
    whole = data.load("made", "train")
    assert data.load("made", "train", limit=7).to_list() == whole.to_list()[:7]
    other = data.load("made", "train", seed=1)
    assert list(other["id"]) != list(whole["id"])
    assert sorted(other["id"]) == sorted(whole["id"])
    with pytest.raises(data.DataError, match="25 examples asked for, 24 are there"):
        data.load("made", "train", limit=25)


def save_after_reading(monkeypatch, file, content):
    """Save `file` anew as soon as its bytes were read."""
    real = Path.read_bytes

    def read_and_save(path):
        found = real(path)
        if path == file:
            file.write_bytes(content)
        return found

    monkeypatch.setattr(Path, "read_bytes", read_and_save)


@pytest.mark.parametrize("name", ["own.jsonl", "own.parquet"])
def test_the_bytes_of_a_file_that_are_hashed_are_those_that_are_parsed(tmp_path, monkeypatch, name):
    file, contents = tmp_path / name, {}
    for text in ("second", "first"):
        table = datasets.Dataset.from_list([a_row(content=text)])
        table.to_parquet(file) if file.suffix == ".parquet" else table.to_json(file)
        contents[text] = file.read_bytes()
    save_after_reading(monkeypatch, file, contents["second"])
    rows, who = data.load_with_identity(file)
    assert rows["content"] == ["first"]
    assert who["sha256"] == hashlib.sha256(contents["first"]).hexdigest()
    assert data.identity(file)["sha256"] == hashlib.sha256(contents["second"]).hexdigest()


def test_the_text_of_a_suite_that_is_hashed_is_the_one_that_is_parsed(bench, monkeypatch):
    file = paths.SUITES / "made.yaml"
    first, who = file.read_bytes(), data.identity("made", "train")
    rows = data.load("made", "train").to_list()
    other = yaml.safe_dump(changed(tasks__asking__content="other"))
    save_after_reading(monkeypatch, file, other.encode())
    found, hashed = data.load_with_identity("made", "train")
    assert (found.to_list(), hashed) == (rows, who)
    assert hashed["sha256"] == hashlib.sha256(first).hexdigest()
    assert data.load("made", "train").to_list() != rows
    assert data.identity("made", "train") != who


def test_the_order_of_keys_does_not_matter(bench):
    before = all_splits(limit=9)
    backwards = dict(reversed(SUITE.items()))
    backwards["tasks"] = dict(reversed(SUITE["tasks"].items()))
    write_suite(backwards, sort_keys=False)
    read = yaml.safe_load((paths.SUITES / "made.yaml").read_text())
    assert list(read["tasks"]) == ["judging", "replying", "asking"]
    for split, table in all_splits(limit=9).items():
        assert table.to_list() == before[split].to_list()


def test_rows_and_identity_are_reproducible(bench):
    # a change of these ids means other rows for the same suite: raise data._ROWS_VERSION
    ids = data.load("made", "query", limit=3)["id"]
    assert ids == ["asking-00010", "judging-00117", "replying-00297"]
    calls = [{}, {"limit": 3}, {"seed": 1}]
    said = [json.dumps(data.identity("made", "train", **call)) for call in calls]
    said.append(json.dumps(data.identity("made", "query")))
    assert json.dumps(data.identity("made", "train")) == said[0]
    write_suite(changed(seed=4))
    said.append(json.dumps(data.identity("made", "train")))
    assert len(set(said)) == len(said)


def test_identity_needs_no_data(bench, monkeypatch):
    monkeypatch.setenv("ICPROBE_CACHE", "/nonexistent")
    assert data.identity("made", "train")["archive_sha256"] == assets.BIGBENCH.sha256


def test_length_limits(bench):
    write_suite(changed(tasks__replying__input_chars=[1, 5]))
    with pytest.raises(data.DataError, match="suite made, task replying: 0 rows fit the train"):
        data.load("made", "train")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sede": 1}, r"made.yaml: sede"),
        ({"seed": None}, r"made.yaml: seed.*required"),
        ({"seed": "0"}, r"made.yaml: seed.*integer.*'0'"),
        ({"seed": True}, r"made.yaml: seed.*integer.*True"),
        ({"splits__query": None}, r"made.yaml: splits.*3.*"),
        ({"splits__query": 0}, r"made.yaml: splits.query.*greater than 0.*0"),
        ({"types__ask__label": None}, r"types.ask.label.*required"),
        ({"types__ask__label": "Q: "}, r"types.ask.label.*ends in white space.*'Q: '"),
        ({"tasks__asking": "one"}, r"tasks.asking.*dictionary.*'one'"),
        ({"tasks__asking__bigbench": None}, r"tasks.asking: bigbench.*required"),
        ({"tasks__asking__bigbench": 1}, r"tasks.asking: bigbench.*string.*1"),
        ({"tasks__asking__type": "akk"}, r"tasks.asking.type: .*'akk'.*ask"),
        ({"tasks__asking__balanced": True}, r"tasks.asking: balanced"),
        ({"tasks__asking__input_chars": [9, 1]}, r"tasks.asking: input_chars.*\[9, 1\]"),
        ({"tasks__asking__passage": "("}, r"tasks.asking: passage.*regular expression"),
        ({"tasks__asking__drop": "("}, r"tasks.asking: drop.*regular expression"),
        ({"tasks__asking__splits": {"train": 1}}, r"tasks.asking: splits.*3.*'train': 1"),
    ],
)
def test_a_wrong_suite_is_an_error_naming_the_key(bench, changes, said):
    write_suite(changed(**changes))
    with pytest.raises(data.DataError, match=said):
        data.read_suite("made")


def test_suites_need_a_split_and_take_no_columns(bench):
    for split in (None, "test"):
        with pytest.raises(data.DataError, match=f"split should be one of .*{split}"):
            data.load("made", split)
    with pytest.raises(data.DataError, match="columns are for files"):
        data.load("made", "train", columns={"prompt": "x"})
    (paths.SUITES / "made.yaml").write_text("tasks: [")
    with pytest.raises(data.DataError, match="not readable as YAML"):
        data.load("made", "train")


# ----------------------------------------------------------------------------- the real suites

NAMES = sorted(file.stem for file in paths.SUITES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_suites_are_well_formed(name):
    suite = data.read_suite(name)
    for task in suite.tasks.values():
        assert task.splits["query"] >= 12
        assert task.splits["evaluation"] >= 12


@pytest.mark.real
@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_suites_are_disjoint_and_balanced(name):
    tables = all_splits(name)
    check_suite(tables, data.read_suite(name))
    again = data.load(name, "train", limit=30)
    assert again.to_list() == tables["train"].to_list()[:30]


@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        ("crossed", {}),
        ("grid", {"mctaco_classification": {2}}),
        ("sentiment", {name: {4} for name in ("hotels", "medicine", "products", "reviews")}),
    ],
)
def test_closed_tasks_have_options_and_no_others(name, numbers):
    found = {}
    for row in data.load(name, "evaluation"):
        if row["options"] is not None:
            found.setdefault(row["task"], set()).add(len(row["options"]))
    assert found == numbers


@pytest.mark.real
def test_the_grid_crosses_contents_and_types():
    table = data.load("grid", "train", limit=144)
    cells = Counter(zip(table["content"], table["type"], strict=True))
    assert set(cells.values()) == {12}
    for content in ("qasc", "mctaco", "cosmosqa"):
        for kind in ("question", "answer", "wrong_answer"):
            assert cells[content, kind] == 12
