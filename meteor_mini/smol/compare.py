"""The table of methods on `smol`: `python -m meteor_mini.smol.compare --out results`.

The protocol (docs/smol.md tells how the model was trained):

1. All methods leave the same mean number of visual tokens per LLM layer, at four averages.
2. Each method's own knobs are searched on validation questions, over a grid of at most twelve
   settings, at one of the averages. search.csv holds every setting tried. METEOR with a stage left
   out has METEOR's setting.
3. The test split is asked once, with the settings found. methods.csv holds a row for each method,
   average, seed and family; "hard" are the questions that the smaller picture gets wrong.

Resumable: what the two files hold is not measured again. Change here: METHODS.
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd

from .. import baselines
from ..budgets import Budget
from ..evaluate import accuracy
from ..model import Meteor
from ..tables import (
    SEEDS,
    Row,
    eagle_rows,
    grid_cells,
    measure_rows,
    pruner_for_average,
    random_in_llm,
    stages,
)

SHARES = (0.60, 0.40, 0.25, 0.15)  # visual tokens per LLM layer, of one encoder's patches
SEARCH_AT = 0.25
PAPER_RATIO = 1193 / 576  # tokens that stage 1 leaves, to those that stage 2 leaves
LAMBDA_QUESTIONS = 48
LAYERS = [(4, 11, 19), (8, 15, 22)]  # of 30: the paper's share of the depth, and PyramidDrop's

# Every method is a function (model, average, **setting) -> Row.


# ------------------------------------------------------------------------- METEOR and parts of it


def both_stages(model: Meteor, K: int) -> Callable:
    """Stages 1 and 2 that leave K tokens, by the paper's ratio."""
    return stages(min(round(PAPER_RATIO * K), model.num_tokens), K)


def adaptive(model: Meteor, average: float, encode: Callable, layers: tuple, k: int) -> Row:
    """Stage 3 behind `encode`, with the lambda that leaves the average on validation questions."""
    budget = Budget(layers=list(layers), k=k)
    pruner = pruner_for_average(model, encode, average, budget, LAMBDA_QUESTIONS)
    return Row("", encode, pruner)


def meteor(model: Meteor, average: int, enter: float, layers: tuple, k: int) -> Row:
    return adaptive(model, average, both_stages(model, round(enter * average)), layers, k)


def stages_1_and_3(model: Meteor, average: int, enter: float, layers: tuple, k: int) -> Row:
    return adaptive(model, average, stages(round(enter * average)), layers, k)


def stages_2_and_3(model: Meteor, average: int, enter: float, layers: tuple, k: int) -> Row:
    return adaptive(model, average, stages(None, round(enter * average)), layers, k)


def stages_1_and_2(model: Meteor, average: int, ratio: float) -> Row:
    return Row("", stages(min(round(ratio * average), model.num_tokens), average))


def stage_1(model: Meteor, average: int) -> Row:
    return Row("", stages(average))


def stage_2(model: Meteor, average: int, fusion: str = "collaborative") -> Row:
    """Stage 2 alone, or another rule in its place."""
    return Row("", stages(None, average, fusion=fusion), random=fusion == "random")


# ----------------------------------------------------------------------------------------- rivals


def fastv(model: Meteor, average: int, enter: float, layer: int) -> Row:
    K, L = round(enter * average), model.decoder.config.num_hidden_layers
    keep = baselines.fastv_count(K, average, layer, L)
    return Row("", both_stages(model, K), baselines.fastv(keep, layer))


def pyramid_drop(model: Meteor, average: int, enter: float, layers: tuple) -> Row:
    K, L = round(enter * average), model.decoder.config.num_hidden_layers
    counts = baselines.pyramid_counts(K, average, L, layers)
    return Row("", both_stages(model, K), baselines.pyramid_drop(counts))


def random_in_layers(model: Meteor, average: int, enter: float, layers: tuple) -> Row:
    K, L = round(enter * average), model.decoder.config.num_hidden_layers
    counts = baselines.pyramid_counts(K, average, L, layers)
    return Row("", both_stages(model, K), random_in_llm(counts), random=True)


def fastv_of_eagle(model: Meteor, average: int, layer: int) -> Row:
    (eagle,) = eagle_rows(model, "")
    K, L = grid_cells(model), model.decoder.config.num_hidden_layers
    keep = baselines.fastv_count(K, average, layer, L)
    return Row("", eagle.encode, baselines.fastv(keep, layer))


def pyramid_drop_of_eagle(model: Meteor, average: int, layers: tuple) -> Row:
    (eagle,) = eagle_rows(model, "")
    K, L = grid_cells(model), model.decoder.config.num_hidden_layers
    return Row(
        "", eagle.encode, baselines.pyramid_drop(baselines.pyramid_counts(K, average, L, layers))
    )


def prumerge(model: Meteor, average: int) -> Row:
    names = list(model.encoders)
    return Row("", lambda model, images: baselines.prumerge(model, images, names, average))


def some_encoders(model: Meteor, average: int, names: tuple[str, ...]) -> Row:
    available = sum(model.views[name].num_tokens for name in names)
    return Row("", stages(min(average, available), encoders=names))


def pool(model: Meteor, average: int) -> Row:
    return Row("", lambda model, images: baselines.pool(model, images, average))


