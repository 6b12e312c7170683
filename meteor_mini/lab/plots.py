"""The tutorial's figures, with matplotlib: what to call on your own picture, model and counts.

Every function takes plain dictionaries of counts or tensors and returns a `Picture`, a matplotlib
Figure that shows itself in a notebook and has `savefig`. Titles state what the numbers given show;
where that can go either way, the title is computed. An encoder has the same colour in all of them
and in `survivors`: Okabe and Ito's, which people of all kinds of colour vision tell apart.
Backgrounds are white and opaque, for light and dark pages.

Needs matplotlib (`pip install "meteor-mini[tutorial]"`); nothing here touches pyplot or another
global state.
"""

import io
import textwrap
from collections.abc import Iterable
from operator import itemgetter

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageOps
from torch import Tensor

from ..toy.parts import ENCODERS
from .survivors import COLORS, patch_map, to_pillow

INK, GREY, DPI = "#1a1a1a", "#777777", 100
BLUE, RED, YELLOW, PALE = "#56B4E9", "#D55E00", "#F0E442", "#BBBBBB"
MARKERS = "osD^vP"
# Methods that are compared are no encoders: black, then the colours that no encoder of the embedded
# model has.
METHOD_STYLES = [(INK, "o", "-"), (RED, "s", "--"), (BLUE, "^", "-."), (GREY, "D", ":")]
CRITERION_STYLES = [("-", "full"), ("--", "none"), (":", "left")]  # line, filling of the marker


class Picture(Figure):
    """A Figure that any notebook shows, with no magic command and no pyplot."""

    # A PNG of 256 colours takes a third of the bytes in a stored notebook; not where a scale must
    # be smooth.
    palette = True

    def _repr_png_(self) -> bytes:
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=DPI)
        if not self.palette:
            return drawn.getvalue()
        picture = Image.open(drawn).convert("RGB")
        picture.quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
        return small.getvalue()


def encoder_color(name: str, names: list[str]) -> str:
    """The embedded model's encoders have colours of their own, whichever are drawn; others by place
    among `names`.
    """
    known = list(ENCODERS)
    place = known.index(name) if name in known else names.index(name)
    return COLORS[place % len(COLORS)]


def _colors(names: Iterable[str]) -> dict[str, str]:
    return {name: encoder_color(name, list(names)) for name in names}


# ------------------------------------------------------------------ axes


def canvas(
    title: str, size: tuple[float, float], rows: int = 1, columns: int = 1, **options
) -> tuple[Picture, np.ndarray]:
    """An empty figure of size (width, height) inches with its title, and its axes (rows,
    columns).
    """
    figure = Picture(figsize=size, facecolor="white", layout="constrained")
    width, _ = size
    lines = textwrap.fill(title, int(width * 12))
    figure.suptitle(lines, fontsize=11, color=INK, x=0.01, ha="left")
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.tick_params(labelsize=9, colors=INK)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _single(title: str, size: tuple[float, float]) -> tuple[Picture, Axes]:
    """A figure with one panel."""
    figure, axes = canvas(title, size)
    return figure, axes[0, 0]


def _label(ax: Axes, x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)


def _name(ax: Axes, text: str) -> None:
    """The title of one panel."""
    ax.set_title(text, fontsize=9, color=INK, loc="left")


def _legend(ax: Axes, **options) -> None:
    ax.legend(fontsize=9, frameon=False, **options)


def _legend_above(ax: Axes, columns: int) -> None:
    _legend(ax, ncols=columns, loc="lower center", bbox_to_anchor=(0.5, 1))


def _side_by_side(place: int, of: int, groups: int) -> tuple[np.ndarray, float]:
    """Where the bars number `place` of so many stand in each group, and how wide they are."""
    width = 0.8 / of
    return np.arange(groups) + (place - (of - 1) / 2) * width, width


# ------------------------------------------------------------------ pictures


