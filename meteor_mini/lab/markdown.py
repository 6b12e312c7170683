"""Measured tables as Markdown: `report.py` prints them and writes them into results/README.md."""

import subprocess
from pathlib import Path

from ..glyph.world import FAMILIES
from .tables import GROUPS
from .texts import NOTES, ORDERS, TITLES, WHY, Order

# ------------------------------------------------------------------ pieces


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of texts."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def cell(value: float, low: float, high: float, form: str = ".1f") -> str:
    """A value with its 95 % interval; form: of the value, the others are written without a sign."""
    ends = form.strip("+")
    return f"{value:{form}} [{low:{ends}}, {high:{ends}}]"


def or_dash(value: float | None) -> str:
    """A share with its sign; a dash where it is not defined."""
    return "-" if value is None else f"{value:+.2f}"


def commit() -> str:
    """Of the checkout that this file lies in; "unknown" without git."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            capture_output=True,
            text=True,
            cwd=Path(__file__).parent,
        )
    except OSError:
        return "unknown"
    return found.stdout.strip() or "unknown"


# ------------------------------------------------------------------ one table


def section(name: str, result: dict) -> str:
    """One table under its title and note; result: as `report.report` measures it."""
    parts = [f"## {TITLES[name]}\n", NOTES[name] + "\n"]
    if "rows" in result:
        parts.append(rows_grid(result["rows"]))
    if "ranks" in result:
        parts.append(ranks_grid(result["ranks"]))
    if "coverage" in result:
        parts.append(coverage_grid(result["coverage"]))
    for stage, encoders in result.get("survivors", {}).items():
        parts.append(survivors_grid(stage, encoders))
    if "family_tokens" in result:
        parts.append(tokens_grid(result["family_tokens"], result["group_tokens"]))
    if "cur" in result:
        parts += redundancy_grids(result)
    if name == "video":
        parts.append(video_grid(result))
    return "\n".join(parts)


def rows_grid(rows: list[dict]) -> str:
    """Rows of `report.measure_rows`; the paper's columns stand last and are named so."""
    paper_columns = list(dict.fromkeys(column for row in rows for column in row["paper"]))
    most_flops = max(row["flops"] for row in rows)
    head = ["", "tokens", "FLOPs", *rows[0]["accuracy"], "difference to", "all", *GROUPS]
    head += [f"paper: {column}" for column in paper_columns]
    lines = []
    for row in rows:
        line = [row["label"], f"{row['average_tokens']:.1f}"]
        line.append(f"{100 * row['flops'] / most_flops:.0f} %")
        for kind, (value, low, high) in row["accuracy"].items():
            of_a_family = kind not in ("all", *GROUPS)
            line.append(cell(value, low, high, ".0f" if of_a_family else ".1f"))
        line.append(row["against"] or "")
        if row["differences"]:
            line += [cell(*difference, "+.1f") for difference in row["differences"].values()]
        else:
            line += [""] * len(["all", *GROUPS])
        line += [str(row["paper"].get(column, "")) for column in paper_columns]
        lines.append(line)
    return f"{rows[0]['questions']} questions.\n\n" + grid(head, lines)


def ranks_grid(ranks: dict[str, dict]) -> str:
    """Of `studies.rank_statistics`."""
    head = ["encoder", "rank at the output", "std / mean over pictures", "nuclear-norm diversity"]
    rows = []
    for encoder, v in ranks.items():
        spread = f"{100 * v['spread']:.0f} %"
        rows.append([encoder, f"{v['rank']:.1f}", spread, f"{v['diversity']:.3f}"])
    return grid(head, rows)


def coverage_grid(coverage: dict[str, dict]) -> str:
    """Of `studies.coverage`."""
    kinds = list(next(iter(coverage.values())))
    rows = []
    for strategy, left in coverage.items():
        rows.append([strategy, *(f"{left[kind]:.0f} %" for kind in kinds)])
    return grid(["patches left in at least one encoder", *kinds], rows)