def shrink(model: Meteor, average: int) -> Row:
    return Row("", lambda model, images: baselines.shrink(model, images, average))


ENCODERS = ("clip", "convnext", "eva", "pix2struct")
ENTER = [1.5, 2.0, 3.0]  # tokens that enter the LLM, to the average
STAGE_3 = {"enter": [1.5, 2.0], "layers": LAYERS, "k": [3, 5, 9]}
PYRAMID = {"enter": ENTER, "layers": [*LAYERS, (2, 8, 15), (10, 17, 23)]}
METHODS = {  # name -> its function, and the values of each of its knobs
    "METEOR": (meteor, STAGE_3),
    "stages 1+2": (stages_1_and_2, {"ratio": [1.25, 1.5, PAPER_RATIO, 3.0]}),
    "stages 1+3": (stages_1_and_3, STAGE_3),  # with METEOR's setting
    "stages 2+3": (stages_2_and_3, STAGE_3),
    "stage 1": (stage_1, {}),
    "stage 2": (stage_2, {}),
    "FastV": (fastv, {"enter": ENTER, "layer": [2, 4, 6, 8]}),
    "PyramidDrop": (pyramid_drop, PYRAMID),
    "random in the LLM": (random_in_layers, PYRAMID),
    "EAGLE-style, FastV": (fastv_of_eagle, {"layer": [1, 2, 3, 4]}),
    "EAGLE-style, PyramidDrop": (pyramid_drop_of_eagle, {"layers": [(2, 8, 15), (4, 11, 19)]}),
    "PruMerge++-style": (prumerge, {}),
    "DivPrune": (partial(stage_2, fusion="DivPrune"), {}),
    "random": (partial(stage_2, fusion="random"), {}),
    "regular grid": (partial(stage_2, fusion="regular grid"), {}),
    "average pooling": (pool, {}),
    "smaller picture": (shrink, {}),
    "best encoder": (some_encoders, {"names": list(itertools.combinations(ENCODERS, 1))}),
    "best pair": (some_encoders, {"names": list(itertools.combinations(ENCODERS, 2))}),
}


# ---------------------------------------------------------------------------------- the protocol


def build_row(model: Meteor, name: str, share: float, setting: dict) -> Row:
    """The row of a method at an average, which is `share` of one encoder's patches."""
    build, _ = METHODS[name]
    row = build(model, round(share * grid_cells(model)), **setting)
    return replace(row, method=name, against=None if name == "METEOR" else "METEOR")


def settings_of(name: str) -> list[dict]:
    """The grid of a method's knobs."""
    _, knobs = METHODS[name]
    return [dict(zip(knobs, values)) for values in itertools.product(*knobs.values())]


def search(model: Meteor, name: str, samples: int) -> pd.DataFrame:
    """Every setting of a method on validation questions: method, setting, tokens, accuracy.

    A setting that cannot reach the average has no accuracy.
    """
    lines = []
    for setting in settings_of(name):
        line = {"method": name, "setting": json.dumps(setting), "questions": samples}
        try:
            row = build_row(model, name, SEARCH_AT, setting)
        except ValueError as error:  # out of reach
            lines.append(line | {"remark": str(error)})
            continue
        result = accuracy(model, row.answer, "val", samples)
        lines.append(line | {"tokens": result["average_tokens"], "accuracy": result["accuracy"]})
    return pd.DataFrame(lines)


def best_setting(searched: pd.DataFrame, name: str) -> dict:
    """The setting of most right answers; the first of equals. Parts of METEOR have METEOR's."""
    if METHODS[name][1] is STAGE_3:
        name = "METEOR"
    own = searched[searched["method"] == name].reset_index(drop=True)
    return json.loads(own["setting"][own["accuracy"].idxmax()])


def rows_at(model: Meteor, searched: pd.DataFrame, share: float) -> list[Row]:
    """All methods at an average; without those whose setting cannot reach it."""
    rows = []
    for name in METHODS:
        try:
            rows.append(build_row(model, name, share, best_setting(searched, name)))
        except ValueError as error:
            print(f"{name} at {share:.0%}: {error}", flush=True)
    return rows


def load_csv(file: Path) -> pd.DataFrame:
    return pd.read_csv(file) if file.exists() else pd.DataFrame({"method": [], "share": []})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="search.csv and methods.csv")
    parser.add_argument("--search", type=int, default=96, help="validation questions")
    parser.add_argument("--samples", type=int, default=240, help="test questions")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = Meteor.from_pretrained("smol")

    searched = load_csv(args.out / "search.csv")
    for name in METHODS:
        is_part = name != "METEOR" and METHODS[name][1] is STAGE_3
        if name not in set(searched["method"]) and not is_part:
            found = search(model, name, args.search)
            print(found.to_string(), flush=True)
            searched = pd.concat([searched, found], ignore_index=True)
            searched.to_csv(args.out / "search.csv", index=False)

    measured = load_csv(args.out / "methods.csv")
    for share in SHARES:
        if share not in set(measured["share"]):
            rows = [Row("unpruned", stages()), *eagle_rows(model, "unpruned")]
            rows += rows_at(model, searched, share)
            frame = measure_rows(model, "methods", rows, args.samples, SEEDS, "smaller picture")
            measured = pd.concat([measured, frame.assign(share=share)], ignore_index=True)
            measured.to_csv(args.out / "methods.csv", index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