def patch_maps(image: Tensor, kept: dict[str, dict[str, Tensor]], title: str) -> Picture:
    """Which patches are still there: a row for each stage (or question), a column for each encoder
    (or layer).

    Clear and framed: there; grey: gone.

    Args: image (3, H, W) float in [0, 1], the same in all rows, or {row: image}; kept: row ->
        {column: (h, w) bool}, as `Answer.kept`.
    """
    rows, columns = len(kept), max(map(len, kept.values()))
    size = (1.95 * columns + 0.4, 2.15 * rows + 0.6)
    figure, axes = canvas(title, size, rows, columns)
    for (row, maps), places in zip(kept.items(), axes):
        picture = to_pillow(image[row] if isinstance(image, dict) else image)
        colors = _colors(maps)
        for (name, alive), ax in zip(maps.items(), places):
            cell = patch_map(picture, alive.cpu(), colors[name])
            ax.imshow(np.asarray(cell), extent=_extent(alive))
            _name(ax, f"{name}: {int(alive.sum())} of {alive.numel()}")
        _label_patches(places, len(maps), textwrap.fill(row, 26))
    _label_last_row(axes, kept)
    return figure


def heat_maps(
    image: Tensor,
    maps: dict[str, dict[str, Tensor]],
    title: str,
    label: str,
    shared: bool = True,
    mark: tuple[int, int] | None = None,
    gamma: float = 1.0,
) -> Picture:
    """A value per patch, laid over the grey picture; no colour where it is NaN (a token that is
    gone).

    Args:
        image (3, H, W) float in [0, 1]; maps: row -> {column: (h, w) float}.
        label: the value's name and unit.
        shared: one colour scale for all, else each map from its lowest to its highest value.
        mark: (row, column) of a patch to frame.
        gamma: below 1 small values get more of the colours.
    """
    rows, columns = len(maps), max(map(len, maps.values()))
    size = (1.9 * columns + 1.1, 2.1 * rows + 0.6)
    figure, axes = canvas(title, size, rows, columns)
    figure.palette = False
    small = to_pillow(image).resize((192, 192), Image.Resampling.BICUBIC)
    grey = np.asarray(ImageOps.grayscale(small))
    ends = _ends(maps)
    for (row, line), places in zip(maps.items(), axes):
        for (name, value), ax in zip(line.items(), places):
            if not shared:
                ends = _ends({row: {name: value}})
            ax.imshow(grey, extent=_extent(value), cmap="gray", vmin=0, vmax=255)
            drawn = _draw_heat(ax, value, PowerNorm(gamma, *ends))
            if mark is not None:
                _frame(ax, *mark)
            _name(ax, textwrap.fill(name, 24))
        _label_patches(places, len(line), textwrap.fill(row, 24))
    _label_last_row(axes, maps)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=30, pad=0.02)
    bar.ax.tick_params(labelsize=8)
    if shared:
        bar.set_label(label, fontsize=9)
    else:
        bar.set_label(f"{label}, each map from its lowest to its highest", fontsize=9)
        bar.set_ticks(list(ends), labels=["low", "high"])  # the colours are those of the last map
    return figure


def _draw_heat(ax: Axes, value: Tensor, norm: PowerNorm):
    numbers = np.ma.masked_invalid(value.detach().cpu().double().numpy())
    return ax.imshow(numbers, extent=_extent(value), cmap="viridis", norm=norm, alpha=0.72)


def _ends(maps: dict[str, dict[str, Tensor]]) -> tuple[float, float]:
    """The lowest and highest value of all maps; tokens that are gone do not count."""
    flat = [value.detach().flatten().double() for line in maps.values() for value in line.values()]
    values = torch.cat(flat)
    low, high = values[values.isfinite()].aminmax()
    return float(low), float(high)


def _extent(patches: Tensor) -> tuple[float, float, float, float]:
    """The place of (h, w) patches: numbers count patches, row 0 is at the top."""
    h, w = patches.shape
    return (-0.5, w - 0.5, h - 0.5, -0.5)


def _frame(ax: Axes, row: int, column: int) -> None:
    ax.plot(
        column,
        row,
        "s",
        markersize=10,
        markerfacecolor="none",
        markeredgecolor="white",
        markeredgewidth=2,
    )


def _label_patches(places: np.ndarray, used: int, label: str) -> None:
    """A row of panels: no ticks, its label on the first, nothing at all where no map is drawn."""
    for ax in places[:used]:
        ax.spines[:].set_visible(False)
        ax.set_xticks([])
        ax.set_yticks([])
    label = f"{label}\npatch row" if label else "patch row"
    places[0].set_ylabel(label, fontsize=9, color=INK)
    for ax in places[used:]:
        ax.set_axis_off()


