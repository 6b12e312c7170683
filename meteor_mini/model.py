"""The thin composition: picture -> stage 1 -> stage 2 -> stage 3 -> words.

`Meteor` holds C vision encoders, one projector for each, and a Hugging Face decoder. It walks data
through the three stage files in order, and says which patch of which encoder is still there.
"""

import contextlib
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import stage1_encode
import stage2_fuse
import stage3_decode

from . import weights
from .budgets import Budget, stage3_lambda
from .pictures import pixels_for, view_of

# Pruners hook into the models themselves, so threads that share a model take turns.
RUNNING = threading.RLock()


@dataclass
class Encoded:
    """A batch of pictures after stages 1 and 2: ask as many questions about it as you like.

    fused: `stage2_fuse.Fused`; stage1_idx: per encoder (B, n_l) int64, the patches that stage 1
        kept.
    """

    fused: stage2_fuse.Fused
    stage1_idx: list[Tensor]

    def rows(self, index: list[int]) -> "Encoded":
        """The pictures `index` of the batch, repeated or reordered as asked."""
        fused = stage2_fuse.Fused(
            self.fused.tokens[index], self.fused.encoder_id[index], self.fused.keep_idx[index]
        )
        return Encoded(fused, [keep[index] for keep in self.stage1_idx])


@dataclass
class Answer:
    """One question answered.

    text: the generated answer.
    tokens: visual tokens {"encoders", "stage1", "stage2", "stage3"}, the last the mean over LLM
        layers.
    layers: visual tokens in each LLM layer.
    survivors: stage name -> {encoder: count}; "stage3" counts those in the LLM's last layer.
    kept: stage name -> {encoder: (h, w) bool}, True where the patch's token is still there.
    """

    text: str
    tokens: dict[str, float]
    layers: list[int]
    survivors: dict[str, dict[str, int]]
    kept: dict[str, dict[str, Tensor]]


