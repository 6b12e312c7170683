"""results/: CSV files, a figure for each table and finding, and the page that shows them.

`save` puts what was measured into a CSV file and draws it; `write` makes README.md from these files
alone, and from methods.csv, which `smol.compare` leaves.
"""

import json
from pathlib import Path

import pandas as pd

from . import plots
from .toy.questions import GROUPS, OCR_CHART, QUESTION_FAMILIES

# ------------------------------------------------------------------------------------- the words

TEXTS = {  # title; what is compared, and what the paper found
    "1": (
        "Table 1: how encoders share the budget",
        "Stage 1 alone, with shares in proportion to ranks, equal ones, and ones in inverse "
        "proportion, at the same totals. The paper: 67.99, 66.87 and 65.69 (supplement, Table 1).",
    ),
    "2": (
        "Table 2: what fusion drops",
        "Stages 1 and 2 with other rules in stage 2, and EAGLE-style fusion of all tokens. Its "
        "Resampler, MLP and PixShuffle are left out: we did not train them. The "
        "paper, on DocVQA from 1193 to 576 tokens: collaborative 72.2, as without pruning, within "
        "each encoder 66.2, random 43.0; EAGLE-style 70.9 (supplement, Table 2).",
    ),
    "3": (
        "Table 3: fixed and adaptive counts in the LLM",
        "What stage 3 adds to a fixed count in one layer: the top heads, more layers, counts that "
        "follow the question. The paper, on DocVQA: 59.9, 61.4, 65.9, 69.0, without stage 3 72.2 "
        "(supplement, Table 3; its third adaptive row is printed as 126 tokens, its counts make "
        "162).",
    ),
    "6": (
        "Table 6: a single encoder, stages 1 and 3",
        "Pix2Struct alone, the encoder that reads, pruned inside by stage 1, and at its output by "
        "PruMerge++ or by stage 1's rule. The paper, LLaVA-1.5 on TextVQA: 58.2 unpruned, stage 1 "
        "57.3 and PruMerge++ 57.1 at 29 % of the FLOPs, stages 1 and 3 53.8 at 12 % (supplement, "
        "Table 6).",
    ),
    "7": (
        "Table 7: a single encoder, stage 3",
        "Pix2Struct alone, pruned in the LLM only, at 45 % of its tokens, by all methods in the "
        "same layers. The paper, LLaVA-Next "
        "on DocVQA: 70.0 unpruned, FastV 62.1, PyramidDrop 65.6, stage 3 67.5 (supplement, "
        "Table 7).",
    ),
    "8": (
        "Table 8: heads and lambda",
        "Stage 3 with other numbers of heads, of 9, at METEOR's average, then with 65/50 and 25/50 "
        "of its lambda, as the paper's are of 50. The paper, on OCR tasks: 64.8, 65.0, 64.6 with "
        "3, 5, 7 of 32 heads; 65.6 and 63.4 with the other lambdas (supplement, Table 8).",
    ),
    "figure1": (
        "Figure 1: who survives",
        "Tokens of each encoder that survive each stage, by group of questions; stage 2 compares "
        "all encoders. In the paper EVA and ConvNeXt lead on POPE, Pix2Struct and ConvNeXt on "
        "DocVQA (Figure 1).",
    ),
    "ranks": (
        "Ranks",
        "The rank of each encoder's patches at stage 1's last point, by which encoders share its "
        "budget, here on other pictures; its standard "
        "deviation over pictures; the nuclear-norm diversity. The paper finds that the rank hardly "
        "varies with the picture, so that it can be measured once.",
    ),
    "similarity": (
        "Redundancy within and across encoders",
        "The cosine of a projected token to the other tokens of its encoder and to those of the "
        "other encoders, nothing pruned: the mean, and the highest. The paper drops tokens that "
        "are like those of other encoders, as this hurts less (its Finding 3: Table 2, "
        "collaborative against separate). Here tokens are much more like those of their own "
        "encoder.",
    ),
    "heads": (
        "Findings 4 and 5: which heads look at the picture",
        "The visual attention value of a layer's heads, mean over questions: the lowest, the "
        "median and the highest; and the sum over the top heads, which sets how many tokens stay. "
        "The paper: most heads hardly look (Finding 4), and the sum is high for OCR, low for "
        "coarse questions (Finding 5). A head's value is its mean over questions; the sum has the "
        "top heads of each question, after stages 1 and 2.",
    ),
    "redundancy": (
        "What each encoder is worth",
        "CUR, the share of right answers that is lost when an encoder's output is replaced by "
        "zeros, and the information gap, the largest CUR minus the smallest. The paper of this "
        "measure finds one encoder with a CUR above 90 % on OCR and charts (here, only one was "
        "taught to read), redundancy on general tasks, and some negative CURs (arXiv 2507.03262).",
    ),
    "video": (
        "Table 4: clips tiled into one picture",
        "Short clips, their frames side by side in one picture, of which the model saw none in "
        "training. The paper, METEOR: 79.0 at 242 tokens against EAGLE's 79.2 at 1024 on MSVD, "
        "55.5 against 55.0 on ActivityNet (supplement, Table 4).",
    ),
}


