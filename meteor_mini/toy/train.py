"""Makes the embedded checkpoint: `python -m meteor_mini.toy.train`.

Stages, all but `align` and `calibrate` resumable, run in this order (one alone with --stage NAME):

    pictures         draw the training pool once (fixed seeds)
    clip convnext    each encoder alone, on its own subjects: see schooling.py
    eva pix2struct
    words            a Llama of few layers, on questions about pictures told in true words: each
                     visual token is what a perfect encoder would say of a patch
    features         encode the pool once under random stage-1 budgets
    align            projectors: a projected patch is to be the sum of its words' vectors
    answer           the Llama, grown to all its layers, on what the encoders see, with stages 1
                     and 2 active at random budgets; it is also told where to look, and that to
                     look costs; the mean of the weights at the ends of three rounds
    steady           EVA, to tell the Llama the same under stage 1 as unpruned
    calibrate        ranks for stage 1, lambda for stage 3; writes the checkpoint
"""

import argparse
import contextlib
import copy
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

import stage1_encode

from ..baselines import FUSIONS
from ..budgets import Budget, measure_lambda, measure_ranks
from ..finetune import Dialogue, answer_loss, filled_up, pack_dialogue, training_loss
from ..model import Encoded, Meteor
from ..weights import CHECKPOINTS, own_weights
from . import questions, world
from .evaluate import accuracy, print_recall, recall
from .parts import DECODER, ENCODERS, build_tokenizer
from .pool import (
    Pool,
    draw_pool,
    labels,
    load_facts,
    load_state,
    progress,
    save_state,
    save_whole,
    schedule,
    update,
)
from .questions import example_batches, to_images
from .schooling import TOLD, TOLD_SLOTS, seen, showing, told_words, train_encoder

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
STAGES = ["pictures", *ENCODERS, "words", "features", "align", "answer", "steady", "calibrate"]
STEPS = {
    "clip": 2400,
    "convnext": 2100,
    "eva": 2800,
    "pix2struct": 4800,
    "words": 4000,
    "align": 3000,
    "steady": 2000,
}
# Steps of "answer", in rounds: in each the learning rate rises and falls. What is kept is the mean
# of the weights at their ends [stochastic weight averaging, arXiv 1803.05407].
ROUNDS = (3200, 800, 800)
POOL = 16_000  # training pictures
CHUNK = 32  # pictures a batch, and a file of cached features

BUDGET = {"stage1": 320, "stage2": 145, "stage3": 48, "k": 6, "layers": [2, 6]}
TAUGHT_LAYERS = [1, 5, 7]  # in which the Llama learns where to look: `aside_loss`
FIRST_LAYERS = 4  # of the Llama that learns words
BATCH = 24  # pictures a step of the Llama
# How often each family is asked, beside one: those that are learned last.
FAMILY_WEIGHTS = {
    "presence": 4,
    "count": 4,
    "relation": 3,
    "number": 10,
    "label": 2,
    "tag": 4,
}
# Share of pictures asked in short: up to this part of the steps on words, and from there on.
SHORT, SHORT_UNTIL, SHORT_LATER = 0.5, 0.4, 0.3
DESCRIBED = 0.3  # share of pictures that are also described as a whole
NOISE = 0.2  # of a token made of true words, in standard deviations of the words' vectors
# Stage 2 in training: mostly the default, so that the same weights serve every strategy that the
# tables compare.
STRATEGIES = {"collaborative": 0.7, "greedy": 0.1, "separate": 0.1, "random": 0.1}
COUNTS = (40, 120)  # tokens that stage 2 leaves in training, at random
# Share of batches with encoders replaced by zeros, so that the tables can ask what each is worth.
MASKED = 0.08
# Weights of two more losses in the stage "answer": see `looking_loss` and `aside_loss`.
LOOKING, ASIDE = 0.1, 0.1
BLANK_WEIGHT = 0.3  # in `align_loss`, of a patch of which an encoder tells no word
# In the stage "steady": tokens that stage 1 leaves of all encoders, at random; and the share of
# steps in which it leaves all.
STEADY_COUNTS, STEADY_WHOLE = (200, 400), 0.15
# Tables of lambda: tokens that enter the LLM, and lambdas.
TABLE_KS = [8, 24, 48, 72, 96, BUDGET["stage2"], 240, 576]
TABLE_LAMBDAS = [0.0, *(2.0 ** np.arange(0, 9.75, 0.5)).round(2).tolist()]


