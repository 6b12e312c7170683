"""Every causal language model of transformers: served rightly, or refused in one sentence.

A tiny random model of each, built from usual fields. WORKS lists those that stage 3 serves; each
other one has to be refused by a sentence of ours, or cannot be built in this way. So a release of
transformers that changes one of them, or brings a new one that goes wrong, fails here.
Run all: pytest tests/test_models.py -m "slow or not slow"
"""

import functools
import math
import traceback

import pytest
import torch
import transformers
from dense_oracle import Softmax64, dense
from transformers import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

import stage3_decode
from stage3_decode import AdaptivePruner

NEWEST = (5, 24)  # WORKS was written for this release of transformers; older ones have fewer models
VERSION = tuple(map(int, transformers.__version__.split(".")[:2]))
WORKS = """
afmoe apertus apertus1p5_text arcee aria_text axk1 bitnet cohere cohere2 cohere2_moe cwm
deepseek_v2 deepseek_v3 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone exaone4 exaone_moe
flex_olmo gemma gemma2 gemma3_text glm glm4 glm4_moe glm4_moe_lite gpt_neox granite granitemoe
granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax internlm3 iquestcoder
jais2 jetmoe kolibri1 laguna llama mellum minicpm3 minimax_m2 minimax_m3_vl_text ministral
ministral3 mistral mixtral nanochat nemotron olmo olmo2 olmo3 olmoe persimmon phi phi3 phimoe
qwen2 qwen2_moe qwen3 qwen3_moe sarvam_mla sarvam_moe seed_oss smollm3 solar_open stablelm
starcoder2 vaultgemma youtu
""".split()
# One of each verdict and of each kind of attention; test_stage3_decode.py has Llama and 18 others.
QUICK = ["ministral3", "deepseek_v3", "gpt_neox", "bert", "qwen3_next", "opt", "beam"]

D = 64
SMALL = dict(
    vocab_size=96,
    hidden_size=D,
    intermediate_size=96,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=8,
    max_position_embeddings=256,
    initializer_range=0.25,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
    sliding_window=256,
    attention_chunk_size=256,
    # mixtures of experts
    num_experts=4,
    num_local_experts=4,
    n_routed_experts=4,
    moe_num_experts=4,
    num_experts_per_tok=2,
    moe_topk=2,
    top_k_experts=2,
    moe_k=2,
    moe_intermediate_size=32,
    shared_expert_intermediate_size=32,
    expert_ffn_hidden_size=32,
    ffn_hidden_size=96,
    n_shared_experts=1,
    n_group=1,
    topk_group=1,
    first_k_dense_replace=1,
    zero_expert_num=0,
    # latent attention
    kv_lora_rank=16,
    q_lora_rank=16,
    qk_rope_head_dim=8,
    qk_nope_head_dim=8,
    qk_head_dim=16,
    v_head_dim=8,
    index_topk=256,
    index_n_heads=2,
    index_head_dim=16,
    # state spaces and linear attention
    mamba_n_heads=8,
    mamba_d_head=16,
    mamba_d_state=8,
    mamba_d_ssm=128,
    mamba_num_heads=8,
    mamba_head_dim=16,
    n_mamba_heads=2,
    ssm_state_size=8,
    state_size=8,
    mamba_expand=2,
    mamba_n_groups=1,
    n_groups=1,
    chunk_size=16,
    lru_width=D,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    # older ones
    ffn_dim=96,
    decoder_layers=6,
    decoder_attention_heads=8,
    decoder_ffn_dim=96,
    d_model=D,
    word_embed_proj_dim=D,
    n_embd=D,
    n_layer=6,
    n_head=8,
    n_positions=256,
    rotary_dim=8,
    hidden_size_per_layer_input=16,
    vocab_size_per_layer_input=96,
    num_kv_shared_layers=0,
    laurel_rank=8,
    global_head_dim=8,
    num_global_key_value_heads=4,
)
OVERRIDES = {
    "zaya": dict(num_experts_per_tok=1),
    "gpt_neo": dict(num_layers=6, attention_types=[[["global"], 6]]),
    "gemma4_text": dict(
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3
    ),
    "lfm2": dict(layer_types=["full_attention", "conv"] * 3),
    "gemma4_unified_text": dict(
        num_kv_shared_layers=2, layer_types=["sliding_attention", "full_attention"] * 3
    ),
}
EAGER_EXPERTS = dict(experts_implementation="eager")  # the grouped ones have no float64


SHAPES = ["tvvvvvvvvttt", "ttvvvvvvvvvvvvtvvvvttttt", "tvvvvvvvvvvvvvvvttttt"]
LAYERS, LAM = [1, 3, 5], 2.0


class CannotBuild(Exception):
    """The reason why there is no tiny model of a name, or none that runs."""


def settable(config, key):
    """Whether a config has such a field, and it may be given."""
    name = getattr(config, "attribute_map", {}).get(key, key)
    return name in vars(config) and not isinstance(getattr(type(config), name, None), property)


def build(name):
    """A tiny random model of that name, in float64."""
    config_class = CONFIG_MAPPING[name]
    usual = config_class()
    if usual.get_text_config() is not usual or usual.sub_configs:
        raise CannotBuild("not a language model alone")
    options = {key: value for key, value in SMALL.items() if settable(usual, key)}
    if hasattr(usual, "kv_lora_rank"):
        options["num_key_value_heads"] = options["num_attention_heads"]
    if getattr(usual, "is_decoder", None) is not None:
        options["is_decoder"] = True
    config = config_class(**options | OVERRIDES.get(name, {}), **EAGER_EXPERTS)
    model_class = getattr(transformers, NAMES[name])
    with torch.device("meta"):
        numbers = sum(p.numel() for p in model_class(config).parameters())
    if numbers > 8e6:
        raise CannotBuild(f"{numbers / 1e6:.0f} million numbers")
    torch.manual_seed(0)
    return model_class(config).eval().double()


