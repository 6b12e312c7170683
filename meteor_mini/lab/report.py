"""Measures the rows of `tables.py` and writes them: `meteor-mini eval --table NAME`, all of them into results/."""

import json
import math
import subprocess
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import stage1_encode

from . import glyphworld
from .evaluate import accuracy, difference, encoding_flops, interval, to_images
from .glyphworld import FAMILIES
from .model import Budget, Meteor
from .tables import GROUPS, TABLES, Row, coverage, meteor_row, redundancy, video

TITLES = {
    "main": "Main result",
    "1": "Table 1: how encoders share the budget (stage 1 alone)",
    "2": "Table 2: what fusion drops (stages 1 and 2)",
    "3": "Table 3: fixed and adaptive counts in the LLM",
    "6": "Table 6: a single encoder, stages 1 and 3",
    "7": "Table 7: a single encoder, stage 3",
    "8": "Table 8: heads and lambda",
    "figure1": "Figure 1: survivors per encoder, by family",
    "redundancy": "What each encoder is worth (arXiv 2507.03262)",
    "video": "Table 4: tiled clips, zero-shot",
}
NOTES = {
    "main": "The paper: METEOR at 242* tokens against EAGLE at 1024 loses 0.3 points on average at 51 % of the TFLOPs. Counts "
    "behind FastV and PyramidDrop are tokens before and after each pruned layer; after stages 1+2 at METEOR's average, "
    "PyramidDrop must drop nearly all at once, because its first quarter of the layers is not pruned.",
    "1": "All strategies have the same totals at the three pruning points.",
    "2": "The learned fusions see all tokens of all encoders and leave one for each grid cell; `train_baselines.py` says how long "
    "they were trained (less than the embedded model). Paper: 576 tokens of 1193; its EAGLE-style row is 1193 tokens wide. "
    "Mutual redundancy keeps what few encoders show (printed digits) and drops every copy of what all of them show "
    "(shapes, bars): the last grid counts it.",
    "3": "K tokens after stage 2 in the paper's proportion to the average. All rows below the first have the same average here, "
    "except the adaptive ones named otherwise; in the paper the rows at layer 1 have 297. The paper's third adaptive row "
    "is printed as 126 tokens; its counts make 162.",
    "6": "Paper: LLaVA-1.5 at 29 % and 12 % of the FLOPs; AIM, its rival at 12 %, is not built here.",
    "7": "Paper: LLaVA-Next; FastV at 51 %, PyramidDrop at 46 %, stage 3 at 44 % of the FLOPs.",
    "8": "K as in Table 3. Differences are to the model's own k at the same average; the last two rows are 65/50 and 25/50 of its "
    "lambda, as the paper's are of 50.",
    "figure1": "The paper: EVA and ConvNeXt lead on POPE (here: presence), Pix2Struct and ConvNeXt on DocVQA (number, cell).",
    "redundancy": "The paper of this measure finds one encoder dominating OCR and chart tasks (CUR above 90 %), redundancy on "
    "general tasks, and some negative CURs. Masked encoders still give their tokens, all alike: compare the "
    "single encoders of Tables 6 and 7, whose sequences hold no others.",
    "video": "The paper: 242* tokens as good as EAGLE's 1024 on MSVD (79.0, 79.2) and ActivityNet (55.5, 55.0).",
}


def measure_rows(model: Meteor, rows: list[Row], samples: int, cache: dict) -> list[dict]:
    """One dictionary a row: accuracies with intervals, overall, by group and family; tokens, FLOPs, differences.

    cache: repr of a budget -> result; tables that share a budget share its run.
    """
    done, results = {}, []
    for row in tqdm(rows, desc="rows", mininterval=5, leave=False):
        key = repr(row.method) if isinstance(row.method, Budget) else None
        if key not in cache or key is None:
            torch.manual_seed(0)  # of the strategy "random"
            cache[key] = accuracy(model, row.method, "test", samples)
        result = done[row.label] = cache[key]
        group = np.array([FAMILIES[f] for f in result["family"]])
        masks = {"all": group != "", **{g: group == g for g in GROUPS}}
        kinds = masks | {f: result["family"] == f for f in FAMILIES}
        right, theirs = result["right"], done[row.against]["right"] if row.against else None
        results.append(
            {
                "label": row.label,
                "paper": row.paper,
                "against": row.against,
                "questions": len(right),
                "accuracy": {
                    k: (100 * float(right[m].mean()), *interval(right[m])) for k, m in kinds.items()
                },
                "differences": {k: difference(right[m], theirs[m]) for k, m in masks.items()}
                if row.against
                else {},
                "flops": result["llm_flops"] + encoding_flops(model, row.encode),
                "average_tokens": result["average_tokens"],
                "family_tokens": result["family_tokens"],
                "survivors": result["survivors"],
                "group_tokens": {
                    g: (float(t.mean()), *interval(t / 100))
                    for g in GROUPS
                    for t in [result["tokens"][masks[g]]]
                },
            }
        )
    return results