def _label_last_row(axes: np.ndarray, maps: dict[str, dict]) -> None:
    used = len(list(maps.values())[-1])
    for ax in axes[-1, :used]:
        ax.set_xlabel("patch column", fontsize=9, color=INK)


# ------------------------------------------------------------------ tokens


def encoder_bars(
    groups: dict[str, dict[str, float]], title: str, ylabel: str, xlabel: str
) -> Picture:
    """Grouped bars, one for each encoder in each group.

    Args: groups: group -> {encoder: value}; ylabel: what the value is, with its unit; xlabel: what
        the groups are.
    """
    figure, ax = _single(title, (7.5, 3.4))
    names = list(next(iter(groups.values())))
    for i, (name, color) in enumerate(_colors(names).items()):
        x, width = _side_by_side(i, len(names), len(groups))
        values = [line[name] for line in groups.values()]
        drawn = ax.bar(x, values, width, color=color, edgecolor="white", label=name)
        ax.bar_label(drawn, fmt=_short, fontsize=8, color=INK, padding=1)
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xticks(range(len(groups)), [textwrap.fill(group, 18) for group in groups])
    _label(ax, xlabel, ylabel)
    ax.margins(y=0.14)
    _legend_above(ax, len(names))
    return figure


def _short(value: float) -> str:
    """Two digits that count for a share, none after the point for a count."""
    return f"{value:.2g}" if abs(value) < 1 else f"{value:.0f}"


def bars(
    panels: dict[str, dict[str, tuple[float, float, float] | None]],
    title: str,
    xlabel: str,
    colors: dict[str, str] | None = None,
) -> Picture:
    """Horizontal bars with their 95 % intervals, one a row, in panels side by side.

    Args: panels: panel -> {label: (value, low, high)}, the same labels in all; None where nothing
        was measured, all three alike where there is no interval; xlabel: what the values are, with
        their unit; colors: label -> color, where not all alike.
    """
    labels = list(next(iter(panels.values())))
    height = 0.24 * len(labels) + 1.3
    figure, axes = canvas(title, (8.0, height), 1, len(panels), sharey=True)
    for (panel, values), ax in zip(panels.items(), axes[0]):
        for row, label in enumerate(labels):
            if values[label] is not None:
                _draw_bar(ax, row, values[label], (colors or {}).get(label, BLUE))
        ax.axvline(0, color=GREY, linewidth=0.8)
        ax.margins(x=0.16)
        _name(ax, panel)
        ax.set_xlabel(xlabel, fontsize=9)
    first = axes[0, 0]
    first.set_yticks(range(len(labels)), labels)
    for tick, label in zip(first.get_yticklabels(), labels):
        tick.set_color((colors or {}).get(label, INK))
    first.invert_yaxis()
    first.set_ylabel(" ")  # room
    return figure


def _draw_bar(ax: Axes, row: int, value: tuple[float, float, float], color: str) -> None:
    """A bar, its interval where it has one, and its number behind both."""
    mean, low, high = value
    ax.barh(row, mean, color=color, edgecolor="white")
    if high > low:
        reach = [[mean - low], [high - mean]]
        ax.errorbar(mean, row, xerr=reach, fmt="none", ecolor=INK, capsize=2, linewidth=1)
    place = {"va": "center", "ha": "left", "fontsize": 8, "color": INK}
    ax.text(max(high, 0), row, f" {mean:.1f}", **place)


# ------------------------------------------------------------------ cost


def cost_curve(
    tokens: list[int], linear: list[float], quadratic: list[float], title: str
) -> Picture:
    """FLOPs of n tokens by formula: the part that grows as n, and the one that grows as n squared.

    Args: tokens, linear and quadratic (FLOPs): as many numbers each.
    """
    figure, ax = _single(title, (7.5, 3.2))
    as_n, as_n_squared = np.array(linear) / 1e12, np.array(quadratic) / 1e12
    both = as_n + as_n_squared
    ax.fill_between(tokens, 0, as_n, color=BLUE, label="projections, MLP: as n")
    ax.fill_between(tokens, as_n, both, color=RED, label="attention: as n squared")
    _label(ax, "visual tokens n", "TFLOPs of the prefill")
    _legend(ax, loc="upper left")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    return figure


