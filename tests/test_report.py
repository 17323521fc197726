"""The report: made by real runs of tiny notebooks, and from folders where something is missing."""

import base64
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest

from icprobe import __version__, paths, provenance, report, runner
from icprobe.artifact import claims

PARAMETERS = """
profile: "str" = "laptop"  # which profile
seed: "int" = 3  # which examples
output_dir: "str" = "figures/laptop"  # results
""".strip()
OPENING = """# 01 · Probing: does it *help*?

**What the paper says.** It does, with $G_{ij}$ nats.

| | |
|---|---|
| **Out** | not a part of the question |
"""
# what real notebooks do, with a figure and a table saved by the library
SAVING = """
import matplotlib.pyplot as plt
import pandas as pd
from icprobe import figures, paths
output_dir = paths.resolve(output_dir)
for name in NAMES:
    figures.save(plt.figure(figsize=(3, 2)), name, output_dir, profile, seed)
"""
TABLES = """
frame = pd.DataFrame({"method": ["<script>alert(1)</script>", "b"], "estimate": [0.12345, 8818.4]})
figures.save_table(frame, "01_findings", output_dir)
figures.save_table(pd.DataFrame({"i": range(100), "p": 1e-5}), "01_long", output_dir)
"""
CLOSING = "**How to read it.** With care, [here](elsewhere.ipynb) or [there](https://example.org)."


class Page(HTMLParser):
    """What a page consists of; an element that is closed wrongly is an error."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.open, self.text, self.headings = [], [], "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        """Note an element."""
        self.tags.append((tag, dict(attributes)))
        if tag not in ("a", "b", "code", "em", "strong", "span"):
            self.text += " "
        if tag not in self.VOID:
            self.open.append(tag)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        """Close the element that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data):
        """Note text that people see."""
        if self.open and self.open[-1] != "style":
            self.text += data

    def of(self, tag: str) -> list[dict]:
        """Return the attributes of all elements of a kind."""
        return [attributes for name, attributes in self.tags if name == tag]


def write_notebook(root: Path, name: str, *cells: str, parameters: str = PARAMETERS) -> Path:
    """Write a notebook; cells that begin with # or * are markdown."""
    first, *rest = cells
    made = [nbformat.v4.new_markdown_cell(first)]
    made.append(nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}))
    for cell in rest:
        text = cell.startswith(("#", "*"))
        made.append((nbformat.v4.new_markdown_cell if text else nbformat.v4.new_code_cell)(cell))
    path = root / "notebooks" / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=made), path)
    return path


