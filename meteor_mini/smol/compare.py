"""The table of methods on `smol`: `python -m meteor_mini.smol.compare --out runs/compare`.

The protocol (docs/smol.md tells how the model was trained):

1. All methods leave the same mean number of visual tokens per LLM layer, at four averages. Stage
   3's lambda is solved for it on the first of the test questions, whose answers play no part.
2. Each method's own knobs are searched on validation questions, over a grid of at most twelve
   settings, at one of the averages; how much stage 1 leaves before stage 2, last, at the best of
   these. search.csv holds every setting tried. METEOR with a stage left out has METEOR's setting.
3. Then the test split is asked: answers.csv has a row for each question. At the average of the
   search as many more are asked, which the model was never asked before: fresh_answers.csv.
4. times.csv holds the time to the first token, of all methods in turns.

methods.csv and fresh_methods.csv are made of these: a row for each method, average, seed and
family; "hard" are the questions that the smaller picture gets wrong. `page` makes README.md and the
figures of it.

Resumable: what the files hold is not measured again. Change here: METHODS (what of them is drawn:
`page.METHODS_FIGURES`).
"""

import argparse
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from .. import baselines, page
from ..bench import take_turns, time_call
from ..budgets import Budget
from ..methods import (
    SEEDS,
    Row,
    ask,
    compare_answers,
    eagle_rows,
    fastv_row,
    grid_cells,
    prumerge_row,
    pruner_for_average,
    pyramid_row,
    random_in_llm,
    stages,
)
from ..model import Meteor
from ..toy.questions import example_batches, images_and_questions

SHARES = (0.60, 0.40, 0.25, 0.15)  # visual tokens per LLM layer, of one encoder's patches
SEARCH_AT = 0.40
PAPER_RATIO = 1193 / 576  # tokens that stage 1 leaves, to those that stage 2 leaves
OTHER_RATIOS = [3.0, 5.0]  # of METEOR, and of what stands in place of its stage 3
WITH_RATIO = ("METEOR", "FastV", "PyramidDrop", "random in the LLM")
TIMED, SECONDS = 4, 240  # questions of a timing; what all its rounds may take
LAYERS = [(4, 11, 19), (8, 15, 22)]  # of 30: the paper's share of the depth, and PyramidDrop's

# Every method is a function (model, average, **setting) -> Row.


# ------------------------------------------------------------------------- METEOR and parts of it


def both_stages(model: Meteor, K: int, ratio: float = PAPER_RATIO) -> Callable:
    """Stages 1 and 2 that leave K tokens, stage 1 alone `ratio` times as many."""
    return stages(min(round(ratio * K), model.num_tokens), K)


def adaptive(
    model: Meteor, average: float, encode: Callable, layers: tuple, k: int, split: str
) -> Row:
    """Stage 3 behind `encode`, with the lambda that leaves the average on a split's questions."""
    budget = Budget(layers=list(layers), k=k)
    return Row("", encode, pruner_for_average(model, encode, average, budget, split))


def meteor(
    model: Meteor,
    average: int,
    enter: float,
    layers: tuple,
    k: int,
    ratio: float = PAPER_RATIO,
    split: str = "val",
) -> Row:
    encode = both_stages(model, round(enter * average), ratio)
    return adaptive(model, average, encode, layers, k, split)


def stages_1_and_3(
    model: Meteor, average: int, enter: float, layers: tuple, k: int, split: str = "val"
) -> Row:
    return adaptive(model, average, stages(round(enter * average)), layers, k, split)


def stages_2_and_3(
    model: Meteor, average: int, enter: float, layers: tuple, k: int, split: str = "val"
) -> Row:
    return adaptive(model, average, stages(None, round(enter * average)), layers, k, split)


def stages_1_and_2(model: Meteor, average: int, ratio: float) -> Row:
    return Row("", both_stages(model, average, ratio))


def stage_1(model: Meteor, average: int) -> Row:
    return Row("", stages(average))


def stage_2(model: Meteor, average: int, fusion: str = "collaborative") -> Row:
    """Stage 2 alone, or another rule in its place."""
    return Row("", stages(None, average, fusion=fusion), random=fusion == "random")


def stage_3(
    model: Meteor, average: int, enter: float, layers: tuple, k: int, split: str = "val"
) -> Row:
    """All tokens enter the LLM, whatever `enter` is."""
    before = model.num_tokens * layers[0] / model.decoder.config.num_hidden_layers
    if before >= average:
        raise ValueError(f"{before:.0f} of the average come from the layers before the first drop")
    return adaptive(model, average, stages(), layers, k, split)


