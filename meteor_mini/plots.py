"""Every figure of the project, with matplotlib, in one style.

Each function takes plain dictionaries, tensors or a pandas frame and returns a matplotlib `Figure`
that belongs to no pyplot state: `figure.savefig("out.png")` writes it, and a notebook shows it
after `%matplotlib inline`.

Change here: PALETTE (encoders, bars and lines in order), SIZE (of the letters), STAGE_TITLES.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterable
from itertools import cycle
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from torch import Tensor

if TYPE_CHECKING:
    import pandas

# Okabe and Ito's colors, which people with every kind of color vision can tell apart.
PALETTE = ["#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9"]
INK, GREY = "#1a1a1a", "#666666"
MARKERS = "osD^vP"
SIZE = 9  # of the letters, in points
STAGE_TITLES = {
    "stage1": "Stage 1, encoding",
    "stage2": "Stage 2, fusion",
    "stage3": "Stage 3, decoding (last LLM layer)",
}
PANELS = ["all", "General", "OCR & Chart"]  # of questions: a figure's panels, a table's columns

# Of the figure of survivors, in inches: the picture with the texts on the left, the cells on the
# right, a row for each stage.
MARGIN, GAP = 0.2, 0.14
TEXT_WIDTH = 32  # letters in a line under the picture
PICTURE, CELL = 3.1, 1.68  # sides
CELLS_FROM = MARGIN + PICTURE + 2 * GAP  # left edge of the cells
ROW = 0.5 + CELL + GAP  # a row's title, the captions, the cells


def new_figure(width: float, height: float, title: str = "") -> Figure:
    """An empty white figure of so many inches."""
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white", layout="constrained")
    if title:
        lines = textwrap.fill(title, int(12 * width))
        figure.suptitle(lines, fontsize=SIZE + 2, color=INK, x=0.01, ha="left")
    return figure


def add_panels(figure: Figure, names: Iterable[str], xlabel: str, ylabel: str) -> list[Axes]:
    """Axes side by side, named, that share their y axis."""
    names = list(names)
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for ax, name in zip(panels, names):
        ax.set_title(name, fontsize=SIZE, color=INK, loc="left")
        ax.set_xlabel(xlabel, fontsize=SIZE)
        ax.tick_params(labelsize=SIZE, colors=INK)
        ax.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel(textwrap.fill(ylabel, 34), fontsize=SIZE)
    return list(panels)


def add_legend(figure: Figure, ax: Axes) -> None:
    """One legend under all panels, of what is drawn in one of them."""
    handles, labels = ax.get_legend_handles_labels()
    if labels:
        letters = 6 + max(map(len, labels))  # of an entry, its line among them
        columns = max(1, min(len(labels), int(12 * figure.get_figwidth() / letters)))
        options = {"fontsize": SIZE, "frameon": False, "ncols": columns}
        figure.legend(handles, labels, loc="outside lower center", **options)


# ------------------------------------------------------------------------- patches and their tokens


def survivor_figure(
    image: Tensor, texts: dict[str, str], kept: dict[str, dict[str, Tensor]]
) -> Figure:
    """Draw which patches survive each stage: a row for each stage, a column for each encoder.

    A patch is clear and framed while its token is kept, and grey once it is dropped. The picture
    and the texts stand on the left.

    Args:
        image (3, H, W) float: the picture in [0, 1], drawn as a square.
        texts: heading -> text under the picture, as {"question": ..., "METEOR": ...}.
        kept: stage name -> {encoder: (h, w) bool}, as `Answer.kept`.
    """
    texts = {heading: textwrap.wrap(text, TEXT_WIDTH) for heading, text in texts.items()}
    text_height = sum(0.26 + 0.22 * len(lines) for lines in texts.values())
    columns = max(len(maps) for maps in kept.values())
    left_height = PICTURE + 2 * GAP + text_height + 0.34
    width = CELLS_FROM + columns * (CELL + GAP) - GAP + MARGIN
    height = 2 * MARGIN + max(left_height, len(kept) * ROW - GAP)
    figure = Figure(figsize=(width, height), dpi=100, facecolor="white")

    picture = add_square(figure, MARGIN, MARGIN, PICTURE)
    picture.imshow(to_pixels(image), aspect="auto")
    y = MARGIN + PICTURE + GAP
    for heading, lines in texts.items():
        add_text(figure, MARGIN, y, heading, GREY)
        for number, line in enumerate(lines):
            add_text(figure, MARGIN, y + 0.17 + 0.22 * number, line, size=SIZE + 3)
        y += 0.26 + 0.22 * len(lines)
    add_text(figure, MARGIN, y + GAP, "clear: token kept    grey: token dropped", GREY)

    for row, (stage, maps) in enumerate(kept.items()):
        y = MARGIN + row * ROW
        total = sum(int(alive.sum()) for alive in maps.values())
        title = f"{STAGE_TITLES.get(stage, stage)}: {total} tokens"
        add_text(figure, CELLS_FROM, y, title, size=SIZE + 2)
        for column, (color, (name, alive)) in enumerate(zip(cycle(PALETTE), maps.items())):
            x = CELLS_FROM + column * (CELL + GAP)
            add_text(figure, x, y + 0.3, "\N{BLACK SQUARE}", color)
            caption = f"{name}: {int(alive.sum())} of {alive.numel()}"
            add_text(figure, x + 0.16, y + 0.3, caption)
            draw_patches(add_square(figure, x, y + 0.5, CELL), image, alive, color)
    return figure


def add_square(figure: Figure, left: float, top: float, side: float) -> Axes:
    """Axes without a frame, placed in inches from the figure's top left corner."""
    width, height = figure.get_size_inches()
    bottom = height - top - side
    ax = figure.add_axes((left / width, bottom / height, side / width, side / height))
    ax.set_axis_off()
    return ax


