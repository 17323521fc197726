"""The report: made by real runs of tiny notebooks, and from folders where something is missing."""

import json
import shutil
from pathlib import Path
from urllib.parse import unquote

import bs4
import nbformat
import pytest

from icprobe.artifact import claims, report, runner
from icprobe.data import paths

PARAMETERS = 'profile: "str" = "laptop"  # which\noutput_dir: "str" = "{}"  # results'
TEXT = """# 01 · Probing

## 2 A map

It *helps*, with $G_{ij}$ <b>nats</b> ([here](elsewhere.ipynb), [there](https://example.org)).
"""
OUTPUTS = """
import matplotlib.pyplot as plt, pandas as pd
from pathlib import Path
Path(output_dir, "01_map.csv").write_text("a")
plt.plot([1, 2])
print("<script>alert(1)</script>")
display(pd.DataFrame({"method": ["<img src=x>"], "estimate": [0.125]}))
"""


def write_notebook(root: Path, name: str, output: Path, *cells: str) -> None:
    """Write a notebook; cells that begin with # are markdown."""
    made = [nbformat.v4.new_code_cell(PARAMETERS.format(output), metadata={"tags": ["parameters"]})]
    for cell in cells:
        text = cell.startswith("#")
        made.append((nbformat.v4.new_markdown_cell if text else nbformat.v4.new_code_cell)(cell))
    nbformat.write(nbformat.v4.new_notebook(cells=made), root / "notebooks" / f"{name}.ipynb")


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Return the results of a run whose third notebook fails; the second has another output_dir."""
    root = tmp_path_factory.mktemp("report")
    folder, own = root / "figures" / "laptop", root / "figures" / "my data"
    (root / "notebooks" / "profiles").mkdir(parents=True)
    (root / "notebooks" / "profiles" / "laptop.yaml").write_text("profile: laptop\n")
    folder.mkdir(parents=True)
    own.mkdir()
    write_notebook(root, "01_first", folder, TEXT, OUTPUTS)
    saving = "from pathlib import Path\nPath(output_dir, '02_map.csv').write_text('a')"
    write_notebook(root, "02_mine", own, "# 02 · Mine", saving)
    write_notebook(root, "03_third", folder, "# 03 · Third", "print('so far')", "1 / 0")
    write_notebook(root, "04_fourth", folder, "# 04 · Fourth")
    claims.write(folder)
    assert runner.main([], root) == 1
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """Copy that run's results, to take things away from."""
    return Path(shutil.copytree(made, tmp_path / "results"))


def page_of(folder: Path) -> bs4.BeautifulSoup:
    """Return the page, whose links lead somewhere and which needs nothing else to be read."""
    page = bs4.BeautifulSoup((folder / "report.html").read_text("utf-8"), "html.parser")
    for link in (tag["href"] for tag in page.find_all("a")):
        if link.startswith("#"):
            assert page.find(id=link[1:]), link
        elif not link.startswith("https://"):
            assert (folder / unquote(link)).exists(), link
    assert not page.find_all(["script", "link", "iframe"])
    assert all(image["src"].startswith("data:") for image in page.find_all("img"))
    style = page.find("style").text
    assert "url(" not in style and "@import" not in style
    return page


def rows(page: bs4.BeautifulSoup) -> dict[str, list[str]]:
    """Return the cells of the table of notebooks, by notebook."""
    table = page.find(id="run").find_next("table")
    return {
        row.th.text: [one.get_text(" ", strip=True) for one in row("td")] for row in table("tr")[1:]
    }


def test_texts_figures_and_tables_are_in_it_and_code_is_not(made):
    page = page_of(made)
    section = page.find(id="01_first")
    assert [head.text for head in section(["h2", "h3"])] == ["01 · Probing", "2 A map"]
    assert "It helps, with $G_{ij}$ <b>nats</b> (here, there)." in section.text
    assert [tag["href"] for tag in section("a")] == ["https://example.org"]
    assert "<script>alert(1)</script>" in section.text and "<img src=x>" in section.table.text
    assert [image["alt"] for image in section("img")] == ["2 A map"]
    assert "matplotlib" not in section.text
    assert page.find(id="claims").find_next("table").text.count("not run") == len(claims.CLAIMS)
    assert "command: ./run_all.sh" in page.text and "python: " in page.text


def test_a_run_that_failed_half_way(made):
    page = page_of(made)
    found = rows(page)
    assert found["01_first"][0] == "done" and all(float(x) > 0 for x in found["01_first"][1:3])
    assert found["03_third"][0].startswith("failed: ZeroDivisionError")
    assert found["03_third"][4] == "half-executed"
    assert "so far" in page.find(id="03_third").text
    assert found["04_fourth"] == ["not run", "–", "–", "–", "none", "none"]


def test_results_in_another_folder_have_a_page_there(made):
    page = page_of(made)
    assert page.find("a", string="my data")["href"] == "../my%20data/report.html"
    there = page_of(made.parent / "my data")
    assert there.find("a", string="whole")["href"] == "../laptop/notebooks/02_mine.ipynb"
    assert there.find(id="02_mine").h2.text == "02 · Mine" and there.find("a", string="02_map.csv")


def test_a_skipped_notebook_is_named_with_its_reason(folder):
    kept = json.loads((folder / "run.json").read_text())
    kept["notebooks"]["01_first"] |= {"status": "skipped", "error": "no <such> repository"}
    (folder / "run.json").write_text(json.dumps(kept))
    report.write(folder)
    assert rows(page_of(folder))["01_first"][0] == "skipped: no <such> repository"


def test_what_is_damaged_or_missing_is_said(folder, capsys):
    for name in ("run.json", "claims.json", "notebooks/01_first.ipynb"):
        (folder / name).write_text("{")
        assert report.main([str(folder)]) == 0
        assert Path(name).name in page_of(folder).find(class_="problems").text
    shutil.rmtree(folder / "notebooks")
    for name in ("run.json", "claims.json"):
        (folder / name).unlink()
    report.write(folder)
    page = page_of(folder)
    assert rows(page) == {"01": ["not recorded", "–", "–", "–", "none", "1 files 01_map.csv"]}
    assert page.find("a", string="01_map.csv") and "no record of a run" in page.text
    assert report.main([str(folder / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_the_committed_results_make_a_page(tmp_path):
    for file in (paths.REFERENCE_FIGURES / "laptop").glob("[c0]*.*"):
        shutil.copy(file, tmp_path)
    report.write(tmp_path)
    page = page_of(tmp_path)
    assert {"01", "03", "05"} <= set(rows(page)) and "reproduced" in page.text
    assert "(runs: " in page.text  # a ratio of seconds has a range, no interval
