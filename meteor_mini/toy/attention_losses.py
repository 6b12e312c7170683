"""Two losses on the Llama's attention: taught here, and by no part of the paper.

A large Llama looks, in its early layers, at what a question may need, and elsewhere its heads rest
on the first token [METEOR, Findings 4 and 5; attention sinks, arXiv 2309.17453]. A small one does
not learn this by itself: its idle heads spread their attention over the picture, and then neither
VAV nor the scores of stage 3 mean anything. So this one is taught:

    looking_loss   attention to the picture is penalised
    aside_loss     attention to the picture that is off the queried object is penalised
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..finetune import Dialogue, pack_dialogue, pad_rows
from ..model import Encoded, Meteor
from .questions import Question, asked_patches
from .schooling import TOLD_SLOTS
from .world import GRID, SLOTS, Picture

TAUGHT_LAYERS = [1, 5, 7]  # of `aside_loss`: stage 3 ranks tokens by the attention of 1 and 5


@contextlib.contextmanager
def record_attention(model: Meteor, K: int) -> Iterator[list[Tensor]]:
    """Record how much the text attends to each of the K visual tokens.

    Yields: a list, filled by the forward pass with (B, H, T, K) float for each layer: the weights
    of H heads, from all T tokens of text behind the picture.
    """
    start, recorded = len(model.before_ids), []
    end = start + K

    def attention(module, query, key, value, attention_mask, **options):
        text = query[:, :, end:]  # (B, H, T, d)
        scores = module.scaling * (text @ key.mT)  # (B, H, T, S)
        hidden = ~attention_mask[:, :, end:]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        recorded.append(weights[..., start:end])
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("recorded", attention)
    before = model.decoder.config._attn_implementation
    model.decoder.set_attn_implementation("recorded")
    try:
        yield recorded
    finally:
        model.decoder.set_attn_implementation(before)


def looking_loss(attention: list[Tensor]) -> Tensor:
    """The mean share of the text's attention that is on the picture, 0 to 1.

    Args: attention: of each layer (B, H, T, K) float.
    """
    shares = [weights.sum(dim=-1).mean() for weights in attention]
    return torch.stack(shares).mean()


class Targets(NamedTuple):
    """R objects that questions ask about; a question may have several.

    picture (R,) int64: row of the batch; question (R,) int64: which of its questions, from 1;
    tokens (R, K) bool: the visual tokens that show the object, one at least.
    """

    picture: Tensor
    question: Tensor
    tokens: Tensor


def find_targets(encoded: Encoded, pictures: list[Picture], asked: list[list[Question]]) -> Targets:
    """The objects of all questions that some visual token still shows.

    A token counts where its encoder knows all that the question needs: of a shape whose color is
    asked, only CLIP's tokens. Otherwise the Llama finds a shape by other encoders' tokens, and
    stage 3 drops the one that has its color.
    """
    picture, question, patches, knows = [], [], [], []
    for b, of_picture in enumerate(asked):
        for number, one in enumerate(of_picture, start=1):
            for thing in one.about:
                picture.append(b)
                question.append(number)
                patches.append(asked_patches(pictures[b], one._replace(about=[thing])))
                knows.append(encoders_that_know(thing))

    kept = torch.cat(encoded.stage1_idx, dim=1)  # (B, sum of n_l): patches
    device = kept.device
    sizes = torch.tensor([idx.shape[1] for idx in encoded.stage1_idx], device=device)
    encoder = torch.arange(len(sizes), device=device).repeat_interleave(sizes)  # (sum of n_l,)
    patch_of_token = kept.gather(1, encoded.fused.keep_idx)  # (B, K)
    encoder_of_token = encoder[encoded.fused.keep_idx]  # (B, K)

    picture = torch.tensor(picture, dtype=torch.int64, device=device)
    question = torch.tensor(question, dtype=torch.int64, device=device)
    patches = torch.tensor(np.array(patches, bool).reshape(-1, GRID**2), device=device)
    knows = torch.tensor(np.array(knows, bool).reshape(-1, len(sizes)), device=device)
    shows_thing = patches.gather(1, patch_of_token[picture])  # (R, K)
    tokens = shows_thing & knows.gather(1, encoder_of_token[picture])  # (R, K)
    is_shown = tokens.any(dim=1)
    return Targets(picture[is_shown], question[is_shown], tokens[is_shown])


def encoders_that_know(thing: dict[str, str | None]) -> list[bool]:
    """For each encoder: do its tokens tell the Llama of this thing, and all that is needed of it?

    Args: thing: of `Question.about`; its slots are what the question needs.
    """
    word = 1 + SLOTS["what"].index(thing["what"])
    needed = [column for column, slot in enumerate(SLOTS) if slot in thing and slot != "what"]
    passed_on = [slots[word] for slots in TOLD_SLOTS.values()]  # of each encoder (slots,), 0 or 1
    return [bool(slots.any() and slots[needed].all()) for slots in passed_on]


def number_questions(model: Meteor, dialogues: list[Dialogue]) -> Tensor:
    """(B, T) int64: of each token of text the number of its question, from 1.

    0 for the tokens of answers and for padding.
    """
    rows = []
    for dialogue in dialogues:
        packed = pack_dialogue(model, dialogue, start=0)
        numbers = []
        for number, label in zip(packed["owner"], packed["labels"]):
            numbers.append(number if label == -100 else 0)
        rows.append(numbers)
    return pad_rows(rows, 0, model.device)


def aside_loss(attention: list[Tensor], targets: Targets, question_of_token: Tensor) -> Tensor:
    r"""-log p, where p is the share of a question's attention to the picture that is on a target.

    The mean over all targets and `TAUGHT_LAYERS`; 0 where there is no target.

    Args: attention: of each layer (B, H, T, K) float; question_of_token (B, T) int64: of
        `number_questions`.
    """
    if len(targets.picture) == 0:
        return attention[0].new_zeros(())
    is_of_question = question_of_token[targets.picture] == targets.question[:, None]  # (R, T)
    losses = []
    for layer in TAUGHT_LAYERS:
        of_text = attention[layer].sum(dim=1)  # (B, T, K): all heads
        of_question = (of_text[targets.picture] * is_of_question[..., None]).sum(dim=1)  # (R, K)
        on_target = (of_question * targets.tokens).sum(dim=1)  # (R,)
        on_picture = of_question.sum(dim=1).clamp(min=1e-6)  # (R,): never 0 over 0
        share = on_target / on_picture
        losses.append(-(share + 1e-3).log().mean())  # at most 7 for a target that is overlooked
    return torch.stack(losses).mean()
