"""The versions of the libraries that pyproject.toml allows, and what is said of them elsewhere."""

import re
from pathlib import Path

import pytest

import stage1_encode
import stage3_decode

PYPROJECT = (Path(__file__).parents[1] / "pyproject.toml").read_text()


@pytest.mark.parametrize("stage", [stage1_encode, stage3_decode])
def test_the_versions_of_transformers_in_a_stages_head_are_the_bounds_of_pyproject(stage):
    low, major, minor = re.search(r'"transformers>=([\d.]+),<(\d+)\.(\d+)"', PYPROJECT).groups()
    assert f"transformers {low} to {major}.{int(minor) - 1}." in stage.__doc__


def test_the_versions_in_the_head_of_stage_1_are_the_bounds_of_pyproject():
    head = " ".join(stage1_encode.__doc__.split())
    low, newest = re.search(r'"open_clip_torch>=([\d.]+),<3\.(\d+)"', PYPROJECT).groups()
    assert f"open_clip {low} to 3.{int(newest) - 1}," in head
    low, newest = re.search(r'"timm>=([\d.]+),<1\.0\.(\d+)"', PYPROJECT).groups()
    assert f"timm {low} and {int(newest) - 1}," in head


def test_every_library_that_we_reach_into_is_bounded_on_both_sides_with_a_reason():
    for library in ("torch", "transformers", "open_clip_torch", "timm"):
        assert re.search(rf'^    "{library}>=[\d.]+,<[\d.]+",  # \S+', PYPROJECT, re.M), (
            f"{library} in pyproject.toml"
        )