def git(root: Path, *arguments: str) -> str:
    who = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    command = ["git", "-C", str(root), *who, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def page_of(folder: Path) -> Page:
    return Page((folder / "report.html").read_text(encoding="utf-8"))


def check_links(folder: Path, page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for link in (attributes["href"] for attributes in page.of("a")):
        if link.startswith("#"):
            assert link[1:] in ids
        elif not link.startswith("https://"):
            assert (folder / unquote(link)).exists(), link


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Run a checkout of three notebooks once; the second of them fails."""
    root = tmp_path_factory.mktemp("report") / "a checkout"
    (root / "notebooks" / "profiles").mkdir(parents=True)
    (root / "notebooks" / "profiles" / "laptop.yaml").write_text("profile: laptop\nseed: 3\n")
    output = root / "figures" / "laptop"
    parameters = PARAMETERS.replace("figures/laptop", str(output))
    write_notebook(
        root,
        "01_first",
        OPENING,
        "## 1 Nothing to see\n\nThis text leads to no figure.",
        "1 + 1",
        "## 2 One `map` & more\n\nWhat *it* shows: <b>not bold</b>.",
        SAVING.replace("NAMES", '["01_map", "01_other"]'),
        "*A caption below.*\n\n## 3 Tables\n\nNumbers.\n\n```\n# no heading\n```",
        TABLES,
        "*Never* shown, since nothing follows.",
        "print('icp: reused 2 of 2 rows')",
        CLOSING,
        parameters=parameters,
    )
    write_notebook(root, "02_second", "# 02 · Second", "1 / 0", parameters=parameters)
    write_notebook(root, "03_third", "# 03 · Third", "1 + 1", parameters=parameters)
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "--message", "all")
    (root / "notebooks" / "new file").write_text("untracked")
    output.mkdir(parents=True)
    claims.write(output)
    assert runner.main([], root) == 1
    return root


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """Copy that run's results, to take things away from."""
    return Path(shutil.copytree(made / "figures" / "laptop", tmp_path / "results"))


@pytest.fixture(scope="module")
def page(made) -> Page:
    return page_of(made / "figures" / "laptop")


def test_all_figures_and_tables_are_in_it_with_the_notebooks_words(made, page):
    images = page.of("img")
    assert [image["alt"] for image in images] == [
        "2 One map & more: map",
        "2 One map & more: other",
    ]
    png = (made / "figures" / "laptop" / "01_map.png").read_bytes()
    assert images[0]["src"] == f"data:image/png;base64,{base64.b64encode(png).decode()}"
    assert (images[0]["width"], images[0]["height"]) == (
        "307",
        "211",
    )  # 3 by 2 inches, and the margin
    text = re.sub(r"\s+", " ", page.text)
    first, shown, below, table = (
        text.index(part)
        for part in (
            "2 One map & more What it shows: <b>not bold</b>.",
            "01_map PNG PDF",
            "A caption below.",
            "01_findings.csv: 2 rows",
        )
    )
    assert first < shown < text.index("01_other PNG PDF") < below < table
    assert "3 Tables Numbers. # no heading" in text
    assert "It does, with G_{ij} nats." in text
    assert "How to read it. With care, here or there." in text
    for left_out in ("leads to no figure", "not a part of the question", "Never shown"):
        assert left_out not in text
    assert text.count("What it shows") == 1  # once for both figures


def test_tables_are_rounded_escaped_and_cut(page):
    assert "<script>alert(1)</script>" in page.text
    assert not page.of("script")
    assert "0.12" in page.text and "8818" in page.text and "0.12345" not in page.text
    assert "01_long.csv: 100 rows" in page.text
    assert "The first 60 of 100 rows" in page.text
    assert page.text.count("1e-5") == 60
    folded = [attributes for attributes in page.of("details") if attributes.get("class") == "table"]
    assert ["open" in attributes for attributes in folded] == [True, False]


def test_it_loads_nothing_and_is_in_order(made, page):
    assert page.of("html") == [{"lang": "en"}]
    assert not page.of("link")
    for tag, attributes in page.tags:
        assert tag == "a" or not {"href", "action", "srcset"} & set(attributes)
        assert attributes.get("src", "data:image/png;base64,").startswith("data:")
    source = (made / "figures" / "laptop" / "report.html").read_text(encoding="utf-8")
    assert "url(" not in source and "@import" not in source
    assert page.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(page.headings, page.headings[1:], strict=False))
    check_links(made / "figures" / "laptop", page)
    links = {attributes["href"] for attributes in page.of("a")}
    assert {"notebooks/01_first.ipynb", "01_map.pdf", "01_findings.csv", "01_long.csv"} <= links
    assert "notebooks/02_second.failed.ipynb" not in links  # it has no section
    assert not any("elsewhere.ipynb" in link for link in links)  # of the notebook's own folder


def test_the_run_stands_in_it(made, page):
    text = re.sub(r"\s+", " ", page.text)
    assert re.search(r"01_first \d\.\d\d \d\.\d\d done reused", text)
    assert re.search(r"02_second \d\.\d\d \d\.\d\d failed", text)
    assert "03_third – – not run" in text
    assert "icp: reused 2 of 2 rows" in text
    assert "02_second: no results in this folder (failed)" in text
    revision = git(made, "rev-parse", "HEAD")
    assert f"{revision} and 1 changed or new file" in text and "notebooks/new file" in text
    assert f"icprobe {__version__}, revision {revision[:10]} with changes." in text
    assert "command ./run_all.sh icprobe" in text
    assert f"torch {provenance.packages()['torch']}" in text
    assert "01_first: seed 3" in text
    assert f"{len(claims.CLAIMS)} claims" in text and text.count("How it is tested") == len(
        claims.CLAIMS
    )
    kept = json.loads((made / "figures" / "laptop" / "run.json").read_text())
    assert kept["notebooks"]["01_first"]["gib"] > 0.01
    assert kept["notebooks"]["03_third"]["gib"] is None


def test_it_can_be_made_anew(made, folder):
    before = (made / "figures" / "laptop" / "report.html").read_bytes()
    assert report.write(made / "figures" / "laptop", made).read_bytes() == before
    assert report.write(folder, made).read_bytes() == before  # wherever the folder lies


def test_command_line(folder, capsys):
    (folder / "report.html").unlink()
    assert report.main([str(folder)]) == 0
    assert capsys.readouterr().out.strip() == str(folder / "report.html")
    assert page_of(folder).of("img")
    assert report.main([str(folder / "nowhere")]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_what_is_missing_is_said(made, folder):
    (folder / "run.json").unlink()
    report.write(folder, made)
    text = re.sub(r"\s+", " ", page_of(folder).text)
    assert "No run.json" in text and "The folder has no record of a run" in text
    assert re.search(r"01_first \d\.\d\d \d\.\d\d done reused", text)  # from run.csv
    assert "01_first: seed 3" in text  # from the executed copy

    (folder / "run.csv").unlink()
    report.write(folder, made)
    text = re.sub(r"\s+", " ", page_of(folder).text)
    assert re.search(r"01_first \d\.\d\d – done –", text)  # from the executed copy
    assert "02_second – – failed" in text

    shutil.rmtree(folder / "notebooks")
    (folder / "claims.json").unlink()
    (folder / "03_findings.csv").write_text("a\n1\n")
    report.write(folder, made)
    page = page_of(folder)
    text = re.sub(r"\s+", " ", page.text)
    assert "No executed copies of 01, 03; texts are the checkout's." in text
    assert "No claims.json" in text
    assert "01_first – – not recorded" in text
    assert "2 One map & more" in text  # from the checkout
    check_links(folder, page)

    (folder / "03_findings.csv").unlink()
    report.write(folder, folder)  # no checkout either
    page = page_of(folder)
    assert "No claims.json" not in page.text  # no notebook here judges any
    assert "there is no notebook 01.ipynb, so no titles and captions" in page.text
    assert len(page.of("img")) == 2
    check_links(folder, page)

    for file in [*folder.glob("01_*"), folder / "report.html"]:
        file.unlink()
    report.write(folder, folder)
    assert not page_of(folder).of("img")


def test_results_of_a_skipped_notebook_are_said_to_be_older(made, folder):
    kept = json.loads((folder / "run.json").read_text())
    kept["notebooks"]["01_first"]["status"] = "skipped"
    (folder / "run.json").write_text(json.dumps(kept))
    report.write(folder, made)
    assert "01 was skipped by the last run: its figures" in page_of(folder).text


def test_damaged_files_are_named(made, folder):
    (folder / "run.json").write_text('{"runs": {}}')
    (folder / "run.csv").write_text("notebook,minutes\n01_first,long\n")
    (folder / "claims.json").write_text("[{}]")
    (folder / "notebooks" / "01_first.ipynb").write_text("{")
    (folder / "01_map.png").write_bytes(b"no picture")
    (folder / "01_findings.csv").write_text('a,b\n"1')
    (folder / "01_empty.csv").write_text("")
    (folder / "01_map.csv").write_text("a,b\n")
    report.write(folder, made)
    page = page_of(folder)
    for said in (
        "run.json is damaged",
        "run.csv could not be read",
        "claims.json could not be read",
        "01_first.ipynb could not be read",
        "01_map.png is damaged",
        "01_findings.csv could not be read",
        "01_empty.csv could not be read",
        "01_map.csv: 0 rows",
    ):
        assert said in page.text
    check_links(folder, page)


def test_files_that_no_cell_names(made, folder):
    (folder / "01_old.csv").write_text("a\n1\n")
    (folder / "01_explorer.html").write_text("a page")
    report.write(folder, made)
    page = page_of(folder)
    text = re.sub(r"\s+", " ", page.text)
    assert "no cell of 01_first.ipynb names 01_old" in text
    assert "01_old.csv: 1 row " in text
    assert "01_explorer.html" in {attributes["href"] for attributes in page.of("a")}


def test_a_folder_keeps_what_earlier_runs_made(made, tmp_path):
    root = Path(shutil.copytree(made, tmp_path / "copy"))
    shutil.rmtree(root / ".git")
    output = ["-p", "output_dir", str(root / "figures" / "laptop")]
    write_notebook(root, "02_second", "# 02 · Second", "1 + 1")
    assert runner.main(["--only", "02", *output], root) == 0
    kept = json.loads((root / "figures" / "laptop" / "run.json").read_text())
    statuses = {name: record["status"] for name, record in kept["notebooks"].items()}
    assert statuses == {"01_first": "done", "02_second": "done", "03_third": "not run"}
    assert len(kept["runs"]) == 2
    text = re.sub(r"\s+", " ", page_of(root / "figures" / "laptop").text)
    assert text.count("Run of ") == 2
    assert "no git: the folder is no checkout" in text
    assert git(made, "rev-parse", "HEAD") in text  # of the first run

    assert runner.main(output, root) == 0
    kept = json.loads((root / "figures" / "laptop" / "run.json").read_text())
    assert len(kept["runs"]) == 1  # nothing is left of the others


def test_results_in_a_folder_of_their_own(made, tmp_path):
    root = Path(shutil.copytree(made, tmp_path / "copy"))
    for path in (root / "notebooks").glob("*.ipynb"):
        path.unlink()
    shutil.rmtree(root / "figures")
    own = root / "figures" / "my data"
    parameters = PARAMETERS.replace("figures/laptop", str(own))
    save = SAVING.replace("NAMES", '["08_map"]')
    write_notebook(root, "08_mine", "# 08 · Mine", save, parameters=parameters)
    assert runner.main([], root) == 0
    page = page_of(root / "figures" / "laptop")
    assert not page.of("img")
    assert "results in my data" in re.sub(r"\s+", " ", page.text)
    assert "../my%20data/report.html" in {attributes["href"] for attributes in page.of("a")}
    check_links(root / "figures" / "laptop", page)
    page = page_of(own)
    assert [image["alt"] for image in page.of("img")] == ["map"]
    assert "../laptop/notebooks/08_mine.ipynb" in {link["href"] for link in page.of("a")}
    assert "no results" not in page.text
    check_links(own, page)


@pytest.mark.parametrize(
    ("value", "whole", "text"),
    [
        (0.12345, False, "0.12"), (-0.0044, False, "-0.0044"), (0.0, False, "0.00"),
        (8818.41, False, "8818"), (7.893e11, False, "7.89e11"), (3.1e-6, False, "3.1e-6"),
        (512.0, True, "512"), (float("nan"), False, "–"), (float("inf"), False, "inf"),
    ],
)  # fmt: skip
def test_numbers_are_rounded_sensibly(value, whole, text):
    assert report._rounded(value, whole) == text


def test_git_state(tmp_path):
    assert provenance.git_state(tmp_path) is None
    git(tmp_path, "init", "--quiet")
    assert "error" in provenance.git_state(tmp_path)  # nothing is committed yet
    (tmp_path / "a file").write_text("1")
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "result.csv").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "all")
    clean = {"revision": git(tmp_path, "rev-parse", "HEAD"), "changed": []}
    assert provenance.git_state(tmp_path) == clean
    (tmp_path / "figures" / "result.csv").write_text("2")  # a result says nothing of the code
    assert provenance.git_state(tmp_path) == clean
    (tmp_path / "a file").rename(tmp_path / "ä file")
    assert set(provenance.git_state(tmp_path)["changed"]) == {"a file", "ä file"}
    within = tmp_path / "unpacked"
    within.mkdir()
    assert provenance.git_state(within) is None  # the repository above is another one


