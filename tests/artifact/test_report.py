"""The report: made by real runs of tiny notebooks, and from folders where something is missing."""

import shutil
from pathlib import Path
from urllib.parse import unquote

import bs4
import nbformat
import pytest

from icprobe.artifact import claims, provenance, report, runner
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
    metadata = {"kernelspec": {"name": "python3", "language": "python", "display_name": "Python"}}
    made = nbformat.v4.new_notebook(cells=made, metadata=metadata)
    nbformat.write(made, root / "notebooks" / f"{name}.ipynb")


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
    claims.write(folder)
    assert runner.main([], root) == 1
    return folder


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


def test_results_in_another_folder_are_found_there(made):
    page = page_of(made)
    assert page.find(id="02_mine").h2.text == "02 · Mine"
    assert page.find("a", string="02_map.csv")["href"] == "../my%20data/02_map.csv"
    assert f"1 files in {made.parent / 'my data'}" in rows(page)["02_mine"][5]


def test_without_a_run_the_claims_are_shown_and_what_is_damaged_is_named(made, tmp_path, capsys):
    shutil.copy(paths.REFERENCE_FIGURES / "laptop" / "claims.json", tmp_path)
    assert report.main([str(tmp_path)]) == 0
    page = page_of(tmp_path)
    assert "no record of a run" in page.text and "reproduced" in page.text
    assert "(runs: " in page.text  # a ratio of seconds has a range, no interval
    for damaged in ("{", "[]", "{}", '{"runs": {}, "notebooks": {"01_mine": {"run": "never"}}}'):
        (tmp_path / "run.json").write_text(damaged)
        assert report.main([str(tmp_path)]) == 2
    provenance.update(tmp_path, {"started": "now"}, {})
    assert provenance.read(tmp_path) == {"runs": {}, "notebooks": {}}
    (tmp_path / "run.json").write_text("{")
    assert report.main([str(tmp_path)]) == 2
    assert report.main([str(tmp_path / "nowhere")]) == 2
    err = capsys.readouterr().err
    assert "run.json is damaged" in err and "nowhere" in err
