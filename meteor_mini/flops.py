"""FLOPs of a prefill: of the encoders, counted while they run, and of the LLM, by a formula."""

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


def prefill_flops(config, visual: Sequence[float], text: int) -> float:
    """FLOPs of a Llama's prefill: 2 (2 n d (q + k) + 2 n^2 q + 3 n d m) summed over layers.

    n: tokens in a layer, d: width, q: width of the queries and of what the heads read, k: width of
    the keys and of the values, m: width of the gated MLP. This is what torch.utils.flop_counter
    counts; embeddings, head and a pruner's own q and k are not in it.

    Args: config: a LlamaConfig; visual: visual tokens in each layer; text: text tokens, which are
        in all layers.
    """
    d, m = config.hidden_size, config.intermediate_size
    q = config.num_attention_heads * config.head_dim
    k = config.num_key_value_heads * config.head_dim
    flops = 0
    for count in visual:
        n = count + text
        projections = 2 * n * d * (q + k)
        attention = 2 * n * n * q
        mlp = 3 * n * d * m
        flops += 2 * (projections + attention + mlp)
    return flops


@torch.no_grad()
def counted_flops(work: Callable[[], object]) -> int:
    """FLOPs of one call, counted while it runs."""
    with countable_attention(), FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


@contextlib.contextmanager
def countable_attention() -> Iterator[None]:
    """Plain attention, whose products the counter counts.

    It does not know the operator of torch's fast path, which CLIP takes, and counts nothing there;
    torch before 2.15 has no count for the CPU's fused attention.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