HEAD = """\
# Results on `smol`

`smol` is a pretrained SmolLM2-135M behind four small encoders. The LLM, by LoRA, and the projectors
were trained on the loss of the answers alone, which knows nothing of attention, patches or layers
([how](../docs/smol.md)). This page and its figures are made from the CSV files beside it:
[methods.csv](methods.csv), [search.csv](search.csv) and [answers.csv](answers.csv), a row for each
question, by `python -m meteor_mini.smol.compare --out results`; [tables.csv](tables.csv) and
[findings.csv](findings.csv) by `meteor-mini eval --model smol --table NAME --samples N --out
results`. (The stored ones come from the functions of these commands, run in two processes.) Real
sizes are timed in [benchmark.md](benchmark.md); Findings 1 and 2 on a pretrained encoder and
photographs are in [docs/real_parts.md](../docs/real_parts.md).

Accuracy: exact match in percent, with its 95 % bootstrap interval over questions. A difference, in
points, is on the same questions, with its paired interval; one below 0 is a loss. Of random methods
the brackets are the lowest and the highest of the seeds, which are no interval. *tokens*: visual
tokens per LLM layer. *FLOPs*: encoders, projectors and the LLM's prefill, in millions, without
those of a pruner in the LLM.

What to keep in mind:

- **The model is not fully trained**: see the unpruned row. What a method loses here it may not lose
  on a better model, and the other way round.
- Training left 40 to 420 tokens, at random, mostly below 240, and all 576 in one step of sixteen.
  So *unpruned* is no upper bound; and at an average below 40, methods that prune before the LLM
  feed it fewer tokens than it ever saw, which METEOR does not. Stage 2's rule, random tokens and
  two rules like it were trained on; average pooling, PruMerge++, the grid, DivPrune and the smaller
  picture were not.
- The encoders were trained to name what a patch shows, so that their late attention finds it; EVA
  also to give under stage 1 what it gives unpruned. The projectors began from the names. What the
  rows say of stage 1 need not hold for other encoders.
- EAGLE-style fusion, one token for a cell of all four encoders, was trained as long as the
  projectors, with the same LoRA.
- The questions of the test split were asked more than once: the share of 60 %, METEOR's last knob
  (*Settings*), and the model's own budget, at which the paper's tables are measured, came after the
  results at 40 and 25 % had been seen.

## Methods compared

All methods leave the same mean number of visual tokens per LLM layer, a share of the 144 patches of
one encoder; METEOR's lambda is solved for it on validation questions, so its counts are off by a
few percent. Each method's own settings were searched on {searched} validation questions at
{search_at} (*Settings*, below; stages 1+3, 2+3 and 3 have METEOR's); the test split has {asked}
questions. FastV, PyramidDrop and random in the LLM stand behind METEOR's stages 1 and 2, in place
of stage 3; those of EAGLE-style behind its fusion, which alone leaves 144 tokens, whatever the
share. Stage 3 alone spends nearly all of its average in the layers before its first drop. A smaller
picture is padded for the encoders, so it saves them no time here. A blank picture shows what is
guessed right. In the paper METEOR is 0.3 points below EAGLE with a quarter of its tokens, and 4
above FastV behind EAGLE (main table, Vicuna-7B, 11 benchmarks). In the figures, the band is
METEOR's interval.
"""