def time_bars(parts: dict[str, dict[str, float]], title: str) -> Picture:
    """Where the milliseconds go, one stacked bar for each model. parts: model -> {part: ms}."""
    figure, ax = _single(title, (7.5, 0.7 * len(parts) + 1.5))
    names, models = list(next(iter(parts.values()))), range(len(parts))
    colors = [BLUE, GREY, RED, YELLOW]
    left = np.zeros(len(parts))
    for i, name in enumerate(names):
        width = np.array([line[name] for line in parts.values()])
        look = {"edgecolor": "white", "color": colors[i % len(colors)]}
        drawn = ax.barh(models, width, left=left, label=name, **look)
        ax.bar_label(drawn, fmt="%.0f", label_type="center", fontsize=9, color=INK)
        left += width
    ax.set_yticks(models, list(parts))
    ax.invert_yaxis()
    _label(ax, "milliseconds for one picture and question", "model")
    _legend_above(ax, len(names))
    return figure


def kv_bars(counts: dict[str, list[int]], title: str) -> Picture:
    """Tokens in the KV cache of each LLM layer after the prompt. counts: name -> L numbers."""
    figure, ax = _single(title, (7.5, 3.1))
    colors = [GREY, RED, BLUE]
    for i, (name, line) in enumerate(counts.items()):
        x, width = _side_by_side(i, len(counts), len(line))
        look = {"color": colors[i % len(colors)], "edgecolor": "white"}
        drawn = ax.bar(x, line, width, label=name, **look)
        ax.bar_label(drawn, fontsize=8, color=INK, padding=1)
    ax.set_xticks(range(len(line)))
    _label(ax, "layer of the LLM", "tokens in the KV cache")
    ax.margins(y=0.1)
    _legend_above(ax, len(counts))
    return figure


# ------------------------------------------------------------------ stage 1


def rank_spread(ranks: dict[str, Tensor], stored: dict[str, float]) -> Picture:
    """Ranks of many pictures, a dot each, and the expected rank stored with the model.

    Args: ranks: encoder -> (pictures,); stored: encoder -> its expected rank.
    """
    between = _percent_spread(torch.tensor(list(stored.values())))
    within = [_percent_spread(r) for r in ranks.values()]
    title = (
        f"Between encoders the expected rank varies by {between:.0f} %, between pictures "
        f"of one encoder by {min(within):.0f} to {max(within):.0f} % (std / mean)"
    )
    figure, ax = _single(title, (7.5, 3.2))
    for i, (name, r) in enumerate(ranks.items()):
        x = i + np.linspace(-0.25, 0.25, len(r))
        color, marker = _colors(ranks)[name], MARKERS[i % len(MARKERS)]
        ax.plot(x, r.numpy(), marker, color=color, markersize=4, alpha=0.7)
        label = "stored with the model" if i == 0 else None  # once in the legend
        ax.plot([i - 0.35, i + 0.35], [stored[name]] * 2, color=INK, linewidth=2, label=label)
    ax.set_xticks(range(len(ranks)), list(ranks))
    _label(ax, "encoder", "rank of one picture's features")
    ax.set_ylim(bottom=0)
    _legend(ax)
    return figure


def _percent_spread(values: Tensor) -> float:
    """Standard deviation in percent of the mean."""
    values = values.double()
    return 100 * float(values.std() / values.mean())


def criteria_by_depth(
    values: dict[str, dict[str, list[float]]], title: str, ylabel: str, chance: float | None = None
) -> Picture:
    """Two or three criteria against each other, block by block, a panel for each encoder.

    Args: values: encoder -> {criterion: L numbers}; chance: where a line is drawn for choosing at
        random.
    """
    figure, axes = canvas(title, (7.5, 3.2), 1, len(values), sharey=True)
    for (name, lines), ax in zip(values.items(), axes[0]):
        L = max(map(len, lines.values()))
        _shade_parts(ax, L)
        for line, (dash, fill) in zip(lines.values(), CRITERION_STYLES):
            ax.plot(range(L), line, dash, marker="o", fillstyle=fill, color=_colors(values)[name])
        if chance is not None:
            ax.axhline(chance, color=GREY, linewidth=1, linestyle=":")
        _name(ax, name)
        ax.set_xticks(range(L))
        ax.set_xlabel("block of the encoder", fontsize=9)
        ax.set_ylim(0, 105)
    axes[0, 0].set_ylabel(ylabel, fontsize=9)
    criteria, samples = list(next(iter(values.values()))), []
    for dash, fill in CRITERION_STYLES[: len(criteria)]:
        samples.append(Line2D([], [], color=INK, linestyle=dash, marker="o", fillstyle=fill))
    _legend_below(figure, samples, criteria)
    return figure


