"""Every name inside transformers, open_clip, timm and huggingface_hub that we rely on, a test each.

A release may rename any of them. These tests run before all others (conftest.py), on the
libraries alone: where one fails, it says in a sentence which name is gone and who needs it, and
the rest is skipped. The bounds in pyproject.toml are the versions that the tests passed on;
docs/versions.md says how to raise one.
"""

import ast
import functools
import importlib
import importlib.metadata
import inspect
import re
from pathlib import Path

import pytest
import torch
import transformers

# Our files are read, not imported: an import may be what a release has broken.
ROOT = Path(__file__).parents[1]
LIBRARIES = ("transformers", "open_clip", "timm", "huggingface_hub")
DECODERS = ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Granite", "Cohere", "Starcoder2"]
DECODERS += [
    "Mixtral",
    "Qwen3Moe",
    "SmolLM3",
    "Phi3",
    "Gemma3Text",
    "Qwen2_5_VLText",
    "Qwen3VLText",
]
FUSED = ["Phi3"]  # one projection for q, k and v
TINY = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4)


def missing(where: str, name: str, user: str):
    """The one way in which these tests fail."""
    library = re.match(r"\w+", where).group()
    version = importlib.metadata.version({"open_clip": "open_clip_torch"}.get(library, library))
    pytest.fail(
        f"{where} has no {name!r} in {library} {version}, and {user} needs it", pytrace=False
    )


def check_path(thing, path: str, user: str):
    """Follow a dotted path; fail if its last name is missing.

    Skip if an earlier one is: that has a test of its own.
    """
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(thing, name):
            pytest.skip(f"{name!r} is missing, which has a test of its own")
        thing = getattr(thing, name)
    if not hasattr(thing, last):
        missing(f"{type(thing).__module__}.{type(thing).__qualname__}", last, user)


def class_of(module: str, name: str):
    """A class or function of a library; skips where it is gone: that has its own test."""
    if not hasattr(importlib.import_module(module), name):
        pytest.skip(f"{name!r} is missing, which has a test of its own")
    return getattr(importlib.import_module(module), name)


def constant(file: str, name: str):
    """What a file of ours assigns to a name: a tuple, or the keys of a dictionary."""
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == name:
            keys = node.value.keys if isinstance(node.value, ast.Dict) else node.value.elts
            return [ast.literal_eval(key) for key in keys]
    raise LookupError(f"{file} assigns nothing to {name}")


# --------------------------------------------------------------------------------- what we import


@functools.cache
def imports() -> list[tuple[str, str, str]]:
    """(file, module, name) of every `from module import name` of ours, of these libraries."""
    found = []
    for path in sorted([*ROOT.glob("*.py"), *ROOT.glob("meteor_mini/**/*.py")]):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in LIBRARIES:
                found += [
                    (str(path.relative_to(ROOT)), node.module, alias.name) for alias in node.names
                ]
    return found


@pytest.mark.parametrize("module, name", sorted({(module, name) for _, module, name in imports()}))
def test_imports(module, name):
    users = ", ".join(sorted({file for file, *import_ in imports() if import_ == [module, name]}))
    try:
        owner = importlib.import_module(module)
    except ImportError:
        missing(module.rpartition(".")[0], module.rpartition(".")[2], users)
    try:
        getattr(owner, name)
    except AttributeError:
        missing(module, name, users)


# ------------------------------------------------------------ what stage 3 finds in a decoder


@functools.cache
def decoder(family: str):
    small = dict(**TINY, num_key_value_heads=2, intermediate_size=32, vocab_size=8)
    if "VL" in family:
        small["rope_parameters"] = dict(rope_type="default", mrope_section=[2, 1, 1])
    if family == "Mixtral":
        small["num_local_experts"] = 2
    if family == "Qwen3Moe":
        small |= dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=8)
    if family in ("Qwen3", "Qwen3Moe", "Qwen3VLText", "Gemma", "Gemma3Text"):
        small["head_dim"] = 8
    small |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    config = getattr(transformers, family + "Config")(**small)
    return getattr(transformers, family + "Model")(config).eval()