class Meteor(nn.Module, PyTorchModelHubMixin, library_name="meteor_mini", license="mit"):
    """C encoders, C projectors and a decoder, pruned by the three stages.

    Args:
        config: what can be written as JSON: "encoders" {name: [family, options]}, "decoder"
            options, "ranks" (points x C) or None, "lambda_table" or None (see `budgets`), "budget"
            (the model's own) or None.
        tokenizer: the decoder's; encoders, decoder: those built already, else `config` builds them.
    """

    def __init__(
        self,
        config: dict,
        tokenizer: PreTrainedTokenizerBase,
        encoders: dict[str, nn.Module] | None = None,
        decoder: PreTrainedModel | None = None,
    ):
        super().__init__()
        self.config, self.tokenizer, self.folder = config, tokenizer, None
        self.encoders = nn.ModuleDict(encoders or weights.build_encoders(config["encoders"]))
        self.decoder = decoder or weights.build_decoder(config["decoder"])
        self.views = {name: view_of(encoder) for name, encoder in self.encoders.items()}
        D = self.decoder.config.hidden_size
        self.projectors = nn.ModuleDict(
            {name: stage2_fuse.Projector(view.width, D) for name, view in self.views.items()}
        )
        end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
        self.decoder.generation_config.eos_token_id = end
        self.decoder.generation_config.pad_token_id = end if pad is None else pad
        self.before, self.after = text_around_picture(tokenizer)

    @property
    def budget(self) -> Budget:
        """The budget that the model was calibrated for; `Budget.keep_all()` where there is none."""
        own = self.config.get("budget")
        return Budget(**own) if own else Budget.keep_all()

    @property
    def ranks(self) -> Tensor | None:
        """Stage 1's expected ranks (points, C), None where they were not measured."""
        return torch.tensor(self.config["ranks"]) if self.config.get("ranks") else None

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def num_tokens(self) -> int:
        """Visual tokens of all encoders together, unpruned."""
        return sum(view.num_tokens for view in self.views.values())

    @property
    def side(self) -> int:
        """Pixels of the largest picture that one of the encoders reads."""
        return max(max(view.size) for view in self.views.values())

    def pixels(self, images: Tensor) -> list[Tensor]:
        """What each encoder reads of pictures (B, 3, H, W) float in [0, 1]."""
        return pixels_for(self.encoders, self.views, images, self.device)

    def encode(
        self,
        images: Tensor,
        budget: Budget | None = None,
        ranks: Tensor | None = None,
    ) -> Encoded:
        """Stages 1 and 2.

        Args: images (B, 3, H, W) float in [0, 1]; budget, ranks (points, C): the model's own where
            None.
        """
        budget = self.budget if budget is None else budget
        ranks = self.ranks if ranks is None else ranks
        if ranks is None and budget.stage1 is not None:
            raise ValueError("stage1 needs ranks: call meteor_mini.calibrate(model, ...) first")
        encoders, pixels = list(self.encoders.values()), self.pixels(images)
        with RUNNING:
            features, kept = stage1_encode.encode_all(encoders, pixels, budget.stage1, ranks)
        return self.fuse(features, kept, budget.stage2)

    def fuse(
        self,
        features: list[Tensor],
        kept: list[Tensor],
        K: int | None = None,
        fusion: Callable = stage2_fuse.fuse,
    ) -> Encoded:
        """Project each encoder's tokens (B, n_l, D_l) into the LLM's width, and run stage 2.

        Args: kept: their patches (B, n_l); K: tokens that stage 2 keeps, None: all; fusion:
            (tokens, K) -> `Fused`, in place of stage 2.
        """
        tokens = [project(x) for project, x in zip(self.projectors.values(), features)]
        return Encoded(fusion(tokens, K), kept)

    def tokenize(self, questions: list[str]) -> list[list[int]]:
        """Token ids of all that follows the picture. Raises: see `question_ids`."""
        return question_ids(self.tokenizer, self.after, questions)

    def prompt(self, encoded: Encoded, questions: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """[padding] [text before the picture] [visual tokens] [question].

        Returns: embeddings (B, S, D), attention mask (B, S) int64, visual mask (B, S) bool.
        """
        visual, ids = encoded.fused.tokens, self.tokenize(questions)  # (B, K, D)
        B = len(visual)
        if len(ids) != B:
            raise ValueError(f"questions must be one for each of the {B} pictures, got {len(ids)}")
        embed = self.decoder.get_input_embeddings()
        before = embed(torch.tensor(self.before_ids, device=visual.device))  # (P, D)
        after = [embed(torch.tensor(question, device=visual.device)) for question in ids]
        return left_padded(before, visual.to(before.dtype), after)

    @property
    def before_ids(self) -> list[int]:
        """Token ids of the text before the picture."""
        return self.tokenizer(self.before, add_special_tokens=False).input_ids

    @torch.no_grad()
    def prefill(self, encoded: Encoded, questions: list[str], pruner: Callable):
        """Run the prompts through the LLM's layers under a pruner, without an answer.

        Args: pruner: (decoder, visual_mask) -> `TokenPruner`. Returns: the pruner, which knows what
            it kept.
        """
        embeds, attention_mask, visual_mask = self.prompt(encoded, questions)
        with RUNNING, pruner(self.decoder, visual_mask) as stage3:
            self.decoder.model(inputs_embeds=embeds, attention_mask=attention_mask)
        return stage3

    @torch.no_grad()
    def generate(
        self,
        encoded: Encoded,
        questions: list[str],
        budget: Budget | None = None,
        pruner: Callable | None = None,
        **options,
    ) -> tuple:
        """Hugging Face `generate` under stage 3's pruner; options go on to it.

        Args: pruner: (decoder, visual_mask) -> `TokenPruner`, in place of the budget's stage 3.
        Returns: what `generate` returns, new token ids (B, T) int64 unless options say otherwise;
            and the pruner, None where stage 3 keeps all.
        """
        budget = self.budget if budget is None else budget
        embeds, attention_mask, visual_mask = self.prompt(encoded, questions)
        if pruner is None:
            stage3 = stage3_pruner(self, budget, encoded.fused.tokens.shape[1], visual_mask)
        else:
            stage3 = pruner(self.decoder, visual_mask)
        options = {"max_new_tokens": 24, "do_sample": False} | options
        with RUNNING, stage3 or contextlib.nullcontext():
            ids = self.decoder.generate(
                inputs_embeds=embeds, attention_mask=attention_mask, **options
            )
        return ids, stage3

    def decode(self, ids: Tensor) -> list[str]:
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        return [text.strip() for text in texts]

    @torch.no_grad()
    def answer(
        self,
        images: Tensor | Encoded,
        questions: list[str],
        budget: Budget | None = None,
        pruner: Callable | None = None,
        **options,
    ) -> list[Answer]:
        """Answer one question for each picture, with what happened to the visual tokens on the way.

        Args: images (B, 3, H, W) float in [0, 1], or an `Encoded` batch to reuse; questions: B
            texts; budget: the model's own where None; pruner, options: of `generate`.
        Returns: B answers; with num_return_sequences=n, n to each question, side by side.
        """
        if self.config.get("trained") is False:
            untrained = "the projectors of this model are not trained yet: its answers mean nothing"
            warnings.warn(untrained, stacklevel=3)
        pictures = images.fused.tokens if isinstance(images, Encoded) else images
        if isinstance(pictures, Tensor) and len(pictures) == 0:
            if len(questions) > 0:
                raise ValueError("images must hold a picture for each question, got none")
            return []
        encoded = images if isinstance(images, Encoded) else self.encode(images, budget)
        output, stage3 = self.generate(encoded, questions, budget, pruner, **options)
        ids = output if isinstance(output, Tensor) else output.sequences
        return account(self, encoded, self.decode(ids), stage3)

    @classmethod
    def from_pretrained(cls, name: str | Path = "toy", **hub) -> "Meteor":
        """Load a model by name: "toy", a directory, a hub id, or a preset of pretrained parts.

        Args: hub: see `weights.build_model`, whose errors are raised.
        Returns: the model in eval mode.
        """
        return weights.build_model(cls, name, **hub)

    def _save_pretrained(self, save_directory: Path) -> None:
        weights.write_model(self, Path(save_directory))  # of save_pretrained and push_to_hub


def stage3_pruner(
    model: Meteor, budget: Budget, K: int, visual_mask: Tensor
) -> stage3_decode.AdaptivePruner | None:
    """Stage 3 for the K tokens that enter the LLM, or None where the budget keeps all of them."""
    lam = stage3_lambda(model.config, budget, K)
    if lam == float("inf"):
        return None
    return stage3_decode.AdaptivePruner(model.decoder, visual_mask, lam, budget.layers, budget.k)


# -------------------------------------------------------------------------- text around the picture


def left_padded(
    before: Tensor, visual: Tensor, after: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """One batch of prompts of different lengths, filled up in front.

    Args: before (P, D), the same for all; visual (B, K, D); after: B x (T_b, D).
    Returns: embeddings (B, S, D), attention mask (B, S) int64, visual mask (B, S) bool.
    """
    (P, _), K = before.shape, visual.shape[1]
    T = max(map(len, after))
    rows, padding = [], []
    for tokens, question in zip(visual, after):
        fillers = T - len(question)
        row = torch.cat([before, tokens, question])  # (P + K + T_b, D)
        rows.append(F.pad(row, (0, 0, fillers, 0)))  # (S, D)
        padding.append(fillers)
    padding = torch.tensor(padding, device=visual.device)
    position = torch.arange(P + K + T, device=visual.device) - padding[:, None]  # (B, S)
    attention_mask = (position >= 0).long()
    visual_mask = (position >= P) & (position < P + K)
    return torch.stack(rows), attention_mask, visual_mask


def text_around_picture(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What a chat template puts before a picture, and after it around the question, {}.

    A tokenizer without a template gets Vicuna's.
    """
    if tokenizer.chat_template is None:
        return f"{tokenizer.bos_token or ''}USER: ", "\n{} ASSISTANT:"
    user = [{"role": "user", "content": "<picture>\n{}"}]
    text = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    before, after = text.split("<picture>")
    return before, after


def question_ids(
    tokenizer: PreTrainedTokenizerBase, after: str, questions: list[str]
) -> list[list[int]]:
    """Token ids of each question in the text that follows a picture.

    Raises: TypeError where questions is no list of str; ValueError for an empty question, or one
        with words that the tokenizer does not know.
    """
    if isinstance(questions, str) or not all(isinstance(q, str) for q in questions):
        raise TypeError("questions must be a list of str, one for each picture")
    if not all(question.strip() for question in questions):
        raise ValueError("question must hold at least one word, got an empty text")
    for question in questions:
        check_words(tokenizer, question)
    texts = [after.replace("{}", question) for question in questions]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def check_words(tokenizer: PreTrainedTokenizerBase, question: str) -> None:
    """ValueError that names the words a tokenizer does not know, and those that it does."""
    encoding = tokenizer(question, add_special_tokens=False)
    unknown = set()
    for i, token in enumerate(encoding.input_ids):
        if token == tokenizer.unk_token_id:
            span = encoding.token_to_chars(i)
            unknown.add(question[span.start : span.end])
    if unknown:
        known = sorted(set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens))
        raise ValueError(
            f"question has words that this model does not know: {', '.join(sorted(unknown))}; "
            f"it knows: {' '.join(known)}"
        )


# ----------------------------------------------------------------- which tokens survived each stage


def account(model: Meteor, encoded: Encoded, texts: list[str], pruner) -> list[Answer]:
    """Counts and maps of patches after each stage, for every answer: one or more to a sample."""
    B, K, _ = encoded.fused.tokens.shape
    L = model.decoder.config.num_hidden_layers
    layers = torch.full((B, L), K)  # visual tokens in each LLM layer
    in_last_layer = torch.ones(B, K, dtype=torch.bool)
    if pruner is not None:
        for i, count in pruner.counts.items():
            layers[:, i:] = count[:, None]
        last = pruner.kept[max(pruner.kept)]  # (B, S)
        in_last_layer = torch.stack([row[seen] for row, seen in zip(last, pruner.visual_mask)])
    everything = torch.ones(K, dtype=torch.bool)
    answers = []
    for number, text in enumerate(texts):
        b = number // (len(texts) // B)
        kept = {
            "stage1": stage1_maps(model, encoded, b),
            "stage2": fused_maps(model, encoded, b, everything),
            "stage3": fused_maps(model, encoded, b, in_last_layer[b].cpu()),
        }
        survivors = {
            stage: {name: int(alive.sum()) for name, alive in maps.items()}
            for stage, maps in kept.items()
        }
        tokens = {
            "encoders": model.num_tokens,
            "stage1": sum(survivors["stage1"].values()),
            "stage2": K,
            "stage3": layers[b].float().mean().item(),
        }
        answers.append(Answer(text, tokens, layers[b].tolist(), survivors, kept))
    return answers


def stage1_maps(model: Meteor, encoded: Encoded, b: int) -> dict[str, Tensor]:
    """Per encoder an (h, w) bool map of sample b: the patches that stage 1 kept."""
    return {
        name: patch_map(view.grid, keep[b])
        for (name, view), keep in zip(model.views.items(), encoded.stage1_idx)
    }


def fused_maps(model: Meteor, encoded: Encoded, b: int, alive: Tensor) -> dict[str, Tensor]:
    """The same of the fused tokens marked in alive (K,) bool.

    A fused token is a place among all that stage 1 kept, encoder after encoder; the place within
    its encoder leads on to the patch.
    """
    places = encoded.fused.keep_idx[b].cpu()[alive]
    maps, start = {}, 0
    for (name, view), keep in zip(model.views.items(), encoded.stage1_idx):
        end = start + keep.shape[1]
        own = places[(places >= start) & (places < end)] - start
        maps[name] = patch_map(view.grid, keep[b].cpu()[own])
        start = end
    return maps


def patch_map(grid: tuple[int, int], patches: Tensor) -> Tensor:
    """(h, w) bool, True at the patches that are numbered in raster order."""
    h, w = grid
    alive = torch.zeros(h * w, dtype=torch.bool)
    alive[patches.cpu()] = True
    return alive.view(h, w)
