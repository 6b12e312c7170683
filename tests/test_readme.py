"""The README's python snippets run, each in a fresh namespace, and its links lead somewhere."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", TEXT, flags=re.S)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippets_run(number, capsys):
    torch.manual_seed(0)
    exec(compile(SNIPPETS[number], f"README snippet {number}", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_links_lead_to_files():
    links = [link for link in re.findall(r"\]\(([^)]+)\)", TEXT) if not link.startswith("http")]
    assert links and all((ROOT / link).exists() for link in links), links


def test_names_in_the_change_table_exist():
    for file, names in re.findall(r"\| `([\w/.]+\.py)`: (.*?) \|", TEXT):
        source = (ROOT / file).read_text()
        for name in re.findall(r"`(\w[\w.]*)", names):
            assert re.search(rf"\b{name.split('.')[-1]}\b", source), f"{name} is not in {file}"