# ----------------------------------------------------------------------------------------- rivals


def entering(model: Meteor, average: int, counts: dict[int, int]) -> int:
    """Tokens that enter the LLM, so that with {layer: tokens left} the average is met."""
    L = model.decoder.config.num_hidden_layers
    layers, left = zip(*counts.items())
    later = np.diff([*layers, L]) @ left
    return min(round((average * L - later) / layers[0]), model.num_tokens)


def fastv(model: Meteor, average: int, enter: float, layer: int, ratio: float = PAPER_RATIO) -> Row:
    L = model.decoder.config.num_hidden_layers
    keep = baselines.fastv_count(round(enter * average), average, layer, L)
    K = entering(model, average, {layer: keep})
    return Row("", both_stages(model, K, ratio), baselines.fastv(keep, layer))


def count_pyramid(model: Meteor, average: int, enter: float, layers: tuple) -> tuple[int, dict]:
    """PyramidDrop's tokens that enter the LLM, and {layer: tokens left}."""
    L = model.decoder.config.num_hidden_layers
    counts = baselines.pyramid_counts(round(enter * average), average, L, layers)
    return entering(model, average, counts), counts


def pyramid_drop(
    model: Meteor, average: int, enter: float, layers: tuple, ratio: float = PAPER_RATIO
) -> Row:
    K, counts = count_pyramid(model, average, enter, layers)
    return Row("", both_stages(model, K, ratio), baselines.pyramid_drop(counts))


def random_in_layers(
    model: Meteor, average: int, enter: float, layers: tuple, ratio: float = PAPER_RATIO
) -> Row:
    K, counts = count_pyramid(model, average, enter, layers)
    return Row("", both_stages(model, K, ratio), random_in_llm(counts), random=True)


def fastv_of_eagle(model: Meteor, average: int, layer: int) -> Row:
    (eagle,) = eagle_rows(model, "")
    return fastv_row(model, eagle.encode, grid_cells(model), average, layer)


def pyramid_drop_of_eagle(model: Meteor, average: int, layers: tuple) -> Row:
    (eagle,) = eagle_rows(model, "")
    return pyramid_row(model, eagle.encode, grid_cells(model), average, layers)


def prumerge(model: Meteor, average: int) -> Row:
    return prumerge_row(model.encoders, average)


def some_encoders(model: Meteor, average: int, names: tuple[str, ...]) -> Row:
    available = sum(model.views[name].num_tokens for name in names)
    return Row("", stages(min(average, available), encoders=tuple(names)))


def pool(model: Meteor, average: int) -> Row:
    return Row("", lambda model, images: baselines.pool(model, images, average))


def shrink(model: Meteor, average: int) -> Row:
    return Row("", lambda model, images: baselines.shrink(model, images, average))


def blank(model: Meteor, average: int) -> Row:
    """What is right without seeing anything: all pictures are grey."""
    see = stages(None, average, fusion="regular grid")
    return Row("", lambda model, images: see(model, torch.full_like(images, 0.5)))


ENCODERS = ("clip", "convnext", "eva", "pix2struct")
ENTER = [1.5, 2.0, 3.0]  # tokens that enter the LLM, to the average
PYRAMID = {"enter": ENTER, "layers": [*LAYERS, (2, 8, 15), (10, 17, 23)]}
OF_EAGLE = [(1, 8, 15), (2, 8, 15), (3, 8, 15), (4, 11, 19)]  # within reach of all averages
METHODS = {  # name -> its function, and the values of each of its knobs; None: METEOR's setting
    "METEOR": (meteor, {"enter": [1.5, 2.0], "layers": LAYERS, "k": [3, 5, 9]}),
    "stages 1+2": (stages_1_and_2, {"ratio": [1.25, 1.5, PAPER_RATIO, 3.0]}),
    "stages 1+3": (stages_1_and_3, None),
    "stages 2+3": (stages_2_and_3, None),
    "stage 1": (stage_1, {}),
    "stage 2": (stage_2, {}),
    "stage 3": (stage_3, None),
    "FastV": (fastv, {"enter": ENTER, "layer": [2, 4, 6, 8]}),
    "PyramidDrop": (pyramid_drop, PYRAMID),
    "random in the LLM": (random_in_layers, PYRAMID),
    "EAGLE-style, FastV": (fastv_of_eagle, {"layer": [1, 2, 3, 4]}),
    "EAGLE-style, PyramidDrop": (pyramid_drop_of_eagle, {"layers": OF_EAGLE}),
    "PruMerge++-style": (prumerge, {}),
    "DivPrune": (partial(stage_2, fusion="DivPrune"), {}),
    "random": (partial(stage_2, fusion="random"), {}),
    "regular grid": (partial(stage_2, fusion="regular grid"), {}),
    "average pooling": (pool, {}),
    "smaller picture": (shrink, {}),
    "blank picture": (blank, {}),
    "best encoder": (some_encoders, {"names": list(itertools.combinations(ENCODERS, 1))}),
    "best pair": (some_encoders, {"names": list(itertools.combinations(ENCODERS, 2))}),
}


