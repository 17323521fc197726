"""The explorer's page in a real browser: what it shows, and that it loads and runs nothing else."""

import itertools
import re
import shutil
import urllib.parse
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers import UNITS, texts, three_methods

from icprobe.artifact import explorer, views

pytestmark = pytest.mark.slow

N, M = 30, 9
ALL = "index == index"
HOSTILE = "</script><img src=x onerror='window.hacked = true'><!--<script>"


@pytest.fixture(scope="module")
def chromium():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        own = Path(playwright.chromium.executable_path)
        file = shutil.which("chromium") or shutil.which("google-chrome") or own
        if not Path(file).exists():
            pytest.skip("no Chromium: apt install chromium, or playwright install chromium")
        flags = ["--no-sandbox", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=file, args=flags)
        yield browser
        browser.close()


class Opened:
    """A page, with all that it asked for or complained about."""

    def __init__(self, browser, file: Path, width: int = 1280, address: str = ""):
        self.page = browser.new_page(viewport={"width": width, "height": 900}, offline=True)
        self.requests, self.messages = [], []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("pageerror", lambda error: self.messages.append(("error", str(error))))
        self.page.on("console", lambda one: self.messages.append((one.type, one.text)))
        self.page.goto(file.as_uri() + address)
        self.page.wait_for_selector("html[data-ready]", timeout=30_000)

    def assert_quiet(self) -> None:
        """Fail if the page asked for anything outside of itself, or complained."""
        local = ("file:", "blob:", "data:", "about:")
        assert [url for url in self.requests if not url.startswith(local)] == []
        assert [one for one in self.messages if one[0] in ("error", "warning")] == []

    def choose(self, label: str) -> None:
        """Choose queries by the beginning of their label."""
        options = self.page.locator("#choice option").all_inner_texts()
        self.page.select_option("#choice", index=[o.startswith(label) for o in options].index(True))

    def cards(self, method: str, end: int, within: str = "#columns") -> dict[str, str]:
        """Return a list's heads by id: end 0 is the first list of a method's column."""
        column = self.page.locator(f'{within} .column[data-method="{method}"]')
        cards = column.locator("> div").nth(end).locator("li").all()
        heads = [" ".join(card.locator(".head").inner_text().split()) for card in cards]
        return dict(zip((c.get_attribute("data-id") for c in cards), heads, strict=True))

    def rows(self) -> list[list[str]]:
        """Return the cells that the table of all training examples shows."""
        return self.page.evaluate(
            "[...document.querySelectorAll('#table tbody tr')].map(r => "
            "[...r.cells].map(c => c.innerText.replace(/\\s+/g, ' ').trim()))"
        )

    @property
    def hash(self) -> dict[str, str]:
        """What the address says of the view."""
        # asked of the page: what Playwright keeps of it comes a little later
        address = self.page.evaluate("location.href")
        return dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(address).fragment))


@pytest.fixture(scope="module")
def scores() -> views.Scores:
    train = texts(N, "example", before="Look at this.\n")
    train.loc[7, "prompt"] = "word " * 400 + "the last words:"
    queries = texts(M, "query", before="Look at this.\n")
    return views.Scores(train, queries, three_methods(N, M), UNITS, {"example-4": "selected"})


