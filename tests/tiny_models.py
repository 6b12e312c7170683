"""Tiny random models of the library's own classes, and prompts for them.

Their weights are large, so that heads attend unevenly, and what is dropped changes the answer.
"""

import functools
import inspect

import torch
import transformers
import transformers as T

# ---------------------------------------------------------------------------------------- decoders

D, L, H, VOCAB = 64, 8, 8, 96
EAGER = dict(experts_implementation="eager")  # the grouped one has no float64
FAMILIES = {
    "Llama": dict(num_key_value_heads=4),
    "Mistral": dict(num_key_value_heads=2, sliding_window=None),
    "Qwen2": dict(num_key_value_heads=8),
    "Qwen3": dict(num_key_value_heads=4, head_dim=16),
    "Gemma": dict(num_key_value_heads=4, head_dim=16),
    "Gemma2": dict(  # caps its scores
        num_key_value_heads=4,
        head_dim=16,
        query_pre_attn_scalar=24,
        attn_logit_softcapping=2.0,
        sliding_window=64,
    ),
    "Gemma3": dict(  # layer 5 looks at all, the others through a window, with another rotary table
        num_key_value_heads=4,
        head_dim=16,
        query_pre_attn_scalar=24,
        sliding_window=64,
        tie_word_embeddings=False,  # as tied, they say the same token again and again
    ),
    "Granite": dict(num_key_value_heads=4, attention_multiplier=0.2, residual_multiplier=0.7),
    "Cohere": dict(num_key_value_heads=4, use_qk_norm=True),  # attention and MLP side by side
    "Cohere2": dict(num_key_value_heads=4, sliding_window=64),  # each fourth layer: no positions
    "Starcoder2": dict(num_key_value_heads=4, sliding_window=None),
    "Mixtral": dict(num_key_value_heads=4, num_local_experts=4, sliding_window=None, **EAGER),
    "Qwen3Moe": dict(
        num_key_value_heads=4,
        head_dim=16,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        **EAGER,
    ),
    "Phi": dict(num_key_value_heads=4, partial_rotary_factor=0.5),
    "Phi3": dict(num_key_value_heads=4, partial_rotary_factor=0.5),  # q, k and v from one matrix
    "SmolLM3": dict(num_key_value_heads=4, no_rope_layer_interval=2),  # 1, 3, 5, 7: no positions
    "Olmo2": dict(num_key_value_heads=4),  # norms after the attention
    "Exaone4": dict(num_key_value_heads=4, sliding_window=64, sliding_window_pattern=4),
    "StableLm": dict(num_key_value_heads=4),
}
CLASSES = {"Gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM")}  # where the name does not say them
CACHE = next(  # what this release calls a KV cache: past_key_values, or cache from 5.24 on
    name
    for name in ("past_key_values", "cache")
    if name in inspect.signature(transformers.LlamaModel.forward).parameters
)


def build(family="Llama", **options):
    """A random decoder with a head: (D wide, L layers, H heads), in float32."""
    config_name, model_name = CLASSES.get(family, (family + "Config", family + "ForCausalLM"))
    usual = dict(
        vocab_size=VOCAB,
        hidden_size=D,
        intermediate_size=96,
        num_hidden_layers=L,
        num_attention_heads=H,
        max_position_embeddings=256,
        initializer_range=0.25,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    config = getattr(transformers, config_name)(**usual | FAMILIES[family] | options)
    torch.manual_seed(0)
    return getattr(transformers, model_name)(config).eval()


@functools.cache
def tiny(family="Llama", dtype=torch.float32, **options):
    """As `build`, the same one for all who ask: leave it as it is."""
    return build(family, **options).to(dtype)


def ragged(dtype=torch.float32, seed=0, shapes=None):
    """Three prompts of 12, 24 and 21 tokens, left-padded: text, visual tokens, text.

    Returns embeds (B, S, D), attention_mask (B, S) int64, visual_mask (B, S) bool.
    """
    shapes = shapes or ["tvvvvvvvvttt", "ttvvvvvvvvvvvvtvvvvttttt", "tvvvvvvvvvvvvvvvttttt"]
    S = max(map(len, shapes))
    rows = [shape.rjust(S) for shape in shapes]
    attention_mask = torch.tensor([[c != " " for c in row] for row in rows]).long()
    visual_mask = torch.tensor([[c == "v" for c in row] for row in rows])
    generator = torch.Generator().manual_seed(seed)
    embeds = torch.randn(len(rows), S, D, generator=generator, dtype=torch.float64)
    return embeds.to(dtype), attention_mask, visual_mask


# --------------------------------------------------------------------------- vision-language models
# A prompt is a list of token ids in which IMAGE stands for one whole picture; its visual tokens are
# put there as the family's processor does.

IMAGE = 3  # the placeholder token's id
TEXT = dict(
    vocab_size=96,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=8,
    num_attention_heads=8,
    max_position_embeddings=1024,
    initializer_range=0.1,
)  # the default, 0.02, makes attention all but flat
EYES = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, patch_size=8
)


