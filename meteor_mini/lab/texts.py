"""What the report says in words: titles, notes under them, what is behind orders not shown here."""

TITLES = {  # in the order of the page
    "requirements": "What the embedded model must be",
    "orders": "The paper's orders",
    "main": "Main result",
    "1": "Table 1: how encoders share the budget (stage 1 alone)",
    "2": "Table 2: what fusion drops (stages 1 and 2)",
    "3": "Table 3: fixed and adaptive counts in the LLM",
    "6": "Table 6: a single encoder, stages 1 and 3",
    "7": "Table 7: a single encoder, stage 3",
    "8": "Table 8: heads and lambda",
    "figure1": "Figure 1: survivors per encoder, by family",
    "redundancy": "What each encoder is worth (arXiv 2507.03262)",
    "depth": "Findings 1 and 2: what tells which patches matter, by depth",
    "drops": "How deep the LLM looks",
    "focus": "Where the last tokens lie",
    "video": "Table 4: tiled clips, zero-shot",
}
NOTES = {  # under the title of each table
    "requirements": "Without most of these, a model cannot show what METEOR does; the tables below "
    "hold all that is measured here. `meteor-mini eval --table requirements` prints this table. "
    'The first two rows and "counts adapt" ask three times as many questions as the tables.',
    "orders": '"above": yes where the 95 % interval of the paired difference is above 0, reverse '
    'where it is below 0. "not below": yes where its lower end is -1 point or more, reverse where '
    "all of it is below -1. Rows are those beside which the paper's numbers stand in the tables "
    "below; tokens are visual tokens per LLM layer of both rows. In brackets: how many questions; "
    "where two rows seldom differ, more than the tables ask. The last two orders compare shares of "
    "the patches that a question asks about.",
    "main": "The paper: METEOR at 242* tokens against EAGLE at 1024 loses 0.3 points on average "
    "at 51 % of the TFLOPs. Counts behind FastV and PyramidDrop are tokens before and after each "
    "pruned layer; PyramidDrop prunes nothing in its first quarter of the layers, and keeps half "
    "at each later one, as in its paper: so fewer tokens enter the LLM. "
    "At METEOR's other two averages, the tokens that enter the LLM are to the average as in the "
    "paper, 2.4 times as many; in the model's own budget, 4.3 times. So stages 1 and 2 drop more "
    "there than in the model's own budget, and the row at the higher average loses more, too.",
    "1": "All strategies have the same totals at the three pruning points. The first three rows "
    "leave what the model's own stage 1 leaves, the others the paper's share: 1193 of 4096.",
    "2": "EAGLE-style fusion sees all tokens of all encoders and leaves one for each grid cell; "
    "`train_fusions.py` says how it was trained. The paper's other learned fusions (Resampler, "
    "MLP, PixShuffle) are left out. Each of the four was trained for about 1000 steps, the model "
    "itself for 4800 and more. EAGLE-style fusion then had a loss on answers of 0.04, the others "
    "still of 1.0, 0.2 and 0.8: their rows would tell of the training, not of the fusion. Paper: "
    "576 tokens of 1193; its EAGLE-style row is 1193 tokens wide. The last grid counts which "
    "patches each strategy leaves in at least one encoder.",
    "3": "All rows prune what the model's own stage 2 leaves, which is the first row. The others "
    "have the same average, except the adaptive ones named otherwise; in the paper the rows at "
    "layer 1 have 297. The average is tighter than the model's own, at which no row lost much on "
    "validation questions. Which counts are better on OCR & Chart depends on it: on 2400 "
    "validation questions adaptive counts are 3.1 points [1.9, 4.4] above the fixed ones here, 12, "
    "6 and 3 tokens; 0.9 [-0.4, 2.1] above 13, 5 and 2, which are nearly as many; and 0.2 "
    "[-0.2, 0.6] below fixed ones at an average of 30. What they give to OCR & Chart they take "
    "from General questions, where they are 5.5 points [3.9, 7.1] below 12, 6 and 3. "
    "The paper's third adaptive row is printed as 126 tokens; its "
    "counts make 162.",
    "6": "Paper: LLaVA-1.5 at 29 % and 12 % of the FLOPs; AIM, its rival at 12 %, is not built "
    'here. The row "at the output only" is a control: the same count, chosen behind the last '
    "block.",
    "7": "Paper: LLaVA-Next; FastV at 51 %, PyramidDrop at 46 %, stage 3 at 44 % of the FLOPs.",
    "8": "Differences are to the model's own k at the same average; the last "
    "two rows are 65/50 and 25/50 of its lambda, as the paper's are of 50.",
    "figure1": "The paper: EVA and ConvNeXt lead on POPE (here: presence), Pix2Struct and "
    "ConvNeXt on DocVQA (here: number, cell, row).",
    "redundancy": "The paper of this measure finds one encoder dominating OCR and chart tasks "
    "(CUR above 90 %), redundancy on general tasks, and some negative CURs. Masked encoders "
    "still give their tokens, all alike: compare the single encoders of Tables 6 and 7, whose "
    "sequences hold no others. OCR: OCR & Chart without the charts.",
    "depth": "Of the patches that a question asks about, the share that each criterion keeps when "
    "it keeps a quarter of all, in encoders that are not pruned; mean over the blocks of the "
    'third, differences paired over questions. "asked": all of them, in every encoder. "asked and '
    'told": only those that show what the encoder tells the LLM; a question without any does not '
    "count for it.",
    "drops": "Nothing is pruned, until all visual tokens go at once.",
    "focus": "Of the tokens left at the last pruned layer, the share on patches that the question "
    "asks about, beside a random choice of as many of all encoders' tokens, and of those that "
    "enter the LLM. Questions whose answer is that nothing is there are left out.",
    "video": "The paper: 242* tokens as good as EAGLE's 1024 on MSVD (79.0, 79.2) and "
    "ActivityNet (55.5, 55.0).",
}
# Number of an order, from 1 -> what is behind it where it does not show here, with the control that
# tells.
WHY: dict[int, str] = {
    5: "our encoders have one grid, and EAGLE's token of a cell holds what all four say of it. So "
    "it loses nothing: the control is the unpruned model, which is not better with all 576 tokens.",
    6: "in front of layer 1, six of the Llama's eight heads look at the picture, two hardly do. "
    "So the top six choose the same tokens as all eight. The top five choose nearly the same: at "
    "30 tokens they are 0.2 points [-0.1, 0.5] below all heads, on 2400 validation questions.",
}
