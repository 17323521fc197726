"""Every number in the README's generated parts is the committed result's."""

import importlib.util
import re

import pandas as pd
import pytest

from icprobe.data import paths

spec = importlib.util.spec_from_file_location("generate", paths.ROOT / "docs" / "generate.py")
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)


def test_the_readme_says_what_the_results_say():
    text = readme.README.read_text()
    assert len(readme.BLOCK.findall(text)) == 15
    assert text == readme.render(text), "run: ./run_all.sh python docs/generate.py"
    changed = re.sub(r"\| (-?\d+\.\d+) \|", "| 99.99 |", text, count=1)
    assert changed != text and readme.render(changed) == text


def test_the_headline_compares_a_whole_pool_with_a_whole_pool():
    said = []
    for notebook, quantity in (
        ("03", "ICP score against product, whole pool, per example"),
        ("07", "ICP score against mean influence"),
        ("03", "ICP score against product, same task"),
    ):
        found = pd.read_csv(readme.FIGURES / "laptop" / f"{notebook}_findings.csv")
        row = found[(found["quantity"] == quantity) & (found["unit"] == "Spearman")].iloc[0]
        said.append(re.escape(f"{row.estimate:.2f} ({row.low:.2f} to {row.high:.2f})"))
    text = " ".join(readme.README.read_text().split())
    here, published, within = said
    assert re.search(
        rf"the whole pool gives {here} here \(suite `grid`\), and {published} in the authors' "
        rf"files; within one task \(C1\), {within}",
        text,
    )


def test_unknown_blocks_are_an_error():
    with pytest.raises(AttributeError, match="nonsense"):
        readme.render("<!-- nonsense: what -->\n<!-- end -->")


@pytest.mark.parametrize("equal", [{"quantity": "nonsense"}, {"unit": "Spearman"}])
def test_a_cell_is_of_one_row(equal):
    with pytest.raises(KeyError, match=r"07_findings\.csv"):
        readme.cell("07_findings.csv", **equal)
