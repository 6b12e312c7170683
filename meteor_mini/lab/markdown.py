"""Measured tables as Markdown: `report.py` prints them and writes them into results/README.md."""

import subprocess
from pathlib import Path

from ..toy.questions import FAMILIES
from .depth import CRITERIA
from .orders import ORDERS, YES
from .tables import GROUPS
from .texts import NOTES, TITLES, WHY

# ------------------------------------------------------------------ pieces


def grid(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table of texts."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def cell(value: float | None, low: float | None, high: float | None, form: str = ".1f") -> str:
    """A value with its 95 % interval, a dash where it is not defined; form: of the value, the
    others are written without a sign.
    """
    if value is None or low is None:
        return "-"
    ends = form.strip("+")
    return f"{value:{form}} [{low:{ends}}, {high:{ends}}]"


def or_dash(value: float | None, form: str = "+.2f") -> str:
    """A number; a dash where it is not defined."""
    return "-" if value is None else f"{value:{form}}"


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


def section(name: str, result: dict, figure: str | None = None) -> str:
    """One table under its title and note; result: as `report.report` measures it.

    figure: file of a plot, before the numbers; they are then folded away.
    """
    head = [f"## {TITLES[name]}\n", NOTES[name] + "\n"]
    if figure is None:
        return "\n".join([*head, *grids(name, result)])
    plot = f"![{TITLES[name]}]({figure})\n"
    folded = ["<details><summary>The numbers</summary>\n", *grids(name, result), "</details>\n"]
    return "\n".join([*head, plot, *folded])


def grids(name: str, result: dict) -> list[str]:
    """The numbers of a section, as Markdown tables with a few words."""
    parts = []
    if name == "requirements":
        parts.append(requirements_grid(result["requirements"]))
    if name == "orders":
        parts.append(verdicts(result["orders"]))
    if "rows" in result:
        parts.append(rows_grid(result["rows"]))
    if "ranks" in result:
        parts.append(ranks_grid(result["ranks"]))
    if "coverage" in result:
        parts.append(coverage_grid(result["coverage"]))
    for stage, encoders in result.get("survivors", {}).items():
        parts.append(survivors_grid(stage, encoders))
    if "family_tokens" in result:
        parts.append(tokens_grid(result))
    if "cur" in result:
        parts += redundancy_grids(result)
    if name == "depth":
        parts += depth_grids(result)
    if name == "drops":
        parts.append(drops_grid(result))
    if name == "focus":
        parts.append(focus_grid(result))
    if name == "video":
        parts.append(video_grid(result))
    return parts


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


def tokens_grid(result: dict) -> str:
    """Of Figure 1: mean tokens per LLM layer, the groups with their intervals, and how many times
    as many the second group has.
    """
    row = ["tokens per LLM layer"]
    row += [f"{result['family_tokens'][family]:.1f}" for family in FAMILIES]
    row += [cell(*result["group_tokens"][group], ".2f") for group in GROUPS]
    row += [cell(*result[key], ".2f") for key in ("ratio", "late ratio")]
    first, second = GROUPS
    ratios = [f"{second} to {first}", "the same from the first pruned layer on"]
    return grid(["", *FAMILIES, *GROUPS, *ratios], [row])


def redundancy_grids(result: dict) -> list[str]:
    """Of `studies.redundancy`: accuracy by subset, CUR and information gap, points lost, attention
    KL.
    """
    kinds, encoders = list(result["cur"]), list(result["kl"])
    subsets = []
    for subset, accuracy in result["subsets"].items():
        subsets.append([subset, *(cell(*accuracy[kind], ".0f") for kind in kinds)])
    rates = []
    for encoder in encoders:
        rates.append([encoder, *(or_dash(result["cur"][kind][encoder]) for kind in kinds)])
    losses = []
    for encoder in encoders:
        of_kind = result["losses"][encoder]
        losses.append([encoder, *(cell(*of_kind[kind], "+.0f") for kind in kinds)])
    rates.append(["information gap", *(or_dash(result["ig"][kind]) for kind in kinds)])
    divergences = ["", *(f"{nats:.2f}" for nats in result["kl"].values())]
    return [
        f"{result['questions']} questions.\n",
        grid(["encoders seen", *kinds], subsets),
        grid(["CUR of", *kinds], rates),
        grid(["points lost without", *kinds], losses),
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


def depth_grids(result: dict) -> list[str]:
    """Of `depth.findings`: shares in the thirds of the blocks, and after each block."""
    rows = []
    for row in result["shares"]:
        difference = cell(*row["difference"], "+.1f") if "difference" in row else ""
        line = [row["patches"], row["blocks"], row["encoder"], str(row["questions"])]
        line += [or_dash(row[criterion], ".1f") for criterion in CRITERIA]
        rows.append([*line, difference])
    head = ["patches", "blocks", "encoder", "questions", *CRITERIA, "similarity - attention"]
    blocks = []
    for encoder, of_criterion in result["blocks"].items():
        for criterion, shares in of_criterion.items():
            blocks.append([encoder, criterion, *(or_dash(share, ".0f") for share in shares)])
    most = max(len(line) for line in blocks)
    blocks = [line + [""] * (most - len(line)) for line in blocks]
    return [
        f"{result['kept']} patches kept of each encoder.\n",
        grid(head, rows),
        grid(
            ["encoder", "asked patches kept, %", *(f"block {i}" for i in range(most - 2))], blocks
        ),
    ]


def drops_grid(result: dict) -> str:
    """Of `studies.drops`."""
    rows = []
    for entry in result["layers"]:
        accuracy, loss = cell(*entry["accuracy"]), cell(*entry["loss"], "+.1f")
        rows.append([str(entry["layers"]), accuracy, loss])
    rows.append(["all", cell(*result["unpruned"]), ""])
    head = ["layers with visual tokens", "accuracy", "points lost"]
    return f"{result['questions']} questions.\n\n" + grid(head, rows)


def focus_grid(result: dict) -> str:
    """Of `studies.focus`."""
    rows = []
    for kind, measured in result.items():
        shares = [measured[key] for key in ("left", "of all", "of those in the LLM")]
        row = [kind, str(measured["questions"]), *(f"{share:.1f} %" for share in shares)]
        row += [cell(*measured[key]) for key in ("ratio", "ratio in the LLM")]
        rows.append(row)
    head = ["", "questions", "on asked patches: left", "of all tokens", "of those in the LLM"]
    return grid([*head, "left to all", "left to those in the LLM"], rows)


# ------------------------------------------------------------------ the model and the orders


def requirements_grid(requirements: list[dict]) -> str:
    """Of `requirements.requirements`."""
    rows = []
    for entry in requirements:
        holds = "**yes**" if entry["holds"] else "no"
        rows.append([entry["what"], entry["target"], entry["measured"], holds])
    return grid(["what", "target", "measured", "holds"], rows)


def verdicts(orders: list[dict]) -> str:
    """Entries of `orders.compare`, with what the 95 % interval says of each, and what is behind
    those that are not shown.
    """
    lines, reasons = [], []
    for number, (order, entry) in enumerate(zip(ORDERS, orders), start=1):
        line = [str(number), entry["order"], order.rule]
        line.append(f"{entry['questions']} ({entry['asked']})")
        if entry["difference"] is None:
            line += ["not measured", "", "", entry["verdict"]]
        else:
            tokens = entry["tokens"]
            line.append(" - ".join(entry["rows"]))
            line.append("" if tokens is None else " / ".join(f"{n:.1f}" for n in tokens))
            line.append(cell(entry["difference"], *entry["interval"], "+.1f"))
            line.append(f"**{YES}**" if entry["verdict"] == YES else entry["verdict"])
        lines.append(line)
        if entry["verdict"] != YES and number in WHY:
            reasons.append(f"- {number}: {WHY[number]}")
    head = ["", "the paper's order", "rule", "questions", "rows", "tokens", "difference, points"]
    parts = [grid([*head, "here"], lines), *reasons]
    return "\n".join([*parts, ""]) if reasons else parts[0]
