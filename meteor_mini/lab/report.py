"""Measures the rows of `tables.py` and writes them: `meteor-mini eval --table NAME`, all of them
into results/.
"""

import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ..budgets import Budget
from ..glyph.evaluate import Method, accuracy, difference, encoding_flops, interval
from ..glyph.world import FAMILIES
from ..model import Meteor
from .markdown import commit, section, verdicts
from .studies import coverage, rank_statistics, redundancy, video
from .tables import GROUPS, TABLES, Row, meteor_row
from .texts import TITLES

__all__ = ["TITLES", "report"]


# ------------------------------------------------------------------ rows


def measure_rows(model: Meteor, rows: list[Row], samples: int, cache: dict) -> list[dict]:
    """One dictionary a row: accuracies with intervals, overall, by group and family; tokens, FLOPs,
    differences.

    cache: repr of a budget -> result; tables that share a budget share its run.
    """
    done, results = {}, []
    for row in tqdm(rows, desc="rows", mininterval=5, leave=False):
        done[row.label] = measure(model, row.method, samples, cache)
        other = None if row.against is None else done[row.against]
        flops = encoding_flops(model, row.encode)
        results.append(row_figures(row, done[row.label], other, flops))
    return results


def measure(model: Meteor, method: Method, samples: int, cache: dict) -> dict:
    """`evaluate.accuracy`; of a budget once for all tables."""
    key = repr(method) if isinstance(method, Budget) else None
    if key in cache:
        return cache[key]
    torch.manual_seed(0)  # of the strategy "random"
    result = accuracy(model, method, "test", samples)
    if key is not None:
        cache[key] = result
    return result


def row_figures(row: Row, result: dict, other: dict | None, encoding: float) -> dict:
    """What is shown of a row.

    Args: result: of the row, other: of the row it is compared with, if any, both of
        `evaluate.accuracy`; encoding: FLOPs of making the visual tokens.
    """
    right, family = result["right"], result["family"]
    groups = question_groups(family)
    kinds = groups | {name: family == name for name in FAMILIES}  # kind -> (n,) bool
    accuracies = {kind: with_interval(right[asked]) for kind, asked in kinds.items()}
    differences = {}
    if other is not None:
        for kind, asked in groups.items():
            differences[kind] = difference(right[asked], other["right"][asked])
    group_tokens = {}
    for group in GROUPS:
        tokens = result["tokens"][groups[group]]
        low, high = interval(tokens / 100)  # interval speaks in percent
        group_tokens[group] = (float(tokens.mean()), low, high)
    return {
        "label": row.label,
        "paper": row.paper,
        "against": row.against,
        "questions": len(right),
        "accuracy": accuracies,
        "differences": differences,
        "flops": result["llm_flops"] + encoding,
        "average_tokens": result["average_tokens"],
        "family_tokens": result["family_tokens"],
        "survivors": result["survivors"],
        "group_tokens": group_tokens,
    }


def question_groups(family: np.ndarray) -> dict[str, np.ndarray]:
    """ "all" and each group -> (n,) bool: which of n questions, of these families, belong to it."""
    group_of = np.array([FAMILIES[name] for name in family])
    masks = {"all": np.ones(len(family), dtype=bool)}
    for group in GROUPS:
        masks[group] = group_of == group
    return masks


def with_interval(right: np.ndarray) -> tuple[float, float, float]:
    """Accuracy in percent, and its 95 % interval."""
    return (100 * float(right.mean()), *interval(right))


# ------------------------------------------------------------------ the whole


def report(model: Meteor, names: list[str], samples: int, folder: Path | None) -> dict:
    """Measure and print tables; with a folder, keep its README.md and tables.json up to date after
    each one.

    Raises: ValueError for a model from which the rows cannot be made, or fewer questions than
        families, before measuring.
    """
    check_model(model)
    if samples < len(FAMILIES):
        raise ValueError(
            f"samples must be {len(FAMILIES)} or more, one for each family, got {samples}"
        )
    rows = {name: TABLES[name](model) for name in names if name in TABLES}
    version, start = commit(), time.time()
    cache, results = {}, {}
    for name in names:
        result = measure_table(model, name, rows.get(name), samples, cache)
        results[name] = plain(result)
        print(section(name, results[name]), flush=True)
        if folder is not None:
            minutes = (time.time() - start) / 60
            how = (
                f"`meteor-mini eval --table all --samples {samples}`, model {model.folder.name}, "
                f"commit {version}, {minutes:.0f} minutes on {torch.get_num_threads()} CPU "
                f"threads, torch {torch.__version__}, fixed seeds."
            )
            write(folder, results, how)
    return results


def check_model(model: Meteor) -> None:
    """ValueError for a model from which the rows cannot be made."""
    budget, L = model.budget, model.decoder.config.num_hidden_layers
    counts = (budget.stage1, budget.stage2, budget.stage3)
    if model.ranks is None or not all(isinstance(count, int) for count in counts):
        raise ValueError(
            f"model must have ranks and a budget with an int for each stage, got {budget}"
        )
    if not {"clip", "pix2struct"} <= set(model.encoders) or L % 4:
        raise ValueError(
            "model must have encoders named clip and pix2struct and a multiple of 4 LLM layers, "
            f"got {list(model.encoders)} and {L} layers"
        )


def measure_table(
    model: Meteor, name: str, rows: list[Row] | None, samples: int, cache: dict
) -> dict:
    """One table of `TITLES`; rows: its rows, if it has any."""
    if name == "redundancy":
        return redundancy(model, min(samples, 400))  # 15 subsets, unpruned
    if name == "video":
        return video(model, min(samples, 200))
    if name == "figure1":
        (own,) = measure_rows(model, [meteor_row(model.budget, "METEOR")], samples, cache)
        return {key: own[key] for key in ("survivors", "family_tokens", "group_tokens")}
    result = {"rows": measure_rows(model, rows, samples, cache)}
    if name == "1":
        result["ranks"] = rank_statistics(model)
    if name == "2":
        result["coverage"] = coverage(model)
    return result


def plain(value):
    """Ready for JSON: numbers are Python's own, and None stands for nan."""
    if isinstance(value, dict):
        return {key: plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and math.isnan(value):
        return None
    return value


HEAD = (
    "Accuracy is exact match in percent on held-out questions, with 95 % bootstrap intervals over "
    "questions; differences are paired, in points, against the row named. *tokens*: visual tokens "
    "per LLM layer. *FLOPs*: encoders, projectors and the LLM's prefill, relative to the most "
    "expensive row of the table. The paper's columns are measured on other data with a 7B model: "
    "compare orders, not numbers."
)


def write(folder: Path, results: dict, how: str) -> None:
    """README.md for people, tables.json for programs; how: the command and what it ran on."""
    folder.mkdir(parents=True, exist_ok=True)
    title = "# The paper's tables on the embedded model"
    tables = "\n".join(section(name, result) for name, result in results.items())
    page = "\n\n".join([title, how, HEAD, verdicts(results) + "\n" + tables])
    (folder / "README.md").write_text(page)
    (folder / "tables.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