def pictures(n, *size, first=0):
    """Pictures number first, first + 1, …, each the same whoever asks for it."""
    every = torch.randn(9, 3, *size, generator=torch.Generator().manual_seed(0))
    return every[first : first + n]


def pixels_of_size(*size):
    """Of a family that takes all pictures of a batch in a row, all of one size."""

    def pixels(per_row, first, ids):
        return dict(pixel_values=pictures(sum(per_row), *size, first=first))

    return pixels


# A family: the model, how many tokens each picture has, and a function that makes the rest of the
# inputs from the number of pictures per row, the number of the first one, and input_ids.


def llava():
    config = T.LlavaConfig(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=T.CLIPVisionConfig(**EYES, image_size=32),
        image_token_index=IMAGE,
    )
    return T.LlavaForConditionalGeneration(config), [16] * 9, pixels_of_size(32, 32)


SIZES = [(64, 64), (64, 32), (32, 64)] * 3  # of different shapes, so of different numbers of tokens
TILES = dict(image_token_index=IMAGE, image_grid_pinpoints=[[32, 64], [64, 32], [64, 64]])


def tiled(model):
    """LLaVA-NeXT and LLaVA-OneVision: the whole; then each row of the tiles, and its end."""
    tokens = [16 + h // 8 * (w // 8 + 1) for h, w in SIZES]

    def pixels(per_row, first, ids):
        n = sum(per_row)
        tiles = torch.stack([pictures(5, 32, 32, first=i % 5) for i in range(first, first + n)])
        inputs = dict(pixel_values=tiles, image_sizes=torch.tensor(SIZES[first : first + n]))
        if isinstance(model, T.LlavaOnevisionForConditionalGeneration):
            inputs["batch_num_images"] = torch.ones(n, dtype=torch.long)  # so that all are tiled
        return inputs

    return model, tokens, pixels


def llava_next():
    vision = T.CLIPVisionConfig(**EYES, image_size=32)
    config = T.LlavaNextConfig(text_config=T.LlamaConfig(**TEXT), vision_config=vision, **TILES)
    return tiled(T.LlavaNextForConditionalGeneration(config))


def llava_onevision():
    vision = T.SiglipVisionConfig(**EYES, image_size=32, vision_use_head=False)
    config = T.LlavaOnevisionConfig(
        text_config=T.Qwen2Config(**TEXT, num_key_value_heads=4), vision_config=vision, **TILES
    )
    return tiled(T.LlavaOnevisionForConditionalGeneration(config))


def internvl():
    config = T.InternVLConfig(
        text_config=T.Qwen2Config(**TEXT, num_key_value_heads=4),
        vision_config=T.InternVLVisionConfig(**EYES | dict(patch_size=[8, 8]), image_size=[64, 64]),
        image_token_id=IMAGE,
    )
    return T.InternVLForConditionalGeneration(config), [16] * 9, pixels_of_size(64, 64)


def idefics(config, vision, model):
    """Idefics3 and SmolVLM: pictures of each prompt in a row of their own, then black ones."""
    built = config(
        text_config=T.LlamaConfig(**TEXT),
        vision_config=vision(**EYES, image_size=64),
        image_token_id=IMAGE,
        scale_factor=2,
    )

    def pixels(per_row, first, ids):
        values = torch.zeros(len(per_row), max(per_row), 3, 64, 64)
        for b, n in enumerate(per_row):
            values[b, :n] = pictures(n, 64, 64, first=first)
            first += n
        return dict(pixel_values=values)

    return model(built), [16] * 9, pixels


def deepseek():
    """Two encoders, SigLIP and SAM, joined by channels."""
    high = T.SamVisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=64,
        patch_size=8,
        mlp_dim=32,
        global_attn_indexes=[1],
        window_size=4,
        initializer_range=0.02,
    )
    config = T.DeepseekVLHybridConfig(
        text_config=T.LlamaConfig(**TEXT),
        high_res_vision_config=high,
        image_token_id=IMAGE,
        vision_config=T.SiglipVisionConfig(**EYES, image_size=32),
    )

    def pixels(per_row, first, ids):
        n = sum(per_row)
        return dict(
            pixel_values=pictures(n, 32, 32, first=first),
            high_res_pixel_values=pictures(n, 64, 64, first=first),
        )

    return T.DeepseekVLHybridForConditionalGeneration(config), [16] * 9, pixels


def paligemma():
    """The prompt sees all of itself: token_type_ids of 0, as its processor gives them."""
    text = T.GemmaConfig(**TEXT, num_key_value_heads=4, head_dim=16)
    vision = T.SiglipVisionConfig(**EYES, image_size=32, vision_use_head=False)
    config = T.PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=IMAGE, projection_dim=64
    )

    def pixels(per_row, first, ids):
        inputs = dict(token_type_ids=torch.zeros_like(ids))
        if sum(per_row):
            inputs["pixel_values"] = pictures(sum(per_row), 32, 32, first=first)
        return inputs

    return T.PaliGemmaForConditionalGeneration(config), [16] * 9, pixels


