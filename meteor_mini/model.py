"""The thin composition: picture -> stage 1 -> stage 2 -> stage 3 -> words.

`Meteor` holds C vision encoders, one projector each, and a Hugging Face decoder; it walks data through the three
stage files in order and keeps the books (which patch of which encoder is still there after each stage).
"""

import contextlib
import json
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import PyTorchModelHubMixin, constants, get_session, hf_hub_download
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from torch import nn
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

import stage1_encode
import stage2_fuse
import stage3_decode

from .calibration import lambda_from_table
from .presets import PRETRAINED, build_decoder, build_encoder

CHECKPOINTS = {"glyph": Path(__file__).parent / "checkpoint"}
PAPER_TOKENS = (1193, 576, 242)  # after stages 1 and 2, and per LLM layer: the paper's main result
SPECIALS = ["<pad>", "<bos>", "<eos>", "<unk>", "<ans>"]  # <ans> ends the question


@dataclass(frozen=True)
class Budget:
    """How many visual tokens each stage leaves; None keeps all.

    stage1: total over the encoders at their output, or (k_0, k_1, k_2) for the three pruning points; stage2: K in
    the fused sequence; stage3: wanted mean number per LLM layer, averaged over layers and questions, from which
    lambda is solved with the table measured at calibration; the strategies, k, layers (of the LLM, None: L/8, 3L/8, 5L/8):
    as in the stage files.
    """

    stage1: int | tuple[int, int, int] | None = None
    stage2: int | None = None
    stage3: float | None = None
    stage1_strategy: str = "rank"
    stage2_strategy: str = "collaborative"
    k: int = 5
    layers: tuple[int, ...] | None = None

    @classmethod
    def none(cls) -> "Budget":
        """The unpruned model: every token goes through everything."""
        return cls()


@dataclass
class Encoded:
    """A batch of pictures after stages 1 and 2: ask as many questions about it as you like.

    fused: `stage2_fuse.Fused`; stage1_idx: per encoder (B, n_l) int64, the patches that stage 1 kept.
    """

    fused: stage2_fuse.Fused
    stage1_idx: list[torch.Tensor]

    def rows(self, index: list[int]) -> "Encoded":
        """The pictures `index` of the batch, repeated or reordered as asked."""
        fused = self.fused
        picked = stage2_fuse.Fused(
            fused.tokens[index], fused.encoder_id[index], fused.keep_idx[index]
        )
        return Encoded(picked, [keep[index] for keep in self.stage1_idx])


@dataclass
class Answer:
    """One question answered.

    text; tokens: visual tokens {"encoders", "stage1", "stage2", "stage3"}, the last the mean over the LLM's layers;
    layers: visual tokens in each LLM layer; survivors: stage name -> {encoder: count}, "stage3" counting those in the
    LLM's last layer; kept: stage name -> {encoder: (h, w) bool tensor}, True where the patch's token is still there.
    """

    text: str
    tokens: dict[str, float]
    layers: list[int]
    survivors: dict[str, dict[str, int]]
    kept: dict[str, dict[str, torch.Tensor]]