def pool_slice(chunk: int) -> slice:
    return slice(chunk * CHUNK, (chunk + 1) * CHUNK)


# ------------------------------------------------------------------------- pictures in true words


def slot_ids(model: Meteor) -> list[Tensor]:
    """Per slot, the token id of each of its words; index 0, "none", is <pad>."""
    ids = []
    for words in world.SLOTS.values():
        of_words = model.tokenizer.convert_tokens_to_ids(words)
        ids.append(torch.tensor([model.tokenizer.pad_token_id, *of_words], device=model.device))
    return ids


def spoken(model: Meteor, words: Tensor, table: list[Tensor]) -> Tensor:
    """What a perfect encoder would say of patches: the sum of n words' vectors, over sqrt(n).

    A patch without words is <pad>.

    Args: words (..., slots) int64; table: `slot_ids`. Returns: (..., D) float.
    """
    vectors = model.decoder.get_input_embeddings().weight  # (V, D)
    total = 0.0
    for slot, ids in enumerate(table):
        there = (words[..., slot] > 0)[..., None]
        total = total + vectors[ids[words[..., slot]]] * there  # (..., D)
    number = (words > 0).sum(dim=-1, keepdim=True)
    blank = vectors[model.tokenizer.pad_token_id]
    return torch.where(number > 0, total / number.clamp(min=1).sqrt(), blank)


