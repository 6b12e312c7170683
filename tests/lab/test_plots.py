"""plots.py and bench_figure.py: every function returns a titled, labelled, white figure and leaves
its arguments alone.
"""

import copy
import inspect
import io
from functools import partial

import pytest
import torch
from PIL import Image

pytest.importorskip(
    "matplotlib", reason="matplotlib is not installed: pip install -e '.[tutorial]'"
)
from matplotlib.colors import to_hex  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

from meteor_mini.lab import bench_figure, plots  # noqa: E402
from meteor_mini.lab.survivors import COLORS  # noqa: E402

NAMES = ["clip", "convnext", "eva", "pix2struct"]
G = torch.Generator().manual_seed(0)
IMAGE = torch.rand(3, 96, 96, generator=G)
MASKS = {name: torch.rand(12, 12, generator=G) < 0.4 for name in NAMES}
HEAT = {name: torch.rand(12, 12, generator=G) for name in NAMES}
HEAT["eva"][:6] = torch.nan
COUNTS = {"a": dict(zip(NAMES, [40, 30, 20, 10])), "b": dict(zip(NAMES, [4, 3, 0, 1]))}
SIX = [0.1, 0.2, 0.4, 0.3, 0.5, 0.6]
RANKS = {name: torch.tensor([40, 42, 39]) for name in NAMES}
VAV = {1: torch.rand(8, generator=G), 3: torch.rand(8, generator=G)}
POINTS = [(10.0, {"all": 50.0, "General": 40.0}), (20.0, {"all": 70.0, "General": 60.0})]

PARTS = {
    f"{part}, ms": 10.0
    for part in ("encoders", "stage 1", "projectors", "stage 2", "stage 3", "LLM")
}
BENCH = {
    "whole": [
        {
            "visual tokens": n,
            "batch": b,
            "contender": c,
            "prefill, s": n / 500,
            "least": n / 600,
            "most": n / 400,
            "speed-up": 2.0,
            "FLOPs ratio": 2.5,
        }
        for n in (1024, 2304)
        for b in (1, 4)
        for c in ("unpruned", "METEOR")
    ],
    "split": [{"visual tokens": 1024, "contender": c} | PARTS for c in ("unpruned", "METEOR")],
    "peers": [
        {"visual tokens": n, "method": m, "speed-up": 1.5}
        for n in (1024, 2304)
        for m in ("unpruned", "stage 3", "FastV, SDPA")
    ],
    "growth": [
        {"N": 1024, "by sums, ms": 3.0, "by pairs, ms": 9.0},
        {"N": 4096, "by sums, ms": 12.0},
    ],
    "overhead": [
        {
            "tokens": n,
            "stage 1, similarity, % of a block": 1.0,
            "stage 3, a selection, % of a layer": 9.0,
        }
        for n in (256, 576)
    ],
}
CALLS = {
    "patch_maps": partial(
        plots.patch_maps, IMAGE, {"one": MASKS, "two": {"clip": MASKS["clip"]}}, "A finding"
    ),
    "heat_maps": partial(
        plots.heat_maps,
        IMAGE,
        {"": HEAT, "x": {"clip": HEAT["clip"]}},
        "A finding",
        "cosine",
        mark=(2, 3),
    ),
    "encoder_bars": partial(plots.encoder_bars, COUNTS, "A finding", "tokens", "group"),
    "bars": partial(
        plots.bars,
        {"a": {"q": (9, 8, 10), "r": (-1, -1, -1)}, "b": {"q": None, "r": (2, 1, 3)}},
        "A finding",
        "percent",
        {"q": "#000000"},
    ),
    "cost_curve": partial(
        plots.cost_curve,
        [1, 2, 3],
        [1e9, 2e9, 3e9],
        [1e8, 4e8, 9e8],
        "A finding",
    ),
    "time_bars": partial(
        plots.time_bars, {"x": {"a": 3.0, "b": 4.0}, "y": {"a": 1.0, "b": 4.0}}, "A finding"
    ),
    "kv_bars": partial(plots.kv_bars, {"x": [96, 48], "y": [24, 12]}, "A finding"),
    "rank_spread": partial(plots.rank_spread, RANKS, dict.fromkeys(NAMES, 40.0)),
    "criteria_by_depth": partial(
        plots.criteria_by_depth,
        {"eva": {"x": SIX, "y": SIX[::-1]}},
        "A finding",
        "percent",
        chance=0.5,
    ),
    "vav_bars": partial(plots.vav_bars, VAV, 5, "A finding"),
    "lambda_curve": partial(
        plots.lambda_curve, [0.0, 1, 2], [10.0, 20, 30], (1.0, 20.0), "A finding"
    ),
    "accuracy_curves": partial(
        plots.accuracy_curves,
        {"METEOR": POINTS, "other": POINTS},
        "A finding",
        {"all": 80.0, "General": 70.0},
    ),
    "benchmark_figure": partial(bench_figure.benchmark_figure, BENCH),
}