METHODS_TABLES = """\
### Right answers, percent

{accuracy}
### Points above METEOR, paired

METEOR's row is its difference to the unpruned model.

{difference}
### Visual tokens per LLM layer, measured

{tokens}
### Kinds of question, at {search_at}

*hard*: the questions that the smaller picture of the same share gets wrong. *speed-up*: the
unpruned model's time to the first token over the method's, in turns, one question at a time, on two
CPU threads; the median over {rounds} rounds [least, most]. From *random* to *blank picture* all do
the same work in the LLM, so their differences are noise and the encoders'.

{kinds}
### At METEOR's time

Each method's best accuracy at a share where it is at least as fast as METEOR is at the column's.
Times differ by a fifth between rounds (above), so who is just in or out of a column is chance.

{at_equal_time}
### Settings

Found on validation questions at {search_at}, of so many tried; so few questions choose roughly, and
the best of twelve accuracies is too high. METEOR's *ratio* (tokens after stage 1 to those after
stage 2, the paper's where it is not given) was varied last, at the best of the other settings.

{settings}"""

TABLES_HEAD = """\
## The paper's tables

In each, a difference is to the row numbered in column *to*. *paper*: how the paper ranks the row to
that one, and the verdict of the questions of OCR & Chart: *shown* where the difference's interval
is on the same side of 0, *reversed* where it is on the other, *not shown* where it contains 0. Most
gaps in the paper, 0.2 to 6 points, are smaller than what so few questions resolve: about 12 points.
Of so many verdicts one may be chance. A random row's verdict needs all its seeds. A stage that
a table does not speak of has the model's own budget.
"""

IN_LLM = ["FastV", "PyramidDrop", "random in the LLM"]
OF_EAGLE = ["EAGLE-style, FastV", "EAGLE-style, PyramidDrop"]
OTHERS = ["PruMerge++-style", "DivPrune", "random", "regular grid", "average pooling"]
SMALLER = ["smaller picture", "blank picture", "best encoder", "best pair"]
PARTS = ["stages 1+2", "stages 1+3", "stages 2+3", "stage 1", "stage 2", "stage 3"]
METHODS_FIGURES = {  # file -> title, methods beside METEOR
    "parts": ("METEOR and its stages", PARTS),
    "inside": ("Rivals that prune inside the LLM", [*IN_LLM, *OF_EAGLE]),
    "before": ("Rivals that prune before the LLM", [*OTHERS, *SMALLER]),
}


FIGURES = {  # of a finding: the criteria that are drawn, and what their values are
    "figure1": (["stage2"], "tokens after stage 2"),
    "ranks": (["rank"], "rank"),
    "similarity": (
        ["mean cosine within the encoder", "mean cosine to the others"],
        "mean cosine",
    ),
    "heads": (["lowest head", "median head", "highest head"], "VAV"),
    "redundancy": (["CUR"], "share of right answers lost"),
    "video": (
        ["accuracy, unpruned", "accuracy, METEOR", "accuracy, EAGLE-style"],
        "right answers, %",
    ),
}


# ---------------------------------------------------------------------------------- the CSV files


def read(folder: Path, name: str) -> pd.DataFrame | None:
    """What was measured of a table or finding; None where it is not in the CSV files."""
    for column in ("table", "finding"):
        frame = read_all(folder, column)
        if name in set(frame[column]):
            return frame[frame[column] == name].reset_index(drop=True)
    return None


def read_all(folder: Path, column: str) -> pd.DataFrame:
    """tables.csv by the column "table", findings.csv by "finding"; empty where there is none."""
    file = folder / f"{column}s.csv"
    if not file.exists():
        return pd.DataFrame({column: []})
    return pd.read_csv(file, dtype={column: str})


