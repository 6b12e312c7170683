"""The versions of the libraries that pyproject.toml allows, and what is said of them elsewhere."""

import re
from pathlib import Path

import stage3_decode

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()


def test_the_versions_that_stage_3_names_are_the_bounds_of_pyproject():
    low, major, minor = re.search(r'"transformers>=([\d.]+),<(\d+)\.(\d+)"', PYPROJECT).groups()
    assert stage3_decode.TESTED_VERSIONS == f"{low} to {major}.{int(minor) - 1}"


def test_every_library_that_we_reach_into_is_bounded_on_both_sides_with_a_reason():
    for library in ("torch", "transformers", "open_clip_torch", "timm"):
        assert re.search(rf'^    "{library}>=[\d.]+,<[\d.]+",  # \S+', PYPROJECT, re.M), (
            f"{library} in pyproject.toml"
        )