def test_sources_are_told_without_loading(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    parameters = {"model": "smollm2-135m-instruct", "dtype": "float32", "seed": 0}
    parameters |= {"train": "data/demo.jsonl", "n_train": None, "queries": "no/such-data-set"}
    parameters |= {"condition_pools": {"crossed": [8, 4]}}
    found = provenance.sources(parameters)
    assert found["model"]["sha256"] and found["training pool"]["source"] == "demo.jsonl"
    assert "no/such-data-set" in found["queries"]["unknown"]
    assert found["suite crossed, query"]["limit"] == 4
    assert provenance.sources({"seed": 0, "output_dir": "x"}) == {}

    run = provenance.of_run("a command", "laptop", tmp_path)
    record = {"status": "done", "sources": found, "parameters": parameters}
    provenance.update(tmp_path, run, {"01_first": record})
    text = re.sub(r"\s+", " ", page_of_written(tmp_path).text)
    assert f"sha256 {found['model']['sha256']}" in text
    assert "unknown" in text and "no/such-data-set" in text
    assert "no git" in text


def page_of_written(folder: Path) -> Page:
    report.write(folder, paths.ROOT)
    return page_of(folder)


def test_the_committed_results_make_a_page(tmp_path):
    source = paths.ROOT / "figures" / "laptop"
    for pattern in ("*.png", "*.csv", "*.json"):
        for file in source.glob(pattern):
            if file.name not in ("run.csv", "run.json"):
                shutil.copy(file, tmp_path)
    page = page_of_written(tmp_path)
    assert len(page.of("img")) == len(list(tmp_path.glob("*.png")))
    assert all(re.match(r"\d+ .*: \w+", image["alt"]) for image in page.of("img"))
    assert "no cell of" not in page.text
    assert (tmp_path / "report.html").stat().st_size < 1e7  # to be sent by mail
    check_links(tmp_path, page)