# -------------------------------------------------------------------------- settings, by validation


def settings_of(name: str) -> list[dict]:
    """The grid of a method's knobs; empty for a part of METEOR."""
    _, knobs = METHODS[name]
    if knobs is None:
        return []
    return [dict(zip(knobs, values)) for values in itertools.product(*knobs.values())]


def build_row(model: Meteor, name: str, share: float, setting: dict, split: str = "val") -> Row:
    """The row of a method at an average, which is `share` of one encoder's patches.

    Args: split: of the questions on which lambda is solved.
    Raises: ValueError where the setting cannot reach the average.
    """
    build, _ = METHODS[name]
    if "k" in setting:  # it has a stage 3
        setting = setting | {"split": split}
    return replace(build(model, round(share * grid_cells(model)), **setting), method=name)


def search(model: Meteor, name: str, setting: dict, samples: int) -> dict:
    """A setting on validation questions; without accuracy where it cannot reach the average."""
    line = {"method": name, "setting": json.dumps(setting)}
    line |= {"share": SEARCH_AT, "questions": samples}
    try:
        row = build_row(model, name, SEARCH_AT, setting)
    except ValueError as error:
        return line | {"remark": str(error)}
    answers = ask(model, row, samples, split="val")
    return line | {"tokens": answers["tokens"].mean(), "accuracy": 100 * answers["right"].mean()}


def best_setting(searched: pd.DataFrame, name: str) -> dict:
    """The setting of most right answers; the first of equals. Parts of METEOR have METEOR's."""
    is_part = METHODS[name][1] is None
    own = searched[searched["method"] == ("METEOR" if is_part else name)].reset_index(drop=True)
    setting = json.loads(own["setting"][own["accuracy"].idxmax()])
    if is_part:
        setting.pop("ratio", None)  # of stages 1 and 2, which no part has both before stage 3
    return setting


def rows_at(model: Meteor, searched: pd.DataFrame, share: float) -> list[Row]:
    """All methods at an average, but those whose setting cannot reach it.

    At the share of all patches, those without a setting: unpruned, and EAGLE-style fusion.
    """
    if share == all_patches(model):
        return [Row("unpruned", stages()), *eagle_rows(model, "unpruned")]
    rows = []
    for name in METHODS:
        try:
            setting = best_setting(searched, name)
            rows.append(build_row(model, name, share, setting, "test"))
        except ValueError as error:
            print(f"{name} at {share:.0%}: {error}", flush=True)
    return rows


def all_patches(model: Meteor) -> float:
    return model.num_tokens / grid_cells(model)


# ---------------------------------------------------------------------------------- the test split


@torch.no_grad()
def time_rows(model: Meteor, rows: list[Row]) -> pd.DataFrame:
    """The time from a picture to the first token, the methods in turns, the unpruned model and
    EAGLE's fusion too: of some questions, one at a time.

    Returns: method; rounds; ms of all questions, median over the rounds; speed_up: the unpruned
        time over the row's in the same round, its median, the least and the most.
    """
    always = [Row("unpruned", stages()), *eagle_rows(model, "unpruned")]
    rows = {row.method: row for row in [*always, *rows]}  # once
    images, questions = images_and_questions(next(example_batches("val", TIMED)))

    def first_token(row: Row) -> None:
        for image, question in zip(images.split(1), questions):
            encoded = row.encode(model, image)
            model.generate(encoded, [question], Budget.keep_all(), row.pruner, max_new_tokens=1)

    work = {name: partial(time_call, partial(first_token, row)) for name, row in rows.items()}
    by_method = take_turns(work, SECONDS).groupby("method", sort=False)
    times = by_method[["ms", "speed_up"]].median()
    speed_ups = by_method["speed_up"]
    times = times.assign(rounds=speed_ups.size(), least=speed_ups.min(), most=speed_ups.max())
    return times.reset_index()