@pytest.mark.parametrize(
    "path",
    [
        "config.hidden_size",
        "config.num_hidden_layers",
        "config.num_attention_heads",
        "config._attn_implementation",
        "device",
        "dtype",
        "rotary_emb",
        "layers",
        "layers.0.input_layernorm",
        "layers.0.self_attn",
        "layers.0.self_attn.q_proj",
        "layers.0.self_attn.k_proj",
        "layers.0.self_attn.v_proj",
        "layers.0.self_attn.o_proj",
        "layers.0.self_attn.o_proj.in_features",
        "layers.0.self_attn.head_dim",
        "layers.0.self_attn.scaling",
    ],
)
def test_decoders_have(path):
    separate = path.rpartition(".")[2] in ("q_proj", "k_proj", "v_proj")
    for family in DECODERS:
        if not (separate and family in FUSED):
            check_path(decoder(family), path, "stage3_decode.py")


@pytest.mark.parametrize(
    "family, path",
    [
        ("Qwen3", "layers.0.self_attn.q_norm"),
        ("Qwen3", "layers.0.self_attn.k_norm"),
        ("Gemma3Text", "layers.0.self_attn.q_norm"),
        ("Gemma3Text", "layers.0.self_attn.layer_type"),
        ("Gemma3Text", "layers.0.self_attn.is_causal"),
        ("Gemma", "layers.0.self_attn.is_causal"),
        ("Phi3", "layers.0.self_attn.qkv_proj"),
        ("Phi3", "layers.0.self_attn.qkv_proj.out_features"),
        ("SmolLM3", "layers.0.self_attn.use_rope"),
        ("Qwen2_5_VLText", "rotary_emb.mrope_section"),
        ("Qwen3VLText", "rotary_emb.mrope_section"),
        ("Mistral", "config.sliding_window"),
        ("Phi3", "config.sliding_window"),
        ("Gemma3Text", "config.sliding_window"),
        ("Gemma3Text", "config.layer_types"),
    ],
)
def test_one_family_has(family, path):
    """Without one of these stage 3 would assume that no decoder has it, and not object."""
    check_path(decoder(family), path, "stage3_decode.py")


@pytest.mark.parametrize(
    "family, module, name",
    [("Gemma3Text", "rotary_emb", "layer_type"), ("Qwen3VLText", "", "deepstack_visual_embeds")],
)
def test_one_family_takes(family, module, name):
    """Stage 3 would call the first without it, and would not see the second."""
    forward = decoder(family).get_submodule(module).forward
    if name not in inspect.signature(forward).parameters:
        missing(f"transformers: {family}Model{'.' + module if module else ''}", name, "stage 3")


def test_the_name_of_the_features_that_are_added():
    """As stage 3 spells it."""
    assert 'ADDED_FEATURES = "deepstack_visual_embeds"' in (ROOT / "stage3_decode.py").read_text()


def test_a_type_of_layers_that_slides():
    types = decoder("Gemma3Text").config.layer_types
    if "sliding_attention" not in types:
        missing(
            "transformers.Gemma3TextConfig.layer_types", "sliding_attention", "stage3_decode.py"
        )


@pytest.mark.parametrize(
    "outer",
    ["LlamaForCausalLM"]
    + [
        f"{name}ForConditionalGeneration"
        for name in ("Llava", "LlavaOnevision", "InternVL", "PaliGemma", "Gemma3", "Qwen2_5_VL")
        + ("Qwen3VL",)
    ],
)
def test_get_decoder(outer):
    if not hasattr(getattr(transformers, outer), "get_decoder"):
        missing(f"transformers.{outer}", "get_decoder", "stage3_decode.py")


def test_apply_rotary_pos_emb():
    for family in DECODERS:
        module = inspect.getmodule(type(decoder(family)))
        if not hasattr(module, "apply_rotary_pos_emb"):
            missing(module.__name__, "apply_rotary_pos_emb", "stage3_decode.py")


# --------------------------------------------------------------------- what it finds in a call