def test_every_figure_is_tested():
    figures = set()
    for module in (plots, bench_figure):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_"):
                assert inspect.getdoc(function), name
                figures |= {name}
    assert figures == {*CALLS, "canvas", "encoder_color"}


@pytest.mark.parametrize("name", CALLS)
def test_has_a_title_and_labels_and_shows_itself(name):
    figure = CALLS[name]()
    assert isinstance(figure, Figure)
    assert figure.get_suptitle().strip()
    drawn = [ax for ax in figure.axes if ax.axison and ax.has_data()]
    assert drawn and any(ax.get_xlabel() for ax in drawn) and any(ax.get_ylabel() for ax in drawn)
    assert to_hex(figure.get_facecolor()) == "#ffffff"
    picture = Image.open(io.BytesIO(figure._repr_png_())).convert("RGB")
    assert picture.getpixel((0, 0)) == (255, 255, 255) and 300 <= picture.width <= 1000
    rim = picture.crop((0, 0, picture.width, 2)).getextrema()
    assert rim == ((255, 255),) * 3  # nothing is cut off at the top


def test_arguments_stay_as_they_are():
    before = copy.deepcopy((HEAT, MASKS, COUNTS, IMAGE))
    for name in ("heat_maps", "patch_maps", "encoder_bars"):
        CALLS[name]()
    heat, masks, counts, image = before
    for name in NAMES:
        assert torch.equal(heat[name].nan_to_num(), HEAT[name].nan_to_num())
        assert torch.equal(masks[name], MASKS[name])
    assert counts == COUNTS and torch.equal(image, IMAGE)


def test_an_encoder_has_one_colour_whichever_are_drawn():
    for i, name in enumerate(NAMES):
        assert plots.encoder_color(name, NAMES) == plots.encoder_color(name, [name]) == COLORS[i]
    assert plots.encoder_color("mine", ["other", "mine"]) == COLORS[1]
    assert len({plots.encoder_color(f"{i}", [f"{i}" for i in range(9)]) for i in range(9)}) == len(
        COLORS
    )


def test_computed_titles_say_what_was_given():
    ranks = {name: torch.tensor([10, 10]) for name in NAMES}
    figure = plots.rank_spread(ranks, dict.fromkeys(NAMES, 10.0))
    title = figure.get_suptitle().replace("\n", " ")
    assert "varies by 0 %" in title and "by 0 to 0 %" in title


def test_patch_maps_take_a_picture_for_each_row():
    rows = {"first": torch.zeros(3, 8, 8), "second": torch.ones(3, 8, 8)}
    kept = {row: {"clip": torch.ones(2, 2, dtype=torch.bool)} for row in rows}
    figure = plots.patch_maps(rows, kept, "A finding")
    centre = [ax.images[0].get_array()[40, 40].tolist() for ax in figure.axes]
    assert centre == [[0, 0, 0], [255, 255, 255]]