def save(folder: Path, name: str, frame: pd.DataFrame) -> None:
    """Put a table or finding into its CSV file, in place of what was measured of it before, and
    draw its figure.
    """
    folder.mkdir(parents=True, exist_ok=True)
    column = "table" if "table" in frame else "finding"
    before = read_all(folder, column)
    others = before[before[column] != name]
    together = pd.concat([others, frame]) if len(others) else frame
    in_order = together.sort_values(column, kind="stable", key=lambda c: c.map(order_on_page))
    in_order.to_csv(folder / f"{column}s.csv", index=False, float_format="%.6g")
    draw(folder, name)


def order_on_page(name: str) -> int:
    return list(TEXTS).index(name)


# --------------------------------------------------------------------------------------- the page


def write(folder: Path) -> None:
    """README.md, and figures that are not there, from the CSV files alone."""
    sections = methods_sections(folder) if (folder / "methods.csv").exists() else []
    names = [name for name in TEXTS if read(folder, name) is not None]
    sections += [TABLES_HEAD] if names else []
    for name in names:
        if not (folder / f"{name}.png").exists():
            draw(folder, name)
        sections.append(section(name, read(folder, name), f"{name}.png"))
    (folder / "README.md").write_text("\n".join(sections))


def section(name: str, frame: pd.DataFrame, figure: str | None = None) -> str:
    """A table or finding in words and numbers."""
    title, text = TEXTS[name]
    picture = [] if figure is None else [f"![{title}]({figure})", ""]
    tables = [method_table(frame)] if "table" in frame else finding_tables(frame)
    blocks = [fenced(table) for table in tables]
    unit = "pictures" if "kind" in frame and frame["kind"].isna().all() else "questions"
    asked = f"{int(frame['questions'].max())} {unit}."
    return "\n".join([f"### {title}", "", *picture, f"{text} {asked}", "", *blocks])


def draw(folder: Path, name: str) -> None:
    """The figure of a table or finding, from its CSV file."""
    frame, (title, _) = read(folder, name), TEXTS[name]
    if "table" in frame:
        figure = plots.table_figure(frame, title)
    else:
        criteria, label = FIGURES[name]
        shown = groups_of(frame)
        figure = plots.finding_figure(shown[shown["criterion"].isin(criteria)], label, title)
    figure.savefig(folder / f"{name}.png")


