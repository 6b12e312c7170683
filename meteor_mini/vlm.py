"""Stage 3 on vision-language models of transformers as they come, training-free (`MODEL_TYPES`);
and stage 1 on LLaVA's CLIP (the paper's Table 6).

What `meteor-mini ask --model llava-hf/llava-1.5-7b-hf` calls; copy from here into your own code.
"""

from functools import partial

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from stage1_encode import EncoderPruner
from stage3_decode import AdaptivePruner, compact, solve_lambda

from .weights import fetch

MODEL_TYPES = (
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
SHARE = 242 / 576  # of the visual tokens, mean over layers: what stage 3 keeps in the paper


def load_vlm(name: str, **hub) -> tuple:
    """A model of `MODEL_TYPES` and its processor, from the hub, its cache or a directory.

    Raises: ValueError where it cannot be fetched; TypeError for another kind of model.
    """
    auto = AutoModelForImageTextToText
    model = fetch(
        name, lambda: auto.from_pretrained(name, dtype="auto", use_safetensors=True, **hub)
    ).eval()
    if model.config.model_type not in MODEL_TYPES:
        raise TypeError(
            f"model must be one of {', '.join(MODEL_TYPES)}, got {model.config.model_type}"
        )
    return model, fetch(name, lambda: AutoProcessor.from_pretrained(name, **hub))


def prepare(model, processor, image: Image.Image, question: str) -> dict:
    """A prompt in the model's own words, with one picture."""
    if processor.chat_template is None:  # PaliGemma: its processor puts the picture in front
        inputs = processor(images=[image], text=[question], return_tensors="pt")
    else:
        content = [{"type": "image", "image": image}, {"type": "text", "text": question}]
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=True,  # by the template alone: no second <bos>
            return_dict=True,
            return_tensors="pt",
        )
    return inputs.to(model.device, model.dtype)


def find_visual(model, inputs: dict) -> torch.Tensor:
    """(B, S) bool: the places of a prompt that hold visual tokens."""
    return inputs["input_ids"] == model.config.image_token_id


@torch.no_grad()
def measure_tokens(model, prompts: list[dict], lam: float) -> float:
    """Visual tokens per layer that lambda keeps, averaged over prompts of `prepare`."""
    averages = []
    for inputs in prompts:
        with AdaptivePruner(model, find_visual(model, inputs), lam=lam) as pruner:
            model(**inputs, logits_to_keep=1)
        averages.append(pruner.average_tokens().mean().item())
    return sum(averages) / len(averages)


def calibrate_lambda(model, prompts: list[dict], tokens: float) -> float:
    """The lambda that keeps `tokens` visual tokens per layer, averaged over prompts.

    Run it once, on representative prompts. Each step of the bisection is one prefill of every
    prompt, and there are up to 42 steps. What the result keeps may differ: see `measure_tokens`.

    Args: prompts: of `prepare`, one or more.
    Returns: lambda, also noted as model.config.meteor_lambda, which `save_pretrained` writes.
    Raises: ValueError for tokens out of reach.
    """
    lam = solve_lambda(tokens, partial(measure_tokens, model, prompts))
    model.config.meteor_lambda = lam
    return lam


def ask(
    model,
    processor,
    image: Image.Image,
    question: str,
    lam: float | None = None,
    **options,
) -> dict:
    """Answer a question about a picture.

    Args:
        lam: lambda; infinity keeps all; None: what `calibrate_lambda` noted.
        options: of `generate`.
    Returns: {"answer", "visual_tokens": what came in, "average_tokens": mean per layer,
        "counts": {layer: tokens from there on}}.
    Raises: ValueError without a lambda.
    """
    if lam is None:
        lam = getattr(model.config, "meteor_lambda", None)
    if lam is None:
        raise ValueError(
            "lam must be given, as this model is not calibrated: `meteor-mini calibrate` finds it "
            "once, on typical pictures"
        )
    inputs = prepare(model, processor, image, question)
    visual_mask = find_visual(model, inputs)
    options = {"max_new_tokens": 64, "do_sample": False} | options
    with AdaptivePruner(model, visual_mask, lam=lam) as pruner:
        ids = model.generate(**inputs, **options)
    answer = ids[:, inputs["input_ids"].shape[1] :]
    return {
        "answer": processor.batch_decode(answer, skip_special_tokens=True)[0].strip(),
        "visual_tokens": int(visual_mask.sum()),
        "average_tokens": pruner.average_tokens().item(),
        "counts": {i: int(n) for i, n in pruner.counts.items()},
    }


# ----------------------------------------------------------------------------- stage 1 on LLaVA-1.5


def blocks_that_llava_reads(model) -> int:
    """How many blocks of its CLIP a LLaVA uses: it takes the patches of the last block but one.

    Raises: TypeError for a LLaVA that joins several layers, or keeps the CLS token.
    """
    layer = model.config.vision_feature_layer
    if not isinstance(layer, int) or model.config.vision_feature_select_strategy != "default":
        raise TypeError("model must read the patches of one layer of its CLIP, as LLaVA-1.5 does")
    if layer >= 0:
        return layer
    blocks = model.model.vision_tower.config.num_hidden_layers
    return blocks + 1 + layer  # layer -1 is the output of the last block


@torch.no_grad()
def encode_llava(
    model,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    pixel_values: torch.Tensor,
    keep: tuple[int | None, ...],
) -> tuple[dict, torch.Tensor]:
    """Stage 1 on a LLaVA-1.5: its CLIP prunes each picture, and the prompt loses as many
    placeholders.

    Args: input_ids, attention_mask (B, S), pixel_values (pictures, 3, H, W): as the processor gives
        them; keep: tokens of a picture at each pruning point, as in `EncoderPruner`.
    Returns: {"inputs_embeds" (B, S', D), "attention_mask" (B, S')} for `generate`, padded on the
        left, and the visual mask (B, S') bool.
    """
    tower, depth = model.model.vision_tower, blocks_that_llava_reads(model)
    with EncoderPruner(tower, keep, depth=depth) as pruner:
        tower(pixel_values)
    tokens = model.model.multi_modal_projector(pruner.tokens)  # (pictures, K, D)
    pictures, K, _ = tokens.shape

    placeholders = input_ids == model.config.image_token_id  # (B, S): N for each picture
    N = int(placeholders.sum()) // pictures
    number = placeholders.flatten().cumsum(0).view_as(placeholders) - 1  # over the whole batch
    kept = placeholders & (number % N < K)  # the first K placeholders of each picture
    embeds = model.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))
    embeds[kept] = tokens.flatten(0, 1).to(embeds.dtype)

    text = ~placeholders & attention_mask.bool()
    idx, real = compact(text | kept)  # (B, S')
    inputs = {
        "inputs_embeds": embeds.take_along_dim(idx[..., None], dim=1),
        "attention_mask": real.long(),
    }
    return inputs, placeholders.gather(1, idx) & real