@torch.no_grad()
def rank_statistics(model: Meteor, pictures: int = 64) -> dict:
    """Per encoder at its output: expected rank, its spread (std over mean) over pictures, nuclear-norm diversity."""
    images = to_images([glyphworld.make_picture(i, "val").image for i in range(pictures)])
    features, _ = stage1_encode.encode_all(
        list(model.encoders.values()), images.to(model.device), None
    )
    table = {}
    for name, x in zip(model.encoders, features):
        rank = stage1_encode.feature_rank(x).double()
        table[name] = {
            "rank": rank.mean().item(),
            "spread": (rank.std() / rank.mean()).item(),
            "diversity": stage1_encode.nuclear_diversity(x).mean().item(),
        }
    return table


# ------------------------------------------------------------------ as Markdown


def cell(value: float, low: float, high: float, form: str = ".1f") -> str:
    return f"{value:{form}} [{low:{form.strip('+')}}, {high:{form.strip('+')}}]"


def grid(head: list[str], rows: list[list[str]]) -> str:
    return (
        "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])
        + "\n"
    )


def markdown(name: str, result: dict) -> str:
    """One table as Markdown; the paper's columns stand last and are named so."""
    parts = [f"## {TITLES[name]}\n", NOTES[name] + "\n"]
    if "rows" in result:
        parts.append(rows_grid(result["rows"]))
    if "ranks" in result:
        parts.append(
            grid(
                [
                    "encoder",
                    "rank at the output",
                    "std / mean over pictures",
                    "nuclear-norm diversity",
                ],
                [
                    [n, f"{v['rank']:.1f}", f"{100 * v['spread']:.0f} %", f"{v['diversity']:.3f}"]
                    for n, v in result["ranks"].items()
                ],
            )
        )
    if "coverage" in result:
        kinds = list(next(iter(result["coverage"].values())))
        parts.append(
            grid(
                ["patches left in at least one encoder", *kinds],
                [[s, *(f"{v[k]:.0f} %" for k in kinds)] for s, v in result["coverage"].items()],
            )
        )
    for stage, encoders in result.get("survivors", {}).items():
        parts.append(
            grid(
                [f"mean tokens after {stage}", *FAMILIES],
                [[e, *(f"{v[f]:.1f}" for f in FAMILIES)] for e, v in encoders.items()],
            )
        )
    if "family_tokens" in result:
        parts.append(
            grid(
                ["", *FAMILIES, *GROUPS],
                [
                    [
                        "tokens per LLM layer",
                        *(f"{result['family_tokens'][f]:.1f}" for f in FAMILIES),
                        *(cell(*result["group_tokens"][g], ".2f") for g in GROUPS),
                    ]
                ],
            )
        )
    if "cur" in result:
        kinds, names = list(result["cur"]), list(result["kl"])
        show = lambda v: "-" if v is None else f"{v:+.2f}"
        parts += [
            f"{result['questions']} questions.\n",
            grid(
                ["encoders seen", *kinds],
                [[s, *(cell(*v[k], ".0f") for k in kinds)] for s, v in result["subsets"].items()],
            ),
            grid(
                ["CUR of", *kinds],
                [[e, *(show(result["cur"][k][e]) for k in kinds)] for e in names]
                + [["information gap", *(show(result["ig"][k]) for k in kinds)]],
            ),
            grid(
                ["attention KL, full to single, nats", *names],
                [["", *(f"{v:.2f}" for v in result["kl"].values())]],
            ),
        ]
    if name == "video":
        rows = [
            [
                kind,
                method,
                f"{v['average_tokens']:.1f}",
                cell(v["accuracy"], *v["interval"]),
                cell(*methods["difference"], "+.1f") if method == "METEOR" else "",
            ]
            for kind, methods in result.items()
            for method, v in methods.items()
            if method != "difference"
        ]
        parts.append(grid(["clip", "method", "tokens", "accuracy", "difference"], rows))
    return "\n".join(parts)


