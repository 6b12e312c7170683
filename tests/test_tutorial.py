"""tutorial.ipynb: its links lead somewhere, and it runs offline and gives its stored outputs again.

Run: pytest -m slow tests/test_tutorial.py (minutes). nbval compares the text of all cells but those
tagged "nbval-ignore-output", which hold times or numbers that differ from machine to machine.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "tutorial.ipynb"


def test_links_lead_somewhere():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    prose = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", prose) if not link.startswith("http")]
    assert links
    for link in links:
        found = f'<a id="{link[1:]}">' in prose if link[0] == "#" else (ROOT / link).exists()
        assert found, link


@pytest.mark.slow
def test_runs_offline_and_gives_its_stored_outputs_again():
    pytest.importorskip("nbval", reason="nbval is not installed: pip install -e '.[tutorial]'")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-n0",
        "--nbval",
        "--nbval-current-env",
        NOTEBOOK,
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout
