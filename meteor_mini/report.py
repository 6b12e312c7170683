"""Measures the rows of `tables.py` and writes them: `meteor-mini eval --table NAME`, all of them into results/."""
import json
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
from .tables import GROUPS, TABLES, Row, own, redundancy, video

TITLES = {"main": "Main result", "1": "Table 1: how encoders share the budget (stage 1 alone)",
          "2": "Table 2: what fusion drops (stages 1 and 2)", "3": "Table 3: fixed and adaptive counts in the LLM",
          "6": "Table 6: a single encoder, stages 1 and 3", "7": "Table 7: a single encoder, stage 3",
          "8": "Table 8: heads and lambda", "figure1": "Figure 1: survivors per encoder, by family",
          "redundancy": "What each encoder is worth (arXiv 2507.03262)", "video": "Table 4: tiled clips, zero-shot"}


def measure_rows(model: Meteor, rows: list[Row], samples: int, cache: dict) -> list[dict]:
    """One dictionary a row: accuracy with its interval, by group and family, tokens, FLOPs, differences to `against`.

    cache: repr of a budget -> result; tables that share a row share its questions and its run.
    """
    done, results = {}, []
    for row in tqdm(rows, desc="rows", mininterval=5, leave=False):
        key = repr(row.method) if isinstance(row.method, Budget) else row.label
        if key not in cache or key == row.label:
            torch.manual_seed(0)  # of the strategy "random"
            cache[key] = accuracy(model, row.method, "test", samples)
        result = done[row.label] = cache[key]
        masks = {"all": result["group"] != "", **{g: result["group"] == g for g in GROUPS}}
        results.append({
            "label": row.label, "paper": row.paper, "against": row.against, "interval": interval(result["right"]),
            "flops": result["llm_flops"] + encoding_flops(model, row.encode),
            "groups": {g: 100 * float(result["right"][masks[g]].mean()) for g in GROUPS},
            "differences": {g: difference(result["right"][mask], done[row.against]["right"][mask])
                            for g, mask in masks.items()} if row.against else {},
            **{k: result[k] for k in ("average_tokens", "accuracy", "families", "family_tokens", "survivors")}})
    return results


def run(model: Meteor, name: str, samples: int, cache: dict) -> dict:
    """Measure one table: {"rows": [...]} of `measure_rows`, or what `redundancy` and `video` return."""
    if name == "redundancy":
        return redundancy(model, min(samples, 400))  # 15 subsets, unpruned
    if name == "video":
        return video(model, min(samples, 200))
    if name == "figure1":
        return {"survivors": measure_rows(model, [own(model.budget, "METEOR")], samples, cache)[0]["survivors"]}
    result = {"rows": measure_rows(model, TABLES[name](model), samples, cache)}
    if name == "1":
        result["ranks"] = rank_statistics(model)
    return result


@torch.no_grad()
def rank_statistics(model: Meteor, pictures: int = 64) -> dict:
    """Per encoder at its output: expected rank, its spread (std over mean) over pictures, nuclear-norm diversity."""
    images = to_images([glyphworld.make_picture(i, "val").image for i in range(pictures)])
    features, _ = stage1_encode.encode_all(list(model.encoders.values()), images, None)
    table = {}
    for name, x in zip(model.encoders, features):
        rank = stage1_encode.feature_rank(x).double()
        table[name] = {"rank": rank.mean().item(), "spread": (rank.std() / rank.mean()).item(),
                       "diversity": stage1_encode.nuclear_diversity(x).mean().item()}
    return table


def bracket(low: float, high: float) -> str:
    return f"[{low:.1f}, {high:.1f}]"


def grid(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows]) + "\n"


