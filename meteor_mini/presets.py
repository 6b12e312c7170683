"""Named models: which encoders, which Llama, which budgets. Only library classes are built here.

"glyph" is the embedded model: four small encoders of 12 x 12 tokens and an 8-layer Llama, of the same classes as the
real ones (open_clip's VisionTransformer, timm's ConvNeXt and Eva, transformers' Pix2StructVisionModel and
LlamaForCausalLM), so that every line of the stage files runs on it as it does on the big models.
"""
from open_clip.transformer import VisionTransformer
from timm.models.convnext import ConvNeXt
from timm.models.eva import Eva
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, Pix2StructVisionConfig, Pix2StructVisionModel

# One entry an encoder, kept in config.json: the class by its family name, and that class's own keywords. (Only
# "input_size" is no keyword: a ConvNeXt has no size of its own, timm notes it in `pretrained_cfg`.)
GLYPH_ENCODERS = {
    "clip": dict(image_size=96, patch_size=8, width=96, layers=6, heads=6, mlp_ratio=3, output_dim=96),
    "convnext": dict(num_classes=0, depths=[1, 1, 4, 2], dims=[32, 64, 96, 96], output_stride=8,
                     input_size=[3, 96, 96],
                     ls_init_value=0.5),  # the default, 1e-6, is for long schedules: here it would delay every block,
    "eva": dict(img_size=96, patch_size=8, num_classes=0, embed_dim=96, depth=6, num_heads=6, mlp_ratio=3,
                use_rot_pos_emb=True, ref_feat_shape=[12, 12]),
    "pix2struct": dict(hidden_size=96, num_hidden_layers=6, num_attention_heads=6, d_kv=16, d_ff=256,
                       patch_embed_hidden_size=192, seq_len=144, initializer_range=0.02),  # the default is 1e-10
}
GLYPH_DECODER = dict(hidden_size=128, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=8,
                     intermediate_size=320, max_position_embeddings=2048, tie_word_embeddings=True,
                     initializer_range=0.05)  # the default, 0.02, is for models ten times as wide


def build_encoder(name: str, options: dict) -> nn.Module:
    """A vision encoder of the named family with random weights; `options` are the library class's own keywords.

    Raises: ValueError for a family that is not one of "clip", "convnext", "eva", "pix2struct".
    """
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
    raise ValueError(f"encoder must be one of {list(GLYPH_ENCODERS)}, got {name!r}")


def build_decoder(options: dict, vocabulary: int) -> LlamaForCausalLM:
    """A Llama with random weights; `options` are LlamaConfig's own keywords."""
    return LlamaForCausalLM(LlamaConfig(**options, vocab_size=vocabulary))