@functools.cache
def recorded(family: str) -> tuple:
    """args and kwargs of the first layer's call, and the output, of a prompt of 5 tokens."""
    model, calls = decoder(family), []
    if not hasattr(model, "layers"):
        pytest.skip("'layers' is missing, which has a test of its own")
    handle = model.layers[0].register_forward_pre_hook(
        lambda _, *call: calls.append(call), with_kwargs=True
    )
    with torch.no_grad():
        output = model(torch.arange(5)[None], use_cache=True)
    handle.remove()
    return *calls[0], output


@pytest.mark.parametrize("name", constant("stage3_decode.py", "DECODER_ARGUMENTS"))
def test_decoders_are_called_with(name):
    for family in DECODERS:
        if name not in inspect.signature(decoder(family).forward).parameters:
            missing(f"transformers.{family}Model.forward", name, "stage3_decode.py")


@pytest.mark.parametrize("name", constant("stage3_decode.py", "LAYER_ARGUMENTS"))
def test_layers_and_attention_are_called_with(name):
    for family in DECODERS:
        args, kwargs, _ = recorded(family)
        layer = decoder(family).layers[0]
        by_position = [*inspect.signature(layer.forward).parameters][: len(args)]
        if name not in [*by_position, *kwargs]:
            missing(f"transformers: {family}Model's call of a layer", name, "stage3_decode.py")
        if not hasattr(layer, "self_attn"):
            pytest.skip("'self_attn' is missing, which has a test of its own")
        if name not in inspect.signature(layer.self_attn.forward).parameters:
            missing(f"transformers: the attention of {family}Model", name, "stage3_decode.py")


def test_the_hidden_states_alone_come_by_position():
    for family in DECODERS:
        assert len(recorded(family)[0]) == 1, (
            f"{family}Model calls its layers with more than hidden_states by position"
        )


def test_the_cache_of_a_call_is_a_dynamic_cache_of_known_length():
    """By type alone, whatever it is called."""
    Cache, DynamicCache = (
        class_of("transformers", "Cache"),
        class_of("transformers", "DynamicCache"),
    )
    for family in DECODERS:
        _, kwargs, output = recorded(family)
        for values in (kwargs.values(), output.values()):
            caches = [value for value in values if isinstance(value, Cache)]
            assert len(caches) == 1 and isinstance(caches[0], DynamicCache), (
                f"{family}: {len(caches)} KV caches in a call"
            )
            assert caches[0].get_seq_length() == caches[0].get_seq_length(0) == 5
            check_path(caches[0].layers[0], "keys", "meteor_mini/bench.py")
            check_path(caches[0].layers[0], "values", "meteor_mini/bench.py")


def test_last_hidden_state():
    for family in DECODERS:
        if not hasattr(recorded(family)[2], "last_hidden_state"):
            missing(
                f"transformers: the output of {family}Model",
                "last_hidden_state",
                "stage3_decode.py",
            )


def test_create_causal_mask_takes_config_states_padding_and_cache_and_is_sized_by_one_layer():
    """By its effect: a token after 3 in layer 1, the first of them padding; layer 0 has 5."""
    create_causal_mask = class_of("transformers.masking_utils", "create_causal_mask")
    cache, model = class_of("transformers", "DynamicCache")(), decoder("Llama")
    for layer, length in enumerate((5, 3)):
        cache.update(torch.zeros(1, 2, length, 8), torch.zeros(1, 2, length, 8), layer)
    valid = torch.tensor([[False, True, True, True]])
    mask = create_causal_mask(model.config, torch.zeros(1, 1, 32), valid, cache, layer_idx=1)
    assert mask.tolist() == [[[[False, True, True, True]]]]


# ------------------------------------------------------------------- what stage 1 finds in encoders


@pytest.mark.parametrize("path", constant("stage1_encode.py", "FAMILIES"))
def test_the_class_of_a_family(path):
    module, _, name = path.rpartition(".")
    if not hasattr(importlib.import_module(module), name):
        missing(module, name, "stage1_encode.py")


