"""Measures the rows of `tables.py`, the studies and the paper's orders, and writes them:
`meteor-mini eval --table NAME`, all of them into results/.
"""

import importlib.util
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from stage3_decode import default_layers

from ..budgets import Budget
from ..toy.evaluate import (
    Method,
    accuracy,
    difference,
    encoding_flops,
    interval,
    ratio,
    with_interval,
)
from ..toy.questions import FAMILIES
from ..model import Meteor
from . import depth
from .markdown import commit, section
from .orders import ORDERS, TABLES_OF_ORDERS, Measured, compare, find_row, without_rows
from .requirements import requirements
from .studies import coverage, drops, focus, rank_statistics, redundancy, video
from .tables import GROUPS, TABLES, Row, grid_cells, label_numbers, question_groups
from .texts import TITLES

__all__ = ["TITLES", "report"]

LAST = ("orders", "requirements")  # of `TITLES`: they compare what the others measure
# Of studies that take long for each question: at most so many.
MOST_OF_REDUNDANCY, MOST_OF_DROPS, MOST_OF_CLIPS = 250, 400, 200
# For the requirements, the unpruned model and METEOR are asked so many times as many questions: of
# the tables' 1200 a family has 100, and its accuracy an interval of up to 8 points either way.
TIMES_OF_REQUIREMENTS = 3


# ------------------------------------------------------------------ what is measured, once


class Measurements:
    """What is measured of a model on `samples` test questions, each thing once, however many tables
    show it.
    """

    def __init__(self, model: Meteor, samples: int):
        self.model, self.samples = model, samples
        self._rows = {}  # table -> its rows
        self._answers = {}  # method -> `accuracy`'s result
        self._results = {}  # table -> what is shown of it
        self._findings = None

    def rows(self, table: str) -> list[Row]:
        """The rows of a table of `TABLES`. For some of them lambda is solved."""
        if table not in self._rows:
            self._rows[table] = TABLES[table](self.model)
        return self._rows[table]

    def answers(self, method: Method, block: int = 0) -> dict:
        """`evaluate.accuracy` of a budget or another method; block 0: on the tables' questions,
        1: on as many after them, and so on.
        """
        key = (repr(method) if isinstance(method, Budget) else method, block)
        if key not in self._answers:
            torch.manual_seed(0)  # of the strategy "random"
            first = block * self.samples
            self._answers[key] = accuracy(self.model, method, "test", self.samples, first)
        return self._answers[key]

    def answers_to_blocks(self, method: Method, times: int) -> dict:
        """The answers to so many blocks of questions, as `row_figures` takes them. FLOPs, survivors
        and tokens by family are of the first block.
        """
        results = [self.answers(method, block) for block in range(times)]
        joined = {key: results[0][key] for key in ("llm_flops", "survivors", "family_tokens")}
        for key in ("right", "tokens", "family"):
            joined[key] = np.concatenate([result[key] for result in results])
        joined["average_tokens"] = float(joined["tokens"].mean())
        return joined

    def figures(self, rows: list[Row], times: int = 1) -> list[dict]:
        """One dictionary a row: accuracies with intervals, overall, by group and family; tokens,
        FLOPs, differences. A row that is compared with another must come after it.
        """
        done, figures = {}, []
        for row in tqdm(rows, desc="rows", mininterval=5, leave=False):
            done[row.label] = self.answers_to_blocks(row.method, times)
            other = None if row.against is None else done[row.against]
            flops = encoding_flops(self.model, row.encode)
            figures.append(row_figures(row, done[row.label], other, flops))
        return figures

    def main_rows(self) -> list[Row]:
        """The unpruned model, and METEOR at its own budget."""
        labels = ("unpruned", f"METEOR, {self.model.budget.stage3}")
        return [find_row(self.rows("main"), label) for label in labels]

    def findings(self) -> depth.Findings:
        if self._findings is None:
            self._findings = depth.findings(self.model, self.samples)
        return self._findings

    def result(self, name: str) -> dict:
        """What is shown under a title of `TITLES`."""
        if name not in self._results:
            self._results[name] = self._measure(name)
        return self._results[name]

    def _measure(self, name: str) -> dict:
        model, samples = self.model, self.samples
        if name == "redundancy":
            return redundancy(model, min(samples, MOST_OF_REDUNDANCY))
        if name == "drops":
            return drops(model, min(samples, MOST_OF_DROPS))
        if name == "focus":
            return focus(model, samples)
        if name == "video":
            return video(model, min(samples, MOST_OF_CLIPS))
        if name == "depth":
            found = self.findings()
            return {"kept": found.kept, "shares": found.rows, "blocks": found.blocks}
        if name == "figure1":
            _, own = self.figures(self.main_rows())
            keys = ("survivors", "family_tokens", "group_tokens")
            ratios = {"ratio": self.token_ratio(), "late ratio": self.token_ratio(late=True)}
            return {key: own[key] for key in keys} | ratios
        if name == "orders":
            return {"orders": self.orders()}
        if name == "requirements":
            return {"requirements": self.requirements()}
        result = {"rows": self.figures(self.rows(name))}
        if name == "1":
            result["ranks"] = rank_statistics(model)
        if name == "2":
            result["coverage"] = coverage(model)
        return result

    def token_ratio(self, late: bool = False, times: int = 1) -> tuple[float, float, float]:
        """METEOR's tokens per LLM layer, OCR & Chart to General, with the interval; late: of the
        layers from the first pruned one on, as all questions have the same number before it; times:
        blocks of questions.
        """
        budget, L = self.model.budget, self.model.decoder.config.num_hidden_layers
        result = self.answers_to_blocks(budget, times)
        tokens = result["tokens"]  # (n,): mean over L layers
        if late:
            first = (budget.layers or default_layers(L))[0]
            tokens = (L * tokens - first * budget.stage2) / (L - first)
        asked = question_groups(result["family"])
        general, ocr = (tokens[asked[group]] for group in GROUPS)
        return ratio(ocr, general, paired=False)

    def orders(self) -> list[dict]:
        """Each of `ORDERS`, with what the measured interval says of it."""
        numbers = label_numbers(self.model)
        compared = []
        for order in tqdm(ORDERS, desc="orders", mininterval=5, leave=False):
            sides = [
                self.measured(order.table, label.format_map(numbers), order.times)
                for label in (order.row, order.other)
            ]
            compared.append(compare(order, *sides))
        return compared

    def measured(self, table: str, label: str, times: int) -> Measured | None:
        """One side of an order, on so many blocks of questions; None for a row that this model does
        not have.
        """
        if table == "depth":
            found = self.findings()
            return Measured(label, found.values[label], found.family, None)
        row = find_row(self.rows(table), label)
        if row is None:
            return None
        result = self.answers_to_blocks(row.method, times)
        right = result["right"].astype(float)
        return Measured(row.label, right, result["family"], result["average_tokens"])

    def requirements(self) -> list[dict]:
        times = TIMES_OF_REQUIREMENTS
        unpruned, meteor = self.figures(self.main_rows(), times)
        return requirements(
            unpruned,
            meteor,
            self.token_ratio(times=times),
            self.token_ratio(late=True, times=times),
            self.result("redundancy"),
            self.result("drops"),
            self.result("focus"),
            self.result("orders")["orders"],
            grid_cells(self.model),
        )


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