def survivors_grid(stage: str, encoders: dict[str, dict]) -> str:
    """Of one stage: {encoder: {family: mean tokens}}."""
    rows = []
    for encoder, left in encoders.items():
        rows.append([encoder, *(f"{left[family]:.1f}" for family in FAMILIES)])
    return grid([f"mean tokens after {stage}", *FAMILIES], rows)


def tokens_grid(by_family: dict[str, float], by_group: dict[str, tuple]) -> str:
    """Mean tokens per LLM layer, the groups with their intervals."""
    row = ["tokens per LLM layer"]
    row += [f"{by_family[family]:.1f}" for family in FAMILIES]
    row += [cell(*by_group[group], ".2f") for group in GROUPS]
    return grid(["", *FAMILIES, *GROUPS], [row])


def redundancy_grids(result: dict) -> list[str]:
    """Of `studies.redundancy`: accuracy by subset, CUR and information gap, attention KL."""
    kinds, encoders = list(result["cur"]), list(result["kl"])
    subsets = []
    for subset, accuracy in result["subsets"].items():
        subsets.append([subset, *(cell(*accuracy[kind], ".0f") for kind in kinds)])
    rates = []
    for encoder in encoders:
        rates.append([encoder, *(or_dash(result["cur"][kind][encoder]) for kind in kinds)])
    rates.append(["information gap", *(or_dash(result["ig"][kind]) for kind in kinds)])
    divergences = ["", *(f"{nats:.2f}" for nats in result["kl"].values())]
    return [
        f"{result['questions']} questions.\n",
        grid(["encoders seen", *kinds], subsets),
        grid(["CUR of", *kinds], rates),
        grid(["attention KL, full to single, nats", *encoders], [divergences]),
    ]


def video_grid(result: dict) -> str:
    """Of `studies.video`."""
    rows = []
    for kind, measured in result.items():
        for method in ("unpruned", "METEOR"):
            v = measured[method]
            accuracy = cell(v["accuracy"], *v["interval"])
            difference = cell(*measured["difference"], "+.1f") if method == "METEOR" else ""
            rows.append([kind, method, f"{v['average_tokens']:.1f}", accuracy, difference])
    return grid(["clip", "method", "tokens", "accuracy", "difference"], rows)


# ------------------------------------------------------------------ the paper's orders


def verdicts(results: dict) -> str:
    """Each of `ORDERS` with what the measured 95 % interval says of it, and what is behind those
    that it does not show.
    """
    lines, not_shown = [], []
    for order in ORDERS:
        for row in compared_rows(results.get(order.table, {}), order.label):
            mean, low, high = row["differences"][order.questions]
            said = verdict(order, low, high)
            compared = f"{row['label']} - {row['against']}"
            difference = cell(mean, low, high, "+.1f")
            lines.append([order.claim, order.questions, compared, difference, said])
            if said != YES and order.table not in not_shown:
                not_shown.append(order.table)
    head = ["the paper's order", "questions", "rows", "difference, points", "here"]
    parts = ["## The paper's orders\n", '"Not shown": the interval holds 0.\n', grid(head, lines)]
    parts += [f"- {WHY[table]}" for table in not_shown if table in WHY]
    return "\n".join([*parts, ""])


YES, REVERSE = "**yes**", "no, the reverse"


def verdict(order: Order, low: float, high: float) -> str:
    """What a 95 % interval of the difference says of an order."""
    row_is_above, row_is_below = low > 0, high < 0
    if not row_is_above and not row_is_below:
        return "not shown"
    return YES if row_is_above == order.above else REVERSE


def compared_rows(result: dict, label: str) -> list[dict]:
    """Rows whose label begins so, and that keep as many tokens as the row compared with."""
    rows = {row["label"]: row for row in result.get("rows", [])}
    compared = []
    for row in rows.values():
        if row["label"].startswith(label) and row["against"]:
            other = rows[row["against"]]
            if abs(row["average_tokens"] - other["average_tokens"]) < 1:
                compared.append(row)
    return compared
