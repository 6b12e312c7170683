"""The figure beside results/benchmark.md: the tables of `bench` as curves and bars."""

import numpy as np
from matplotlib.axes import Axes

from .plots import INK, METHOD_STYLES, Picture, canvas
from .survivors import COLORS

PART_COLORS = {
    "encoders": "#999999",
    "projectors": "#DDDDDD",
    "LLM": "#555555",
    "stage 1": "#E69F00",
    "stage 2": "#009E73",
    "stage 3": "#D55E00",
}
GROWTH_STYLES = {"by sums, ms": (INK, "o"), "by pairs, ms": ("#D55E00", "s")}


def benchmark_figure(tables: dict[str, list[dict]]) -> Picture:
    """Prefill and its parts, the speed-up beside the ratio of FLOPs, peers, and growth.

    Args: tables: of `bench.bench`.
    """
    title = "What pruning buys: seconds, speed-ups and what choosing costs"
    figure, axes = canvas(title, (9.9, 10), 3, 2)
    (prefill, parts), (speed, peers), (growth, overhead) = axes
    one_picture = [row for row in tables["whole"] if row["batch"] == 1]
    contenders = list(dict.fromkeys(row["contender"] for row in one_picture))
    for name, style in zip(contenders, METHOD_STYLES):
        rows = [row for row in one_picture if row["contender"] == name]
        _draw_prefill(prefill, name, rows, style)
        _draw_speed_up(speed, name, rows, style)
    _describe(prefill, "prefill, batch 1 (median, least and most)", "visual tokens", "seconds")
    _describe(
        speed, "speed-up: measured, and the ratio of FLOPs", "visual tokens", "unpruned / row"
    )
    _draw_parts(parts, tables["split"])
    _draw_peers(peers, tables["peers"])
    _draw_growth(growth, tables["growth"])
    _draw_overhead(overhead, tables["overhead"])
    return figure


def _draw_prefill(ax: Axes, name: str, rows: list[dict], style: tuple) -> None:
    color, marker, dash = style
    below = [row["prefill, s"] - row["least"] for row in rows]
    above = [row["most"] - row["prefill, s"] for row in rows]
    ax.errorbar(
        [row["visual tokens"] for row in rows],
        [row["prefill, s"] for row in rows],
        color=color,
        marker=marker,
        linestyle=dash,
        label=name,
        capsize=3,
        yerr=np.array([below, above]),
    )


def _draw_speed_up(ax: Axes, name: str, rows: list[dict], style: tuple) -> None:
    color, marker, _ = style
    sizes = [row["visual tokens"] for row in rows]
    measured = [row["speed-up"] for row in rows]
    counted = [row["FLOPs ratio"] for row in rows]
    ax.plot(sizes, measured, color=color, marker=marker, linestyle="-", label=f"{name}: measured")
    ax.plot(sizes, counted, color=color, linestyle=":", label=f"{name}: FLOPs")


def _draw_parts(ax: Axes, rows: list[dict]) -> None:
    labels = [f"{row['contender']}, {row['visual tokens']}" for row in rows]
    left = np.zeros(len(rows))
    for name, color in PART_COLORS.items():
        seconds = np.array([row[f"{name}, ms"] / 1000 for row in rows])
        ax.barh(labels, seconds, left=left, color=color, label=name)
        left = left + seconds
    _describe(ax, "where a prefill's time goes", "seconds", "")


def _draw_peers(ax: Axes, rows: list[dict]) -> None:
    sizes = list(dict.fromkeys(row["visual tokens"] for row in rows))
    methods = list(dict.fromkeys(row["method"] for row in rows))
    methods.remove("unpruned")
    for place, (name, color) in enumerate(zip(methods, COLORS)):
        speed_ups = [row["speed-up"] for row in rows if row["method"] == name]
        x = np.arange(len(sizes)) + 0.16 * place
        ax.bar(x, speed_ups, width=0.16, color=color, label=name)
    ax.set_xticks(np.arange(len(sizes)) + 0.32, sizes)
    _leave_room_for_legend(ax)
    title = "in the LLM alone, as many tokens kept by each"
    _describe(ax, title, "visual tokens into the LLM", "speed-up")


def _draw_growth(ax: Axes, rows: list[dict]) -> None:
    for column, (color, marker) in GROWTH_STYLES.items():
        measured = [row for row in rows if column in row]
        ax.loglog(
            [row["N"] for row in measured],
            [row[column] for row in measured],
            color=color,
            marker=marker,
            label=column.removesuffix(", ms"),
        )
    _describe(ax, "stage 2's choice", "tokens of all encoders", "milliseconds")


def _draw_overhead(ax: Axes, rows: list[dict]) -> None:
    _, *choices = rows[0]  # the first column counts tokens
    for column, (color, marker, dash) in zip(choices, METHOD_STYLES):
        ax.plot(
            [row["tokens"] for row in rows],
            [row[column] for row in rows],
            color=color,
            marker=marker,
            linestyle=dash,
            label=column.removesuffix(", % of a block").removesuffix(", % of a layer"),
        )
    _leave_room_for_legend(ax)
    title = "one choice, in percent of the block or layer it is made in"
    _describe(ax, title, "tokens", "percent")


def _leave_room_for_legend(ax: Axes) -> None:
    _, top = ax.get_ylim()
    ax.set_ylim(top=1.45 * top)


def _describe(ax: Axes, title: str, x: str, y: str) -> None:
    """Title, labels and legend; a linear axis starts at 0 unless something lies below."""
    ax.set_title(title, fontsize=9, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=9)
    ax.set_ylabel(y, fontsize=9)
    bottom, _ = ax.get_ylim()
    if ax.get_yscale() == "linear" and bottom >= 0:
        ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, frameon=False)
