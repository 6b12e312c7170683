"""Train the toy model: `python -m meteor_mini.toy.train --work DIR --out DIR`.

The stages, in this order. Each leaves a file when it is done, and is resumable until then; to
repeat a stage, delete WORK/STAGE.safetensors and those of all later stages:

    pictures         draw the training pictures
    clip convnext    each encoder alone, on its own subjects: schooling.py
    eva pix2struct
    words            a Llama of few layers answers questions about pictures told in true words:
                     each visual token is the sum of the words of a patch, in the Llama's own
                     embeddings. It learns to look things up before it sees an encoder
    align            each projector learns to turn a patch into the sum of its words
    answer           the Llama, grown to all its layers, learns on what the encoders see, with
                     stages 1 and 2 active at random budgets, and stage 3 off. Two more losses teach
                     it where to look: attention_losses.py
    distill          EVA learns to give under stage 1 what it gives unpruned
    calibrate        ranks for stage 1, lambda for stage 3; writes the checkpoint to OUT

Three things make a small Llama learn to look things up early: Muon in place of AdamW for its
matrices, heads of 32 dimensions instead of 16, and questions in keywords (dialogues.py), where most
tokens are answers.
"""

import argparse
import copy
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_model
from torch import Tensor, nn

import stage1_encode

from ..budgets import Budget, measure_lambda, measure_ranks
from ..evaluate import accuracy
from ..finetune import answer_loss
from ..model import Meteor
from . import attention_losses, schooling, world
from .dialogues import make_dialogue
from .parts import DECODER, ENCODERS, build_tokenizer
from .pool import Pool, draw_pool, fit
from .questions import WORDS, example_batches, images_and_questions, to_images, to_pairs
from .random_budgets import encode_randomly, fuse_randomly
from .schooling import TOLD_SLOTS, build_pupil, select_words, train_encoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STAGES = ["pictures", *ENCODERS, "words", "align", "answer", "distill", "calibrate"]
STEPS = {"words": 4000, "align": 3000, "answer": 4800, "distill": 2000}
POOL = 16_000  # training pictures
BATCH = 24  # pictures a step
BUDGET = {"stage1": 320, "stage2": 145, "stage3": 48, "k": 6, "layers": [2, 6]}
FIRST_LAYERS = 4  # of the Llama that learns words
KEYWORDS, KEYWORDS_LATER = 0.5, 0.3  # share of pictures asked in keywords: at first, and later
NOISE = 0.2  # of a token made of true words, in standard deviations of the word embeddings
BLANK_WEIGHT = 0.3  # in `align_loss`, of a patch without words
LOOKING, ASIDE = 0.1, 0.1  # weights of the losses on attention
DISTILL_TOKENS = (200, 400)  # that stage 1 leaves of all encoders while EVA learns
RANK_PICTURES = 128  # on which ranks are measured
VALIDATION = 240  # questions after the stage "answer"
TABLE_KS = [8, 24, 48, 72, 96, BUDGET["stage2"], 240, 576]  # of the table of lambda
TABLE_LAMBDAS = [0.0, *(2.0 ** np.arange(0, 9.75, 0.5)).round(2).tolist()]
TABLE_QUESTIONS = 96


# ---------------------------------------------------------------------------------------- the model


def build_model(layers: int | None = None) -> Meteor:
    """The toy model with random weights. layers: of its Llama, where not all."""
    torch.manual_seed(0)
    layers = layers or DECODER["num_hidden_layers"]
    tokenizer = build_tokenizer(WORDS)
    config = {
        "encoders": {name: [name, options] for name, options in ENCODERS.items()},
        "decoder": DECODER | {"vocab_size": len(tokenizer), "num_hidden_layers": layers},
        "ranks": None,
        "lambda_table": None,
        "budget": BUDGET,
    }
    model = Meteor(config, tokenizer)
    for layer in model.decoder.model.layers:  # 2 L outputs are added: together as loud as one
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data *= (2 * layers) ** -0.5
    return model.to(DEVICE)


def load_stage(work: Path, stage: str) -> Meteor:
    """The model as a finished stage left it, without gradients, with the ranks of stage 1."""
    model = build_model()
    load_model(model, work / f"{stage}.safetensors")
    calibrate_ranks(model)
    return model.requires_grad_(False).eval()