@functools.cache
def encoder(family: str):
    """A tiny one of the library's own class."""
    vit = dict(img_size=16, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=0)
    if family == "CLIP":
        build = class_of("open_clip.transformer", "VisionTransformer")
        return build(
            image_size=16, patch_size=8, width=32, layers=3, heads=4, mlp_ratio=1.0, output_dim=8
        )
    if family == "ViT":
        return class_of("timm.models.vision_transformer", "VisionTransformer")(**vit)
    if family == "ViT of transformers":
        family = "ViT"
    if family == "EVA fused":
        return class_of("timm.models.eva", "Eva")(
            use_rot_pos_emb=True, ref_feat_shape=(2, 2), **vit
        )
    if family == "EVA":
        return class_of("timm.models.eva", "Eva")(
            use_rot_pos_emb=True, ref_feat_shape=(2, 2), qkv_fused=False, **vit
        )
    if family == "ConvNeXt":
        return class_of("timm.models.convnext", "ConvNeXt")(
            depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=0
        )
    if family == "Pix2Struct":
        config = transformers.Pix2StructVisionConfig(**TINY, d_kv=8, d_ff=32, seq_len=4)
        return class_of("transformers", "Pix2StructVisionModel")(config)
    if family == "LLaVA":
        vision = transformers.CLIPVisionConfig(
            **TINY, intermediate_size=32, image_size=16, patch_size=8
        )
        text = transformers.LlamaConfig(**TINY, intermediate_size=32, vocab_size=8)
        return transformers.LlavaForConditionalGeneration(
            transformers.LlavaConfig(vision_config=vision, text_config=text, image_token_id=3)
        )
    config = class_of("transformers", f"{family}Config")
    model = class_of("transformers", f"{family}Model")
    return model(config(**TINY, image_size=16, patch_size=8))


def in_block(block: str, names: list[str]) -> list[str]:
    return [f"{block}.{name}" for name in names]


ATTENTION = ["attention", "attention.q_proj", "attention.k_proj", "attention.head_dim"]
ATTENTION += ["attention.scaling"]
SELF_ATTENTION = ["layer_norm1", "self_attn", "self_attn.q_proj", "self_attn.k_proj"]
SELF_ATTENTION += ["self_attn.head_dim", "self_attn.scale"]
TIMM = ["blocks", "norm", "num_prefix_tokens", "cls_token"] + in_block(
    "blocks.0",
    ["norm1", "attn", "attn.qkv", "attn.q_norm", "attn.k_norm", "attn.head_dim", "attn.scale"],
)
# Stage 1 reads these in a model, besides the type of its convolution.
ENCODER_PATHS = {
    "CLIP": ["transformer", "transformer.resblocks", "ln_post", "attn_pool", "final_ln_after_pool"]
    + in_block(
        "transformer.resblocks.0",
        ["ln_1", "attn", "attn.in_proj_weight", "attn.in_proj_bias", "attn.head_dim"],
    ),
    "ViT": TIMM,
    "EVA fused": [*TIMM, "rope_mixed", "blocks.0.attn.q_bias", "blocks.0.attn.rotate_half"],
    "EVA": ["blocks.0.attn.q_proj", "blocks.0.attn.k_proj"],
    "ConvNeXt": ["forward_features", "feature_info"],
    "Pix2Struct": ["encoder", "encoder.layer", "layernorm"]
    + in_block(
        "encoder.layer.0",
        [
            "pre_attention_layer_norm",
            "attention",
            "attention.query",
            "attention.key",
            "attention.key_value_proj_dim",
            "attention.scaling",
        ],
    ),
    "CLIPVision": ["encoder", "encoder.layers"] + in_block("encoder.layers.0", SELF_ATTENTION),
    "SiglipVision": ["encoder", "encoder.layers", "post_layernorm"]
    + in_block("encoder.layers.0", SELF_ATTENTION),
    "ViT of transformers": ["layers", "layernorm"]
    + in_block("layers.0", ["layernorm_before", *ATTENTION]),
    "Dinov2": ["encoder", "encoder.layer", "layernorm"]
    + in_block("encoder.layer.0", ["norm1", *ATTENTION]),
    "Dinov2WithRegisters": [
        "encoder",
        "encoder.layer",
        "layernorm",
        "config.num_register_tokens",
        *in_block("encoder.layer.0", ["norm1", *ATTENTION]),
    ],
}
# pictures.py reads these, for the encoders that a Meteor may have.
VIEW_PATHS = {
    "CLIP": ["image_size", "conv1"],
    "ViT": ["patch_embed", "patch_embed.img_size", "embed_dim"],
    "EVA": ["patch_embed", "patch_embed.img_size", "embed_dim"],
    "ConvNeXt": ["num_features"],
    "Pix2Struct": ["config.patch_embed_hidden_size", "config.seq_len", "config.hidden_size"],
    "Dinov2": ["config.image_size", "config.patch_size", "config.hidden_size"],
}
# ToMe, in lab/baselines.py, runs the blocks of a ViT by itself.
TOME_PATHS = {
    "ViT": ["patch_embed", "_pos_embed", "patch_drop", "norm_pre"]
    + in_block("blocks.0", ["ls1", "ls2", "norm2", "mlp", "attn.proj", "attn.num_heads"])
}
VLM_PATHS = {
    "LLaVA": [
        "model",
        "model.vision_tower",
        "model.vision_tower.config.num_hidden_layers",
        "model.multi_modal_projector",
        "config.vision_feature_layer",
        "config.vision_feature_select_strategy",
        "config.image_token_id",
    ],
}
PATHS_OF = {
    "stage1_encode.py": ENCODER_PATHS,
    "meteor_mini/pictures.py": VIEW_PATHS,
    "meteor_mini/lab/baselines.py": TOME_PATHS,
    "meteor_mini/vlm.py": VLM_PATHS,
}