def method_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each method, numbered; its accuracy, and its difference to the one in *to*."""
    methods = list(frame["method"].unique())
    rows = []
    for method in methods:
        of_method = frame[frame["method"] == method]
        against = of_method["against"].iloc[0]
        row = {"method": name_with_seeds(method, of_method), **numbers_of(of_method)}
        row["to"] = methods.index(against) + 1 if against in methods else ""
        for kind in plots.GROUPS:
            own = of_method[of_method["family"] == kind]
            row[kind] = over_seeds(own, "accuracy", "low", "high", form=".1f")
        for kind in plots.GROUPS:
            own = of_method[of_method["family"] == kind]
            columns = ("difference", "difference_low", "difference_high")
            row[f"difference, {kind}"] = over_seeds(own, *columns, form="+.1f")
        row["paper"] = paper_ranking(of_method)
        rows.append(row)
    return pd.DataFrame(rows, index=range(1, len(rows) + 1))


def paper_ranking(of_method: pd.DataFrame) -> str:
    """How the paper ranks a method, if it does, and whether all its seeds show that."""
    paper = of_method["paper"].iloc[0]
    if pd.isna(paper):
        return ""
    own = of_method[of_method["family"] == OCR_CHART]
    verdict = "not shown"
    if (own["difference_low"] > 0).all():
        verdict = "shown" if paper == "above" else "reversed"
    elif (own["difference_high"] < 0).all():
        verdict = "shown" if paper == "below" else "reversed"
    return f"{paper}: {verdict}"


def numbers_of(of_method: pd.DataFrame) -> dict[str, str]:
    """Tokens and FLOPs of a method, over all questions and seeds; its speed-up, if measured."""
    overall = of_method[of_method["family"] == "all"]
    tokens, flops = overall["tokens"].mean(), overall["flops"].mean()
    numbers = {"tokens": f"{tokens:.1f}", "FLOPs": f"{flops / 1e6:.0f}"}
    if "speed_up" in of_method:
        speed_up = overall[["speed_up", "least", "most"]].mean()
        numbers["speed-up"] = with_interval(*speed_up, form=".2f")
    return numbers


def over_seeds(own: pd.DataFrame, value: str, *interval: str, form: str) -> str:
    """A value with its interval, if it has one; of several seeds the mean, lowest and highest."""
    if len(own) == 0 or own[value].isna().all():
        return ""
    of_seeds = own[value]
    if not interval:
        return f"{of_seeds.mean():{form}}"
    if len(own) > 1:
        return with_interval(of_seeds.mean(), of_seeds.min(), of_seeds.max(), form)
    return with_interval(of_seeds.iloc[0], *own[list(interval)].iloc[0], form)


def with_interval(value: float, low: float, high: float, form: str = ".3g") -> str:
    if pd.isna(low):
        return f"{value:{form}}"
    return f"{value:{form}} [{low:{form}}, {high:{form}}]"


# ------------------------------------------------------------------------- the table of methods


def methods_sections(folder: Path) -> list[str]:
    """What `smol.compare` measured, from methods.csv and search.csv; draws the figures."""
    methods, searched = pd.read_csv(folder / "methods.csv"), pd.read_csv(folder / "search.csv")
    asked, share = int(searched["questions"].max()), searched["share"].max()
    questions = int(methods["questions"].max())
    head = HEAD.format(searched=asked, search_at=f"{share:.0%}", asked=questions)
    most, figures = methods["share"].max(), []  # most: of all patches
    for name, (title, others) in METHODS_FIGURES.items():
        draw_methods(methods, others, title).savefig(folder / f"methods_{name}.png")
        figures.append(f"![{title}](methods_{name}.png)\n")
    tables = {
        "accuracy": by_share(methods, ("accuracy", "low", "high"), ".1f"),
        "difference": by_share(
            methods, ("difference", "difference_low", "difference_high"), "+.1f"
        ),
        "tokens": by_share(methods, ("tokens",), ".1f"),
        "kinds": kinds_table(methods[methods["share"].isin([share, most])]),
        "at_equal_time": at_equal_time(methods).round(1),
        "settings": settings_table(searched),
    }
    tables = {name: fenced(table) for name, table in tables.items()}
    words = {"search_at": f"{share:.0%}", "rounds": int(methods["rounds"].min())}
    return [head, *figures, METHODS_TABLES.format(**words, **tables)]


def by_share(methods: pd.DataFrame, columns: tuple[str, ...], form: str) -> pd.DataFrame:
    """A row for each method, a column for each share, of all questions."""
    overall = methods[methods["family"] == "all"]
    most = overall["share"].max()  # of all patches
    everywhere = overall[overall["method"] == "unpruned"]
    table = {}
    for share in sorted(set(overall["share"]) - {most}, reverse=True):
        own = pd.concat([everywhere, overall[overall["share"] == share]])
        cells = {}
        for method, rows in own.groupby("method", sort=False):
            name = name_with_seeds(method, rows)
            cells[name] = over_seeds(rows, *columns, form=form)
        tokens = overall[overall["share"] == share]["tokens"].median()
        table[f"{share:.0%}, {tokens:.0f} tokens"] = pd.Series(cells)
    longest = max(table.values(), key=len)  # some method reaches few shares
    return pd.DataFrame(table).reindex(longest.index).fillna("")


def kinds_table(methods: pd.DataFrame) -> pd.DataFrame:
    """Accuracy by kind of question, FLOPs and speed-up of each method, of one share and of all
    patches.
    """
    table = {}
    for method, own in methods.groupby("method", sort=False):
        own = own[own["share"] == own["share"].min()]
        row = table[name_with_seeds(method, own)] = numbers_of(own)
        for kind in (*GROUPS, "hard"):
            of_kind = own[own["family"] == kind]
            row[kind] = over_seeds(of_kind, "accuracy", "low", "high", form=".1f")
    return pd.DataFrame(table).T


def name_with_seeds(method: str, rows: pd.DataFrame) -> str:
    seeds = rows["seed"].nunique()
    return method if seeds == 1 else f"{method} ({seeds} seeds)"


def fenced(table: pd.DataFrame) -> str:
    return f"```\n{table.to_string(na_rep='')}\n```\n"


def draw_methods(methods: pd.DataFrame, others: list[str], title: str):
    """Accuracy by tokens, METEOR's with its interval, in a panel for each kind of question."""
    panels = {}
    for kind in plots.GROUPS:
        lines = {}
        for method in ("METEOR", *others):
            own = methods[(methods["method"] == method) & (methods["family"] == kind)]
            own = own.groupby("share")[["tokens", "accuracy", "low", "high"]].mean()
            if len(own):
                columns = own.to_numpy().T  # tokens, accuracy, low, high
                lines[method] = tuple(columns if method == "METEOR" else columns[:2])
        panels[kind] = lines
    return plots.line_figure(panels, "visual tokens per LLM layer", "right answers, %", title)


