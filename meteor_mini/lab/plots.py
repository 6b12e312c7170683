"""The tutorial's figures, with matplotlib: what to call on your own picture, model and counts.

Every function takes plain dictionaries of counts or tensors and returns a `Picture`, a matplotlib Figure that shows
itself in a notebook and has `savefig`. Titles state what the numbers given show; where that can go either way, the
title is computed. An encoder has the same colour in all of them and in `survivors`: Okabe and Ito's, which people of all
kinds of colour vision tell apart. Backgrounds are white and opaque, for light and dark pages.

Needs matplotlib (`pip install "meteor-mini[tutorial]"`); nothing here touches pyplot or another global state.
"""

import io
import textwrap

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from PIL import Image, ImageOps

from .survivors import COLORS, patch_map, to_pillow
from .presets import GLYPH_ENCODERS

INK, GREY, DPI = "#1a1a1a", "#777777", 100
MARKERS = "osD^vP"
# Methods that are compared are no encoders: black, then the colours that no encoder of the embedded model has.
METHOD_STYLES = [
    ("#1a1a1a", "o", "-"),
    ("#D55E00", "s", "--"),
    ("#56B4E9", "^", "-."),
    ("#777777", "D", ":"),
]
CRITERION_STYLES = [("-", "full"), ("--", "none"), (":", "left")]  # line, marker


class Picture(Figure):
    """A Figure that any notebook shows, with no magic command and no pyplot."""

    palette = True  # a PNG of 256 colours: a third of the bytes in a stored notebook; not where a scale must be smooth

    def _repr_png_(self) -> bytes:
        drawn, small = io.BytesIO(), io.BytesIO()
        self.savefig(drawn, format="png", dpi=DPI)
        if not self.palette:
            return drawn.getvalue()
        picture = Image.open(drawn).convert("RGB")
        picture.quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
        return small.getvalue()


def encoder_color(name: str, names: list[str]) -> str:
    """The embedded model's encoders have colours of their own, whichever are drawn; others by place among `names`."""
    known = list(GLYPH_ENCODERS)
    return COLORS[(known if name in known else names).index(name) % len(COLORS)]


def _colors(names) -> dict[str, str]:
    return {name: encoder_color(name, list(names)) for name in names}


def canvas(
    title: str, size: tuple[float, float], rows: int = 1, columns: int = 1, **options
) -> tuple[Picture, np.ndarray]:
    """An empty figure of size (width, height) inches with its title, and its axes (rows, columns)."""
    figure = Picture(figsize=size, facecolor="white", layout="constrained")
    figure.suptitle(
        textwrap.fill(title, int(size[0] * 12)), fontsize=11, color=INK, x=0.01, ha="left"
    )
    axes = figure.subplots(rows, columns, squeeze=False, **options)
    for ax in axes.flat:
        ax.tick_params(labelsize=9, colors=INK)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


# ------------------------------------------------------------------ pictures


def patch_maps(
    image: torch.Tensor, kept: dict[str, dict[str, torch.Tensor]], title: str
) -> Picture:
    """Which patches are still there: a row for each stage (or question), a column for each encoder (or layer).

    Args: image (3, H, W) float in [0, 1], the same in all rows, or {row: image}; kept: row -> {column: (h, w) bool}, as
    `Answer.kept`. Clear and framed: there; grey: gone.
    """
    rows, columns = len(kept), max(map(len, kept.values()))
    figure, axes = canvas(title, (1.95 * columns + 0.4, 2.15 * rows + 0.6), rows, columns)
    for (row, maps), line in zip(kept.items(), axes):
        picture = to_pillow(image[row] if isinstance(image, dict) else image)
        colors = _colors(maps)
        for (name, alive), ax in zip(maps.items(), line):
            h, w = alive.shape
            ax.imshow(
                np.asarray(patch_map(picture, alive.cpu(), colors[name])),
                extent=(-0.5, w - 0.5, h - 0.5, -0.5),
            )
            ax.set_title(
                f"{name}: {int(alive.sum())} of {alive.numel()}", fontsize=9, color=INK, loc="left"
            )
            _patch_axes(ax, first=ax is line[0], last=ax in axes[-1], label=textwrap.fill(row, 26))
        for ax in line[len(maps) :]:
            ax.set_axis_off()
    return figure