@pytest.mark.parametrize(
    "user, family, path",
    [
        (user, family, path)
        for user, families in PATHS_OF.items()
        for family, paths in families.items()
        for path in paths
    ],
)
def test_encoders_have(user, family, path):
    check_path(encoder(family), path, user)


@pytest.mark.parametrize("library", ["open_clip.transformer", "timm.layers"])
def test_patch_dropout_is_told_by_the_name_of_its_class_and_has_a_probability(library):
    """Stage 1 refuses a forward in which it is active."""
    if not hasattr(importlib.import_module(library), "PatchDropout"):
        missing(library, "PatchDropout", "stage1_encode.py")
    check_path(class_of(library, "PatchDropout")(0.5), "prob", "stage1_encode.py")


@pytest.mark.parametrize("family", ["CLIP", "ViT", "EVA", "CLIPVision", "SiglipVision", "Dinov2"])
def test_a_vision_transformer_cuts_its_patches_by_its_one_convolution(family):
    """Stage 1 counts patches by the stride of it."""
    convolutions = [m for m in encoder(family).modules() if isinstance(m, torch.nn.Conv2d)]
    assert [m.stride for m in convolutions] == [(8, 8)]


@pytest.mark.parametrize(
    "family, kind",
    [
        ("CLIP", "ResidualAttentionBlock.MultiheadAttention"),
        ("ViT", "Block.Attention"),
        ("EVA", "EvaBlock.EvaAttention"),
    ],
)
def test_the_classes_of_a_block_and_of_its_attention(family, kind):
    """Stage 1 refuses blocks of classes that it does not know."""
    block = (
        encoder(family).transformer.resblocks[0] if family == "CLIP" else encoder(family).blocks[0]
    )
    if kind != (found := f"{type(block).__name__}.{type(block.attn).__name__}"):
        missing(f"{type(block).__module__}, where it is {found},", kind, "stage1_encode.py")


def test_what_open_clip_wraps_around_a_tower():
    """Without preprocess_cfg a view would silently normalise with the statistics of CLIP."""
    import open_clip

    model = open_clip.create_model("ViT-S-32-alt")
    check_path(model, "visual", "meteor_mini/pictures.py")
    check_path(model, "visual.preprocess_cfg", "meteor_mini/pictures.py")
    assert {"mean", "std"} <= model.visual.preprocess_cfg.keys()


def test_what_timm_notes_of_a_model():
    import timm

    model = timm.create_model("test_vit", num_classes=0)
    check_path(model, "pretrained_cfg", "meteor_mini/pictures.py")
    assert {"mean", "std", "input_size"} <= model.pretrained_cfg.keys()