def add_text(
    figure: Figure, left: float, top: float, text: str, color: str = INK, size: float = SIZE
) -> None:
    """A line of text, placed in inches from the figure's top left corner."""
    y = figure.get_size_inches()[1] - top
    looks = {"color": color, "fontsize": size, "va": "top", "parse_math": False}
    figure.text(left, y, text, transform=figure.dpi_scale_trans, **looks)


def draw_patches(ax: Axes, image: Tensor, alive: Tensor, color: str) -> None:
    """The picture (3, H, W): patches where alive (h, w) is True clear and framed, others grey."""
    picture = to_pixels(image)  # (H, W, 3)
    H, W, _ = picture.shape
    h, w = alive.shape
    shade = 0.43 + 0.17 * picture.mean(axis=2, keepdims=True)  # unlike white and black pages
    clear = alive.numpy()[np.arange(H) * h // H][:, np.arange(W) * w // W]  # (H, W)
    shown = np.where(clear[:, :, None], picture, shade)
    ax.imshow(shown, extent=(0, w, h, 0), aspect="auto")  # axes count patches
    boxes = [
        [(column, row), (column + 1, row), (column + 1, row + 1), (column, row + 1)]
        for row, column in alive.nonzero().tolist()
    ]
    line = 10 / max(h, w)  # thin where patches are small
    ax.add_collection(PolyCollection(boxes, facecolor="none", edgecolor=color, linewidth=line))


def to_pixels(image: Tensor) -> np.ndarray:
    """(3, H, W) float in [0, 1] -> (H, W, 3)."""
    return image.detach().cpu().float().clamp(0, 1).permute(1, 2, 0).numpy()


# ----------------------------------------------------------------------------------- bars and lines


def bar_figure(
    groups: dict[str, dict[str, float | tuple[float, float, float]]],
    xlabel: str,
    ylabel: str,
    title: str = "",
) -> Figure:
    """Draw bars side by side in each group, one for each name.

    Args: groups: group -> {name: value, or (value, low, high) with an interval}.
    """
    figure = new_figure(max(7.5, 0.6 * len(groups)), 3.4, title)
    (ax,) = add_panels(figure, [""], xlabel, ylabel)
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / max(len(bars) for bars in groups.values())
    for name, color in zip(names, cycle(PALETTE)):
        label = name  # once in the legend
        for group, bars in enumerate(groups.values()):
            if name not in bars:
                continue
            value, *interval = np.atleast_1d(bars[name])
            x = group + width * (list(bars).index(name) - (len(bars) - 1) / 2)
            drawn = ax.bar(x, value, width, color=color, edgecolor="white", label=label)
            if interval:
                ax.vlines(x, *interval, color=INK, linewidth=1)
            else:
                ax.bar_label(drawn, fmt=format_value, fontsize=SIZE - 2, color=INK, padding=1)
            label = None
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xticks(range(len(groups)), [textwrap.fill(str(group), 18) for group in groups])
    ax.margins(x=0.02, y=0.1)
    add_legend(figure, ax)
    return figure


def format_value(value: float) -> str:
    """Two decimals of a share, whole numbers of a count."""
    return f"{value:.2f}" if abs(value) < 1 else f"{value:.0f}"


def line_figure(
    panels: dict[str, dict[str, tuple]], xlabel: str, ylabel: str, title: str = ""
) -> Figure:
    """Draw lines in panels side by side; a line has the same color in each.

    Args: panels: panel -> {line: (x, y) or (x, y, low, high), n numbers each; a band is drawn
        between low and high}.
    """
    figure = new_figure(7.5, 3.4, title)
    drawn = add_panels(figure, panels, xlabel, ylabel)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    looks = dict(zip(names, zip(cycle(PALETTE), cycle(MARKERS))))
    for ax, lines in zip(drawn, panels.values()):
        for name, (x, y, *band) in lines.items():
            color, marker = looks[name]
            again = names.index(name) >= len(PALETTE)  # all colors are used: hollow and dashed
            style = {"linestyle": "--", "markerfacecolor": "white"} if again else {}
            ax.plot(x, y, color=color, marker=marker, markersize=4, label=name, **style)
            if band:
                ax.fill_between(x, *band, color=color, alpha=0.2, linewidth=0)
    drawn[0].set_ylim(bottom=min(0, drawn[0].get_ylim()[0]))  # of all panels: they share it
    fullest = max(drawn, key=lambda ax: len(ax.lines))
    add_legend(figure, fullest)
    return figure


# -------------------------------------------------------------------------- tables as pandas frames


def table_figure(frame: pandas.DataFrame, title: str = "") -> Figure:
    """Draw the accuracy of each method of one table, with its interval, by group of questions.

    A random method has a dot for each seed.

    Args: frame: a row for each (method, seed, family), with the columns method, tokens, family,
        accuracy, low and high; a group of `PANELS` stands for a family.
    """
    groups = [group for group in PANELS if group in set(frame["family"])]
    methods = list(frame["method"].unique())
    tokens = frame[frame["family"] == groups[0]].groupby("method")["tokens"].mean()
    labels = [f"{method} ({tokens[method]:.0f} tokens)" for method in methods]
    longest = max(len(label) for label in labels)
    figure = new_figure(5.5 + 0.07 * longest, 0.28 * len(methods) + 1.2, title)
    panels = add_panels(figure, groups, "right answers, percent", "")
    for ax, group in zip(panels, groups):
        for place, method in enumerate(methods):
            rows = frame[(frame["family"] == group) & (frame["method"] == method)]
            spread = min(0.15, 0.6 / max(1, len(rows)))  # between the dots of its seeds
            y = place + spread * (np.arange(len(rows)) - (len(rows) - 1) / 2)
            color = PALETTE[0] if method.startswith("METEOR") else GREY
            ax.hlines(y, rows["low"], rows["high"], color=color, linewidth=1)
            ax.plot(rows["accuracy"], y, "o", color=color, markersize=4)
        ax.grid(axis="y", color="#eeeeee")
        ax.set_axisbelow(True)
    panels[0].set_yticks(range(len(methods)), labels)
    panels[0].invert_yaxis()
    return figure


def finding_figure(frame: pandas.DataFrame, ylabel: str = "value", title: str = "") -> Figure:
    """Draw a finding: lines by layer, a panel for each encoder; where there are no layers, bars of
    the encoders for each kind of question, or of the criteria for each kind or encoder.

    Args: frame: the columns criterion and value; encoder; kind; layer; low and high, the ends of an
        interval. All but the first two may be missing or empty.
    """
    empty = frame.columns[frame.isna().all()].difference(["value"])
    frame = frame.drop(columns=empty)
    numbers = ["value", "low", "high"] if {"low", "high"} <= set(frame) else ["value"]
    if "layer" in frame:
        panels = {}
        frame = frame if "encoder" in frame else frame.assign(encoder="")
        for (encoder, criterion), rows in frame.groupby(["encoder", "criterion"], sort=False):
            panels.setdefault(encoder, {})[criterion] = rows[["layer", *numbers]].to_numpy().T
        return line_figure(panels, "layer", ylabel, title)
    group = "kind" if "kind" in frame else "encoder"
    bar = "encoder" if {"kind", "encoder"} <= set(frame) else "criterion"
    groups = {}
    for _, row in frame.iterrows():
        groups.setdefault(row[group], {})[row[bar]] = tuple(row[numbers])
    return bar_figure(groups, "", ylabel, title)