def each_thing_once(words: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """What all encoders would say of pictures, without repetition.

    Args: words (B, 144, slots) uint8.
    Returns: (B, K, slots), K as the fullest picture needs; the others' blanks lie anywhere.
    """
    pictures = []
    for patches in words:
        said = []
        for name in TOLD:
            of_encoder = told_words(patches, name)
            of_encoder = of_encoder[of_encoder.any(axis=1)]
            _, first = np.unique(of_encoder, axis=0, return_index=True)
            said.append(of_encoder[np.sort(first)])
        pictures.append(np.concatenate(said))
    K = max(map(len, pictures))
    tokens = np.zeros((len(words), K, words.shape[-1]), np.uint8)
    for picture, said in zip(tokens, pictures):
        picture[np.sort(rng.permutation(K)[: len(said)])] = said
    return tokens


def words_stage(work: Path) -> None:
    """Train a Llama of few layers on questions about pictures told in true words."""
    model = new_model(FIRST_LAYERS).train()
    pool, pictures, table = Pool(work), load_facts(work), slot_ids(model)

    def loss_of(step: int, rng: np.random.Generator) -> Tensor:
        rows = np.sort(rng.integers(len(pool), size=BATCH))
        words = each_thing_once(pool.words[rows], rng)
        tokens = spoken(model, labels(words, DEVICE), table)  # (B, K, D)
        loudness = NOISE * model.decoder.get_input_embeddings().weight.detach().std()
        tokens = tokens + loudness * torch.randn_like(tokens)
        short = SHORT if step < SHORT_UNTIL * STEPS["words"] else SHORT_LATER
        dialogues = [as_pairs(dialogue(pictures[i], rng, short)) for i in rows]
        return answer_loss(model, tokens, dialogues)["loss"]

    train_llama(model, "words", work, loss_of, range(STEPS["words"]), rate=3e-3, hold=0.8)


# ---------------------------------------------------------------------------------------- the Llama


def optimizers_of(decoder: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest: word vectors and norms."""
    layers = [p for p in decoder.model.layers.parameters() if p.ndim == 2]
    in_layers = {id(p) for p in layers}
    rest = [p for p in decoder.parameters() if id(p) not in in_layers]
    return [
        torch.optim.Muon(layers, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, weight_decay=0.02, betas=(0.9, 0.98), fused=True),
    ]


def train_llama(
    model: Meteor,
    stage: str,
    work: Path,
    loss_of: Callable[[int, np.random.Generator], Tensor],
    numbers: range,
    rate: float,
    hold: float,
) -> None:
    """Train the Llama on the losses of loss_of(number, rng), resumable; writes the whole model.

    Args: numbers: of the steps, which are also their seeds.
    """
    optimizers, state = optimizers_of(model.decoder), work / f"{stage}.resume.safetensors"
    steps, losses = len(numbers), []
    bar = progress(load_state(state, model, optimizers), steps, stage)
    for step in bar:
        number = numbers[step]
        torch.manual_seed(number)
        rng = np.random.default_rng([17, number])
        loss = loss_of(number, rng)
        update(optimizers, loss, rate * schedule(step, steps, hold=hold), clip=1.0)
        losses.append(loss.item())
        if step % 20 == 19:
            bar.set_postfix(loss=f"{np.mean(losses[-100:]):.3f}")
        if step % 250 == 249 or step == steps - 1:
            save_state(state, own_weights(model), optimizers, step + 1)
    save_whole(own_weights(model), work / f"{stage}.safetensors")


def mean_weights(files: list[Path]) -> dict[str, Tensor]:
    """The mean of the weights in several files, name by name."""
    models = [load_file(file) for file in files]
    return {name: torch.stack([model[name] for model in models]).mean(0) for name in models[0]}


def grown(few: nn.Module, many: nn.Module) -> None:
    """Give a Llama of many layers the weights of one of few: the same function, deeper.

    Each old layer becomes the last of a group; the layers before it add nothing at first, as their
    output projections are zero. So what the old layers look up comes to lie deep.
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


# ----------------------------------------------------- features of frozen encoders, computed once


def cache_features(
    model: Meteor,
    work: Path,
    into: str,
    chunks: int,
    choose_budget: Callable[[int], int | None],
) -> None:
    """Encode the pool once, `CHUNK` pictures a file.

    A file holds, per encoder, tokens (32, n_l, D_l) in half precision and the patches kept
    (32, n_l). Files that are there already stay.

    Args: into: directory in work; choose_budget: number of a file -> its stage-1 budget.
    """
    pool = Pool(work)
    (work / into).mkdir(exist_ok=True)
    encoders = list(model.encoders.values())
    for chunk in progress(0, chunks, into):
        target = work / into / f"{chunk}.safetensors"
        if target.exists():
            continue
        pixels = model.pixels(to_images(pool.images[pool_slice(chunk)]))
        with torch.no_grad():
            features, kept = stage1_encode.encode_all(
                encoders, pixels, choose_budget(chunk), model.ranks
            )
        arrays = {}
        for name, x, keep_idx in zip(model.encoders, features, kept):
            arrays[f"tokens.{name}"] = x.half()
            arrays[f"keep.{name}"] = keep_idx.to(torch.uint8)
        save_whole(arrays, target)


def random_stage1(chunk: int) -> int | None:
    """A stage-1 budget for each file; one file in eight keeps all."""
    rng = np.random.default_rng([11, chunk])
    if rng.random() < 1 / 8:
        return None
    return int(rng.integers(100, 260))


def load_chunk(model: Meteor, folder: Path, chunk: int) -> tuple[list[Tensor], list[Tensor]]:
    """A file of `cache_features`: per encoder tokens (32, n_l, D_l) and patches (32, n_l)."""
    arrays = load_file(folder / f"{chunk}.safetensors")
    features = [arrays[f"tokens.{name}"].float().to(DEVICE) for name in model.encoders]
    kept = [arrays[f"keep.{name}"].long().to(DEVICE) for name in model.encoders]
    return features, kept


def features_stage(work: Path) -> None:
    model = with_encoders(new_model(), work)
    calibrate_ranks(model)
    (work / "ranks.json").write_text(json.dumps(model.config["ranks"]))
    cache_features(model, work, "features", POOL // CHUNK, random_stage1)


# --------------------------------------------------------------- projectors in the space of words


def align_loss(projected: Tensor, target: Tensor, has_words: Tensor) -> Tensor:
    """Mean squared distance to the sum of words, patches without words weighted down.

    Args: projected, target (B, n, D) float; has_words (B, n) bool.
    """
    distance = (projected - target).square().mean(dim=-1)  # (B, n)
    weight = torch.where(has_words, 1.0, BLANK_WEIGHT)
    return (distance * weight).sum() / weight.sum()


def learn_words(
    model: Meteor,
    project: Callable[[list[Tensor], list[Tensor]], dict[str, tuple[Tensor, Tensor, list[str]]]],
    parameters: Iterable[nn.Parameter],
    work: Path,
    features: str,
    steps: int,
) -> None:
    """Train whatever projects features to say what the encoders learned, in the Llama's words.

    Args:
        project: features and patches kept of all encoders, as `load_chunk` gives them -> name ->
            projected tokens (B, n, D), their patches (B, n), and the encoders whose words they are.
        features: directory of `cache_features`.
    """
    table, pool = slot_ids(model), Pool(work)
    chunks = len(list((work / features).iterdir()))
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, fused=True)
    scale = model.decoder.get_input_embeddings().weight.detach().var()
    bar = progress(0, steps, "align")
    for step in bar:
        chunk = int(np.random.default_rng([13, step]).integers(chunks))
        shown = pool.words[pool_slice(chunk)]  # (B, 144, slots)
        losses = {}
        projected = project(*load_chunk(model, work / features, chunk))
        for name, (tokens, patches, encoders) in projected.items():
            taught = [told_words(shown, encoder) for encoder in encoders]
            words = labels(np.maximum.reduce(taught), DEVICE)
            words = words.take_along_dim(patches[..., None], dim=1)  # (B, n, slots)
            target = spoken(model, words, table).detach()
            losses[name] = align_loss(tokens, target, words.any(dim=-1)) / scale
        update([optimizer], sum(losses.values()), 3e-3 * schedule(step, steps))
        if step % 50 == 49:
            bar.set_postfix({name: f"{loss.item():.3f}" for name, loss in losses.items()})


def align_stage(work: Path) -> None:
    """Train all projectors."""
    model = with_encoders(grown_model(work), work)

    def project(features, kept):
        tokens = {}
        for (name, projector), x, patches in zip(model.projectors.items(), features, kept):
            tokens[name] = (projector(x), patches, [name])
        return tokens

    learn_words(model, project, model.projectors.parameters(), work, "features", STEPS["align"])
    save_whole(own_weights(model), work / "align.safetensors")
    print_recall(recall(model, replace(model.budget, stage3=None)))


# --------------------------------------------------------------------------------------- questions


def dialogue(
    picture: world.Picture, rng: np.random.Generator, short: float = 0.0, most: int = 72
) -> list[questions.Question]:
    """Questions with true answers about a picture, families mixed.

    They have about `most` words in all, so that the rows of a batch are nearly as long as one
    another; some begin with a description of the whole picture.

    Args: short: share of pictures that are asked in two or three words.
    """
    if rng.random() < short:
        pairs = questions.in_short(picture, rng)
        order = rng.permutation(len(pairs))
        return fitting([only_trains(*pairs[i]) for i in order], most)
    families = weighted_families(picture.kind)
    whole_picture = only_trains(*questions.describe(picture))
    asked = []
    if rng.random() < DESCRIBED:
        asked.append(whole_picture)
    for _ in range(24):
        family = families[rng.integers(len(families))]
        if family == "where":
            asked.append(only_trains(*questions.where(picture, rng)))
            continue
        question = questions.ask(picture, family, rng)
        if question is not None:
            asked.append(question)
    return fitting(asked, most) or [whole_picture]


def only_trains(text: str, answer: str) -> questions.Question:
    """A question that is not measured: nobody says which patches it is about."""
    return questions.Question(text, answer, about=[])


def fitting(asked: list[questions.Question], most: int) -> list[questions.Question]:
    """The questions in their order, none twice, that have at most `most` words together."""
    chosen, texts, words = [], set(), 0
    for question in asked:
        more = len(questions.split_words(question.text + " " + question.answer)) + 2  # <ans>, <eos>
        if question.text not in texts and words + more <= most:
            chosen.append(question)
            texts.add(question.text)
            words += more
    return chosen


def as_pairs(asked: list[questions.Question]) -> Dialogue:
    return [(question.text, question.answer) for question in asked]


def weighted_families(kind: str) -> list[str]:
    """The families of a kind of picture, each as often as it is to be asked."""
    kinds = questions.KIND_OF_FAMILY | {"where": "scene"}
    families = []
    for family, of_kind in kinds.items():
        if of_kind == kind:
            families += [family] * FAMILY_WEIGHTS.get(family, 1)
    return families


def random_batch(
    rng: np.random.Generator, kept_by_stage1: int, full: int
) -> tuple[int, Budget, Callable]:
    """(pictures, stage-2 budget, fusion): all tokens for few pictures, or few tokens for many."""
    if kept_by_stage1 == full and rng.random() < 0.7:
        return 6, Budget(), FUSIONS["collaborative"]
    if rng.random() < 0.1:
        return 12, Budget(), FUSIONS["collaborative"]
    strategy = str(rng.choice(list(STRATEGIES), p=list(STRATEGIES.values())))
    K = min(int(rng.integers(*COUNTS)), kept_by_stage1)
    return BATCH, Budget(stage2=K), FUSIONS[strategy]


def mask_encoders(features: list[Tensor], rng: np.random.Generator) -> list[Tensor]:
    """Now and then, some encoders see nothing: their features are zeros."""
    if rng.random() >= MASKED:
        return features
    seen = rng.random(len(features)) < 0.6
    return [x if sees else torch.zeros_like(x) for x, sees in zip(features, seen)]


def random_encoded(
    model: Meteor, work: Path, chunk: int, rng: np.random.Generator
) -> tuple[Encoded, np.ndarray]:
    """Pictures of a file of features, after stage 2 at a random budget.

    Returns: the batch, and which pictures of the pool it shows.
    """
    features, kept = load_chunk(model, work / "features", chunk)
    kept_by_stage1 = sum(x.shape[1] for x in features)
    size, budget, fusion = random_batch(rng, kept_by_stage1, model.num_tokens)
    rows = rng.permutation(CHUNK)[:size]
    features = mask_encoders([x[rows] for x in features], rng)
    encoded = model.fuse(features, [keep_idx[rows] for keep_idx in kept], budget, fusion)
    return encoded, chunk * CHUNK + rows


def answer_stage(work: Path) -> None:
    """Train the Llama on what the encoders see, in `ROUNDS`; the projectors stay as they are."""
    model = trained(work, "align").train()
    model.projectors.requires_grad_(False)
    pictures = load_facts(work)

    def loss_of(step: int, rng: np.random.Generator) -> Tensor:
        if step % 500 == 499:
            print_accuracies(model, step + 1)
        encoded, numbers = random_encoded(model, work, int(rng.integers(POOL // CHUNK)), rng)
        shown = [pictures[i] for i in numbers]
        asked = [dialogue(picture, rng, SHORT_LATER) for picture in shown]
        dialogues = [as_pairs(of_picture) for of_picture in asked]
        with attention_on_picture(model, encoded.fused.tokens.shape[1]) as attention:
            loss = training_loss(model, encoded, dialogues)["loss"]
        about = tokens_asked_about(encoded, shown, asked)
        asking = asking_tokens(model, dialogues)
        loss = loss + LOOKING * looking_loss(attention)
        return loss + ASIDE * aside_loss(attention, about, asking)

    first, files = 0, []
    for number, steps in enumerate(ROUNDS, start=1):
        name = f"answer{number}"
        numbers = range(first, first + steps)  # a later round sees other pictures and questions
        train_llama(model, name, work, loss_of, numbers, rate=2e-3, hold=0.6)
        files.append(work / f"{name}.safetensors")
        first += steps
    save_whole(mean_weights(files), work / "answer.safetensors")
    load_own(model, work / "answer.safetensors")
    print_recall(recall(model, replace(model.budget, stage3=None)))


# ---------------------------------------------------------------------------- where the Llama looks
# A large Llama looks, in its early layers, at what a question may need, and elsewhere it rests on
# the first token [METEOR, Findings 4 and 5; arXiv 2309.17453]. A small one does not learn this by
# itself: its idle heads spread their attention over the picture, and then neither VAV nor the
# scores tell anything. So this one is told.


@contextlib.contextmanager
def attention_on_picture(model: Meteor, K: int) -> Iterator[list[Tensor]]:
    """Collects how much the text looks at each of the K visual tokens.

    Yields: a list, filled by the forward pass with (B, H, T, K) float for each layer: the weights
    of H heads, from all T tokens of text behind the picture.
    """
    start, collected = len(model.before_ids), []
    end = start + K

    def attention(module, query, key, value, attention_mask, **options):
        text = query[:, :, end:]  # (B, H, T, d)
        scores = module.scaling * (text @ key.mT)  # (B, H, T, S)
        hidden = ~attention_mask[:, :, end:]
        weights = scores.masked_fill(hidden, -torch.inf).softmax(dim=-1)
        collected.append(weights[..., start:end])
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)

    AttentionInterface.register("on_picture", attention)
    before = model.decoder.config._attn_implementation
    model.decoder.set_attn_implementation("on_picture")
    try:
        yield collected
    finally:
        model.decoder.set_attn_implementation(before)


def looking_loss(attention: list[Tensor]) -> Tensor:
    """Looking at the picture costs: the mean share of the text's attention that is on it, 0..1.

    Args: attention: of each layer (B, H, T, K) float.
    """
    shares = [weights.sum(dim=-1).mean() for weights in attention]
    return torch.stack(shares).mean()


class About(NamedTuple):
    """R things that questions ask about: several for a question that needs several.

    picture (R,) int64: row of the batch; question (R,) int64: which of its questions, from 1;
    tokens (R, K) bool: the visual tokens that show the thing, of the encoders that tell all that
    the question needs of it; at least one.
    """

    picture: Tensor
    question: Tensor
    tokens: Tensor


def tokens_asked_about(
    encoded: Encoded, pictures: list[world.Picture], asked: list[list[questions.Question]]
) -> About:
    """Things that no visual token shows any more are left out."""
    picture, question, patches, knows = [], [], [], []
    for b, of_picture in enumerate(asked):
        for number, one in enumerate(of_picture, 1):
            for thing in one.about:
                picture.append(b)
                question.append(number)
                patches.append(questions.asked_patches(pictures[b], one._replace(about=[thing])))
                knows.append(encoders_that_tell_of(thing))

    kept = torch.cat(encoded.stage1_idx, dim=1)  # (B, sum of n_l): patches
    device = kept.device
    sizes = torch.tensor([idx.shape[1] for idx in encoded.stage1_idx], device=device)
    encoder = torch.arange(len(sizes), device=device).repeat_interleave(sizes)  # (sum of n_l,)
    patch_of_token = kept.gather(1, encoded.fused.keep_idx)  # (B, K)
    encoder_of_token = encoder[encoded.fused.keep_idx]  # (B, K)

    picture = torch.tensor(picture, dtype=torch.int64, device=device)
    question = torch.tensor(question, dtype=torch.int64, device=device)
    patches = torch.tensor(np.array(patches, bool).reshape(-1, world.GRID**2), device=device)
    knows = torch.tensor(np.array(knows, bool).reshape(-1, len(sizes)), device=device)
    shows_thing = patches.gather(1, patch_of_token[picture])  # (R, K)
    tokens = shows_thing & knows.gather(1, encoder_of_token[picture])  # (R, K)
    is_shown = tokens.any(dim=1)
    return About(picture[is_shown], question[is_shown], tokens[is_shown])


def encoders_that_tell_of(thing: dict[str, str | None]) -> list[bool]:
    """For each encoder: do its tokens tell the LLM of this thing, and all that the question needs
    of it? Of a shape whose color is asked, only CLIP's do.

    Args: thing: of `questions.Question.about`, whose slots are what the question needs.
    """
    word = 1 + world.SLOTS["what"].index(thing["what"])
    needed = [column for column, slot in enumerate(world.SLOTS) if slot in thing and slot != "what"]
    return [bool(told[word].any() and told[word][needed].all()) for told in TOLD_SLOTS.values()]


def asking_tokens(model: Meteor, dialogues: list[Dialogue]) -> Tensor:
    """(B, T) int64: the number of the question, from 1, that a token of text belongs to.

    0 for the tokens of answers, and for those that fill up a row.
    """
    rows = []
    for dialogue in dialogues:
        packed = pack_dialogue(model, dialogue, start=0)
        numbers = []
        for number, label in zip(packed["owner"], packed["labels"]):
            numbers.append(number if label == -100 else 0)
        rows.append(numbers)
    return filled_up(rows, 0, model.device)


def aside_loss(attention: list[Tensor], about: About, asking: Tensor) -> Tensor:
    r"""Looking aside costs, in `TAUGHT_LAYERS`: stage 3 goes by the attention of two of them.

    -log p, p the share of a question's attention on the picture that is on a thing it asks about;
    mean over all things and these layers; 0 where nothing is asked about.

    Args: attention: of each layer (B, H, T, K) float; about: of `tokens_asked_about`; asking
        (B, T) int64: of `asking_tokens`.
    """
    if len(about.picture) == 0:
        return asking.new_zeros((), dtype=torch.float32)
    is_of_question = asking[about.picture] == about.question[:, None]  # (R, T)
    losses = []
    for layer in TAUGHT_LAYERS:
        looks = attention[layer].sum(dim=1)  # (B, T, K): all heads
        of_question = (looks[about.picture] * is_of_question[..., None]).sum(dim=1)  # (R, K)
        on_thing = (of_question * about.tokens).sum(dim=1)  # (R,)
        on_picture = of_question.sum(dim=1).clamp(min=1e-6)  # (R,): never 0 over 0
        share = on_thing / on_picture
        losses.append(-(share + 1e-3).log().mean())  # at most 7 for a thing that nobody looks at
    return torch.stack(losses).mean()


def print_accuracies(model: Meteor, step: int) -> None:
    """On validation questions, with stages 1 and 2 and without."""
    budgets = {
        "stages 1+2": replace(model.budget, stage3=None),
        "unpruned": Budget.none(),
    }
    model.eval()
    for name, budget in budgets.items():
        result = accuracy(model, budget, "val", samples=240)
        print(f"\nstep {step} {name}: {in_words(result)}", flush=True)
    model.train()


def in_words(result: dict) -> str:
    """`accuracy`'s result in a line."""
    families = ", ".join(f"{family} {share:.0f}" for family, share in result["families"].items())
    return f"{result['accuracy']:.1f} %  {families}"


# ------------------------------------------------------------------------- an encoder under stage 1


def steady_loss(
    encoder: nn.Module,
    teacher: nn.Module,
    project: nn.Module,
    pixels: Tensor,
    has_words: Tensor,
    keep: Sequence[int | None],
) -> Tensor:
    """What an encoder tells the Llama under stage 1 is to be what it tells it unpruned.

    Args:
        encoder, teacher: the one that learns, and the one that it was; project: its projector.
        pixels (B, 3, H, W) float: what the encoder reads; has_words (B, N) bool: patches of which
            it tells a word.
        keep: patches left at each pruning point, as in `stage1_encode.encode`.
    """
    with torch.no_grad():
        unpruned, _ = stage1_encode.encode(teacher, pixels)
        target = project(unpruned)  # (B, N, D)
    tokens, kept = stage1_encode.encode(encoder, pixels, keep)  # (B, n, D_l), (B, n)
    target = target.take_along_dim(kept[..., None], dim=1)  # (B, n, D)
    return align_loss(project(tokens), target, has_words.take_along_dim(kept, dim=1))


def steady_stage(work: Path) -> None:
    """Train EVA alone to say the same under stage 1.

    A patch of a bar tells how high the bar is. Where stage 1 had dropped some patches of a bar, the
    others told a height that was off, mostly by one.
    """
    name, steps = "eva", STEPS["steady"]
    model, pool = trained(work, "answer"), Pool(work)
    model.projectors.requires_grad_(False)
    encoder, project, view = model.encoders[name], model.projectors[name], model.views[name]
    teacher = copy.deepcopy(encoder)
    encoder.requires_grad_(True).train()
    bars, place = showing(pool, "bar"), list(model.encoders).index(name)
    optimizer = torch.optim.AdamW(
        encoder.parameters(), weight_decay=0.0, betas=(0.9, 0.98), fused=True
    )
    state = work / "steady.resume.safetensors"
    for step in progress(load_state(state, encoder, [optimizer]), steps, "steady"):
        rng = np.random.default_rng([19, step])
        half = CHUNK // 2
        rows = np.concatenate([rng.integers(len(pool), size=half), rng.choice(bars, size=half)])
        pixels = view(seen(pool.images[rows], name).to(DEVICE))
        has_words = torch.from_numpy(told_words(pool.words[rows], name).any(axis=-1)).to(DEVICE)
        keep = random_plan(model, rng)[place]
        loss = steady_loss(encoder, teacher, project, pixels, has_words, keep)
        update([optimizer], loss, 8e-4 * schedule(step, steps, hold=0.3), clip=1.0)
        if step % 200 == 199 or step == steps - 1:
            save_state(state, encoder.state_dict(), [optimizer], step + 1)
    save_whole(own_weights(model), work / "steady.safetensors")


def random_plan(model: Meteor, rng: np.random.Generator) -> list[tuple[int, ...]]:
    """Stage 1's counts for each encoder at a random total; now and then all patches stay."""
    total = None if rng.random() < STEADY_WHOLE else int(rng.integers(*STEADY_COUNTS))
    available = [view.num_tokens for view in model.views.values()]
    inside = [stage1_encode.can_prune_inside(encoder) for encoder in model.encoders.values()]
    return stage1_encode.plan_budgets(total, model.ranks, available, inside)


# -------------------------------------------------------------------- ranks, lambda, the checkpoint


def calibrate_ranks(model: Meteor, pictures: int = 128) -> None:
    """Stage 1's expected ranks (3 x C), measured on training pictures."""
    images = to_images([world.make_picture(i).image for i in range(pictures)])
    model.config["ranks"] = measure_ranks(model, list(images.split(32)))


def calibrate_lambda(model: Meteor, count: int = 96) -> None:
    """The table of lambdas, measured on validation questions of all families."""
    parts = example_batches("val", count, first=50_000)
    examples = [example for part in parts for example in part]
    images = to_images([example.picture.image for example in examples])
    asked = [example.question for example in examples]
    table = measure_lambda(model, images, asked, TABLE_KS, TABLE_LAMBDAS)
    model.config["lambda_table"] = table


def calibrate_stage(work: Path, out: Path) -> None:
    model = trained(work, "steady")
    calibrate_ranks(model)
    calibrate_lambda(model)
    model.half().save_pretrained(out)  # half the size; loaded as float32


# -------------------------------------------------------------------------------------- the stages


def new_model(layers: int | None = None) -> Meteor:
    """The embedded model with random weights; layers: of its Llama, where not all."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(questions.WORDS)
    decoder = DECODER | {"vocab_size": len(tokenizer)}
    if layers is not None:
        decoder["num_hidden_layers"] = layers
    config = {
        "encoders": {name: [name, options] for name, options in ENCODERS.items()},
        "decoder": decoder,
        "ranks": None,
        "lambda_table": None,
        "budget": BUDGET,
    }
    model = Meteor(config, tokenizer)
    # what 2 L sums add up to is to be as loud as one of them
    for layer in model.decoder.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data.mul_((2 * len(model.decoder.model.layers)) ** -0.5)
    return model.to(DEVICE)


def with_encoders(model: Meteor, work: Path) -> Meteor:
    """The model with the encoders as they were trained alone; they are frozen."""
    for name, encoder in model.encoders.items():
        encoder.load_state_dict(load_file(work / f"{name}.safetensors"))
    model.encoders.requires_grad_(False)
    ranks = work / "ranks.json"
    if ranks.exists():
        model.config["ranks"] = json.loads(ranks.read_text())
    return model.eval()


def load_own(model: Meteor, file: Path) -> Meteor:
    model.load_state_dict(load_file(file), strict=False)  # tied word embeddings are stored once
    return model


def grown_model(work: Path) -> Meteor:
    """The embedded model with the Llama that learned words, grown to all its layers."""
    few, model = load_own(new_model(FIRST_LAYERS), work / "words.safetensors"), new_model()
    grown(few.decoder, model.decoder)
    return model


def trained(work: Path, stage: str) -> Meteor:
    """The model as a finished stage left it."""
    return load_own(with_encoders(new_model(), work), work / f"{stage}.safetensors")


def run_stage(stage: str, work: Path, out: Path) -> None:
    """work: what stages leave for one another; out: where the checkpoint goes."""
    if stage == "pictures":
        draw_pool(work, POOL)
    elif stage in ENCODERS:
        train_encoder(stage, work, STEPS[stage], DEVICE)
    elif stage == "words":
        words_stage(work)
    elif stage == "features":
        features_stage(work)
    elif stage == "align":
        align_stage(work)
    elif stage == "answer":
        answer_stage(work)
    elif stage == "steady":
        steady_stage(work)
    else:
        calibrate_stage(work, out)


def last_file(stage: str) -> str:
    """What a stage writes last: where it is there, the stage is done."""
    if stage == "pictures":
        return "facts.json"
    if stage == "features":
        return f"features/{POOL // CHUNK - 1}.safetensors"
    return f"{stage}.safetensors"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stage", choices=STAGES, help="one alone; all in turn where left out")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/toy"), help="pictures, features, resumable states"
    )
    parser.add_argument(
        "--out", type=Path, default=CHECKPOINTS["toy"], help="where the checkpoint goes"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.stage is not None:
        run_stage(args.stage, args.work, args.out)
        return
    for stage in STAGES:
        done = args.work / last_file(stage)
        if done.exists():
            print(f"{stage}: done before, {done} is there")
        else:
            run_stage(stage, args.work, args.out)


if __name__ == "__main__":
    main()
