"""What the embedded model must be, so that METEOR can be learned from it, and what was measured.

Each row of the table is a requirement: what it is about, its target, what was measured, whether it
holds. They are read off the results of the tables and studies, which measure on the test split.
"""

from ..toy.questions import FAMILIES
from .orders import REVERSE, YES

TWO_STEPS = ("label", "tag")  # families that find one thing, and read another
UNPRUNED, EACH_FAMILY = 93, 80  # percent, at least
SHARE_OF_GRID = 24  # percent of one encoder's grid cells, at most
LOSS, LOSS_AT_MOST = 1, 2  # points: measured, and the upper end of its interval
ALONE = 15  # points that the best single encoder is below all, at least
WORTH = 10  # points that leaving an encoder out costs in some family, at least
CUR_OF_OCR = 0.6  # of Pix2Struct, at least
MISSED = 2  # points; an encoder whose loss is no larger is not missed
DEEP = 10  # points lost when all visual tokens go after a quarter of the layers, at least
MORE_TOKENS = 1.2  # OCR & Chart to General, at least
FOCUS = 3  # times a random choice, at least
SHOWN = 11  # orders that are "yes", at least


def requirement(what: str, target: str, measured: str, holds: bool) -> dict:
    return {"what": what, "target": target, "measured": measured, "holds": bool(holds)}


def requirements(
    unpruned: dict,
    meteor: dict,
    ratio: tuple[float, float, float],
    late_ratio: tuple[float, float, float],
    redundancy: dict,
    drops: dict,
    focus: dict,
    orders: list[dict],
    cells: int,
) -> list[dict]:
    """All requirements, in order.

    Args: unpruned, meteor: rows of `report`, the second compared with the first; ratio: of tokens
        per LLM layer, OCR & Chart to General, with its interval; late_ratio: the same of the layers
        from the first pruned one on; redundancy, drops, focus: of
        `studies`; orders: of `orders.compare`; cells: of one encoder's grid.
    """
    return [
        unpruned_is_good(unpruned),
        meteor_loses_little(meteor, cells),
        no_encoder_alone(redundancy),
        each_is_worth_something(redundancy),
        pix2struct_reads(redundancy),
        some_family_is_redundant(redundancy),
        llm_reads_deep(drops),
        counts_adapt(meteor, ratio, late_ratio),
        figure_tells_the_truth(focus),
        orders_show(orders),
    ]


# ------------------------------------------------------------------ accuracy


def unpruned_is_good(row: dict) -> dict:
    mean = row["accuracy"]["all"][0]
    each = {family: row["accuracy"][family][0] for family in FAMILIES}
    worst = min(each, key=each.get)
    enough = len(FAMILIES) >= 10 and len(TWO_STEPS) >= 2
    return requirement(
        "unpruned",
        f"{UNPRUNED} % on average, {EACH_FAMILY} % in every family, at least ten families, two of "
        "them of two steps",
        f"{mean:.1f} % of {row['questions']} questions; lowest {worst} {each[worst]:.0f} %; "
        f"{len(FAMILIES)} families, of two steps " + ", ".join(TWO_STEPS),
        mean >= UNPRUNED and each[worst] >= EACH_FAMILY and enough,
    )


def meteor_loses_little(row: dict, cells: int) -> dict:
    gain, low, high = row["differences"]["all"]
    loss, least, most = 0 - gain, 0 - high, 0 - low  # -gain would print -0.0
    tokens = row["average_tokens"]
    share = 100 * tokens / cells
    return requirement(
        "METEOR",
        f"at most {SHARE_OF_GRID} % of one encoder's grid cells, within {LOSS} point of unpruned, "
        f"upper end of the interval of the loss at most {LOSS_AT_MOST}",
        f"{tokens:.1f} tokens, {share:.1f} % of {cells}; loses {points(loss, least, most)} on "
        f"{row['questions']} questions",
        share <= SHARE_OF_GRID and loss <= LOSS and most <= LOSS_AT_MOST,
    )


# ------------------------------------------------------------------ encoders


def no_encoder_alone(redundancy: dict) -> dict:
    names = list(redundancy["losses"])
    subsets = redundancy["subsets"]
    full = subsets["+".join(names)]["all"][0]
    each = {name: subsets[name]["all"][0] for name in names}
    best = max(each, key=each.get)
    return requirement(
        "no encoder alone",
        f"the best single encoder at least {ALONE} points below all",
        f"all {full:.1f} %, {best} alone {each[best]:.1f} %, {full - each[best]:.1f} points below",
        full - each[best] >= ALONE,
    )


