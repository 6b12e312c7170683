"""The figures of results/README.md: a plot for each table, where matplotlib is installed."""

from ..toy.questions import FAMILIES
from .orders import NOT_SHOWN, REVERSE, YES
from .plots import BLUE, GREY, RED, Picture, bars, criteria_by_depth, encoder_bars
from .tables import GROUPS
from .texts import TITLES

KINDS = ["all", *GROUPS]
VERDICT_COLORS = {YES: BLUE, NOT_SHOWN: GREY, REVERSE: RED}


def figure_of(name: str, result: dict) -> Picture | None:
    """The figure of one table; None where the table says it all.

    Args: name: of `TITLES`; result: as `report` has it.
    """
    if "rows" in result:
        return rows_figure(TITLES[name], result["rows"])
    if name == "orders":
        return orders_figure(result["orders"])
    if name == "figure1":
        return encoder_bars(
            by_family(result["survivors"]["stage2"]),
            "Who survives stage 2 depends on what the picture shows",
            "mean tokens after stage 2",
            "family of questions",
        )
    if name == "redundancy":
        rates = {kind: result["cur"][kind] for kind in (*KINDS, "OCR")}
        title = "What is lost without an encoder"
        return encoder_bars(rates, title, "CUR: share of right answers lost", "questions")
    if name == "depth":
        return depth_figure(result)
    if name == "drops":
        values = {f"after layer {e['layers']}": tuple(e["loss"]) for e in result["layers"]}
        title = "Points lost where all visual tokens go after so many layers"
        return bars({"": values}, title, "points lost")
    if name == "focus":
        values = {kind: tuple(measured["ratio"]) for kind, measured in result.items()}
        title = "Share of the last tokens on what is asked, beside a random choice of as many"
        return bars({"": values}, title, "times the random choice")
    if name == "video":
        return video_figure(result)
    return None


def rows_figure(title: str, rows: list[dict]) -> Picture:
    """Accuracy of each row, over all questions and by group."""
    panels = {}
    for kind in KINDS:
        panels[kind] = {row_label(row): tuple(row["accuracy"][kind]) for row in rows}
    return bars(panels, title, "right answers, percent")


def row_label(row: dict) -> str:
    return f"{row['label']} ({row['average_tokens']:.0f} tokens)"


def orders_figure(orders: list[dict]) -> Picture:
    """Differences with their intervals, colored by the verdict."""
    values, colors = {}, {}
    for number, entry in enumerate(orders, start=1):
        label = f"{number}. {entry['order']}"
        colors[label] = VERDICT_COLORS[entry["verdict"]]
        values[label] = None
        if entry["difference"] is not None:
            values[label] = (entry["difference"], *entry["interval"])
    shown = [entry["verdict"] for entry in orders].count(YES)
    title = (
        f"{shown} of {len(orders)} orders of the paper show (blue); grey: undecided, red: reverse"
    )
    return bars({"": values}, title, "difference, points", colors)


def by_family(survivors: dict[str, dict]) -> dict[str, dict[str, float]]:
    """{encoder: {family: tokens}} -> {family: {encoder: tokens}}"""
    return {f: {name: left[f] for name, left in survivors.items()} for f in FAMILIES}


def depth_figure(result: dict) -> Picture:
    title = f"Asked patches among the {result['kept']} that each criterion keeps, block by block"
    return criteria_by_depth(result["blocks"], title, "asked patches kept, percent")


def video_figure(result: dict) -> Picture:
    values = {}
    for kind, measured in result.items():
        for method in ("unpruned", "METEOR"):
            v = measured[method]
            values[f"{kind}, {method}"] = (v["accuracy"], *v["interval"])
    return bars({"": values}, TITLES["video"], "right answers, percent")
