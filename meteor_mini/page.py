"""results/: CSV files, a figure for each table and finding, and the page that shows them.

`save` puts what was measured into a CSV file and draws it; `write` makes README.md from these files
alone, and from those that `smol.compare` leaves. The words are those of page.md, where {name}
stands for the numbers of a table or finding.

Change here: page.md; METHODS_FIGURES and FIGURES, what is drawn.
"""

import json
import re
from pathlib import Path

import pandas as pd

from . import plots
from .toy.questions import GROUPS, OCR_CHART, QUESTION_FAMILIES

TEXT = Path(__file__).with_name("page.md").read_text()
SECTIONS = re.split(r"^(?=##)", TEXT, flags=re.MULTILINE)

ACCURACY = ("accuracy", "low", "high")  # of methods.csv: a value and its interval
DIFFERENCE = ("difference", "difference_low", "difference_high")

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
    return TEXT.index(f"{{{name}}}")


def draw(folder: Path, name: str) -> None:
    """The figure of a table or finding, from its CSV file."""
    frame, title = read(folder, name), title_of(name)
    if "table" in frame:
        figure = plots.table_figure(frame, title)
    else:
        criteria, label = FIGURES[name]
        shown = groups_of(frame)
        figure = plots.finding_figure(shown[shown["criterion"].isin(criteria)], label, title)
    figure.savefig(folder / f"{name}.png")


# --------------------------------------------------------------------------------------- the page


def write(folder: Path) -> None:
    """README.md, and figures that are not there, from the CSV files alone.

    A section of page.md is left out where one of its numbers was not measured.
    """
    numbers = methods_numbers(folder) if (folder / "methods.csv").exists() else {}
    for column in ("table", "finding"):
        for name, frame in read_all(folder, column).groupby(column):
            numbers[name] = numbers_in_text(frame.reset_index(drop=True))
            if not (folder / f"{name}.png").exists():
                draw(folder, name)
    filled = [fill(section, numbers) for section in SECTIONS if placeholders(section) <= {*numbers}]
    (folder / "README.md").write_text("".join(filled))


def placeholders(section: str) -> set[str]:
    return set(re.findall(r"{(\w+)}", section))


def fill(section: str, numbers: dict[str, str]) -> str:
    return re.sub(r"{(\w+)}", lambda match: numbers[match[1]], section)


def section_of(name: str) -> str:
    """The section of page.md that shows a table or finding."""
    return next(section for section in SECTIONS if name in placeholders(section))


def title_of(name: str) -> str:
    return section_of(name).splitlines()[0].strip("# ")


def as_section(name: str, frame: pd.DataFrame) -> str:
    """A table or finding in words and numbers, without its figure."""
    words = re.sub(r"!\[.*\n\n", "", section_of(name))
    return fill(words, {name: numbers_in_text(frame)})


def numbers_in_text(frame: pd.DataFrame) -> str:
    tables = [method_table(frame)] if "table" in frame else finding_tables(frame)
    unit = "pictures" if "kind" in frame and frame["kind"].isna().all() else "questions"
    asked = f"{int(frame['questions'].max())} {unit}:"
    return "\n\n".join([asked, *map(fenced, tables)])


def method_table(frame: pd.DataFrame) -> pd.DataFrame:
    """A row for each method, numbered; its accuracy, and its difference to the one in *to*."""
    methods = list(frame["method"].unique())
    rows = []
    for method in methods:
        of_method = frame[frame["method"] == method]
        against = of_method["against"].iloc[0]
        row = {"method": name_with_seeds(method, of_method), **numbers_of(of_method)}
        row["to"] = methods.index(against) + 1 if against in methods else ""
        for kind in plots.PANELS:
            own = of_method[of_method["family"] == kind]
            row[kind] = over_seeds(own, *ACCURACY, form=".1f")
        for kind in plots.PANELS:
            own = of_method[of_method["family"] == kind]
            row[f"difference, {kind}"] = over_seeds(own, *DIFFERENCE, form="+.1f")
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


def methods_numbers(folder: Path) -> dict[str, str]:
    """What `smol.compare` measured, for page.md, from methods.csv and search.csv; draws figures."""
    methods, searched = pd.read_csv(folder / "methods.csv"), pd.read_csv(folder / "search.csv")
    share, most = searched["share"].max(), methods["share"].max()  # most: of all patches
    for name, (title, others) in METHODS_FIGURES.items():
        draw_methods(methods, others, title).savefig(folder / f"methods_{name}.png")
    fresh = pd.read_csv(folder / "fresh_methods.csv")
    tables = {
        "accuracy": by_share(methods, ACCURACY, ".1f"),
        "difference": by_share(methods, DIFFERENCE, "+.1f"),
        "tokens": by_share(methods, ("tokens",), ".1f"),
        "fresh_accuracy": by_share(fresh, ACCURACY, ".1f"),
        "fresh_difference": by_share(fresh, DIFFERENCE, "+.1f"),
        "fresh_tokens": by_share(fresh, ("tokens",), ".1f"),
        "kinds": kinds_table(methods[methods["share"].isin([share, most])]),
        "at_equal_time": at_equal_time(methods).round(1),
        "settings": settings_table(searched),
    }
    words = {
        "searched": f"{searched['questions'].max():.0f}",
        "search_at": f"{share:.0%}",
        "asked": f"{methods['questions'].max():.0f}",
        "rounds": f"{methods['rounds'].min():.0f}",
    }
    return words | {name: fenced(table) for name, table in tables.items()}


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
            row[kind] = over_seeds(of_kind, *ACCURACY, form=".1f")
    return pd.DataFrame(table).T


def name_with_seeds(method: str, rows: pd.DataFrame) -> str:
    seeds = rows["seed"].nunique()
    return method if seeds == 1 else f"{method} ({seeds} seeds)"


def fenced(table: pd.DataFrame) -> str:
    return f"```\n{table.to_string(na_rep='')}\n```"


def draw_methods(methods: pd.DataFrame, others: list[str], title: str):
    """Accuracy by tokens, METEOR's with its interval, in a panel for each kind of question."""
    panels = {}
    for kind in plots.PANELS:
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
                    "tokens": f"{best['tokens']:.1f}",
                    "accuracy": f"{low:.1f} to {high:.1f}",
                }
            )
    columns = ["method", "setting", "tried", "tokens", "accuracy"]
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
