"""Suites: what they give, that splits are disjoint and balanced, and what is said of wrong ones."""

import copy
import functools
import hashlib
import json
import operator
import re
import string
from collections import Counter

import pytest
import yaml
from helpers import keep_suite, keep_tasks, save_after_reading

from icprobe import data
from icprobe.data import assets, paths

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
TASKS = {
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


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Put made-up tasks into the cache, and the suite "made" into the suites folder."""
    keep_suite(monkeypatch, tmp_path, SUITE, TASKS)


def asked(tmp_path, examples, split="train"):
    """Return the rows of a split whose task has these entries."""
    keep_tasks(tmp_path / "tasks", TASKS | {"one": examples})
    return [row for row in data.load("made", split) if row["task"] == "asking"]


def write_suite(suite, **options):
    (paths.SUITES / "made.yaml").write_text(yaml.safe_dump(suite, **options))


def changed(**changes):
    """Return the suite with values changed at paths such as tasks__asking__type."""
    suite = copy.deepcopy(SUITE)
    for path, value in changes.items():
        *above, key = path.split("__")
        place = functools.reduce(operator.getitem, above, suite)
        place[key] = value
        if value is None:
            del place[key]
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
def test_few_answers_of_a_task_are_its_options(bench, tmp_path, n):
    answers = [f"answer {i:02d}" for i in range(n)]
    entries = zip(WORDS, reversed(answers * len(WORDS)), strict=False)
    examples = [{"input": f"Fact: {word}.", "target": ["", f"{end} "]} for word, end in entries]
    options = [f" {answer}" for answer in answers] if 2 <= n <= 10 else None
    for split in data.SPLITS:
        rows = asked(tmp_path, examples, split)
        assert {row["completion"] for row in rows} <= {f" {answer}" for answer in answers}
        assert all(row["options"] == options for row in rows)


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
def test_scored_answers_are_the_options(bench, tmp_path, scores, options):
    # every second example has other scores: an example's options are its own, not the task's
    scored = [{"target_scores": {"a": 1, "d": 0}}, {"target_scores": scores, "target": "a"}]
    examples = [{"input": f"Fact: {word}.", **scored[i % 2]} for i, word in enumerate(WORDS)]
    rows = asked(tmp_path, examples)
    odd = [int(row["id"].rpartition("-")[2]) % 2 for row in rows]
    assert set(odd) == {0, 1}
    assert [row["options"] for row in rows] == [options if i else [" a", " d"] for i in odd]


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


def test_the_text_of_a_suite_that_is_hashed_is_the_one_that_is_parsed(bench, monkeypatch):
    file = paths.SUITES / "made.yaml"
    first, who = file.read_bytes(), data.identity("made", "train")
    rows = data.load("made", "train").to_list()
    other = yaml.safe_dump(changed(tasks__asking__content="other"))
    save_after_reading(monkeypatch, file, other.encode())
    found, hashed = data.Source("made", "train").load()
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


def test_rows_and_identity_are_reproducible(bench, monkeypatch):
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
    monkeypatch.setenv("ICPROBE_CACHE", "/nonexistent")  # an identity needs no data
    assert data.identity("made", "train")["archive_sha256"] == assets.BIGBENCH.sha256


def test_length_limits(bench):
    write_suite(changed(tasks__replying__input_chars=[9, 1]))
    with pytest.raises(data.DataError, match=r"made, task replying: 0 .* train "):
        data.load("made", "train")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sede": 1}, r"made.yaml: sede"),
        ({"seed": None}, r"made.yaml: seed.*required"),
        ({"seed": True}, r"made.yaml: seed.*integer.*True"),
        ({"splits__query": None}, r"made.yaml: splits.*3.*"),
        ({"types__ask__label": None}, r"types.ask.label.*required"),
        ({"types__ask__label": "Q: "}, r"types.ask.label.*'Q: '"),
        ({"tasks__asking": "one"}, r"tasks.asking.*dictionary.*'one'"),
        ({"tasks__asking__bigbench": None}, r"tasks.asking: bigbench.*required"),
        ({"tasks__asking__bigbench": 1}, r"tasks.asking: bigbench.*string.*1"),
        ({"tasks__asking__type": "akk"}, r"tasks.asking.type: .*'akk'.*ask"),
        ({"tasks__asking__balanced": True}, r"tasks.asking: balanced"),
        ({"tasks__asking__input_chars": [9]}, r"tasks.asking: input_chars.*\[9\]"),
        ({"tasks__asking__passage": "("}, r"tasks.asking: passage.*regular expression"),
        ({"tasks__asking__splits": {"train": 1}}, r"tasks.asking: splits.*3.*'train': 1"),
    ],
)
def test_a_wrong_suite_is_an_error_naming_the_key(bench, changes, said):
    write_suite(changed(**changes))
    with pytest.raises(data.DataError, match=said):
        data.read_suite("made")


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"split": None}, "made: split .*train.*None"),
        ({"split": "test"}, "made: split .*train.*'test'"),
        ({"columns": {"prompt": "x"}}, "made: columns"),
        ({"limit": 25}, "made: 25 .* 24 "),
    ],
)
def test_what_a_suite_cannot_give(bench, asked, said):
    with pytest.raises(data.DataError, match=said):
        data.load("made", **{"split": "train", **asked})


@pytest.mark.parametrize(
    ("source", "said"), [("made", r"made\.yaml.*YAML"), ("mede", "'mede'.* made")]
)
def test_a_suite_that_cannot_be_read(bench, source, said):
    (paths.SUITES / "made.yaml").write_text("tasks: [")
    with pytest.raises(data.DataError, match=said):
        data.load(source, "train")


# ----------------------------------------------------------------------------- the real suites

NAMES = sorted(file.stem for file in paths.SUITES.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_suites_are_well_formed(name):
    suite = data.read_suite(name)
    assert min(task.splits[one] for task in suite.tasks.values() for one in data.SPLITS[1:]) >= 12


@pytest.mark.real
@pytest.mark.parametrize("name", NAMES)
def test_the_shipped_suites_are_disjoint_and_balanced(name):
    tables = all_splits(name)
    check_suite(tables, data.read_suite(name))


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