def heat_maps(
    image: torch.Tensor,
    maps: dict[str, dict[str, torch.Tensor]],
    title: str,
    label: str,
    shared: bool = True,
    mark: tuple[int, int] | None = None,
    gamma: float = 1.0,
) -> Picture:
    """A value per patch, laid over the grey picture; no colour where it is NaN (a token that is gone).

    Args: image (3, H, W) float in [0, 1]; maps: row -> {column: (h, w) float}; label: the value's name and unit; shared: one
    colour scale for all, else each map from its lowest to its highest value; mark: (row, column) of a patch to frame;
    gamma: below 1 small values get more of the colours.
    """
    rows, columns = len(maps), max(map(len, maps.values()))
    figure, axes = canvas(title, (1.9 * columns + 1.1, 2.1 * rows + 0.6), rows, columns)
    figure.palette = False
    grey = np.asarray(
        ImageOps.grayscale(to_pillow(image).resize((192, 192), Image.Resampling.BICUBIC))
    )
    values = torch.cat([v.flatten() for line in maps.values() for v in line.values()]).double()
    low, high = values[values.isfinite()].aminmax()
    for (row, line), places in zip(maps.items(), axes):
        for (name, value), ax in zip(line.items(), places):
            (h, w), value = value.shape, np.ma.masked_invalid(value.detach().cpu().double().numpy())
            extent = (-0.5, w - 0.5, h - 0.5, -0.5)
            ax.imshow(grey, extent=extent, cmap="gray", vmin=0, vmax=255)
            ends = (float(low), float(high)) if shared else (float(value.min()), float(value.max()))
            drawn = ax.imshow(
                value, extent=extent, cmap="viridis", norm=PowerNorm(gamma, *ends), alpha=0.72
            )
            if mark is not None:
                ax.plot(
                    mark[1],
                    mark[0],
                    "s",
                    markersize=10,
                    markerfacecolor="none",
                    markeredgecolor="white",
                    markeredgewidth=2,
                )
            ax.set_title(textwrap.fill(name, 24), fontsize=9, color=INK, loc="left")
            _patch_axes(
                ax, first=ax is places[0], last=ax in axes[-1], label=textwrap.fill(row, 24)
            )
        for ax in places[len(line) :]:
            ax.set_axis_off()
    bar = figure.colorbar(drawn, ax=axes, shrink=0.8, aspect=30, pad=0.02)
    bar.set_label(
        label if shared else f"{label}, each map from its lowest to its highest", fontsize=9
    )
    bar.ax.tick_params(labelsize=8)
    if not shared:
        bar.set_ticks([ends[0], ends[1]], labels=["low", "high"])
    return figure


def _patch_axes(ax, first: bool, last: bool, label: str) -> None:
    ax.spines[:].set_visible(False)
    ax.set_xticks([]), ax.set_yticks([])
    if first:
        ax.set_ylabel((label + "\n" if label else "") + "patch row", fontsize=9, color=INK)
    if last:
        ax.set_xlabel("patch column", fontsize=9, color=INK)


# ------------------------------------------------------------------ tokens


def token_flow(counts: dict[str, dict[str, float]], title: str | None = None) -> Picture:
    """Visual tokens at each point of the model, stacked by encoder. counts: point -> {encoder: tokens}."""
    totals = [sum(line.values()) for line in counts.values()]
    title = title or f"{totals[0]:.0f} visual tokens come in, {totals[-1]:.0f} are left at the end"
    figure, ((ax,),) = canvas(title, (7.5, 3.6))
    names, below = list(next(iter(counts.values()))), np.zeros(len(counts))
    for name, color in _colors(names).items():
        height = np.array([line[name] for line in counts.values()])
        ax.bar(
            range(len(counts)),
            height,
            bottom=below,
            color=color,
            edgecolor="white",
            linewidth=0.6,
            label=name,
        )
        below += height
    for i, total in enumerate(totals):
        ax.text(i, total, f"{total:.0f}", ha="center", va="bottom", fontsize=9, color=INK)
    ax.set_xticks(range(len(counts)), [textwrap.fill(point, 11) for point in counts])
    ax.set_xlabel("where in the model", fontsize=9), ax.set_ylabel("visual tokens", fontsize=9)
    ax.legend(fontsize=9, frameon=False, ncols=2)
    return figure