def rows_grid(rows: list[dict]) -> str:
    paper = list(dict.fromkeys(c for row in rows for c in row["paper"]))
    full = max(row["flops"] for row in rows)
    lines = []
    for row in rows:
        differences = [cell(*v, "+.1f") for v in row["differences"].values()] or [""] * (
            1 + len(GROUPS)
        )
        accuracies = [
            cell(*v, ".1f" if k in ("all", *GROUPS) else ".0f") for k, v in row["accuracy"].items()
        ]
        lines.append(
            [
                row["label"],
                f"{row['average_tokens']:.1f}",
                f"{100 * row['flops'] / full:.0f} %",
                *accuracies,
                row["against"] or "",
                *differences,
                *(str(row["paper"].get(c, "")) for c in paper),
            ]
        )
    head = [
        "",
        "tokens",
        "FLOPs",
        *rows[0]["accuracy"],
        "difference to",
        "all",
        *GROUPS,
        *(f"paper: {c}" for c in paper),
    ]
    return f"{rows[0]['questions']} questions.\n\n" + grid(head, lines)


# The paper's orders: (claim, table, beginning of the row's label, questions, whether it says that the row is above the one that it
# is compared with), at equal averages. Where one is not shown here, WHY says what is behind it.
ORDERS = [
    ("average allocation is below rank-based", "1", "average", "all", False),
    ("reversed allocation is below rank-based", "1", "rank_reverse", "all", False),
    ("separate pruning is below collaborative", "2", "separate", "all", False),
    ("random pruning is below collaborative", "2", "random", "all", False),
    ("pre-projection fusion is below post-projection", "2", "EAGLE-style", "all", False),
    ("Resampler is below collaborative", "2", "Resampler", "all", False),
    ("MLP is below collaborative", "2", "MLP", "all", False),
    ("PixShuffle is below collaborative", "2", "PixShuffle", "all", False),
    ("the top heads choose better than all", "3", "fixed, layer 1,", "all", True),
    ("adaptive counts are above fixed ones", "3", "adaptive", "OCR & Chart", True),
    ("stage 1 is above PruMerge++", "6", "stage 1,", "all", True),
    ("stage 3 is above FastV", "7", "stage 3", "all", True),
    ("FastV in place of stage 3 is below it", "main", "stages 1+2, FastV", "all", False),
    (
        "PyramidDrop in place of stage 3 is below it",
        "main",
        "stages 1+2, PyramidDrop",
        "all",
        False,
    ),
    ("PruMerge++ is below METEOR", "main", "PruMerge++", "all", False),
]
WHY = {
    "2": "Table 2: the rule does what it says, and keeps the most printed-digit patches, but what all encoders show (shapes, bars) is "
    "redundant in every copy, and all copies go (last grid of Table 2); here one copy of most things is enough to answer, and at the "
    "larger budgets every strategy leaves one. The learned fusions see all tokens, and drop none.",
    "3": "Table 3: after LLM layer 2 a handful of visual tokens is enough, so their number does not matter; most heads look at the picture "
    "for every question, so it hardly varies; at layer 1, where tokens matter, adaptive counts are no better (its control row).",
    "6": "Table 6: made at the encoder's output only, stage 1's choice equals PruMerge++'s (control row). Choosing inside this small "
    "encoder costs: tokens go before its last blocks have read them.",
    "main": "Main result: PyramidDrop keeps as many tokens as stage 3 up to its first quarter of the layers, where this Llama reads the picture.",
}