def each_is_worth_something(redundancy: dict) -> dict:
    said, enough = [], True
    for name, losses in redundancy["losses"].items():
        family = max(FAMILIES, key=lambda family, of=losses: of[family][0])
        said.append(f"{name}: {family} {points(*losses[family])}")
        enough = enough and losses[family][0] >= WORTH
    return requirement(
        "each encoder is worth something",
        f"for each, a family in which leaving it out costs {WORTH} points or more",
        "; ".join(said),
        enough,
    )


def pix2struct_reads(redundancy: dict) -> dict:
    rate = redundancy["cur"]["OCR"]["pix2struct"]
    return requirement(
        "Pix2Struct reads",
        f"its CUR on OCR (OCR & Chart without charts) at least {CUR_OF_OCR}",
        f"{rate:.2f}",
        rate >= CUR_OF_OCR,
    )


def some_family_is_redundant(redundancy: dict) -> dict:
    """A family in which the encoder that is missed most is missed least of all families."""
    general = [family for family, group in FAMILIES.items() if group == "General"]
    most = {}  # family -> (points, encoder) of the encoder that is missed most
    for family in general:
        losses = {name: loss[family][0] for name, loss in redundancy["losses"].items()}
        encoder = max(losses, key=losses.get)
        most[family] = (losses[encoder], encoder)
    family = min(most, key=most.get)
    loss, encoder = most[family]
    return requirement(
        "general questions are redundant",
        f"a General family in which leaving out any one encoder costs {MISSED} points or less",
        f"{family}: at most {loss:.1f} points ({encoder})",
        loss <= MISSED,
    )


# ------------------------------------------------------------------ the LLM


def llm_reads_deep(drops: dict) -> dict:
    number = len(drops["layers"]) + 1  # of layers in the LLM
    quarter = number // 4
    (entry,) = (entry for entry in drops["layers"] if entry["layers"] == quarter)
    return requirement(
        "the LLM reads deep",
        f"dropping all visual tokens after the first quarter of the layers costs {DEEP} points or "
        "more",
        f"after {quarter} of {number} layers {points(*entry['loss'])}",
        entry["loss"][0] >= DEEP,
    )


def counts_adapt(row: dict, ratio: tuple, late_ratio: tuple) -> dict:
    value = ratio[0]
    general, ocr = (row["group_tokens"][group][0] for group in ("General", "OCR & Chart"))
    return requirement(
        "counts adapt",
        f"OCR & Chart questions keep at least {100 * (MORE_TOKENS - 1):.0f} % more tokens than "
        "General ones, at lambda solved on validation",
        f"{ocr:.1f} against {general:.1f} tokens per LLM layer: {more(ratio)}; from the first "
        f"pruned layer on {more(late_ratio)}",
        value >= MORE_TOKENS,
    )


def figure_tells_the_truth(focus: dict) -> dict:
    measured = focus["all"]
    value, low, high = measured["ratio"]
    in_llm = measured["ratio in the LLM"][0]
    return requirement(
        "the figure tells the truth",
        f"of the tokens left at the last pruned layer, the share on what is asked about is {FOCUS} "
        "times that of a random choice of as many, or more",
        f"{measured['left']:.0f} % against {measured['of all']:.1f} %: {value:.1f} times "
        f"[{low:.1f}, {high:.1f}]; {in_llm:.1f} times a choice among those that enter the LLM",
        value >= FOCUS,
    )


# ------------------------------------------------------------------ the paper's orders


def orders_show(orders: list[dict]) -> dict:
    verdicts = [entry["verdict"] for entry in orders]
    shown, reverse = verdicts.count(YES), verdicts.count(REVERSE)
    return requirement(
        "the paper's orders",
        f'at least {SHOWN} of {len(orders)} "yes", none "reverse"',
        f"{shown} yes, {len(orders) - shown - reverse} not shown, {reverse} reverse",
        shown >= SHOWN and reverse == 0,
    )


def more(ratio: tuple[float, float, float]) -> str:
    """1.2 [1.1, 1.3] -> +20 % [+10, +30]"""
    value, low, high = (100 * (end - 1) for end in ratio)
    return f"{value:+.0f} % [{low:+.0f}, {high:+.0f}]"


def points(value: float, low: float, high: float) -> str:
    return f"{value:.1f} points [{low:.1f}, {high:.1f}]"