def encoder_bars(
    groups: dict[str, dict[str, float]], title: str, ylabel: str, xlabel: str
) -> Picture:
    """Grouped bars, one for each encoder in each group.

    Args: groups: group -> {encoder: value}; ylabel: what the value is, with its unit; xlabel: what the groups are.
    """
    figure, ((ax,),) = canvas(title, (7.5, 3.4))
    names = list(next(iter(groups.values())))
    width = 0.8 / len(names)
    for i, (name, color) in enumerate(_colors(names).items()):
        x = np.arange(len(groups)) + (i - (len(names) - 1) / 2) * width
        drawn = ax.bar(
            x,
            [line[name] for line in groups.values()],
            width,
            color=color,
            edgecolor="white",
            label=name,
        )
        ax.bar_label(
            drawn,
            fmt=lambda v: f"{v:.2g}" if abs(v) < 1 else f"{v:.0f}",
            fontsize=8,
            color=INK,
            padding=1,
        )
    ax.axhline(0, color=GREY, linewidth=0.8)
    ax.set_xticks(range(len(groups)), [textwrap.fill(group, 18) for group in groups])
    ax.set_ylabel(ylabel, fontsize=9), ax.set_xlabel(xlabel, fontsize=9)
    ax.margins(y=0.14)
    ax.legend(
        fontsize=9, frameon=False, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    return figure


def tokens_by_layer(counts: dict[str, list[float]], title: str) -> Picture:
    """Visual tokens in each layer of the LLM, a line for each question or method. counts: name -> L numbers."""
    figure, ((ax,),) = canvas(title, (7.5, 3.2))
    for i, (name, line) in enumerate(counts.items()):
        color, marker, dash = METHOD_STYLES[i % len(METHOD_STYLES)]
        shift = (i - (len(counts) - 1) / 2) * 0.08  # so that equal counts do not hide each other
        ax.plot(
            np.arange(len(line)) + shift,
            line,
            marker=marker,
            linestyle=dash,
            color=color,
            markersize=5,
            label=f"{name}  (mean {np.mean(line):.1f})",
        )
    ax.set_xticks(range(len(line)))
    (
        ax.set_xlabel("layer of the LLM", fontsize=9),
        ax.set_ylabel("visual tokens present", fontsize=9),
    )
    ax.set_ylim(bottom=0), ax.legend(fontsize=9, frameon=False)
    return figure


# ------------------------------------------------------------------ cost


def cost_curve(
    tokens: list[int], linear: list[float], quadratic: list[float], ms: list[float], title: str
) -> Picture:
    """What n tokens cost: FLOPs by formula, split in the part that grows as n and the one that grows as n squared; time.

    Args: tokens, linear and quadratic (FLOPs), ms: n numbers each.
    """
    figure, ((left, right),) = canvas(title, (7.5, 3.2), 1, 2)
    linear, quadratic = np.array(linear) / 1e9, np.array(quadratic) / 1e9
    left.fill_between(tokens, 0, linear, color="#56B4E9", label="projections, MLP: as n")
    left.fill_between(
        tokens, linear, linear + quadratic, color="#D55E00", label="attention: as n squared"
    )
    (
        left.set_ylabel("GFLOPs, by formula", fontsize=9),
        left.legend(fontsize=9, frameon=False, loc="upper left"),
    )
    right.plot(tokens, ms, "o-", color=INK)
    right.set_ylabel("prefill, ms, measured here", fontsize=9)
    for ax in (left, right):
        ax.set_xlabel("visual tokens n", fontsize=9), ax.set_xlim(left=0), ax.set_ylim(bottom=0)
    return figure


def time_bars(parts: dict[str, dict[str, float]], title: str) -> Picture:
    """Where the milliseconds go, one stacked bar for each model. parts: model -> {part: ms}."""
    figure, ((ax,),) = canvas(title, (7.5, 0.7 * len(parts) + 1.5))
    names, left = list(next(iter(parts.values()))), np.zeros(len(parts))
    for i, name in enumerate(names):
        width = np.array([line[name] for line in parts.values()])
        drawn = ax.barh(
            range(len(parts)),
            width,
            left=left,
            edgecolor="white",
            label=name,
            color=["#56B4E9", "#777777", "#D55E00", "#F0E442"][i % 4],
        )
        ax.bar_label(drawn, fmt="%.0f", label_type="center", fontsize=9, color=INK)
        left += width
    ax.set_yticks(range(len(parts)), list(parts)), ax.invert_yaxis()
    (
        ax.set_xlabel("milliseconds for one picture and question", fontsize=9),
        ax.set_ylabel("model", fontsize=9),
    )
    ax.legend(
        fontsize=9, frameon=False, ncols=len(names), loc="lower center", bbox_to_anchor=(0.5, 1)
    )
    return figure


def kv_bars(sizes: dict[str, list[float]], title: str) -> Picture:
    """KV cache of each LLM layer after the prompt. sizes: name -> L sizes in bytes."""
    figure, ((ax,),) = canvas(title, (7.5, 3.1))
    width = 0.8 / len(sizes)
    for i, (name, line) in enumerate(sizes.items()):
        x = np.arange(len(line)) + (i - (len(sizes) - 1) / 2) * width
        ax.bar(
            x,
            np.array(line) / 1024,
            width,
            color=["#777777", "#D55E00", "#56B4E9"][i % 3],
            edgecolor="white",
            label=f"{name}  (together {sum(line) / 1024:.0f} KiB)",
        )
    ax.set_xticks(range(len(line)))
    ax.set_xlabel("layer of the LLM", fontsize=9), ax.set_ylabel("KV cache, KiB", fontsize=9)
    (
        ax.margins(y=0.1),
        ax.legend(
            fontsize=9, frameon=False, ncols=len(sizes), loc="lower center", bbox_to_anchor=(0.5, 1)
        ),
    )
    return figure


# ------------------------------------------------------------------ stage 1


def spectra(sigma: dict[str, torch.Tensor], rtol: float, title: str) -> Picture:
    """Singular values of each encoder's token matrix; those above the line count. sigma: encoder -> (n,), any order."""
    figure, ((ax,),) = canvas(title, (7.5, 3.4))
    for (name, values), marker in zip(sigma.items(), MARKERS * 2):
        values = values.sort(descending=True).values.double().cpu().numpy()
        values = values / values[0]
        rank = int((values > rtol).sum())
        ax.semilogy(
            range(1, len(values) + 1),
            values.clip(1e-7),
            color=_colors(sigma)[name],
            label=f"{name}: rank {rank}",
        )
        ax.plot(
            rank,
            values[rank - 1],
            marker,
            color=_colors(sigma)[name],
            markeredgecolor=INK,
            markersize=7,
        )
    ax.axhline(rtol, color=GREY, linestyle="--", linewidth=1)
    ax.text(ax.get_xlim()[1], rtol * 1.15, f"rtol = {rtol:g}", ha="right", fontsize=9, color=INK)
    ax.set_ylim(rtol / 30, 1.3)
    (
        ax.set_xlabel("number of the singular value", fontsize=9),
        ax.set_ylabel("singular value / largest", fontsize=9),
    )
    ax.legend(fontsize=9, frameon=False)
    return figure


def rank_spread(ranks: dict[str, torch.Tensor], stored: dict[str, float]) -> Picture:
    """Ranks of many pictures, a dot each, and the expected rank stored with the model. ranks: encoder -> (pictures,)."""
    percent = lambda values: 100 * float(values.double().std() / values.double().mean())
    within = [percent(r) for r in ranks.values()]
    title = (
        f"Between encoders the expected rank varies by {percent(torch.tensor(list(stored.values()))):.0f} %, between pictures "
        f"of one encoder by {min(within):.0f} to {max(within):.0f} % (std / mean)"
    )
    figure, ((ax,),) = canvas(title, (7.5, 3.2))
    for i, (name, r) in enumerate(ranks.items()):
        jitter = np.linspace(-0.25, 0.25, len(r))
        ax.plot(
            i + jitter,
            r.numpy(),
            MARKERS[i % 6],
            color=_colors(ranks)[name],
            markersize=4,
            alpha=0.7,
        )
        ax.plot(
            [i - 0.35, i + 0.35],
            [stored[name]] * 2,
            color=INK,
            linewidth=2,
            label="stored with the model" if i == 0 else None,
        )
    ax.set_xticks(range(len(ranks)), list(ranks))
    (
        ax.set_xlabel("encoder", fontsize=9),
        ax.set_ylabel("rank of one picture's features", fontsize=9),
    )
    ax.set_ylim(bottom=0), ax.legend(fontsize=9, frameon=False)
    return figure


def depth_curves(values: dict[str, list[float]], title: str, ylabel: str) -> Picture:
    """A value after each block, a line for each encoder; the bands are the three parts. values: encoder -> L numbers."""
    figure, ((ax,),) = canvas(title, (7.5, 3.2))
    L = max(map(len, values.values()))
    _parts(ax, L)
    for (name, line), marker in zip(values.items(), MARKERS):
        ax.plot(range(len(line)), line, marker=marker, color=_colors(values)[name], label=name)
    ax.set_xticks(range(L))
    (
        ax.set_xlabel("block of the encoder", fontsize=9),
        ax.set_ylabel(ylabel, fontsize=9),
        ax.legend(fontsize=9, frameon=False),
    )
    return figure


def criteria_by_depth(
    values: dict[str, dict[str, list[float]]], title: str, ylabel: str, chance: float | None = None
) -> Picture:
    """Two or three criteria against each other, block by block, a panel for each encoder.

    Args: values: encoder -> {criterion: L numbers}; chance: where a line is drawn for choosing at random.
    """
    figure, axes = canvas(title, (7.5, 3.2), 1, len(values), sharey=True)
    for (name, lines), ax in zip(values.items(), axes[0]):
        L = max(map(len, lines.values()))
        _parts(ax, L)
        for line, (dash, fill) in zip(lines.values(), CRITERION_STYLES):
            ax.plot(range(L), line, dash, marker="o", fillstyle=fill, color=_colors(values)[name])
        if chance is not None:
            ax.axhline(chance, color=GREY, linewidth=1, linestyle=":")
        ax.set_title(name, fontsize=9, color=INK, loc="left"), ax.set_xticks(range(L))
        ax.set_xlabel("block of the encoder", fontsize=9), ax.set_ylim(bottom=0)
    axes[0, 0].set_ylabel(ylabel, fontsize=9)
    styles = [
        Line2D([], [], color=INK, linestyle=dash, marker="o", fillstyle=fill)
        for dash, fill in CRITERION_STYLES
    ]
    criteria = list(next(iter(values.values())))
    figure.legend(
        styles[: len(criteria)],
        criteria,
        fontsize=9,
        frameon=False,
        ncols=3,
        loc="outside lower center",
    )
    return figure


def _parts(ax, L: int) -> None:
    for part, shade in enumerate(("#f2f2f2", "#e4e4e4", "#f2f2f2")):
        ax.axvspan(L * part / 3 - 0.5, L * (part + 1) / 3 - 0.5, color=shade, linewidth=0, zorder=0)
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


def projection_plot(
    tokens: dict[str, torch.Tensor], kept: dict[str, torch.Tensor], title: str
) -> Picture:
    """Tokens of all encoders in their common space, on its first two principal directions (of unit vectors).

    Args: tokens: encoder -> (n_l, D) float, projected; kept: encoder -> (n_l,) bool: filled, the others hollow.
    """
    figure, ((ax,),) = canvas(title, (7.0, 4.4))
    units = torch.nn.functional.normalize(torch.cat(list(tokens.values())).double(), dim=-1)
    centred = units - units.mean(dim=0)
    _, sigma, V = torch.linalg.svd(centred, full_matrices=False)
    V = V[:2] * torch.sign(
        V[:2].sum(dim=1, keepdim=True)
    )  # a sign that does not depend on the library
    plane = (centred @ V.T).split([len(t) for t in tokens.values()])
    share = (sigma[:2] ** 2 / (sigma**2).sum()).tolist()
    for (name, xy), marker in zip(zip(tokens, plane), MARKERS):
        color, alive = _colors(tokens)[name], kept[name].cpu()
        ax.scatter(
            *xy[~alive].T.numpy(),
            s=22,
            marker=marker,
            facecolors="none",
            edgecolors=color,
            linewidths=0.8,
        )
        ax.scatter(
            *xy[alive].T.numpy(),
            s=26,
            marker=marker,
            color=color,
            label=f"{name}: {int(alive.sum())} of {len(alive)} kept",
        )
    ax.set_xlabel(f"first principal direction ({100 * share[0]:.0f} % of the variance)", fontsize=9)
    ax.set_ylabel(f"second ({100 * share[1]:.0f} %)", fontsize=9)
    ax.legend(fontsize=9, frameon=True, title="filled: kept, hollow: dropped", title_fontsize=9)
    return figure


def vav_bars(vav: dict[int, torch.Tensor], k: int, title: str) -> Picture:
    """The Visual Attention Value of every head, highest first, at each pruned layer; the first k decide.

    Args: vav: layer -> (H,) float in 0..1.
    """
    figure, axes = canvas(title, (7.5, 2.9), 1, len(vav), sharey=True)
    for (layer, values), ax in zip(vav.items(), axes[0]):
        order = values.argsort(descending=True, stable=True)
        ax.bar(
            range(len(values)),
            values[order].cpu().numpy(),
            edgecolor="white",
            color=["#D55E00" if place < k else "#BBBBBB" for place in range(len(values))],
        )
        ax.set_xticks(range(len(values)), [str(h) for h in order.tolist()])
        ax.set_title(
            f"layer {layer}: the top {k} sum to {values[order][:k].sum():.2f}",
            fontsize=9,
            color=INK,
            loc="left",
        )
        ax.set_xlabel("head, highest first", fontsize=9)
    axes[0, 0].set_ylabel("VAV: share of attention\non the picture", fontsize=9)
    return figure


def lambda_curve(
    lam: list[float], average: list[float], chosen: tuple[float, float], title: str
) -> Picture:
    """Mean visual tokens against lambda on a calibration set, and the lambda that was solved for.

    Args: lam, average: numbers each; chosen: (lambda, its average).
    """
    figure, ((ax,),) = canvas(title, (7.5, 3.1))
    ax.plot(lam, average, "o-", color=INK, markersize=4)
    ax.plot([chosen[0]] * 2, [0, chosen[1]], "--", color="#D55E00")
    ax.plot([0, chosen[0]], [chosen[1]] * 2, "--", color="#D55E00")
    ax.plot(
        *chosen,
        "s",
        color="#D55E00",
        label=f"wanted: {chosen[1]:.1f} tokens, lambda = {chosen[0]:.1f}",
    )
    (
        ax.set_xlabel("lambda", fontsize=9),
        ax.set_ylabel("visual tokens, mean over\nlayers and questions", fontsize=9),
    )
    (
        ax.set_xlim(left=0),
        ax.set_ylim(bottom=0),
        ax.legend(fontsize=9, frameon=False, loc="lower right"),
    )
    return figure


# ------------------------------------------------------------------ all together


def accuracy_curves(
    curves: dict[str, list[tuple[float, dict[str, float]]]],
    title: str,
    whole: dict[str, float] | None = None,
) -> Picture:
    """Accuracy against average tokens, a panel for each group of questions, a line for each method.

    Args: curves: method -> [(tokens per LLM layer, {group: accuracy in percent})]; whole: {group: accuracy} of the unpruned
    model, a dotted line.
    """
    groups = list(next(iter(curves.values()))[0][1])
    figure, axes = canvas(title, (7.8, 3.4), 1, len(groups), sharey=True)
    for group, ax in zip(groups, axes[0]):
        if whole:
            ax.axhline(whole[group], color=INK, linestyle=":", linewidth=1, label="unpruned")
        for (method, points), (color, marker, dash) in zip(curves.items(), METHOD_STYLES * 2):
            points = sorted(points, key=lambda p: p[0])
            ax.plot(
                [t for t, _ in points],
                [a[group] for _, a in points],
                marker=marker,
                linestyle=dash,
                color=color,
                label=method,
                markersize=5,
            )
        ax.set_title(group, fontsize=9, color=INK, loc="left")
        ax.set_xlabel("visual tokens per layer", fontsize=9)
    axes[0, 0].set_ylabel("right answers, percent", fontsize=9)
    figure.legend(
        *axes[0, 0].get_legend_handles_labels(),
        fontsize=9,
        frameon=False,
        ncols=3,
        loc="outside lower center",
    )
    return figure


def benchmark_figure(tables: dict[str, list[dict]]) -> Picture:
    """The tables of `bench.bench`: prefill and its parts, the speed-up beside the ratio of FLOPs, peers, and growth."""
    figure, axes = canvas(
        "What pruning buys: seconds, speed-ups and what choosing costs", (9.9, 10), 3, 2
    )
    (time, parts), (speed, peer), (grow, share) = axes
    one = [row for row in tables["whole"] if row["batch"] == 1]
    for name, (color, marker, dash) in zip(
        dict.fromkeys(row["contender"] for row in one), METHOD_STYLES
    ):
        rows = [row for row in one if row["contender"] == name]
        sizes = [row["visual tokens"] for row in rows]
        time.errorbar(
            sizes,
            [row["prefill, s"] for row in rows],
            color=color,
            marker=marker,
            linestyle=dash,
            label=name,
            capsize=3,
            yerr=np.array(
                [
                    [row["prefill, s"] - row["least"], row["most"] - row["prefill, s"]]
                    for row in rows
                ]
            ).T,
        )
        speed.plot(
            sizes,
            [row["speed-up"] for row in rows],
            color=color,
            marker=marker,
            linestyle="-",
            label=f"{name}: measured",
        )
        speed.plot(
            sizes,
            [row["FLOPs ratio"] for row in rows],
            color=color,
            linestyle=":",
            label=f"{name}: FLOPs",
        )
    _describe(time, "prefill, batch 1 (median, least and most)", "visual tokens", "seconds")
    _describe(
        speed, "speed-up: measured, and the ratio of FLOPs", "visual tokens", "unpruned / row"
    )
    names, stacked = (
        ["encoders", "projectors", "LLM", "stage 1", "stage 2", "stage 3"],
        np.zeros(len(tables["split"])),
    )
    labels = [f"{row['contender']}, {row['visual tokens']}" for row in tables["split"]]
    for name, color in zip(
        names, ["#999999", "#DDDDDD", "#555555", "#E69F00", "#009E73", "#D55E00"]
    ):
        values = np.array([row[f"{name}, ms"] / 1000 for row in tables["split"]])
        parts.barh(labels, values, left=stacked, color=color, label=name)
        stacked = stacked + values
    _describe(parts, "where a prefill's time goes", "seconds", "")
    sizes = list(dict.fromkeys(row["visual tokens"] for row in tables["peers"]))
    methods = [
        name
        for name in dict.fromkeys(row["method"] for row in tables["peers"])
        if name != "unpruned"
    ]
    for place, (name, color) in enumerate(zip(methods, COLORS)):
        values = [row["speed-up"] for row in tables["peers"] if row["method"] == name]
        peer.bar(np.arange(len(sizes)) + 0.16 * place, values, width=0.16, color=color, label=name)
    peer.set_xticks(np.arange(len(sizes)) + 0.32, sizes)
    peer.set_ylim(top=1.45 * peer.get_ylim()[1])  # room for the legend
    _describe(
        peer,
        "in the LLM alone, as many tokens kept by each",
        "visual tokens into the LLM",
        "speed-up",
    )
    for column, color, marker in (("by sums, ms", INK, "o"), ("by pairs, ms", "#D55E00", "s")):
        rows = [row for row in tables["growth"] if column in row]
        grow.loglog(
            [row["N"] for row in rows],
            [row[column] for row in rows],
            color=color,
            marker=marker,
            label=column[:-4],
        )
    _describe(grow, "stage 2's choice", "tokens of all encoders", "milliseconds")
    for column, (color, marker, dash) in zip(list(tables["overhead"][0])[1:], METHOD_STYLES):
        share.plot(
            [row["tokens"] for row in tables["overhead"]],
            [row[column] for row in tables["overhead"]],
            color=color,
            marker=marker,
            linestyle=dash,
            label=column.removesuffix(", % of a block").removesuffix(", % of a layer"),
        )
    share.set_ylim(top=1.45 * share.get_ylim()[1])
    _describe(
        share, "one choice, in percent of the block or layer it is made in", "tokens", "percent"
    )
    return figure


def _describe(ax, title: str, x: str, y: str) -> None:
    ax.set_title(title, fontsize=9, color=INK, loc="left")
    ax.set_xlabel(x, fontsize=9), ax.set_ylabel(y, fontsize=9)
    ax.set_ylim(bottom=0 if ax.get_yscale() == "linear" and ax.get_ylim()[0] >= 0 else None)
    ax.legend(fontsize=8, frameon=False)