def verdicts(results: dict) -> str:
    """Each of `ORDERS` with what the measured 95 % interval says of it, and what is behind those that it does not show."""
    lines, open_questions = [], []
    for claim, table, label, kind, above in ORDERS:
        rows = {r["label"]: r for r in results.get(table, {}).get("rows", [])}
        fair = lambda r: (
            r["against"] and abs(r["average_tokens"] - rows[r["against"]]["average_tokens"]) < 1
        )
        for row in [r for r in rows.values() if r["label"].startswith(label) and fair(r)]:
            mean, low, high = row["differences"][kind]
            shown = low > 0 if above else high < 0
            reverse = high < 0 if above else low > 0
            lines.append(
                [
                    claim,
                    kind,
                    f"{row['label']} - {row['against']}",
                    cell(mean, low, high, "+.1f"),
                    "**yes**" if shown else "no, the reverse" if reverse else "not shown",
                ]
            )
            open_questions += (
                [] if shown or table in open_questions or table not in WHY else [table]
            )
    text = grid(["the paper's order", "questions", "rows", "difference, points", "here"], lines)
    return "\n".join(
        [
            "## The paper's orders\n",
            '"Not shown": the interval holds 0.\n',
            text,
            *(f"- {WHY[t]}" for t in open_questions),
            "",
        ]
    )


# ------------------------------------------------------------------ the whole


def report(model: Meteor, names: list[str], samples: int, folder: Path | None) -> dict:
    """Measure and print tables; with a folder, keep its README.md and tables.json up to date after each one.

    Raises: ValueError for a model from which the rows cannot be made, or fewer questions than families, before measuring.
    """
    budget, L = model.budget, model.decoder.config.num_hidden_layers
    if (
        not all(isinstance(v, int) for v in (budget.stage1, budget.stage2, budget.stage3))
        or model.ranks is None
    ):
        raise ValueError(
            f"model must have ranks and a budget with an int for each stage, got {budget}"
        )
    if not {"clip", "pix2struct"} <= set(model.encoders) or L % 4:
        raise ValueError(
            "model must have encoders named clip and pix2struct and a multiple of 4 LLM layers, got "
            f"{list(model.encoders)} and {L} layers"
        )
    if samples < len(FAMILIES):
        raise ValueError(
            f"samples must be {len(FAMILIES)} or more, one for each family, got {samples}"
        )
    rows = {name: TABLES[name](model) for name in names if name in TABLES}
    version, cache, results, start = commit(), {}, {}, time.time()
    for name in names:
        if name in rows:
            results[name] = {"rows": measure_rows(model, rows[name], samples, cache)}
        elif name == "redundancy":
            results[name] = redundancy(model, min(samples, 400))  # 15 subsets, unpruned
        elif name == "video":
            results[name] = video(model, min(samples, 200))
        else:
            one = measure_rows(model, [meteor_row(budget, "METEOR")], samples, cache)[0]
            results[name] = {
                key: one[key] for key in ("survivors", "family_tokens", "group_tokens")
            }
        if name == "1":
            results[name]["ranks"] = rank_statistics(model)
        if name == "2":
            results[name]["coverage"] = coverage(model)
        results[name] = plain(results[name])
        print(markdown(name, results[name]), flush=True)
        if folder is not None:
            write(
                folder,
                results,
                f"`meteor-mini eval --table all --samples {samples}`, model {model.folder.name}, commit {version}, "
                f"{(time.time() - start) / 60:.0f} minutes on {torch.get_num_threads()} CPU threads, torch "
                f"{torch.__version__}, fixed seeds.",
            )
    return results


def plain(value):
    """Ready for JSON: numbers are Python's own, and None stands for nan."""
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and math.isnan(value) else value


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


def write(folder: Path, results: dict, how: str) -> None:
    head = (
        f"# The paper's tables on the embedded model\n\n{how}\n\nAccuracy is exact match in percent on held-out questions, with "
        "95 % bootstrap intervals over questions; differences are paired, in points, against the row named. *tokens*: visual "
        "tokens per LLM layer. *FLOPs*: encoders, projectors and the LLM's prefill, relative to the most expensive row of the "
        "table. The paper's columns are measured on other data with a 7B model: compare orders, not numbers.\n\n"
    )
    folder.mkdir(parents=True, exist_ok=True)
    tables = "\n".join(markdown(name, result) for name, result in results.items())
    (folder / "README.md").write_text(head + verdicts(results) + "\n" + tables)
    (folder / "tables.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
