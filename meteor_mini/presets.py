"""Named models: which encoders, which Llama, which budgets. Only library classes are built here, with random weights;
`pretrained.py` fetches those that the world already uses.

"glyph" is the embedded model: four small encoders of 12 x 12 tokens and an 8-layer Llama, of the same classes as the
real ones (open_clip's VisionTransformer, timm's ConvNeXt and Eva, transformers' Pix2StructVisionModel and
LlamaForCausalLM), so that every line of the stage files runs on it as it does on the big models.
"""

import open_clip
from open_clip.transformer import VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Dinov2Config,
    Dinov2Model,
    Pix2StructVisionConfig,
    Pix2StructVisionModel,
    PreTrainedModel,
)

# One entry an encoder, kept in config.json: the class by its family name, and that class's own keywords. (Only
# "input_size" is no keyword: a ConvNeXt has no size of its own, timm notes it in `pretrained_cfg`.)
GLYPH_ENCODERS = {
    "clip": dict(
        image_size=96, patch_size=8, width=96, layers=6, heads=6, mlp_ratio=3, output_dim=96
    ),
    "convnext": dict(
        num_classes=0,
        depths=[1, 1, 4, 2],
        dims=[32, 64, 96, 96],
        output_stride=8,
        input_size=[3, 96, 96],
        ls_init_value=0.5,
    ),  # the default, 1e-6, is for long schedules: here it would delay every block,
    "eva": dict(
        img_size=96,
        patch_size=8,
        num_classes=0,
        embed_dim=96,
        depth=6,
        num_heads=6,
        mlp_ratio=3,
        use_rot_pos_emb=True,
        ref_feat_shape=[12, 12],
    ),
    "pix2struct": dict(
        hidden_size=96,
        num_hidden_layers=6,
        num_attention_heads=6,
        d_kv=16,
        d_ff=256,
        patch_embed_hidden_size=192,
        seq_len=144,
        initializer_range=0.02,
    ),  # the default is 1e-10
}
GLYPH_DECODER = dict(
    hidden_size=128,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=8,
    intermediate_size=320,
    max_position_embeddings=2048,
    tie_word_embeddings=True,
    initializer_range=0.05,
)  # the default, 0.02, is for models ten times as wide


# Weights of the world, by the names that `pretrained.encoder` reads. "grid": patches (h, w) of a Pix2Struct or DINOv2. The
# budget has the paper's proportions (1193, 576 and 242 of 4096 tokens), at the encoders' own number of tokens.
PRETRAINED = {
    "small": {
        "encoders": {
            "clip": "ViT-B-16/openai",
            "convnext": "convnext_base_w/laion2b_s13b_b82k",
            "eva": "EVA02-B-16/merged2b_s8b_b131k",
            "pix2struct": "google/pix2struct-base",
        },
        "decoder": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "grid": [16, 16],
    },  # 196 + 64 + 196 + 256 tokens
    "eagle-x4": {
        "encoders": {
            "clip": "ViT-L-14-336/openai",
            "convnext": "convnext_xxlarge/laion2b_s34b_b82k_augreg_soup",
            "eva": "EVA02-L-14-336/merged2b_s6b_b61k",
            "pix2struct": "google/pix2struct-large",
        },
        "decoder": "lmsys/vicuna-7b-v1.5",
        "grid": [32, 32],
    },  # 576 + 64 + 576 + 1024
}


def build_encoder(name: str, options: dict) -> nn.Module:
    """A vision encoder of the named family with random weights; `options` are the library class's own keywords; of
    "open_clip" {"model_cfg": open_clip's own, "preprocess": {"mean", "std"}}.

    Raises: ValueError for another family.
    """
    if name == "open_clip":
        return build_open_clip(**options)
    if name == "dinov2":
        return Dinov2Model(Dinov2Config(**options))
    if name == "clip":
        return VisionTransformer(**options)
    if name == "convnext":
        model = ConvNeXt(**{k: v for k, v in options.items() if k != "input_size"})
        model.pretrained_cfg = {"input_size": options["input_size"]}
        return model
    if name == "eva":
        return Eva(**options)
    if name == "pix2struct":
        return Pix2StructVisionModel(Pix2StructVisionConfig(**options))
    raise ValueError(
        f"encoder must be one of {[*GLYPH_ENCODERS, 'open_clip', 'dinov2']}, got {name!r}"
    )


def build_open_clip(model_cfg: dict, preprocess: dict) -> nn.Module:
    """The image tower that `open_clip.create_model` would make, without its text tower."""
    vision = dict(model_cfg["vision_cfg"])
    if "timm_model_name" in vision:
        vision["timm_model_pretrained"] = False
    text = {
        "vocab_size": 1,
        "context_length": 1,
        "width": 1,
        "heads": 1,
        "layers": 1,
    }  # the smallest, not kept
    quick_gelu = model_cfg.get("quick_gelu", False)
    visual = open_clip.CLIP(model_cfg["embed_dim"], vision, text, quick_gelu).visual
    visual.preprocess_cfg = preprocess
    return visual


def build_decoder(options: dict, vocabulary: int | None = None) -> PreTrainedModel:
    """A decoder with random weights; `options` are the configuration's own keywords, of a Llama where they have no
    "model_type"."""
    size = {} if vocabulary is None else {"vocab_size": vocabulary}
    config = AutoConfig.for_model(**{"model_type": "llama"} | options | size)
    return AutoModelForCausalLM.from_config(config)