# ------------------------------------------------------------------ the whole


def report(model: Meteor, names: list[str], samples: int, folder: Path | None) -> dict:
    """Measure and print tables; with a folder, keep its README.md, tables.json and orders.json up
    to date after each one.

    Raises: ValueError for a model from which the rows cannot be made, or fewer questions than
        families, before measuring.
    """
    check_model(model)
    if samples < len(FAMILIES):
        raise ValueError(
            f"samples must be {len(FAMILIES)} or more, one for each family, got {samples}"
        )
    measurements = Measurements(model, samples)
    for table in tables_needed(names):
        measurements.rows(table)
    version, start = commit(), time.time()
    results = {}
    for name in sorted(names, key=LAST.__contains__):  # stable: the others keep their order
        results[name] = plain(measurements.result(name))
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


def tables_needed(names: list[str]) -> list[str]:
    """The tables whose rows are measured under some titles."""
    needed = [name for name in names if name in TABLES]
    if set(names) & set(LAST):
        needed += TABLES_OF_ORDERS
    if "figure1" in names:
        needed.append("main")
    return list(dict.fromkeys(needed))


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


def on_page(folder: Path, name: str, result: dict) -> str:
    """A section of the page; its figure goes beside the page where matplotlib is installed."""
    figure = None
    if importlib.util.find_spec("matplotlib"):
        from .report_figures import figure_of

        figure = figure_of(name, result)
    if figure is None:
        return section(name, result)
    (folder / f"{name}.png").write_bytes(figure._repr_png_())
    return section(name, result, f"{name}.png")


def write(folder: Path, results: dict, how: str) -> None:
    """README.md for people, tables.json and, of the orders, orders.json for programs; how: the
    command and what it ran on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    title = "# The paper's tables on the embedded model"
    sections = [on_page(folder, name, results[name]) for name in TITLES if name in results]
    page = "\n\n".join([title, how, HEAD, "\n".join(sections)])
    (folder / "README.md").write_text(page)
    (folder / "tables.json").write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    if "orders" in results:
        orders = without_rows(results["orders"]["orders"])
        (folder / "orders.json").write_text(json.dumps(orders, indent=1) + "\n")