def gemma3():
    """Each picture sees itself; layer 5 looks at all, the others through a window."""
    text = T.Gemma3TextConfig(
        **TEXT, num_key_value_heads=4, head_dim=16, query_pre_attn_scalar=24, sliding_window=128
    )
    vision = T.SiglipVisionConfig(**EYES, image_size=64, vision_use_head=False)
    config = T.Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, mm_tokens_per_image=16
    )
    model = T.Gemma3ForConditionalGeneration(config)
    projection = model.model.multi_modal_projector.mm_input_projection_weight
    torch.nn.init.normal_(projection, std=0.2)  # it starts at 0

    def pixels(per_row, first, ids):
        inputs = dict(token_type_ids=(ids == IMAGE).long())
        if sum(per_row):
            inputs["pixel_values"] = pictures(sum(per_row), 64, 64, first=first)
        return inputs

    return model, [16] * 9, pixels


GRIDS = [(1, 4, 16), (1, 8, 8), (1, 6, 4)] * 3  # patches of each picture: time, rows, columns
THREE_PARTS = dict(rope_type="default", rope_theta=10000.0, mrope_section=[2, 1, 1])


def qwen_vl_model(name, text=None, **vision):
    """A token has three positions, and of a picture they run along its rows and columns."""
    vision = dict(
        depth=2,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        patch_size=8,
        out_hidden_size=64,
        **vision,
    )
    text = TEXT | dict(num_key_value_heads=4, rope_parameters=THREE_PARTS) | (text or {})
    config = getattr(T, name + "Config")(
        text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=90
    )
    tokens = [rows * columns // 4 for _, rows, columns in GRIDS]  # 2 x 2 patches make a token

    def pixels(per_row, first, ids):
        inputs = dict(mm_token_type_ids=(ids == IMAGE).int())
        grids = GRIDS[first : first + sum(per_row)]
        if grids:
            patches = [
                torch.randn(
                    h * w, 3 * 2 * 8 * 8, generator=torch.Generator().manual_seed(first + i)
                )
                for i, (_, h, w) in enumerate(grids)
            ]
            inputs |= dict(pixel_values=torch.cat(patches), image_grid_thw=torch.tensor(grids))
        return inputs

    return getattr(T, name + "ForConditionalGeneration")(config), tokens, pixels


def qwen2_5_vl():
    return qwen_vl_model("Qwen2_5_VL", window_size=32, fullatt_block_indexes=[1])


def qwen3_vl():
    """After its first layer it adds visual features once more."""
    return qwen_vl_model(
        "Qwen3VL",
        text=dict(head_dim=8),
        deepstack_visual_indexes=[0],
        num_position_embeddings=64,
    )


VLMS = {
    "llava": llava,
    "llava-next": llava_next,
    "llava-onevision": llava_onevision,
    "internvl": internvl,
    "deepseek-vl-hybrid": deepseek,
    "idefics3": lambda: idefics(
        T.Idefics3Config, T.Idefics3VisionConfig, T.Idefics3ForConditionalGeneration
    ),
    "smolvlm": lambda: idefics(
        T.SmolVLMConfig, T.SmolVLMVisionConfig, T.SmolVLMForConditionalGeneration
    ),
    "paligemma": paligemma,
    "gemma3": gemma3,
    "qwen2.5-vl": qwen2_5_vl,
    "qwen3-vl": qwen3_vl,
}
NEED_PIXELS_ALWAYS = {"paligemma", "gemma3", "qwen2.5-vl", "qwen3-vl"}  # inputs for text alone, too


def batch(family, prompts, first=0):
    """Inputs of `generate`, padded on the left, and the visual mask; first: number of a picture."""
    _, tokens, pixels, needs_always = family
    tokens, rows = iter(tokens[first:]), []
    for prompt in prompts:
        rows.append(
            [t for token in prompt for t in ([token] * next(tokens) if token == IMAGE else [token])]
        )
    S = max(map(len, rows))
    ids = torch.tensor([[0] * (S - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (S - len(row)) + [1] * len(row) for row in rows])
    per_row = [prompt.count(IMAGE) for prompt in prompts]
    inputs = dict(input_ids=ids, attention_mask=mask)
    if sum(per_row) or needs_always:
        inputs |= pixels(per_row, first, ids)
    return inputs, ids == IMAGE


def vlm(name):
    """(model, visual tokens of each picture, a function for the other inputs, always called?)."""
    torch.manual_seed(0)
    model, tokens, pixels = VLMS[name]()
    return model.eval(), tokens, pixels, name in NEED_PIXELS_ALWAYS