def summarise(answers: pd.DataFrame, times: pd.DataFrame) -> pd.DataFrame:
    """A row for each share, method, seed and family, METEOR against the unpruned model and all
    others against METEOR, paired. EAGLE's fusion has a row at every share, always the same.

    Args: answers: share, method, seed, and the columns of `ask`; times: share, and the columns of
        `time_rows`.
    """
    answers = repeat_eagle(answers)
    cases = {
        case: own.reset_index(drop=True)
        for case, own in answers.groupby(["share", "method", "seed"], sort=False)
    }
    most = answers["share"].max()  # of all patches
    records = []
    for (share, method, seed), own in cases.items():
        against = "unpruned" if method == "METEOR" or share == most else "METEOR"
        against = None if method == "unpruned" else against
        other = cases.get((most if against == "unpruned" else share, against, 0))
        easy = cases.get((share, "smaller picture", 0))
        hard = None if easy is None else ~easy["right"]
        for line in compare_answers(own, other, hard):
            head = {"share": share, "method": method, "against": against, "seed": seed}
            records.append(head | line)
    return pd.DataFrame(records).merge(times, on=["share", "method"], how="left")


def repeat_eagle(frame: pd.DataFrame) -> pd.DataFrame:
    """At every share, EAGLE's rows, which were measured once, beside the unpruned model's."""
    most = frame["share"].max()
    eagle = frame[(frame["share"] == most) & (frame["method"] != "unpruned")]
    shares = [share for share in frame["share"].unique() if share != most]
    return pd.concat([*(eagle.assign(share=share) for share in shares), frame], ignore_index=True)


def ask_all(
    model: Meteor, rows: list[Row], share: float, samples: int, first: int, file: Path
) -> None:
    """Put the answers of the rows into `file`, but those that it holds.

    Args: first: number of the first question of the test split.
    """
    answers = load_csv(file, "share", "method", "seed")
    done = set(zip(answers["share"], answers["method"], answers["seed"]))
    for row in rows:
        for seed in SEEDS if row.random else SEEDS[:1]:
            if (share, row.method, seed) not in done:
                own = ask(model, row, samples, seed, first=first)
                own = own.assign(share=share, method=row.method, seed=seed)
                answers = append(file, answers, own)


def load_csv(file: Path, *columns: str) -> pd.DataFrame:
    return pd.read_csv(file) if file.exists() else pd.DataFrame({name: [] for name in columns})


def append(file: Path, frame: pd.DataFrame, more: pd.DataFrame) -> pd.DataFrame:
    """The frame that `file` holds with more rows, which are written to it."""
    frame = pd.concat([frame, more], ignore_index=True) if len(frame) else more
    frame.to_csv(file, index=False, float_format="%.6g")
    return frame


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the CSV files")
    parser.add_argument("--search", type=int, default=48, help="validation questions")
    parser.add_argument("--samples", type=int, default=120, help="test questions")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    model = Meteor.from_pretrained("smol")

    searched = load_csv(args.out / "search.csv", "method", "setting")
    done = set(zip(searched["method"], searched["setting"]))
    for name in METHODS:
        for setting in settings_of(name):
            if (name, json.dumps(setting)) not in done:
                line = search(model, name, setting, args.search)
                print(line, flush=True)
                searched = append(args.out / "search.csv", searched, pd.DataFrame([line]))

    of_grids = searched[~searched["setting"].str.contains("ratio")]
    for name, ratio in itertools.product(WITH_RATIO, OTHER_RATIOS):
        setting = best_setting(of_grids, name) | {"ratio": ratio}
        if (name, json.dumps(setting)) not in done:
            line = search(model, name, setting, args.search)
            searched = append(args.out / "search.csv", searched, pd.DataFrame([line]))

    times = load_csv(args.out / "times.csv", "share")
    for share in (all_patches(model), *SHARES):
        if share in set(times["share"]):
            continue  # the times are measured last
        rows = rows_at(model, searched, share)
        ask_all(model, rows, share, args.samples, 0, args.out / "answers.csv")
        if share in (all_patches(model), SEARCH_AT):
            ask_all(model, rows, share, args.samples, args.samples, args.out / "fresh_answers.csv")
        own = time_rows(model, rows).assign(share=share)
        times = append(args.out / "times.csv", times, own)
    for name in ("", "fresh_"):
        methods = summarise(pd.read_csv(args.out / f"{name}answers.csv"), times)
        methods.to_csv(args.out / f"{name}methods.csv", index=False, float_format="%.6g")
    page.write(args.out)
    print((args.out / "README.md").read_text())


if __name__ == "__main__":
    main()
