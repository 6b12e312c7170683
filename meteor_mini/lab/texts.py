"""What the report says in words: titles, notes, the paper's orders, why some do not show here."""

from typing import NamedTuple

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
NOTES = {  # under the title of each table
    "main": "The paper: METEOR at 242* tokens against EAGLE at 1024 loses 0.3 points on average "
    "at 51 % of the TFLOPs. Counts behind FastV and PyramidDrop are tokens before and after each "
    "pruned layer; after stages 1+2 at METEOR's average, PyramidDrop must drop nearly all at "
    "once, because its first quarter of the layers is not pruned.",
    "1": "All strategies have the same totals at the three pruning points.",
    "2": "The learned fusions see all tokens of all encoders and leave one for each grid cell; "
    "`train_fusions.py` says how long they were trained (less than the embedded model). Paper: "
    "576 tokens of 1193; its EAGLE-style row is 1193 tokens wide. Mutual redundancy keeps what "
    "few encoders show (printed digits) and drops every copy of what all of them show (shapes, "
    "bars): the last grid counts it.",
    "3": "K tokens after stage 2 in the paper's proportion to the average. All rows below the "
    "first have the same average here, except the adaptive ones named otherwise; in the paper "
    "the rows at layer 1 have 297. The paper's third adaptive row is printed as 126 tokens; its "
    "counts make 162.",
    "6": "Paper: LLaVA-1.5 at 29 % and 12 % of the FLOPs; AIM, its rival at 12 %, is not built "
    "here.",
    "7": "Paper: LLaVA-Next; FastV at 51 %, PyramidDrop at 46 %, stage 3 at 44 % of the FLOPs.",
    "8": "K as in Table 3. Differences are to the model's own k at the same average; the last "
    "two rows are 65/50 and 25/50 of its lambda, as the paper's are of 50.",
    "figure1": "The paper: EVA and ConvNeXt lead on POPE (here: presence), Pix2Struct and "
    "ConvNeXt on DocVQA (number, cell).",
    "redundancy": "The paper of this measure finds one encoder dominating OCR and chart tasks "
    "(CUR above 90 %), redundancy on general tasks, and some negative CURs. Masked encoders "
    "still give their tokens, all alike: compare the single encoders of Tables 6 and 7, whose "
    "sequences hold no others.",
    "video": "The paper: 242* tokens as good as EAGLE's 1024 on MSVD (79.0, 79.2) and "
    "ActivityNet (55.5, 55.0).",
}


class Order(NamedTuple):
    """One order that the paper finds, and where it would show here, at equal averages of tokens.

    claim: in words; table: whose rows say it; label: beginning of the labels of these rows;
    questions: the kind asked; above: whether the claim is that the row is above the one that it is
    compared with, else below.
    """

    claim: str
    table: str
    label: str
    questions: str
    above: bool


ORDERS = [
    Order("average allocation is below rank-based", "1", "average", "all", above=False),
    Order("reversed allocation is below rank-based", "1", "rank_reverse", "all", above=False),
    Order("separate pruning is below collaborative", "2", "separate", "all", above=False),
    Order("random pruning is below collaborative", "2", "random", "all", above=False),
    Order("pre-projection fusion is below post-projection", "2", "EAGLE-style", "all", above=False),
    Order("Resampler is below collaborative", "2", "Resampler", "all", above=False),
    Order("MLP is below collaborative", "2", "MLP", "all", above=False),
    Order("PixShuffle is below collaborative", "2", "PixShuffle", "all", above=False),
    Order("the top heads choose better than all", "3", "fixed, layer 1,", "all", above=True),
    Order("adaptive counts are above fixed ones", "3", "adaptive", "OCR & Chart", above=True),
    Order("stage 1 is above PruMerge++", "6", "stage 1,", "all", above=True),
    Order("stage 3 is above FastV", "7", "stage 3", "all", above=True),
    Order("FastV in place of stage 3 is below it", "main", "stages 1+2, FastV", "all", above=False),
    Order(
        "PyramidDrop in place of stage 3 is below it",
        "main",
        "stages 1+2, PyramidDrop",
        "all",
        above=False,
    ),
    Order("PruMerge++ is below METEOR", "main", "PruMerge++", "all", above=False),
]

WHY = {  # table -> what is behind orders of it that do not show here
    "2": "Table 2: the rule does what it says, and keeps the most printed-digit patches, but "
    "what all encoders show (shapes, bars) is redundant in every copy, and all copies go (last "
    "grid of Table 2); here one copy of most things is enough to answer, and at the larger "
    "budgets every strategy leaves one. The learned fusions see all tokens, and drop none.",
    "3": "Table 3: after LLM layer 2 a handful of visual tokens is enough, so their number does "
    "not matter; most heads look at the picture for every question, so it hardly varies; at "
    "layer 1, where tokens matter, adaptive counts are no better (its control row).",
    "6": "Table 6: made at the encoder's output only, stage 1's choice equals PruMerge++'s "
    "(control row). Choosing inside this small encoder costs: tokens go before its last blocks "
    "have read them.",
    "main": "Main result: PyramidDrop keeps as many tokens as stage 3 up to its first quarter of "
    "the layers, where this Llama reads the picture.",
}
