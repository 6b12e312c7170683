"""README and docs: their python snippets run, each in a fresh namespace; their links lead
somewhere; the names that the README gives exist.
"""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SNIPPETS = [
    (page.name, snippet)
    for page in PAGES
    for snippet in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.S)
]


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number, capsys):
    page, snippet = SNIPPETS[number]
    torch.manual_seed(0)
    exec(compile(snippet, f"{page}, snippet {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\(([^)]+)\)", page.read_text())
    here = [link for link in links if not link.startswith(("http", "#"))]
    assert all((page.parent / link).exists() for link in here), here


def test_every_page_is_linked_from_the_readme():
    text = README.read_text()
    assert all(f"(docs/{page.name})" in text for page in PAGES[1:])


def test_names_in_the_change_table_exist():
    rows = re.findall(r"`([\w/.]+\.py)`: ([^|;]+)", README.read_text())
    assert rows
    for file, names in rows:
        source = (ROOT / file).read_text()
        for name in re.findall(r"`(\w[\w.]*)", names):
            assert re.search(rf"\b{name.split('.')[-1]}\b", source), f"{name} is not in {file}"