def at_equal_time(methods: pd.DataFrame) -> pd.DataFrame:
    """Each method's best accuracy among the shares where it is at least as fast as METEOR.

    Returns: a row for each method, a column for each of METEOR's shares; nan where a method is
        always slower.
    """
    overall = methods[methods["family"] == "all"]
    points = overall.groupby(["method", "share"], sort=False)[["accuracy", "speed_up"]].mean()
    table = {}
    for (_, share), meteor in points.loc[["METEOR"]].sort_index(ascending=False).iterrows():
        fast = points[points["speed_up"] >= meteor["speed_up"]]
        best = fast.groupby("method", sort=False)["accuracy"].max()
        table[f"{share:.0%}, speed-up {meteor['speed_up']:.2f}"] = best
    return pd.DataFrame(table).reindex(points.index.unique("method"))


def settings_table(searched: pd.DataFrame) -> pd.DataFrame:
    """For each method with settings: how many were tried, the best, and the accuracies' range."""
    rows = []
    for method, own in searched.groupby("method", sort=False):
        reached = own.dropna(subset="accuracy")
        if len(own) > 1:
            best = reached.loc[reached["accuracy"].idxmax()]
            setting = ", ".join(f"{k} {v}" for k, v in json.loads(best["setting"]).items())
            low, high = reached["accuracy"].min(), reached["accuracy"].max()
            rows.append(
                {
                    "method": method,
                    "setting": setting,
                    "tried": len(own),
                    "accuracy": f"{low:.1f} to {high:.1f}",
                }
            )
    columns = ["method", "setting", "tried", "accuracy"]
    return pd.DataFrame(rows, columns=columns).set_index("method")


# ------------------------------------------------------------------------------------- findings


def groups_of(frame: pd.DataFrame) -> pd.DataFrame:
    """A finding without its single families: these are in findings.csv alone."""
    return frame[~frame["kind"].isin(QUESTION_FAMILIES)]


def finding_tables(frame: pd.DataFrame) -> list[pd.DataFrame]:
    """A table of all lines that fill the same of the fields encoder, kind and layer: the last of
    these makes its columns, the others and the criterion its rows.
    """
    frame = groups_of(frame).astype({"layer": "Int64"})
    numbers = frame[["value", "low", "high"]].itertuples(index=False)
    frame = frame.assign(text=[with_interval(*each) for each in numbers])
    fields = ["encoder", "kind", "layer"]
    tables = []
    for filled, lines in frame.groupby([frame[field].notna() for field in fields], sort=False):
        *others, columns = [field for field, is_filled in zip(fields, filled) if is_filled]
        rows = [*others, "criterion"]
        for field in (*rows, columns):  # in the order of the lines: pivot sorts
            lines = lines.assign(**{field: pd.Categorical(lines[field], lines[field].unique())})
        tables.append(lines.pivot(index=rows, columns=columns, values="text").fillna(""))
    return tables
