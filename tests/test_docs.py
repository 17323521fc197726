"""What README.md and docs/ name is there: links, modules, parameters, notebooks, packages."""

import importlib
import re
from importlib.metadata import metadata

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import icprobe
from icprobe import data
from icprobe.artifact import settings
from icprobe.data import paths

PAGES = [
    *(paths.ROOT / name for name in ("README.md", "data/README.md")),
    *sorted((paths.ROOT / "docs").glob("*.md")),
]
MODULES = {file.stem for file in (paths.ROOT / "lib" / "icprobe").glob("[a-z]*")}
NOTEBOOKS = sorted(paths.NOTEBOOKS.glob("[0-9]*.ipynb"))

each_page = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(paths.ROOT))
)


def code(text: str) -> str:
    """Return what stands in code blocks and spans of a page, a line each."""
    found = re.findall(r"```\w*\n(.*?)```|`([^`]+)`", text, re.DOTALL)
    return "\n".join(block or span for block, span in found)


def anchors(text: str) -> set[str]:
    """Return the anchors that GitHub gives a page's headings."""
    without_code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    titles = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@each_page
def test_links_lead_somewhere(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)\s]+)\)", text)
    for target in targets:
        if re.match(r"https?:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (page.parent / file).resolve() if file else page
        assert there.exists(), target
        if anchor:
            assert anchor in anchors(there.read_text(encoding="utf-8")), target


def test_the_readme_leads_to_every_page_and_notebook():
    readme = (paths.ROOT / "README.md").read_text(encoding="utf-8")
    for page in [*(paths.ROOT / "docs").glob("*.md"), *NOTEBOOKS]:
        assert f"]({page.relative_to(paths.ROOT)})" in readme


@each_page
def test_modules_and_their_parts_are_there(page):
    text = code(page.read_text(encoding="utf-8"))
    named = re.findall(r"(?:lib/icprobe/|\bicprobe\.)(\w+)", text)
    for names in re.findall(r"from icprobe import ([\w, ]+)", text):
        named += re.split(r", *", names)
    assert set(named) - {""} <= MODULES | set(dir(icprobe))
    for module, part in re.findall(r"(?<![\w./-])(\w+)\.([A-Za-z_]\w*)", text):
        if module in MODULES and part not in ("py", "ipynb"):
            assert hasattr(importlib.import_module(f"icprobe.{module}"), part), f"{module}.{part}"


@each_page
def test_commands_name_parameters_profiles_and_notebooks_that_are_there(page):
    text = code(page.read_text(encoding="utf-8")).replace("\\\n", " ")
    declared = {name for one in settings.NOTEBOOKS.values() for name in one.model_fields}
    assert set(re.findall(r"(?<=-p )[a-z]\w*", text)) <= declared
    profiles = {file.stem for file in (paths.NOTEBOOKS / "profiles").glob("*.yaml")}
    commands = {"test", "publish", "lab", "python"}
    assert set(re.findall(r"(?<=run_all\.sh )[a-z]\w*", text)) <= profiles | commands
    numbers = {notebook.name[:2] for notebook in NOTEBOOKS}
    asked = {
        number for listed in re.findall(r"--only ([\d,]+)", text) for number in listed.split(",")
    }
    assert asked <= numbers


def test_the_suite_of_the_page_is_one(tmp_path, monkeypatch):
    page = (paths.ROOT / "docs" / "add_a_suite.md").read_text(encoding="utf-8")
    (suite,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "plausible.yaml").write_text(suite)
    monkeypatch.setattr(paths, "SUITES", tmp_path)
    assert data.suites() == ["plausible"]
    found = data.read_suite("plausible")
    assert set(found.tasks) == set(yaml.safe_load(suite)["tasks"])


def test_every_locked_package_is_for_every_python_that_is_allowed():
    # the README asks for Python 3.11, and distributions ship its early patch releases
    locked = (paths.ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    locked += (paths.ROOT / "requirements-no-deps.txt").read_text(encoding="utf-8").splitlines()
    for line in locked:
        if line and not line.lstrip().startswith("#"):
            name = Requirement(line).name
            needs = metadata(name).get("Requires-Python") or ""
            assert "3.11.0" in SpecifierSet(needs), f"{name} needs Python {needs}"
