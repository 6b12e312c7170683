"""plots.py: a figure shows what its data say. Run: pytest tests/test_plots.py"""

import numpy as np
import pandas
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb

from meteor_mini import plots

KEPT = {"clip": torch.eye(4, dtype=torch.bool), "pix2struct": torch.arange(10).view(2, 5) < 3}


def test_kept_patches_are_clear_and_dropped_ones_grey_in_the_pixels():
    image = torch.tensor([0.9, 0.2, 0.1])[:, None, None].expand(3, 40, 40)
    figure = plots.survivor_figure(image, {"question": "what?"}, {"stage1": KEPT, "stage3": KEPT})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[::-1]  # row 0 at the bottom, as in axes
    cells = figure.axes[1:]  # after the picture
    assert len(cells) == 4
    for ax, alive in zip(cells, [*KEPT.values()] * 2):
        for row, column in np.ndindex(*alive.shape):
            x, y = ax.transData.transform((column + 0.5, row + 0.5)).astype(int)
            red, green, blue, _ = pixels[y, x].tolist()
            if alive[row, column]:
                assert abs(red - 0.9 * 255) <= 1 and abs(blue - 0.1 * 255) <= 1
            else:
                assert red == green == blue
        (frames,) = ax.collections
        assert len(frames.get_paths()) == alive.sum()
        assert to_rgb(frames.get_edgecolor()[0]) == to_rgb(
            plots.PALETTE[0 if alive is KEPT["clip"] else 1]
        )


def test_captions_carry_the_counts_and_long_texts_fit():
    texts = {"question": "word " * 99, "answer": ""}
    figure = plots.survivor_figure(torch.rand(3, 9, 9), texts, {"stage1": KEPT})
    lines = [text.get_text() for text in figure.texts]
    assert {"question", "answer", "Stage 1, encoding: 7 tokens", "clip: 4 of 16"} < set(lines)
    assert " ".join(line for line in lines if line.startswith("word")).count("word") == 99
    FigureCanvasAgg(figure).draw()
    for text in figure.texts:
        box = text.get_window_extent()
        assert figure.bbox.y0 < box.y0 and box.y1 < figure.bbox.y1


def test_bars_stand_in_their_groups_and_have_the_heights_given():
    groups = {"a": {"x": 1.0, "y": (2.0, 1.5, 3.0)}, "b": {"y": 4.0}}
    figure = plots.bar_figure(groups, "group", "tokens", "A title")
    (ax,) = figure.axes
    bars = sorted((bar.get_center()[0], bar.get_height()) for bar in ax.patches)
    assert np.allclose(bars, [(-0.2, 1), (0.2, 2), (1, 4)])
    assert figure.get_suptitle() == "A title" and ax.get_ylabel() == "tokens"
    (interval,) = ax.collections
    assert interval.get_segments()[0][:, 1].tolist() == [1.5, 3.0]


def test_a_table_has_a_dot_with_its_interval_for_each_seed():
    rows = [
        {"method": method, "seed": seed, "family": family, "tokens": 48.0}
        | {"accuracy": 90.0 + seed, "low": 88.0 + seed, "high": 91.0 + seed}
        for method, seed in [("METEOR", 0), ("random", 0), ("random", 1)]
        for family in ("all", "General", "count")
    ]
    figure = plots.table_figure(pandas.DataFrame(rows), "Table 1")
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["all", "General"]
    for ax in figure.axes:
        dots = [x for line in ax.lines for x in line.get_xdata()]
        assert dots == [90, 90, 91]
        ends = [s[:, 0].tolist() for lines in ax.collections for s in lines.get_segments()]
        assert ends == [[88, 91], [88, 91], [89, 92]]
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels == ["METEOR (48 tokens)", "random (48 tokens)"]


def test_more_lines_than_colors_look_different():
    lines = {f"method {number}": ([0, 1], [number, number]) for number in range(9)}
    (ax,) = plots.line_figure({"": lines}, "x", "y").axes
    looks = {(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.lines}
    assert len(looks) == 9


def test_a_finding_is_lines_by_layer_or_bars():
    frame = pandas.DataFrame(
        [
            {"encoder": encoder, "layer": layer, "kind": np.nan, "criterion": criterion}
            | {"value": layer + 1.0, "low": layer + 0.5, "high": layer + 2.0}
            for encoder in ("clip", "eva")
            for criterion in ("similarity", "attention")
            for layer in range(3)
        ]
    )
    by_layer = plots.finding_figure(frame, "percent")
    assert [ax.get_title(loc="left") for ax in by_layer.axes] == ["clip", "eva"]
    for ax in by_layer.axes:
        assert [line.get_label() for line in ax.lines] == ["similarity", "attention"]
        assert all(line.get_ydata().tolist() == [1, 2, 3] for line in ax.lines)
        assert len(ax.collections) == 2  # bands
    last = frame[frame.layer == 2].drop(columns=["layer", "low", "high"])
    (ax,) = plots.finding_figure(last).axes
    assert [bar.get_height() for bar in ax.patches] == [3] * 4
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["clip", "eva"]
    of_kind = last[last["criterion"] == "attention"].assign(kind="General")
    (ax,) = plots.finding_figure(of_kind).axes
    assert [bar.get_height() for bar in ax.patches] == [3] * 2
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["General"]