def _legend_below(figure: Picture, lines: list, names: list[str]) -> None:
    """One legend for all panels."""
    figure.legend(lines, names, fontsize=9, frameon=False, ncols=3, loc="outside lower center")


def _shade_parts(ax: Axes, L: int) -> None:
    """Bands behind the three parts into which stage 1 cuts L blocks."""
    for part, shade in enumerate(("#f2f2f2", "#e4e4e4", "#f2f2f2")):
        start, end = L * part / 3 - 0.5, L * (part + 1) / 3 - 0.5
        ax.axvspan(start, end, color=shade, linewidth=0, zorder=0)
        ax.text(
            L * (part + 0.5) / 3 - 0.5,
            0.01,
            f"part {part}",
            transform=ax.get_xaxis_transform(),
            ha="center",
            va="bottom",
            fontsize=8,
            color=GREY,
        )


# ------------------------------------------------------------------ stages 2 and 3


def vav_bars(vav: dict[int, Tensor], k: int, title: str) -> Picture:
    """The Visual Attention Value of every head, highest first, at each pruned layer; the first k
    decide.

    Args: vav: layer -> (H,) float in 0..1.
    """
    figure, axes = canvas(title, (7.5, 2.9), 1, len(vav), sharey=True)
    for (layer, values), ax in zip(vav.items(), axes[0]):
        H = len(values)
        order = values.argsort(descending=True, stable=True)
        colors = [RED if place < k else PALE for place in range(H)]
        ax.bar(range(H), values[order].cpu().numpy(), edgecolor="white", color=colors)
        ax.set_xticks(range(H), [str(h) for h in order.tolist()])
        _name(ax, f"layer {layer}: the top {k} sum to {values[order][:k].sum():.2f}")
        ax.set_xlabel("head, highest first", fontsize=9)
    axes[0, 0].set_ylabel("VAV: share of attention\non the picture", fontsize=9)
    return figure


def lambda_curve(
    lam: list[float], average: list[float], chosen: tuple[float, float], title: str
) -> Picture:
    """Mean visual tokens against lambda on a calibration set, and the lambda that was solved for.

    Args: lam, average: numbers each; chosen: (lambda, its average).
    """
    figure, ax = _single(title, (7.5, 3.1))
    x, y = chosen
    ax.plot(lam, average, "o-", color=INK, markersize=4)
    ax.plot([x, x], [0, y], "--", color=RED)
    ax.plot([0, x], [y, y], "--", color=RED)
    ax.plot(x, y, "s", color=RED, label=f"wanted: {y:.1f} tokens, lambda = {x:.1f}")
    _label(ax, "lambda", "visual tokens, mean over\nlayers and questions")
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    _legend(ax, loc="lower right")
    return figure


# ------------------------------------------------------------------ all together


def accuracy_curves(
    curves: dict[str, list[tuple[float, dict[str, float]]]],
    title: str,
    whole: dict[str, float] | None = None,
) -> Picture:
    """Accuracy against average tokens, a panel for each group of questions, a line for each method.

    Args: curves: method -> [(tokens per LLM layer, {group: accuracy in percent})]; whole: {group:
        accuracy} of the unpruned model, a dotted line.
    """
    _, first = next(iter(curves.values()))[0]
    groups = list(first)
    figure, axes = canvas(title, (7.8, 3.4), 1, len(groups), sharey=True)
    for group, ax in zip(groups, axes[0]):
        if whole:
            ax.axhline(whole[group], color=INK, linestyle=":", linewidth=1, label="unpruned")
        for (method, points), style in zip(curves.items(), METHOD_STYLES * 2):
            color, marker, dash = style
            points = sorted(points, key=itemgetter(0))  # by tokens
            x = [tokens for tokens, _ in points]
            y = [accuracy[group] for _, accuracy in points]
            look = {"marker": marker, "linestyle": dash, "color": color, "markersize": 5}
            ax.plot(x, y, label=method, **look)
        _name(ax, group)
        ax.set_xlabel("visual tokens per layer", fontsize=9)
    axes[0, 0].set_ylabel("right answers, percent", fontsize=9)
    _legend_below(figure, *axes[0, 0].get_legend_handles_labels())
    return figure