def test_the_encoder_of_a_whole_pix2struct():
    text = dict(hidden_size=8, d_kv=8, d_ff=8, num_heads=1, num_layers=1, vocab_size=8)
    vision = dict(**TINY, d_kv=8, d_ff=32, seq_len=4)
    config = transformers.Pix2StructConfig(text_config=text, vision_config=vision)
    whole = transformers.Pix2StructForConditionalGeneration(config)
    check_path(whole, "encoder", "meteor_mini/weights.py")


def test_rotary_table_of_a_block():
    if "rope" not in inspect.signature(encoder("EVA").blocks[0].forward).parameters:
        missing("timm.models.eva.EvaBlock.forward", "rope", "stage1_encode.py")


def test_rotary_embedding_by_halves():
    from timm import layers

    if not hasattr(layers, "apply_rot_embed_cat"):
        missing("timm.layers", "apply_rot_embed_cat", "stage1_encode.py")
    if "half" not in inspect.signature(layers.apply_rot_embed_cat).parameters:
        missing("timm.layers.apply_rot_embed_cat", "half", "stage1_encode.py")


# ------------------------------------------------------------------------ what meteor_mini calls

FUNCTIONS = {
    "meteor_mini/weights.py": [
        "open_clip.CLIP",
        "open_clip.create_model",
        "open_clip.list_models",
        "open_clip.get_pretrained_cfg",
        "open_clip.get_model_config",
        "open_clip.download_pretrained",
        "open_clip.list_pretrained_tags_by_model",
        "huggingface_hub.constants.ENDPOINT",
        "huggingface_hub.constants.HF_HUB_OFFLINE",
        "huggingface_hub.constants.HF_HUB_ETAG_TIMEOUT",
    ],
    "meteor_mini/model.py, of its own hooks,": [
        "huggingface_hub.PyTorchModelHubMixin._save_pretrained"
    ],
    "meteor_mini/finetune.py, of its own hooks,": [
        "transformers.Trainer._save",
        "transformers.PreTrainedModel._keys_to_ignore_on_save",
    ],
    "meteor_mini/lab/baselines.py": ["transformers.PreTrainedModel.set_attn_implementation"],
}


@pytest.mark.parametrize(
    "user, path", [(user, path) for user, paths in FUNCTIONS.items() for path in paths]
)
def test_functions(user, path):
    where, _, name = path.rpartition(".")
    try:
        owner = importlib.import_module(where)
    except ModuleNotFoundError:  # a class of a module
        module, _, cls = where.rpartition(".")
        owner = getattr(importlib.import_module(module), cls)
    if not hasattr(owner, name):
        missing(where, name, user)


@pytest.mark.parametrize(
    "function, keyword, user",
    [
        ("open_clip.create_model", "pretrained", "meteor_mini/weights.py"),
        ("open_clip.create_model", "force_quick_gelu", "meteor_mini/weights.py"),
        ("open_clip.create_model", "force_preprocess_cfg", "meteor_mini/weights.py"),
        (
            "transformers.LlavaForConditionalGeneration.forward",
            "logits_to_keep",
            "meteor_mini/vlm.py",
        ),
    ],
)
def test_keywords(function, keyword, user):
    library, *names = function.split(".")
    found = importlib.import_module(library)
    for name in names:
        found = getattr(found, name)
    if keyword not in inspect.signature(found).parameters:
        missing(function, keyword, user)


@pytest.mark.parametrize(
    "path",
    [
        "lm_head",
        "model",
        "model.norm",
        "generation_config",
        "get_input_embeddings",
        "config.tie_word_embeddings",
        "config.num_key_value_heads",
        "config.intermediate_size",
    ],
)
def test_a_llama_has(path):
    """For training, which asks for no logits of the prompt, for saving, and for counting FLOPs."""
    config = transformers.LlamaConfig(**TINY, intermediate_size=32, vocab_size=8)
    check_path(transformers.LlamaForCausalLM(config), path, "meteor_mini")
