"""The notebook's browser: widgets where somebody picks, tables where nobody can."""

import json
import queue

import nbformat
import numpy as np
import pytest
from conftest import texts
from jupyter_client.manager import start_new_kernel
from nbclient import NotebookClient

from icprobe import browser, views

N, M = 12, 6
TASKS = ("colours", "sums")
WIDGET = "application/vnd.jupyter.widget-view+json"


@pytest.fixture
def scores() -> views.Scores:
    rng = np.random.default_rng(0)
    step = np.full((N, M), np.nan)
    step[:6, :3] = 1e-3 * rng.normal(size=(6, 3))
    return views.Scores(
        train=texts(N, "example", TASKS), queries=texts(M, "query", TASKS),
        methods={"gain": rng.normal(size=(N, M)), "step": step},
        units={"gain": "nats", "step": "nats"},
    )  # fmt: skip


@pytest.fixture(scope="module")
def kernel():
    manager, client = start_new_kernel()
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


CELL = f"""
import numpy as np, pandas as pd
from icprobe import browser, views
rows = pd.DataFrame({{name: ["a", "b", "c"] for name in {list(views.COLUMNS)}}})
matrix = np.arange(9.0).reshape(3, 3)
methods, units = {{"gain": matrix}}, {{"gain": "nats"}}
scores = views.Scores(train=rows, queries=rows, methods=methods, units=units)
"""


def answer(client, code: str, somebody: bool) -> dict:
    """Run code as a front end does, with or without somebody at it; return what it shows."""
    asked = client.execute(code, allow_stdin=somebody)
    shown = {}
    while True:
        try:
            message = client.get_iopub_msg(timeout=60)
        except queue.Empty:
            pytest.fail("the kernel does not answer")
        if message["parent_header"].get("msg_id") != asked:
            continue
        content = message["content"]
        if message["msg_type"] == "error":
            pytest.fail("\n".join(content["traceback"]))
        if message["msg_type"] == "execute_result":
            shown = content["data"]
        if message["msg_type"] == "status" and content["execution_state"] == "idle":
            return shown


def test_where_somebody_sits_there_are_widgets(kernel):
    client = kernel[1]
    answer(client, CELL, somebody=True)
    assert WIDGET in answer(client, "browser.browse(scores)", somebody=True)
    assert WIDGET not in answer(client, "browser.browse(scores)", somebody=False)
    # and where the widgets are missing, tables
    answer(client, "import sys; there = sys.modules['ipywidgets']", somebody=True)
    answer(client, "sys.modules['ipywidgets'] = None", somebody=True)
    shown = answer(client, "browser.browse(scores)", somebody=True)
    answer(client, "sys.modules['ipywidgets'] = there", somebody=True)
    assert WIDGET not in shown and "highest 1" in shown["text/html"]


def test_in_a_run_without_anybody_there_are_tables(kernel):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(code) for code in (CELL, "browser.browse(scores)")]
    )
    NotebookClient(notebook, km=kernel[0]).execute(cleanup_kc=False)
    (output,) = notebook.cells[-1].outputs
    assert WIDGET not in output.data and WIDGET not in json.dumps(notebook.metadata)
    assert "highest 1" in output.data["text/html"]


def test_in_plain_python_there_are_tables(scores):
    assert not browser.attended()
    shown = browser.browse(scores, top=2).data
    assert "all queries (mean)" in shown
    best = views.extremes(scores, "gain", query="query-0", top=1).loc[("highest", 1)]
    assert f"{best['id']}: {best['prompt']} ▸ {best['completion'].strip()}" in shown
    assert "query-0: Question 0" in shown and "query-1: Question 1" in shown
    with pytest.raises(ValueError, match="top is 0"):
        browser.browse(scores, top=0)


def test_cells_say_what_the_views_say(scores):
    table = browser.side_by_side(scores, ["gain", "step"], top=4)
    assert table.columns.tolist() == ["gain (nats)", "step (nats)"]
    found = views.extremes(scores, "gain", top=4)
    row = found.loc[("lowest", 2)]
    said = table.loc["lowest 2", "gain (nats)"].splitlines()
    assert said[0] == f"rank {row['rank']:.0f} ({row['rank_low']:.0f} to {row['rank_high']:.0f})"
    digits = views.decimals(scores, "gain")
    score, low, high = (views.number(row[name], digits) for name in ("score", "low", "high"))
    assert said[1] == f"{score} ({low} to {high})"
    assert said[2].startswith(f"{row['id']}: Question")
    # of six measured, four are the highest, and two are left
    assert (table["step (nats)"] != "").sum() == 6
    assert "(" not in browser.side_by_side(scores, ["gain"], query="query-3").iloc[0, 0]


def test_tables_follow_what_is_picked(scores):
    shown = browser.Browser(scores, top=2)

    def first(**of) -> str:
        return views.extremes(scores, "gain", **of)["id"].iloc[0] + ":"

    assert first() in shown.ranked.value and "all queries (mean)" in shown.ranked.value
    shown.queries.value = ("query", "query-5")
    assert first(query="query-5") in shown.ranked.value and "query-5:" in shown.ranked.value
    shown.queries.value = ("task", "sums")
    assert first(task="sums") in shown.ranked.value
    shown.among.value = "colours"
    assert first(task="sums", among="colours") in shown.ranked.value
    assert "example-1:" not in shown.ranked.value  # its task is sums
    shown.methods["gain"].value = False
    assert "gain (nats)" not in shown.ranked.value + shown.helped.value
    shown.methods["gain"].value = True
    shown.example.value = "example-9"
    row = views.helped(scores, "example-9", top=1).iloc[0]
    assert "Whom example-9 helps and hurts" in shown.helped.value
    assert f"{row['query']}: Question" in shown.helped.value
    assert f"rank {row['rank']:.0f} of {N}" in shown.helped.value
    before = shown.helped.value
    shown.example.value = ""  # cleared to type another
    assert shown.helped.value == before
    for box in shown.methods.values():
        box.value = False
    assert "Nothing was measured here" in shown.ranked.value


def test_hostile_texts_are_texts(scores):
    hostile = "<img src=x onerror=alert(1)>"
    train, queries = (rows.copy() for rows in (scores.train, scores.queries))
    for rows in (train, queries):
        for column in ("id", "prompt", "completion", "task"):
            rows[column] = [f"{hostile}{text}" for text in rows[column]]
    made = views.Scores(
        train=train, queries=queries, methods={hostile: scores.methods["gain"]},
        units={hostile: hostile},
    )  # fmt: skip
    shown = browser.Browser(made, top=2)
    shown.queries.value = ("query", queries["id"][3])
    for said in (browser.few(made).data, shown.ranked.value, shown.helped.value):
        assert "&lt;img" in said and "<img" not in said