def prompts():
    """Token ids, attention mask and visual mask, (3, 24) each, left-padded."""
    rows = [shape.rjust(24) for shape in SHAPES]
    mask = torch.tensor([[c != " " for c in row] for row in rows]).long()
    visual = torch.tensor([[c == "v" for c in row] for row in rows])
    ids = torch.randint(3, 96, mask.shape, generator=torch.Generator().manual_seed(0))
    return ids, mask, visual


class Case:
    """A model and some prompts for it."""

    def __init__(self, model, ids, mask, visual):
        self.model, self.ids, self.mask, self.visual = model, ids, mask, visual

    @torch.no_grad()
    def logits(self, lam=None):
        """(logits, pruner), of the model alone where lam is None."""
        embeds = self.model.get_input_embeddings()(self.ids)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        call = dict(inputs_embeds=embeds, attention_mask=self.mask, position_ids=positions)
        if lam is None:
            return self.model(**call).logits, None
        with AdaptivePruner(self.model, self.visual, lam, LAYERS) as pruner:
            return self.model(**call).logits, pruner

    def words(self, lam=None):
        """Four words of a greedy answer."""
        call = dict(max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
        generate = functools.partial(
            self.model.generate, self.ids, attention_mask=self.mask, **call
        )
        if lam is None:
            return generate()[:, -4:]
        with AdaptivePruner(self.model, self.visual, lam, LAYERS):
            return generate()[:, -4:]

    def single(self, b):
        real = self.mask[b].bool()
        return Case(self.model, *(x[b : b + 1, real] for x in (self.ids, self.mask, self.visual)))


def gap(a, b):
    return float((a - b).abs().max())


def faults(case):
    """What of a batch is wrong, as sentences."""
    real = case.mask.bool()
    plain, _ = case.logits()
    everything, _ = case.logits(math.inf)
    if not torch.equal(everything[real], plain[real]):
        yield f"lambda infinity differs by {gap(everything[real], plain[real]):.2g}"
    if not torch.equal(case.words(math.inf), case.words()):
        yield "lambda infinity generates other words"
    batch, pruner = case.logits(LAM)
    words = case.words(LAM)
    if gap(batch[:, -1], plain[:, -1]) < 1e-4:
        yield "pruning changes nothing"
    for b in range(len(real)):
        one = case.single(b)
        logits, alone = one.logits(LAM)
        if any(not torch.equal(alone.kept[i][0], pruner.kept[i][b, real[b]]) for i in LAYERS):
            yield f"the batch keeps other tokens than prompt {b} alone"
        elif gap(logits[0, -1], batch[b, -1]) > 1e-5:
            yield f"the batch differs from prompt {b} alone by {gap(logits[0, -1], batch[b, -1])}"
        if not torch.equal(one.words(LAM)[0], words[b]):
            yield f"the batch generates other words than prompt {b} alone"
        embeds = case.model.get_input_embeddings()(one.ids)[0].detach()
        want = dense(case.model, embeds, one.visual[0], LAYERS, LAM)
        kept = {i: set(alone.kept[i][0].nonzero().flatten().tolist()) for i in LAYERS}
        if kept != want.kept:
            yield f"prompt {b} keeps other tokens than the library uncut"
        elif (off := gap(logits[0][want.alive], want.logits[want.alive])) > 1e-5:
            yield f"prompt {b} differs from the library uncut by {off:.2g}"


def cases(name):
    """Prompts with padding, and prompts of one length without a mask's help."""
    try:
        model, (ids, mask, visual) = build(name), prompts()
        same = (torch.arange(24) > 1) & (torch.arange(24) < 18)
        found = [
            Case(model, ids, mask, visual),
            Case(model, ids, torch.ones_like(mask), same.expand(3, 24)),
        ]
        for case in found:
            logits, _ = case.logits()
            case.words()
            if not logits[case.mask.bool()].isfinite().all():
                raise CannotBuild("its logits are not finite")
    except Exception as error:
        raise CannotBuild(f"{type(error).__name__}: {error}") from error
    return found


def is_ours(error):
    """Whether stage 3 itself raised it, as a sentence."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    ours = last.filename == stage3_decode.__file__ and last.name == "require"
    return ours and isinstance(error, (ValueError, TypeError))


def examine(name):
    """("works" | "refused" | "cannot be built" | "WRONG", why)."""
    with Softmax64():
        try:
            found = cases(name)
        except CannotBuild as error:
            return "cannot be built", str(error)
        wrong = []
        try:
            for case in found:
                wrong += faults(case)
        except Exception as error:
            if is_ours(error) and not wrong:
                return "refused", str(error)
            wrong.append(f"{type(error).__name__}: {error}")
    return ("WRONG", "; ".join(wrong)) if wrong else ("works", "")


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES],
)
def test_a_model_of_the_library_is_served_rightly_or_refused_in_a_sentence(name):
    verdict, why = examine(name)
    if name not in WORKS:
        assert verdict in ("refused", "cannot be built"), f"{verdict}: {why}"
        assert verdict == "cannot be built" or ("\n" not in why and len(why) < 250)
        return
    if verdict != "works" and VERSION < NEWEST:
        assert verdict in ("refused", "cannot be built"), f"{verdict}: {why}"
        pytest.skip(f"{verdict}, by an older release: {why}")
    assert verdict == "works", f"{verdict}: {why}"


def test_every_model_that_works_is_known_to_the_newest_release():
    if VERSION >= NEWEST:
        assert set(WORKS) <= set(NAMES) and set(QUICK) <= set(NAMES)