def build_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer: lower case, digits one by one, unknown words become <unk>."""
    vocabulary = {word: i for i, word in enumerate(SPECIALS + list(words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"<ans>|<eos>"), "isolated"),
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    return wrap_tokenizer(tokenizer)


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<ans>"],
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def chat_template(tokenizer: PreTrainedTokenizerBase) -> tuple[str, str]:
    """What a decoder's own template puts before a picture, and after it around the question, {}; Vicuna's where it has none."""
    if tokenizer.chat_template is None:
        return f"{tokenizer.bos_token or ''}USER: ", "\n{} ASSISTANT:"
    user = [{"role": "user", "content": "<picture>\n{}"}]
    return tuple(
        tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True).split(
            "<picture>"
        )
    )


class Meteor(nn.Module, PyTorchModelHubMixin, library_name="meteor_mini", license="mit"):
    """C encoders, C projectors and a decoder, pruned by the three stages.

    Args: config, a JSON-able dictionary: "encoders" {name: [family, options]}, "decoder" options, "words" of the word-level
    tokenizer or None, "ranks" (3 x C) or None, "lambda_table" or None (see `calibrate`), "budget" (the default one) or None;
    tokenizer: the decoder's own, where there are no words; encoders, decoder: those built already, as `pretrained.py` does.
    """

    def __init__(
        self,
        config: dict,
        tokenizer: PreTrainedTokenizerBase | None = None,
        encoders: dict[str, nn.Module] | None = None,
        decoder: PreTrainedModel | None = None,
    ):
        super().__init__()
        self.config, self.folder, words = config, None, config["words"]
        self.encoders = nn.ModuleDict(
            encoders or {n: build_encoder(f, o) for n, (f, o) in config["encoders"].items()}
        )
        self.tokenizer = tokenizer if words is None else build_tokenizer(words)
        self.decoder = decoder or build_decoder(config["decoder"], words and len(self.tokenizer))
        width = self.decoder.config.hidden_size
        self.adapters = [stage1_encode.adapter(e) for e in self.encoders.values()]
        self.projectors = nn.ModuleDict(
            {n: stage2_fuse.Projector(a.dim, width) for n, a in zip(self.encoders, self.adapters)}
        )
        generation, tokens = self.decoder.generation_config, self.tokenizer
        generation.pad_token_id = (
            tokens.eos_token_id if tokens.pad_token_id is None else tokens.pad_token_id
        )
        generation.eos_token_id = tokens.eos_token_id
        self.before, self.after = (
            chat_template(tokens) if words is None else ("<bos>", "{}<ans>")
        )  # around a picture

    # ---------------------------------------------------------------- stages 1 and 2

    @property
    def budget(self) -> Budget:
        """The budget that the model was calibrated for; `Budget.none()` where there is none."""
        return Budget(**self.config["budget"]) if self.config.get("budget") else Budget.none()

    @property
    def proportions(self) -> tuple[float, float]:
        """Tokens after stage 1 for each after stage 2, those of the model's own budget; and after stage 2 for each per LLM
        layer, the paper's: a model's own may leave stage 3 little room below its own average."""
        own, (one, two, three) = self.budget, PAPER_TOKENS
        stage1 = own.stage1 if isinstance(own.stage1, (int, type(None))) else own.stage1[-1]
        return (one / two if None in (stage1, own.stage2) else stage1 / own.stage2), two / three

    def budget_for(self, tokens: float) -> Budget:
        """The model's own budget where it has this average; otherwise one that leaves a mean of `tokens` per LLM layer,
        stages 1 and 2 in the model's `proportions`. A stage whose share exceeds the tokens there are keeps all of them.

        So counts around the model's own average do not rise smoothly: its own budget was tuned, the others follow a rule.
        Raises: ValueError for tokens outside 4 .. all the encoders' tokens (there, `Budget.none()`).
        Source: [our choice]
        """
        total = sum(a.num_tokens for a in self.adapters)
        if not 4 <= tokens <= total:
            raise ValueError(
                f"tokens must be 4 to {total}, the visual tokens of all encoders, got {tokens}"
            )
        if tokens == total:
            return Budget.none()
        if tokens == self.budget.stage3:
            return self.budget
        stage2 = round(tokens * self.proportions[1])
        stage1 = round(stage2 * self.proportions[0])
        return replace(
            self.budget,
            stage1=stage1 if stage1 < total else None,
            stage2=stage2 if stage2 < total else None,
            stage3=tokens,
        )

    @property
    def ranks(self) -> torch.Tensor | None:
        return torch.tensor(self.config["ranks"]) if self.config.get("ranks") else None

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    def encode(self, images: torch.Tensor, budget: Budget | None = None) -> Encoded:
        """Stages 1 and 2. images (B, 3, H, W) float in [0, 1]; budget: the model's own where None."""
        budget = self.budget if budget is None else budget
        features, kept = stage1_encode.encode_all(
            list(self.encoders.values()),
            images.to(self.device),
            budget.stage1,
            self.ranks,
            budget.stage1_strategy,
        )
        return self.fuse(features, kept, budget)

    def fuse(
        self, features: list[torch.Tensor], kept: list[torch.Tensor], budget: Budget
    ) -> Encoded:
        """Project each encoder's tokens (B, n_l, D_l) into the LLM's width and run stage 2."""
        tokens = [
            projector(x) for projector, x in zip(self.projectors.values(), features)
        ]  # C x (B, n_l, D)
        return Encoded(stage2_fuse.fuse(tokens, budget.stage2, budget.stage2_strategy), kept)

    # ---------------------------------------------------------------- the decoder and stage 3

    def tokenize(self, questions: list[str]) -> list[list[int]]:
        """Token ids of all that follows the picture: each question, and what makes the model answer it (<ans>).

        Raises: TypeError where questions is no list of str; ValueError for an empty question, or one with words that
        the tokenizer does not know, naming them and the words that it knows.
        """
        if isinstance(questions, str) or not all(isinstance(q, str) for q in questions):
            raise TypeError("questions must be a list of str, one for each picture")
        if not all(q.strip() for q in questions):
            raise ValueError("question must hold at least one word, got an empty text")
        ids = [
            self.tokenizer(self.after.replace("{}", q), add_special_tokens=False).input_ids
            for q in questions
        ]
        for question, row in zip(questions, ids):
            if self.config["words"] and self.tokenizer.unk_token_id in row:
                encoding = self.tokenizer(question, add_special_tokens=False)
                spans = [
                    encoding.token_to_chars(i)
                    for i, t in enumerate(row)
                    if t == self.tokenizer.unk_token_id
                ]
                unknown = ", ".join(sorted({question[s.start : s.end] for s in spans}))
                known = " ".join(w for w in self.config["words"])
                raise ValueError(
                    f"question has words that this model does not know: {unknown}; it knows: {known}"
                )
        return ids

    @property
    def before_ids(self) -> list[int]:
        return self.tokenizer(self.before, add_special_tokens=False).input_ids

    def prompt(
        self, encoded: Encoded, questions: list[str]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[padding] P tokens before the picture (<bos>), visual tokens, T with the question: embeddings (B, S, D), attention
        mask and visual mask (B, S)."""
        ids, visual = self.tokenize(questions), encoded.fused.tokens
        B, K, _ = visual.shape
        if len(ids) != B:
            raise ValueError(f"questions must be one for each of the {B} pictures, got {len(ids)}")
        embed, T = self.decoder.get_input_embeddings(), max(map(len, ids))
        before = embed(torch.tensor(self.before_ids, device=visual.device))  # (P, D)
        rows = [
            torch.cat([before, v.to(before.dtype), embed(torch.tensor(row, device=visual.device))])
            for v, row in zip(visual, ids)
        ]
        pads = torch.tensor([T - len(row) for row in ids], device=visual.device)
        embeds = torch.stack(
            [F.pad(row, (0, 0, T - len(i), 0)) for row, i in zip(rows, ids)]
        )  # (B, P + K + T, D)
        P, S = len(before), embeds.shape[1]
        position = (
            torch.arange(S, device=visual.device) - pads[:, None]
        )  # (B, S); negative on padding
        return embeds, (position >= 0).long(), (position >= P) & (position < P + K)

    def forward(
        self,
        images: torch.Tensor,
        dialogues: list[list[tuple[str, str]]],
        budget: Budget | None = None,
    ) -> dict:
        """The training loss: mean cross-entropy of the answers' tokens, with stages 1 and 2 active.

        Args: images (B, 3, H, W) float in [0, 1], or an `Encoded` batch; dialogues: per picture its questions with true
        answers; budget: the model's own where None (stage 3, as in the paper, works at inference only).
        Returns: {"loss": scalar, "logits": (n, V), "labels": (n,)} of the n tokens of all answers, <eos> with them.
        """
        encoded = images if isinstance(images, Encoded) else self.encode(images, budget)
        return self.answer_loss(encoded.fused.tokens, dialogues)

    def answer_loss(self, visual: torch.Tensor, dialogues: list[list[tuple[str, str]]]) -> dict:
        """`forward` from visual tokens (B, K, D), however they were made."""
        embeds, mask, position, labels = self.pack(visual, dialogues)
        hidden = self.decoder.model(
            inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False
        )[0]
        said = labels[:, 1:] != -100
        logits, labels = self.decoder.lm_head(hidden[:, :-1][said]), labels[:, 1:][said]
        return {"loss": F.cross_entropy(logits, labels), "logits": logits, "labels": labels}

    def pack(
        self, visual: torch.Tensor, dialogues: list[list[tuple[str, str]]]
    ) -> tuple[torch.Tensor, ...]:
        """[before, visual tokens, question 1 <ans> answer 1 <eos>, question 2 ...]: several questions a picture, none of
        which sees another, each at the positions it would have alone.

        Args: visual (B, K, D). Returns: inputs_embeds (B, S, D), mask (B, 1, S, S) bool, position_ids (B, S), labels (B, S)
        with -100 where nothing is asked (labels[i] is predicted at i - 1).
        """
        B, K, _ = visual.shape
        eos, start = self.tokenizer.eos_token_id, len(self.before_ids) + K
        ids, owner, position, labels = [], [], [], []
        for dialogue in dialogues:
            row_ids, row_owner, row_position, row_labels = [], [], [], []
            questions = self.tokenize([q for q, _ in dialogue])
            answers = self.tokenizer([a for _, a in dialogue], add_special_tokens=False).input_ids
            for number, (q, a) in enumerate(zip(questions, answers), 1):
                row_ids += q + a + [eos]
                row_owner += [number] * (len(q) + len(a) + 1)
                row_position += range(start, start + len(q) + len(a) + 1)
                row_labels += [-100] * len(q) + a + [eos]
            (
                ids.append(row_ids),
                owner.append(row_owner),
                position.append(row_position),
                labels.append(row_labels),
            )
        T = max(map(len, ids))
        fill = lambda rows, value: torch.tensor(
            [row + [value] * (T - len(row)) for row in rows], device=visual.device
        )
        ids, owner, labels = (
            fill(ids, self.decoder.generation_config.pad_token_id),
            fill(owner, -1),
            fill(labels, -100),
        )
        position = fill(position, 0)
        embed = self.decoder.get_input_embeddings()
        before = embed(torch.tensor(self.before_ids, device=visual.device)).expand(B, -1, -1)
        embeds = torch.cat(
            [before, visual.to(before.dtype), embed(ids)], dim=1
        )  # (B, P + K + T, D)
        owner = F.pad(
            owner, (start, 0)
        )  # 0: what stands before and the picture, which every question sees
        causal = torch.ones(start + T, start + T, dtype=torch.bool, device=visual.device).tril()
        mask = causal & (
            (owner[:, None, :] == 0) | (owner[:, None, :] == owner[:, :, None])
        )  # (B, S, S)
        position = torch.cat(
            [torch.arange(start, device=visual.device).expand(B, -1), position], dim=1
        )
        return embeds, mask[:, None], position, F.pad(labels, (start, 0), value=-100)

    def lam(self, budget: Budget, K: int) -> float:
        """Stage 3's lambda for a wanted average of the K tokens that enter the LLM; infinity where it keeps all."""
        return (
            float("inf")
            if budget.stage3 is None
            else lambda_from_table(self.config.get("lambda_table"), K, budget.stage3)
        )

    @torch.no_grad()
    def generate(
        self,
        encoded: Encoded,
        questions: list[str],
        budget: Budget | None = None,
        pruner: Callable | None = None,
        **options,
    ):
        """Hugging Face `generate` under stage 3's pruner; keywords go on to it.

        Args: pruner: (decoder, visual_mask) -> `AdaptivePruner`, in place of the budget's stage 3.
        Returns: new token ids (B, T) int64, and the pruner (None where stage 3 keeps all) with what it kept.
        """
        budget = self.budget if budget is None else budget
        embeds, attention_mask, visual_mask = self.prompt(encoded, questions)
        if pruner is not None:
            pruner = pruner(self.decoder, visual_mask)
        elif (lam := self.lam(budget, encoded.fused.tokens.shape[1])) < float("inf"):
            pruner = stage3_decode.AdaptivePruner(
                self.decoder, visual_mask, budget.layers, lam=lam, k=budget.k
            )
        with pruner or contextlib.nullcontext():
            options = {"max_new_tokens": 24, "do_sample": False} | options
            ids = self.decoder.generate(
                inputs_embeds=embeds, attention_mask=attention_mask, **options
            )
        return ids, pruner

    def decode(self, ids: torch.Tensor) -> list[str]:
        """Texts of generated ids; of a word-level tokenizer with the digits of one number joined."""
        texts = [
            text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        ]
        return (
            [re.sub(r"(?<=\d) (?=\d)", "", text) for text in texts]
            if self.config["words"]
            else texts
        )

    def answer(
        self,
        images: torch.Tensor,
        questions: list[str],
        budget: Budget | None = None,
        pruner: Callable | None = None,
        **options,
    ) -> list[Answer]:
        """Answer one question for each picture, with what happened to the visual tokens on the way.

        Args: images (B, 3, H, W) float in [0, 1], or an `Encoded` batch to reuse; questions: B texts; budget: the
        model's own where None; pruner, options: of `generate`.
        """
        if self.config.get("trained") is False:
            warnings.warn(
                "the projectors of this model are not trained yet: its answers mean nothing",
                stacklevel=2,
            )
        if not isinstance(images, (Encoded, torch.Tensor)):
            raise TypeError(
                "images must be a tensor (B, 3, H, W) in [0, 1], as meteor_mini.pictures.load_picture(file) gives, or "
                f"an Encoded batch, got {type(images).__name__}"
            )
        budget = self.budget if budget is None else budget
        encoded = images if isinstance(images, Encoded) else self.encode_no_grad(images, budget)
        ids, pruner = self.generate(encoded, questions, budget, pruner, **options)
        return self.report(encoded, self.decode(ids), pruner)

    @torch.no_grad()
    def encode_no_grad(self, images: torch.Tensor, budget: Budget | None = None) -> Encoded:
        return self.encode(images, budget)

    def report(self, encoded: Encoded, texts: list[str], pruner) -> list[Answer]:
        """The books of a batch: counts and patch maps after each stage, for every sample."""
        (B, K), L = encoded.fused.tokens.shape[:2], self.decoder.config.num_hidden_layers
        last, layers = torch.ones(B, K, dtype=torch.bool), torch.full((B, L), K)
        if pruner is not None:
            for i, count in pruner.counts.items():
                layers[:, i:] = count[:, None]
            last = torch.stack(
                [
                    kept[seen]
                    for kept, seen in zip(pruner.kept[max(pruner.kept)], pruner.visual_mask)
                ]
            )
        answers = []
        for b, text in enumerate(texts):
            kept = {
                "stage1": self.patches(encoded, b, None),
                "stage2": self.patches(encoded, b, torch.ones(K, dtype=torch.bool)),
                "stage3": self.patches(encoded, b, last[b].cpu()),
            }
            survivors = {
                stage: {n: int(m.sum()) for n, m in maps.items()} for stage, maps in kept.items()
            }
            tokens = {
                "encoders": sum(a.num_tokens for a in self.adapters),
                "stage1": sum(survivors["stage1"].values()),
                "stage2": K,
                "stage3": layers[b].float().mean().item(),
            }
            answers.append(Answer(text, tokens, layers[b].tolist(), survivors, kept))
        return answers

    def patches(
        self, encoded: Encoded, b: int, alive: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """Per encoder an (h, w) bool map of sample b: patches whose token is among the fused ones marked `alive` (K,),
        or, where alive is None, among those that stage 1 kept. Token -> patch is the composition of both keep_idx."""
        maps, start = {}, 0
        for name, adapter, keep in zip(self.encoders, self.adapters, encoded.stage1_idx):
            patch = keep[b].cpu()  # (n_l,): stage 1's choice
            if alive is not None:
                place = encoded.fused.keep_idx[b].cpu()[alive]  # positions in the concatenation
                here = place[(place >= start) & (place < start + len(patch))] - start
                start, patch = start + len(patch), patch[here]
            maps[name] = torch.zeros(adapter.num_tokens, dtype=torch.bool)
            maps[name][patch] = True
            maps[name] = maps[name].view(adapter.grid)
        return maps

    # ---------------------------------------------------------------- save and load

    def _save_pretrained(self, save_directory: Path) -> None:
        """config.json, tokenizer.json and model.safetensors; called by `save_pretrained` and `push_to_hub`."""
        folder = Path(save_directory)
        (folder / "config.json").write_text(json.dumps(self.config, indent=1) + "\n")
        if self.config["words"]:
            self.tokenizer.backend_tokenizer.save(str(folder / "tokenizer.json"))
        else:
            self.tokenizer.save_pretrained(folder)
        save_file(
            {k: v.contiguous() for k, v in self.weights().items()}, folder / "model.safetensors"
        )

    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict, each shared tensor (tied word embeddings) once."""
        tied = "decoder.lm_head.weight" if self.decoder.config.tie_word_embeddings else None
        return {k: v for k, v in self.state_dict().items() if k != tied}

    @classmethod
    def from_pretrained(cls, name: str | Path = "glyph", **hub) -> "Meteor":
        """The embedded model "glyph", a directory that `save_pretrained` wrote, or a hub id; in eval mode, float32. Or, on
        weights of other people, the presets "small" and "eagle-x4", or any encoders=[...], decoder="...", see
        `pretrained.from_names`.

        Args: hub: of huggingface_hub's `hf_hub_download`, as revision, cache_dir, token; of `from_names` for its models.
        Raises: ValueError for a directory without config.json or model.safetensors, or whose weights do not fit, and
        where the hub cannot be reached.
        """
        if name in PRETRAINED or "encoders" in hub:
            from .pretrained import from_names  # which imports this file

            return from_names(name if name in PRETRAINED else None, **hub)
        folder = str(CHECKPOINTS.get(str(name), name))
        config_file, weights_file = (
            _find(folder, file, hub) for file in ("config.json", "model.safetensors")
        )
        try:
            config = json.loads(Path(config_file).read_text())
            with hub_or_cache(folder):
                tokenizer = (
                    None if config["words"] else AutoTokenizer.from_pretrained(folder, **hub)
                )
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{config_file} is not the configuration of a Meteor model: {error}"
            ) from error
        try:
            model = cls(config, tokenizer)
        except ImportError:  # a package that this model needs
            raise
        except (
            Exception
        ) as error:  # the libraries raise a dozen kinds for sizes that do not fit each other
            reason = f"{type(error).__name__}: {error}"
            raise ValueError(f"no model can be built from {config_file}: {reason}") from error
        try:
            weights, own = load_file(weights_file), model.weights()
        except SafetensorError as error:
            raise ValueError(
                f"{weights_file} is not a safetensors file, or is cut short: {error}"
            ) from error
        wrong = [
            k
            for k in own.keys() | weights.keys()
            if k not in own or k not in weights or own[k].shape != weights[k].shape
        ]
        if wrong:
            raise ValueError(
                f"{weights_file} does not fit {config_file}: {len(wrong)} tensors are missing, unknown or of "
                f"another shape, first {min(wrong)}"
            )
        model.load_state_dict(
            {k: v.float() for k, v in weights.items()}, strict=False
        )  # tied weights appear once
        model.folder = Path(
            weights_file
        ).parent  # what lies beside the weights, as baselines.safetensors
        return model.float().eval()  # a configuration of bfloat16 builds its decoder so


@contextlib.contextmanager
def hub_or_cache(name: str) -> Iterator[None]:
    """Within, only the cache is read where the hub does not answer one request; file by file it would be tried for minutes.

    Args: name: what is loaded; a directory asks for nothing.
    """
    before = constants.HF_HUB_OFFLINE
    try:
        if not Path(name).is_dir():
            get_session().head(constants.ENDPOINT, timeout=constants.HF_HUB_ETAG_TIMEOUT)
    except Exception:  # of whichever HTTP library huggingface_hub is on
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _find(model_id: str, file: str, hub: dict) -> str:
    """The file in a directory, or fetched from the hub (its cache where that is warm)."""
    if Path(model_id).is_dir():
        if not (Path(model_id) / file).is_file():
            raise ValueError(
                f"model directory {model_id} has no {file}; a directory that save_pretrained wrote has one"
            )
        return str(Path(model_id) / file)
    try:
        with hub_or_cache(model_id):
            return hf_hub_download(model_id, file, **hub)
    except (
        Exception
    ) as error:  # the hub raises a dozen kinds: offline, unknown repository, bad name
        raise ValueError(
            f"model {model_id!r} is no preset ({', '.join([*CHECKPOINTS, *PRETRAINED])}), no directory, and {file} "
            f"could not be fetched from the hub: run `hf download {model_id}` where there is a network and copy "
            "the cache folder here (HF_HOME), or give the directory"
        ) from error