def markdown(name: str, result: dict) -> str:
    """One table as Markdown; the paper's columns stand last and are named so."""
    text = f"## {TITLES[name]}\n\n"
    if name == "redundancy":
        kinds, names = list(result["cur"]), list(result["kl"])
        text += grid(["encoders seen", *kinds], [[s, *(f"{v[k]:.1f}" for k in kinds)] for s, v in result["subsets"].items()])
        text += "\n" + grid(["CUR of", *kinds], [[e, *(f"{result['cur'][k][e]:+.2f}" for k in kinds)] for e in names] +
                            [["IG", *(f"{result['ig'][k]:.2f}" for k in kinds)]])
        return text + "\n" + grid(["attention KL, full to single", *names], [["nats", *(f"{v:.2f}" for v in result["kl"].values())]])
    if name == "video":
        return text + grid(["clip", "method", "tokens", "accuracy"],
                           [[kind, method, f"{v['average_tokens']:.1f}", f"{v['accuracy']:.1f} {bracket(*v['interval'])}"]
                            for kind, methods in result.items() for method, v in methods.items()])
    if name == "figure1":
        parts = []
        for stage, encoders in result["survivors"].items():
            families = list(next(iter(encoders.values())))
            parts.append(grid([stage, *families], [[e, *(f"{v[f]:.1f}" for f in families)] for e, v in encoders.items()]))
        return text + "\n".join(parts)
    rows = result["rows"]
    paper = list(dict.fromkeys(c for row in rows for c in row["paper"]))
    full = max(row["flops"] for row in rows)
    head = ["", "tokens", "FLOPs", "accuracy", *GROUPS, *FAMILIES, "difference", *GROUPS, *(f"paper: {c}" for c in paper)]
    lines = []
    for row in rows:
        differences = [f"{mean:+.1f} {bracket(low, high)}" for mean, low, high in row["differences"].values()]
        differences = [f"{differences[0]} to {row['against']}", *differences[1:]] if differences else [""] * (1 + len(GROUPS))
        lines.append([row["label"], f"{row['average_tokens']:.1f}", f"{100 * row['flops'] / full:.0f} %",
                      f"{row['accuracy']:.1f} {bracket(*row['interval'])}", *(f"{v:.1f}" for v in row["groups"].values()),
                      *(f"{row['families'][f]:.1f}" for f in FAMILIES), *differences, *(str(row["paper"].get(c, "")) for c in paper)])
    text += grid(head, lines)
    if "ranks" in result:
        text += "\n" + grid(["encoder", "expected rank", "std / mean over pictures", "nuclear-norm diversity"],
                            [[n, f"{v['rank']:.1f}", f"{100 * v['spread']:.0f} %", f"{v['diversity']:.3f}"]
                             for n, v in result["ranks"].items()])
    return text


def report(model: Meteor, names: list[str], samples: int, folder: Path | None) -> dict:
    """Measure and print tables; with a folder, write them to its README.md and tables.json.

    Raises: ValueError for a model without a budget of its own for all three stages, from which the rows are made.
    """
    if not all(isinstance(v, (int, float)) for v in (model.budget.stage1, model.budget.stage2, model.budget.stage3)):
        raise ValueError(f"model must have a budget with a count for each stage, got {model.budget}")
    cache, results, start = {}, {}, time.time()
    for name in names:
        results[name] = run(model, name, samples, cache)
        print(markdown(name, results[name]), flush=True)
    if folder is not None:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip() or "unknown"
        head = (f"# The paper's tables on the embedded model\n\n`meteor-mini eval --table all --samples {samples}`, commit {commit}, "
                f"{(time.time() - start) / 60:.0f} minutes on {torch.get_num_threads()} CPU threads, torch {torch.__version__}, fixed "
                "seeds.\n\nAccuracy is exact match in percent on held-out questions, with a 95 % bootstrap interval over questions; "
                "differences are paired, in points, against the row named. *tokens*: visual tokens per LLM layer. *FLOPs*: encoders, "
                "projectors and the LLM's prefill, relative to the most expensive row of the table. The paper's columns are measured "
                "on other data with a 7B model: compare orders, not numbers.\n\n")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README.md").write_text(head + "\n".join(markdown(name, results[name]) for name in names))
        (folder / "tables.json").write_text(json.dumps(results, indent=1, default=float) + "\n")
    return results