@pytest.fixture(scope="module")
def file(scores, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("explorer")
    return explorer.write(scores, folder / "page.html", "Which help?", "A tiny model & data")


@pytest.fixture(scope="module")
def opened(chromium, file):
    return Opened(chromium, file)


@pytest.fixture
def shown(opened):
    """Return the page as it opens; loading it for each test would be most of the tests' time."""
    opened.page.select_option(".dt-length select", "10")
    opened.page.evaluate("location.hash = '#'")
    opened.page.wait_for_function("location.hash.includes('example=')")
    yield opened
    opened.assert_quiet()


def told(scores, method: str, x: float) -> str:
    """Return a score as the page, which has single precision, shows it; a zero has no sign."""
    shown = f"{abs(np.float32(x)):.{views.decimals(scores, method)}f}"
    return shown if float(shown) == 0 else f"{'−' if x < 0 else '+'}{shown}"


def extremes(scores, method: str, of: str = ALL, top: int = 5) -> list[pd.DataFrame]:
    """Return the rows at both ends of a ranking; none is at both."""
    ranked = views.ranking(scores, method, scores.queries.query(of).index)
    table = scores.train.set_index("id").join(ranked).reset_index()
    table = table[table["rank"].notna()].sort_values("rank", kind="stable")
    return [table.head(top), table.iloc[top:].iloc[::-1].head(top)]


def helped(scores, example: str, method: str, top: int = 5) -> list[pd.DataFrame]:
    """Return the queries that an example helps and hurts most, with its rank for each of them."""
    matrix, row = scores.methods[method], scores.train["id"].tolist().index(example)
    table = scores.queries.assign(
        score=matrix[row], rank=(matrix > matrix[row]).sum(0) + 1, ranked=np.isfinite(matrix).sum(0)
    ).sort_values("score", ascending=False, kind="stable")
    helps, hurts = table[table["score"] > 0], table[table["score"] < 0].iloc[::-1]
    return [helps.head(top), hurts.head(top)]


def test_the_page_says_what_it_is(shown):
    page = shown.page
    assert page.title() == page.inner_text("h1") == "Which help?"
    facts = page.inner_text("body")
    for said in ("A tiny model & data", "30 training examples, 9 queries, 3 methods"):
        assert said in facts
    # whoever cannot see the layout needs headings in order, and names of all controls
    levels = page.evaluate("[...document.querySelectorAll('h1,h2,h3,h4')].map(h => +h.tagName[1])")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    nameless = page.evaluate(
        "[...document.querySelectorAll('input,select,button')].filter(e => "
        "!e.labels?.length && !e.innerText.trim() && !e.ariaLabel).map(e => e.outerHTML)"
    )
    assert nameless == []


@pytest.mark.parametrize(
    ("label", "of"),
    [("", ALL), ("animals: mean", "task == 'animals'"), ("query-5:", "id == 'query-5'")],
)
def test_numbers_are_those_of_the_views(shown, scores, label, of):
    shown.page.select_option(".dt-length select", "100")
    shown.choose(label)
    for method, end in itertools.product(scores.methods, (0, 1)):
        wanted = extremes(scores, method, of)[end]
        cards = shown.cards(method, end)
        assert [*cards] == wanted["id"].tolist()
        for head, row in zip(cards.values(), wanted.itertuples(), strict=True):
            place = f"Rank {row.rank:.0f}"
            if np.isfinite(row.rank_low):
                place += f" ({row.rank_low:.0f} to {row.rank_high:.0f})"
            sign = {1: "▲ ", -1: "▼ ", 0: ""}[np.sign(row.score)]
            score, low, high = (told(scores, method, x) for x in (row.score, row.low, row.high))
            score += "" if "query-5" in of else f" ({low} to {high})"
            assert re.sub(r"([▲▼]) ?", r"\1 ", head) == f"{place} {sign}{score}"
    columns = scores.queries.query(of).index
    agreed = views.agreements(scores, columns).query("examples > 0")
    cells = shown.page.locator("#agreement tbody tr").all_inner_texts()
    assert [cell.replace("−", "-").split("\t") for cell in cells] == [
        [f"{first}, {second}", f"{estimate:.2f}", f"{low:.2f} to {high:.2f}", str(examples)]
        for first, second, estimate, low, high, examples, _ in agreed.itertuples(index=False)
    ]
    ranked = {name: views.ranking(scores, name, columns) for name in scores.methods}
    found = {row[0]: row[3:] for row in shown.rows()}
    assert [*found] == ranked["gain"]["rank"].sort_values(kind="stable").index.tolist()
    for name, cells in found.items():
        for cell, (method, table) in zip(cells, ranked.items(), strict=True):
            score, rank = table.loc[name, ["score", "rank"]]
            if np.isnan(score):
                assert cell == "–"
            else:
                assert told(scores, method, score) in cell and f"rank {rank:.0f}" in cell


def test_a_training_example_is_picked_and_shows_whom_it_helps(shown, scores):
    card = shown.page.locator('#columns .column[data-method="cosine"]').locator("li").nth(1)
    name = card.get_attribute("data-id")
    card.locator(".text").click()
    assert shown.hash["example"] == name
    assert shown.page.inner_text("#helped-title") == f"Whom {name} helps and hurts"
    for method in scores.methods:
        for end, wanted in enumerate(helped(scores, name, method)):
            cards = shown.cards(method, end, "#helped-columns")
            assert [*cards] == wanted["id"].tolist()
            for head, row in zip(cards.values(), wanted.itertuples(), strict=True):
                assert told(scores, method, row.score) in head
                assert f"rank {row.rank:.0f} of {row.ranked}" in head
    # from there to one of the queries
    other = helped(scores, name, "gain")[0]["id"].iloc[0]
    shown.page.locator("#helped-columns button", has_text=re.compile(f"^{other}$")).first.click()
    assert shown.hash["query"] == other and shown.hash["example"] == name
    assert shown.page.inner_text("#query-title") == f"Query {other}"
    shown.page.fill("#pick", "example-4")  # and by its id
    shown.page.keyboard.press("Enter")
    assert shown.hash["example"] == "example-4"
    assert "selected" in shown.page.inner_text("#example-text")


def test_search_and_filter_by_task(shown, scores):
    page = shown.page
    shown.choose("query-4:")
    page.select_option("#task", "sums")
    ranked = extremes(scores, "gain", "id == 'query-4'", top=N)[0].query("task == 'sums'")
    assert [*shown.cards("gain", 0)] == ranked["id"].tolist()[:5]
    assert "10 training examples of 30 pass the filter (sums)" in page.inner_text("#filtered")
    assert {row[1] for row in shown.rows()} == {"sums"}
    page.select_option("#task", label="the query's own task")
    assert {row[1].split()[0] for row in shown.rows()} == {"animals"}
    page.select_option("#task", "")
    page.fill("#search", "example-7")  # a long text is clipped, and can be seen whole
    card = page.locator("#columns li").first
    prompt = card.locator(".prompt")
    assert len(prompt.inner_text()) == 200 and prompt.inner_text().endswith("the last words:")
    card.get_by_role("button", name="whole text").click()
    assert prompt.inner_text() == scores.train["prompt"][7]
    page.fill("#search", "nowhere to be found")
    assert not shown.cards("gain", 0)
    page.uncheck("#methods input >> nth=1")
    assert page.locator('#columns .column[data-method="cosine"]').count() == 0


def test_the_table_sorts_by_its_headings(shown, scores):
    ranked = views.ranking(scores, "step", range(M))["rank"].dropna().sort_values().index
    heading = shown.page.locator("#table thead th", has_text="step (nats)")
    # what was not measured comes last either way
    for order, wanted in (("ascending", ranked), ("descending", ranked[::-1])):
        heading.locator("[tabindex='0']").first.focus()
        shown.page.keyboard.press("Enter")
        shown.page.wait_for_selector(f"th[aria-sort={order}]:has-text('step')")
        assert [row[0] for row in shown.rows()] == wanted[:10].tolist()
    shown.page.locator("#table thead th", has_text="gain").first.click()  # as it began


def test_it_goes_by_keyboard(shown):
    page, queries = shown.page, []
    for key in ("j", "ArrowRight", "j", "ArrowLeft", "k", "k", "k"):
        page.keyboard.press(key)
        queries.append(page.input_value("#choice"))
    assert queries == ["1", "2", "3", "2", "1", "0", "0"] and page.is_disabled("#previous")
    page.keyboard.press("/")
    page.keyboard.type("jk answer 7")  # in a field, letters are letters
    assert page.input_value("#search") == "jk answer 7" and page.input_value("#choice") == "0"
    page.fill("#search", "")
    page.keyboard.press("Escape")
    # whoever picks by keyboard stays where they are
    button = page.locator('#columns .column[data-method="gain"] li button.pick').nth(2)
    name = button.inner_text()
    button.focus()
    page.keyboard.press("Enter")
    assert shown.hash["example"] == name
    assert page.evaluate("document.activeElement.innerText") == name


def test_the_address_keeps_the_view(shown, chromium, file):
    page = shown.page
    shown.choose("query-8:")
    page.select_option("#task", "animals")
    page.fill("#search", "question")
    page.select_option("#x", label="step (nats)")
    page.uncheck("#methods input >> nth=0")
    main = page.inner_text("main")
    # on a telephone, too, nothing is wider than the screen
    address = "#" + urllib.parse.urlsplit(page.url).fragment
    again = Opened(chromium, file, width=390, address=address).page
    assert again.evaluate("document.documentElement.scrollWidth") == 390
    again.set_viewport_size({"width": 1280, "height": 900})
    assert again.inner_text("main") == main and again.url == page.url
    # an address that is typed into the open page counts, too
    again.evaluate("location.hash = '#query=query-77'")
    again.wait_for_function("document.getElementById('message').innerText.includes('77')")
    assert again.inner_text("#query-title") == "All queries"


def test_hostile_texts_are_texts(chromium, tmp_path):
    train, queries = texts(N, "example"), texts(M, "query")
    for frame, column in itertools.product((train, queries), ("id", "prompt", "completion")):
        frame[column] = [f"{HOSTILE} {text}" for text in frame[column]]
    train["task"] = queries["task"] = HOSTILE
    methods = {f"{HOSTILE} {name}": matrix for name, matrix in three_methods(N, M).items()}
    marks = dict.fromkeys(train["id"], HOSTILE)
    scores = views.Scores(train, queries, methods, dict.fromkeys(methods, HOSTILE), marks)
    opened = Opened(chromium, explorer.write(scores, tmp_path / "page.html", HOSTILE, HOSTILE))
    page = opened.page
    page.keyboard.press("j")
    page.locator("#columns li").first.click()
    point(opened, 0)
    page.locator(".bk-Tooltip").filter(has_text="onerror").first.wait_for()
    assert page.inner_text("h1") == HOSTILE
    assert HOSTILE in page.inner_text("#query-text")
    assert HOSTILE in page.inner_text("#table tbody tr >> nth=0")
    assert page.locator("img[src=x]").count() == 0
    assert page.evaluate("window.hacked") is None
    opened.assert_quiet()


def point(opened: Opened, row: int) -> None:
    """Move to a point of the scatter."""
    x, y = opened.page.evaluate(
        """(row) => {
          const plot = [...Bokeh.index.roots][0];
          document.getElementById("scatter").scrollIntoView({block: "center"});
          const {x, y, row: rows} = plot.model.document.get_model_by_name("points").data;
          const k = Array.from(rows).indexOf(row);
          const box = plot.canvas_view.el.getBoundingClientRect();
          const {x_scale, y_scale} = plot.frame;
          return [box.x + x_scale.compute(x[k]), box.y + y_scale.compute(y[k])];
        }""",
        row,
    )
    opened.page.mouse.move(x - 3, y)
    opened.page.mouse.move(x, y)


def test_the_scatter_shows_a_text_and_picks_it(shown, scores):
    shown.choose("query-5:")
    page = shown.page
    page.wait_for_timeout(200)  # a frame to draw in
    point(shown, 7)
    tooltip = page.locator(".bk-Tooltip").filter(has_text="the last words: ▸ answer 7").first
    tooltip.wait_for()
    said = tooltip.evaluate("e => e.shadowRoot.textContent")
    assert told(scores, "gain", scores.methods["gain"][7, 5]) in said
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function("location.hash.includes('example=example-7')")
    # other axes, a filter
    page.select_option("#y", label="step (nats)")
    page.select_option("#task", "sums")
    drawn = page.evaluate(
        "(d => ({rows: [...d('points').data.row], rest: d('others').data.x.length}))"
        "(name => [...Bokeh.index.roots][0].model.document.get_model_by_name(name))"
    )
    assert drawn == {"rows": [2, 5, 8, 11], "rest": 8}


def test_of_many_examples_the_extreme_ones_stay(chromium, scores, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer, "MOST_EXAMPLES", 27)
    page = Opened(chromium, explorer.write(scores, tmp_path / "page.html", "part")).page
    said = page.inner_text("#kept")
    assert "holds the 27 training examples" in said and "among all 30" in said
    whole = int(re.search(r"Places 1 to (\d+) from either end", said)[1])
    held = page.evaluate("[...document.querySelectorAll('#ids option')].map(o => o.value)")
    assert len(set(held)) == 27
    choices = [ALL, "task == 'sums'", *(f"id == 'query-{j}'" for j in range(M))]
    for method, of in itertools.product(scores.methods, choices):
        for rows in extremes(scores, method, of, top=whole):
            assert set(rows["id"]) <= set(held)


def test_one_method_and_one_query_are_enough(chromium, tmp_path):
    scores = views.Scores(
        texts(5, "example"), texts(1, "query"), {"gain": np.arange(5.0)[:, None]}, {"gain": "nats"}
    )
    opened = Opened(chromium, explorer.write(scores, tmp_path / "page.html", "small"))
    assert [*opened.cards("gain", 0)] == [f"example-{i}" for i in (4, 3, 2, 1, 0)]
    opened.page.keyboard.press("j")
    assert opened.page.inner_text("#query-title") == "Query query-0"
    opened.assert_quiet()
