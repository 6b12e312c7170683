"""Stage 3 on vision-language models of transformers as they come, training-free (`FAMILIES`);
and stage 1 on LLaVA's CLIP (the paper's Table 6).

What `meteor-mini ask --model llava-hf/llava-1.5-7b-hf` calls; copy from here into your own code.
"""

import math

import torch
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

import stage1_encode
from stage3_decode import AdaptivePruner, compact, solve_lambda

from .pretrained import fetched

FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "internvl",
    "smolvlm",
    "idefics3",
    "deepseek_vl_hybrid",
    "deepseek_vl",
    "paligemma",
    "gemma3",
    "qwen2_5_vl",
    "qwen3_vl",
)
# Of the visual tokens, on average over the layers: the paper's main result against EAGLE.
SHARE = 242 / 1024


def load_vlm(name: str, dtype="auto", **hub):
    """A model of `FAMILIES` and its processor, from the hub, its cache or a directory.

    Raises: ValueError where it cannot be fetched; TypeError for another kind of model.
    """
    auto = AutoModelForImageTextToText
    model = fetched(
        name, lambda: auto.from_pretrained(name, dtype=dtype, use_safetensors=True, **hub)
    ).eval()
    if model.config.model_type not in FAMILIES:
        raise TypeError(
            f"model must be one of {', '.join(FAMILIES)}, got {model.config.model_type}"
        )
    return model, fetched(name, lambda: AutoProcessor.from_pretrained(name, **hub))


def inputs_of(model, processor, image: Image.Image, question: str) -> dict:
    """A prompt in the model's own words, with one picture."""
    if processor.chat_template is None:  # PaliGemma: its processor puts the picture in front
        text = question
    else:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        user = [{"role": "user", "content": content}]
        text = processor.apply_chat_template(user, add_generation_prompt=True)
    inputs = processor(images=[image], text=[text], return_tensors="pt")
    return inputs.to(model.device, model.dtype)


@torch.no_grad()
def lambda_for(model, inputs: dict, visual_mask: torch.Tensor, average: float) -> float:
    """lambda that keeps `average` visual tokens per layer on these prompts.

    To serve many, solve it once on typical ones.
    """

    def measure(lam: float) -> float:
        with AdaptivePruner(model, visual_mask, lam=lam) as pruner:
            model(**inputs, logits_to_keep=1)
        return pruner.average_tokens().mean().item()

    return solve_lambda(average, measure)


def ask(
    model,
    processor,
    image: Image.Image,
    question: str,
    tokens: float | None = None,
    keep_all: bool = False,
    **options,
) -> dict:
    """Answer a question about a picture.

    Args:
        tokens: wanted visual tokens per layer; None: `SHARE` of them.
        options: of `generate`.
    Returns: {"answer", "visual_tokens": what came in, "average_tokens": mean per layer,
        "counts": {layer: tokens from there on}}.
    Raises: ValueError for tokens out of reach.
    """
    inputs = inputs_of(model, processor, image, question)
    visual_mask = inputs["input_ids"] == model.config.image_token_id
    visual = int(visual_mask.sum())
    if keep_all:
        lam = math.inf
    else:
        wanted = SHARE * visual if tokens is None else tokens
        lam = lambda_for(model, inputs, visual_mask, wanted)
    options = {"max_new_tokens": 64, "do_sample": False} | options
    with AdaptivePruner(model, visual_mask, lam=lam) as pruner:
        ids = model.generate(**inputs, **options)
    answer = ids[:, inputs["input_ids"].shape[1] :]
    text = processor.batch_decode(answer, skip_special_tokens=True)[0].strip()
    return {
        "answer": text,
        "visual_tokens": visual,
        "average_tokens": pruner.average_tokens().item(),
        "counts": {i: int(n) for i, n in pruner.counts.items()},
    }


# ------------------------------------------------------------------ stage 1 on LLaVA-1.5


class LlavaTower(nn.Module):
    """A LLaVA's CLIP, up to the layer that it reads (the last but one), as `stage1_encode.encode` takes it."""

    def __init__(self, llava):
        super().__init__()
        self.clip, layer = llava.model.vision_tower, llava.config.vision_feature_layer
        if not isinstance(layer, int) or llava.config.vision_feature_select_strategy != "default":
            raise TypeError(
                "model must read the patches of one layer of its CLIP, as LLaVA-1.5 does"
            )
        L = self.clip.config.num_hidden_layers
        self.layers = self.clip.encoder.layers[: layer if layer >= 0 else L + 1 + layer]


class LlavaAdapter(stage1_encode.Adapter):
    """transformers' CLIPVisionModel; LLaVA takes its patches without the final norm."""

    def __init__(self, v, outer):
        c = v.clip.config
        side = c.image_size // c.patch_size
        super().__init__(
            v,
            outer,
            v.layers,
            nn.Identity(),
            c.hidden_size,
            (side, side),
            (c.image_size,) * 2,
            1,
            True,
        )

    def patchify(self, pixels):
        return self.model.clip.pre_layrnorm(self.model.clip.embeddings(pixels)), None

    def block(self, i, x, rope):
        return self.blocks[i](x, None)

    def attention(self, i, x, rope):
        attn, h = self.blocks[i].self_attn, self.blocks[i].layer_norm1(x)
        q, k = (
            stage1_encode.heads(y, attn.head_dim) for y in (attn.q_proj(h[:, :1]), attn.k_proj(h))
        )
        return q, k, attn.scale


stage1_encode.FAMILIES[f"{__name__}.LlavaTower"] = LlavaAdapter


@torch.no_grad()
def encode_llava(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pixel_values: torch.Tensor,
    keep: tuple[int | None, int | None, int | None],
) -> tuple[dict, torch.Tensor]:
    """Stage 1 on a LLaVA-1.5: each picture keeps `keep` tokens at the three points, and as many placeholders in the prompt.

    Args: input_ids, attention_mask (B, S), pixel_values (pictures, 3, H, W): as the processor gives them.
    Returns: {"inputs_embeds" (B, S', D), "attention_mask" (B, S')} for `generate`, padded on the left, and the visual mask.
    """
    statistics = stage1_encode.CLIP_MEAN, stage1_encode.CLIP_STD
    mean, std = (torch.tensor(c, device=pixel_values.device).view(3, 1, 1) for c in statistics)
    images = (pixel_values.float() * std + mean).clamp(0, 1)
    tokens, _ = stage1_encode.encode(LlavaTower(model), images, keep)  # (pictures, K, D_CLIP)
    tokens = model.model.multi_modal_projector(tokens)  # (pictures, K, D)
    places = input_ids == model.config.image_token_id  # (B, S): N for each picture
    N = int(places.sum()) // len(tokens)
    number = (places.flatten().cumsum(0) - 1).view_as(
        places
    )  # of each placeholder, over the whole batch
    stays = ~places | (number % N < tokens.shape[1])
    embeds = model.get_input_embeddings()(input_ids.masked_fill(places, 0))
    embeds[places & stays] = tokens.flatten(0, 1).to(embeds.dtype)
    idx, real = compact(stays & attention_mask.bool())  # (B, S')
    inputs = {
        "inputs_embeds": embeds.take_along_dim(idx[..., None], dim=1),
        "attention_mask": real.long(),
    }
    return inputs, places.gather(1, idx) & real