def grow_layers(few: nn.Module, many: nn.Module) -> None:
    """Give a Llama of many layers the weights of one of few: the same function, deeper.

    Each old layer becomes the last of a group; the layers before it add nothing at first, as their
    output projections are zero. So the lookups of the old layers end up deep.
    """
    group = len(many.model.layers) // len(few.model.layers)
    for number, layer in enumerate(many.model.layers):
        old, place = divmod(number, group)
        if place == group - 1:
            layer.load_state_dict(few.model.layers[old].state_dict())
        else:
            nn.init.zeros_(layer.self_attn.o_proj.weight)
            nn.init.zeros_(layer.mlp.down_proj.weight)
    many.model.embed_tokens.load_state_dict(few.model.embed_tokens.state_dict())
    many.model.norm.load_state_dict(few.model.norm.state_dict())


def llama_optimizers(decoder: nn.Module, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest: word embeddings and norms."""
    matrices = [p for p in decoder.model.layers.parameters() if p.ndim == 2]
    in_layers = {id(p) for p in matrices}
    rest = [p for p in decoder.parameters() if id(p) not in in_layers]
    return [
        torch.optim.Muon(matrices, rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, rate, betas=(0.9, 0.98), weight_decay=0.02),
    ]


# -------------------------------------------------------------------------------------------- words


def embed_words(model: Meteor, words: Tensor) -> Tensor:
    """What a perfect encoder would say of patches: see `sum_embeddings`. A patch without words is
    <pad>.
    """
    embeddings = model.decoder.get_input_embeddings().weight  # (V, D)
    ids = [model.tokenizer.convert_tokens_to_ids(slot) for slot in world.SLOTS.values()]
    return sum_embeddings(embeddings, ids, words, embeddings[model.tokenizer.pad_token_id])


def sum_embeddings(embeddings: Tensor, ids: list[list[int]], words: Tensor, blank: Tensor):
    """The sum of n words' embeddings over sqrt(n), for each patch; `blank` (D,) where n is 0.

    Args: embeddings (V, D); ids: for each slot, the token ids of its words; words (..., slots)
        int64: of each patch, numbers in these lists from 1 on, 0 for none. Returns: (..., D) float.
    """
    total = 0.0
    for slot, of_words in enumerate(ids):
        of_slot = torch.tensor([0, *of_words], device=words.device)[words[..., slot]]  # (...)
        total = total + embeddings[of_slot] * (words[..., slot] > 0)[..., None]
    count = (words > 0).sum(dim=-1, keepdim=True)
    return torch.where(count > 0, total / count.clamp(min=1).sqrt(), blank)


def list_things_once(words: Tensor, rng: np.random.Generator) -> Tensor:
    """What all encoders pass on of pictures, without repetition, at random places.

    Args: words (B, 144, slots). Returns: (B, K, slots), K as the fullest picture needs.
    """
    pictures = []
    for patches in words:
        of_encoders = [select_words(patches, slots).unique(dim=0) for slots in TOLD_SLOTS.values()]
        things = torch.cat(of_encoders)
        pictures.append(things[things.any(dim=1)])
    K = max(map(len, pictures))
    tokens = words.new_zeros(len(words), K, words.shape[-1])
    for row, things in zip(tokens, pictures):
        row[np.sort(rng.permutation(K)[: len(things)])] = things
    return tokens


def train_words(work: Path) -> None:
    """Train a Llama of few layers on pictures told in true words."""
    model, pool = build_model(FIRST_LAYERS).train(), Pool(work)
    embeddings = model.decoder.get_input_embeddings().weight

    def compute_loss(step: int, rng: np.random.Generator) -> Tensor:
        rows = rng.integers(len(pool), size=BATCH)
        words = list_things_once(pool.words[rows], rng).to(DEVICE)
        tokens = embed_words(model, words)  # (B, K, D)
        tokens = tokens + NOISE * embeddings.detach().std() * torch.randn_like(tokens)
        share = KEYWORDS if step < 0.4 * STEPS["words"] else KEYWORDS_LATER
        asked = [make_dialogue(pool.pictures[i], rng, share) for i in rows]
        return answer_loss(model, tokens, to_pairs(asked))["loss"]

    optimizers = llama_optimizers(model.decoder, rate=3e-3)
    fit("words", work, model, optimizers, compute_loss, STEPS["words"], hold=0.8)


# --------------------------------------------------------------------------------------- projectors


def align_loss(projected: Tensor, target: Tensor, has_words: Tensor) -> Tensor:
    """Mean squared distance, patches without words weighted down.

    Args: projected, target (B, n, D) float; has_words (B, n) bool.
    """
    distance = (projected - target).square().mean(dim=-1)  # (B, n)
    weight = torch.where(has_words, 1.0, BLANK_WEIGHT)
    return (distance * weight).sum() / weight.sum()


def start_model(work: Path) -> Meteor:
    """The trained encoders, the Llama that learned words, grown; projectors are random."""
    model = build_model()
    for name, encoder in model.encoders.items():
        pupil = build_pupil(name)
        load_model(pupil, work / f"{name}.safetensors")
        encoder.load_state_dict(pupil["encoder"].state_dict())
    few = build_model(FIRST_LAYERS)
    load_model(few, work / "words.safetensors")
    grow_layers(few.decoder, model.decoder)
    calibrate_ranks(model)
    return model.requires_grad_(False).eval()


def train_projectors(work: Path) -> None:
    """Train the projectors to turn patches into the sums of their words."""
    model, pool = start_model(work), Pool(work)
    model.projectors.requires_grad_(True)
    scale = model.decoder.get_input_embeddings().weight.var()

    def compute_loss(step: int, rng: np.random.Generator) -> Tensor:
        rows, keep_all = rng.integers(len(pool), size=BATCH), step % 4 == 1
        features, kept = encode_randomly(model, pool.load_images(rows), keep_all, rng)
        loss = 0.0
        for name, x, patches in zip(model.projectors, features, kept):
            words = select_words(pool.words[rows], TOLD_SLOTS[name]).to(DEVICE)
            own_words = words.take_along_dim(patches[..., None], dim=1)  # (B, n, slots)
            target = embed_words(model, own_words)
            projected = model.projectors[name](x)
            loss = loss + align_loss(projected, target, own_words.any(dim=-1)) / scale
        return loss

    optimizer = torch.optim.AdamW(model.projectors.parameters(), 3e-3, weight_decay=0.01)
    fit("align", work, model, [optimizer], compute_loss, STEPS["align"])


# ------------------------------------------------------------------------------------------ answers


def train_answers(work: Path) -> None:
    """Train the Llama on what the encoders see."""
    model, pool = load_stage(work, "align"), Pool(work)
    model.decoder.requires_grad_(True).train()

    def compute_loss(step: int, rng: np.random.Generator) -> Tensor:
        keep_all = step % 8 == 0
        size = BATCH // 4 if keep_all else BATCH  # few pictures with all tokens, or many with few
        rows = rng.integers(len(pool), size=size)
        pictures = [pool.pictures[i] for i in rows]
        asked = [make_dialogue(picture, rng, KEYWORDS_LATER) for picture in pictures]
        dialogues = to_pairs(asked)
        images = pool.load_images(rows)
        features, kept = encode_randomly(model, images, keep_all, rng)
        encoded = fuse_randomly(model, features, kept, rng)
        tokens = encoded.fused.tokens  # (B, K, D)
        with attention_losses.record_attention(model, tokens.shape[1]) as attention:
            loss = answer_loss(model, tokens, dialogues)["loss"]
        targets = attention_losses.find_targets(encoded, pictures, asked)
        question_of_token = attention_losses.number_questions(model, dialogues)
        aside = attention_losses.aside_loss(attention, targets, question_of_token)
        return loss + LOOKING * attention_losses.looking_loss(attention) + ASIDE * aside

    optimizers = llama_optimizers(model.decoder, rate=2e-3)
    fit("answer", work, model, optimizers, compute_loss, STEPS["answer"], hold=0.6)
    print_accuracies(model.eval())


def print_accuracies(model: Meteor) -> None:
    """On validation questions: unpruned, and with stages 1 and 2."""
    methods = {"unpruned": Budget.keep_all(), "stages 1+2": replace(model.budget, stage3=None)}
    for name, method in methods.items():
        result = accuracy(model, method, "val", VALIDATION)
        families = ", ".join(f"{name} {right:.0f}" for name, right in result["families"].items())
        print(f"{name}: {result['accuracy']:.1f} %  {families}", flush=True)


# -------------------------------------------------------------------------------- EVA under stage 1


def distill_loss(
    encoder: nn.Module,
    teacher: nn.Module,
    project: nn.Module,
    pixels: Tensor,
    has_words: Tensor,
    keep: Sequence[int | None],
) -> Tensor:
    """The distance of an encoder's projected tokens under stage 1 from its teacher's, unpruned.

    Args: pixels (B, 3, H, W) float: what the encoder reads; has_words (B, N) bool: patches of which
        it passes on a word; keep: patches left at each pruning point, as in `stage1_encode.encode`.
    """
    with torch.no_grad():
        unpruned, _ = stage1_encode.encode(teacher, pixels)
        target = project(unpruned)  # (B, N, D)
    tokens, kept = stage1_encode.encode(encoder, pixels, keep)  # (B, n, D_l), (B, n)
    target = target.take_along_dim(kept[..., None], dim=1)  # (B, n, D)
    return align_loss(project(tokens), target, has_words.take_along_dim(kept, dim=1))


def distill_eva(work: Path) -> None:
    """Fine-tune EVA so that its outputs survive stage 1.

    A patch of a bar tells how tall the bar is. Where stage 1 had dropped some patches of a bar, the
    others told a height that was off, mostly by one. The encoders had learned with random patches
    dropped, and never under stage 1.
    """
    model, pool = load_stage(work, "answer"), Pool(work)
    eva, project = model.encoders["eva"], model.projectors["eva"]
    teacher = copy.deepcopy(eva)
    eva.requires_grad_(True).train()
    bars = schooling.find_pictures(pool, "bar")
    available = [view.num_tokens for view in model.views.values()]
    inside = [stage1_encode.can_prune_inside(encoder) for encoder in model.encoders.values()]
    place = list(model.encoders).index("eva")

    def compute_loss(step: int, rng: np.random.Generator) -> Tensor:
        anywhere = rng.integers(len(pool), size=BATCH // 2)
        rows = np.concatenate([anywhere, rng.choice(bars, size=BATCH // 2)])
        pixels = schooling.read_pixels(pool.load_images(rows).to(DEVICE), eva)
        has_words = select_words(pool.words[rows], TOLD_SLOTS["eva"]).any(dim=-1).to(DEVICE)
        total = int(rng.integers(*DISTILL_TOKENS))
        plan = stage1_encode.plan_budgets(total, model.ranks, available, inside)
        return distill_loss(eva, teacher, project, pixels, has_words, plan[place])

    optimizer = torch.optim.AdamW(eva.parameters(), 8e-4, betas=(0.9, 0.98), weight_decay=0.0)
    fit("distill", work, model, [optimizer], compute_loss, STEPS["distill"], hold=0.3)


# -------------------------------------------------------------------------------------- calibration


def calibrate_ranks(model: Meteor) -> None:
    """Stage 1's expected ranks (3 x C), measured on training pictures."""
    images = to_images([world.make_picture(i).image for i in range(RANK_PICTURES)])
    model.config["ranks"] = measure_ranks(model, list(images.split(32)))


def calibrate_lambda(model: Meteor) -> None:
    """The table of lambdas, measured on validation questions of all families."""
    batches = example_batches("val", TABLE_QUESTIONS, first=50_000)
    examples = [example for batch in batches for example in batch]
    images, texts = images_and_questions(examples)
    model.config["lambda_table"] = measure_lambda(model, images, texts, TABLE_KS, TABLE_LAMBDAS)


def calibrate(work: Path, out: Path) -> None:
    """Measure ranks and lambda; write the checkpoint in half precision, which loads as float32."""
    model = load_stage(work, "distill")
    calibrate_lambda(model)
    model.half().save_pretrained(out)


# -------------------------------------------------------------------------------------- the command


def run_stage(stage: str, work: Path, out: Path) -> None:
    if stage == "pictures":
        draw_pool(work, POOL)
    elif stage in ENCODERS:
        train_encoder(stage, work, DEVICE)
    elif stage == "words":
        train_words(work)
    elif stage == "align":
        train_projectors(work)
    elif stage == "answer":
        train_answers(work)
    elif stage == "distill":
        distill_eva(work)
    else:
        calibrate(work, out)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True, help="what the stages leave")
    parser.add_argument("--out", type=Path, required=True, help="where the checkpoint goes")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    last_files = {stage: args.work / f"{stage}.safetensors" for stage in STAGES}
    last_files["pictures"] = args.work / "pictures.pickle"
    last_files["calibrate"] = args.out / "model.safetensors"
    for stage, last_file in last_files.items():
        if last_file.exists():
            print(f"{stage}: done, {last_file} is there")
        else:
            run_stage(stage, args.work, args.out)


if __name__ == "__main__":
    main()
