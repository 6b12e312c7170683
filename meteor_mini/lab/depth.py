"""What stage 1's two criteria say of every patch after every block (Findings 1 and 2)."""

import torch
from torch import Tensor, nn

from stage1_encode import ROPE, find_encoder, mean_similarity, received_attention


@torch.no_grad()
def criteria_by_block(encoder: nn.Module, pixels: Tensor) -> dict[str, list[Tensor]]:
    """Run an encoder, unpruned, and score its patches in each block.

    Args: encoder: of stage 1's `FAMILIES`, with blocks; pixels: what it reads, B pictures.
    Returns: {"similarity", "attention"}: for each block (B, N) float32, the patches' likeness to
        their mean after the block, and the attention that they receive in it.
    Source: [paper, Findings 1 and 2]
    """
    model, family = find_encoder(encoder)
    blocks = model.get_submodule(family.blocks)
    prefix, has_cls = family.prefix(model)
    scores = {"similarity": [], "attention": []}

    def score(block, args, kwargs, output):
        x_in = args[0]  # (B, P + N, D)
        x_out = output[0] if isinstance(output, tuple) else output
        queries = 1 if has_cls else x_in.shape[1]
        q, k, scale = family.queries_and_keys(block, x_in, queries, kwargs.get(ROPE))
        scores["similarity"].append(mean_similarity(x_out[:, prefix:]))
        scores["attention"].append(received_attention(q, k, scale)[:, prefix:])

    handles = [block.register_forward_hook(score, with_kwargs=True) for block in blocks]
    try:
        model(pixels)
    finally:
        for handle in handles:
            handle.remove()
    return scores
