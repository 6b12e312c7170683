"""FLOPs against torch's counter, the paper's rows and the sizes of a layer."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaModel

from meteor_mini.flops import counted_flops, prefill_flops
from stage1_encode import encode


@pytest.mark.parametrize("grouped", [8, 2])
def test_the_formula_agrees_with_torchs_counter(grouped):
    config = LlamaConfig(
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=grouped,
        vocab_size=64,
    )
    llama = LlamaModel(config)
    plain = sdpa_kernel(SDPBackend.MATH)  # whose products every torch counts
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        llama(inputs_embeds=torch.randn(1, 300, 256), use_cache=False)
    assert prefill_flops(config, [250] * 4, 50) == pytest.approx(
        counter.get_total_flops(), rel=0.02
    )


def test_the_formula_gives_the_papers_rows():
    vicuna = LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32
    )
    full = prefill_flops(vicuna, [2880] * 32, 30)  # 30: a short question
    fastv, pyramid = [2880] * 2 + [1440] * 30, [2880] * 8 + [1440] * 8 + [720] * 8 + [360] * 8
    assert round(100 * prefill_flops(vicuna, fastv, 30) / full) == 51
    assert round(100 * prefill_flops(vicuna, pyramid, 30) / full) == 46


def test_all_of_a_vit_is_counted_though_clip_has_an_operator_of_its_own(untrained):
    v = untrained.encoders["clip"]
    n, d = 1 + v.grid_size[0] * v.grid_size[1], v.conv1.out_channels
    m = v.transformer.resblocks[0].mlp[0].out_features
    blocks = len(v.transformer.resblocks) * 2 * (4 * n * d * d + 2 * n * n * d + 2 * n * d * m)
    embed = 2 * (n - 1) * d * v.conv1.weight[0].numel()
    head = 2 * v.proj.numel()  # of CLS alone, in the library's own forward
    pixels = torch.rand(1, 3, *v.image_size)
    assert counted_flops(lambda: encode(v, pixels)) == blocks + embed + head
    assert torch.backends.mha.get_fastpath_enabled()
