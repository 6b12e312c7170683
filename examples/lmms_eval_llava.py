r"""LLaVA-1.5 under lmms-eval, unpruned or pruned in its LLM: POPE, TextVQA, and other tasks that
show one picture and read a generated answer.

    pip install -e . lmms-eval "filelock<4" && hf auth login
    meteor-mini calibrate PICTURES --model llava-hf/llava-1.5-7b-hf --question "QUESTION"
    python examples/lmms_eval_llava.py --model pruned_llava --tasks pope,textvqa_val \
        --model_args pretrained=llava-hf/llava-1.5-7b-hf,method=meteor,lam=LAM \
        --batch_size 1 --output_path logs --log_samples

`meteor-mini calibrate` prints LAM, the \lambda that keeps a target number of visual tokens
(`--tokens`) on a few typical pictures and a typical question. The run prints AVERAGE, the number
that each task really had, mean over the LLM's layers. To compare at equal tokens, run the others
with tokens=AVERAGE: method=fastv, pyramid_drop or random. method=none keeps all. With stage1=N,
LLaVA's CLIP prunes each picture to N tokens first, under any method.

lmms-eval 0.7.3 does not run with filelock 4, and needs the login for POPE's data set. Tested with
that release, tiny random models and ten pictures.
"""

import random
from collections import defaultdict
from contextlib import nullcontext
from statistics import fmean

import torch
from lmms_eval.api.model import lmms
from tqdm import tqdm

from meteor_mini.baselines import RandomPruner, fastv, fastv_count, pyramid_counts, pyramid_drop
from meteor_mini.vlm import encode_llava, find_visual, load_vlm, prepare
from stage1_encode import plan_budgets
from stage3_decode import AdaptivePruner

METHODS = ("none", "meteor", "fastv", "pyramid_drop", "random")


class PrunedLlava(lmms):
    r"""Answers one prompt at a time: greedily, up to 64 tokens, unless the task says otherwise.

    Args: as in --model_args.
        pretrained: hub id or directory of a model of `vlm.MODEL_TYPES`; stage 1 needs a LLaVA-1.5.
        method: one of METHODS.
        lam: \lambda of meteor; None: what `meteor-mini calibrate --out` stored with the model.
        tokens: of the other methods, visual tokens to keep, mean over the LLM's layers.
        layer: where fastv and random prune.
        seed: of random.
        stage1: tokens of each picture that leave CLIP; None: all.
        device: None: cuda where there is one, else cpu.
        batch_size: 1.
    Raises: ValueError for an unknown method, or one without its lam or tokens.
    """

    def __init__(
        self,
        pretrained: str = "llava-hf/llava-1.5-7b-hf",
        method: str = "meteor",
        lam: float | None = None,
        tokens: float | None = None,
        layer: int = 2,
        seed: int = 0,
        stage1: int | None = None,
        device: str | None = None,
        batch_size: int | str = 1,
    ):
        super().__init__()
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if method not in ("none", "meteor") and tokens is None:
            raise ValueError(f"method={method} needs tokens=N, the mean to keep in a layer")
        if str(batch_size) != "1":
            raise ValueError(f"batch_size must be 1, got {batch_size}")
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        model, self.processor = load_vlm(pretrained)
        self.model = model.to(self.device)
        self.lam = getattr(model.config, "meteor_lambda", None) if lam is None else lam
        if method == "meteor" and self.lam is None:
            raise ValueError("method=meteor needs lam=LAM, which `meteor-mini calibrate` prints")
        self.method, self.tokens, self.layer, self.stage1 = method, tokens, layer, stage1
        self.seeds = random.Random(seed)

    def generate_until(self, requests: list) -> list[str]:
        answers, averages = [], defaultdict(list)
        for request in tqdm(requests, desc=f"method={self.method}"):
            question, options, doc_to_visual, doc_id, task, split = request.args
            images = doc_to_visual(self.task_dict[task][split][doc_id])
            if len(images) != 1:
                raise ValueError(f"prompts must have one picture, got {len(images)} in {task}")
            answer, average = self.answer(images[0], question, options)
            answers.append(answer)
            averages[task].append(average)
        self.average_tokens = {task: fmean(each) for task, each in averages.items()}
        for task, average in self.average_tokens.items():
            print(f"{task}, method={self.method}: {average:.1f} visual tokens, mean over layers")
        return answers

    def answer(self, image, question: str, options: dict) -> tuple[str, float]:
        """The answer, and how many visual tokens the LLM had, mean over its layers."""
        options = {"max_new_tokens": 64, "do_sample": False} | options
        stops = options.pop("until", [])
        inputs = prepare(self.model, self.processor, image, question)
        visual_mask = find_visual(self.model, inputs)  # (1, S)
        start = inputs["input_ids"].shape[1]  # where the answer starts
        if self.stage1 is not None:
            (keep,) = plan_budgets(self.stage1, None, [int(visual_mask.sum())], [True])
            inputs, visual_mask = encode_llava(self.model, **inputs, keep=keep)
            start = 0  # from embeddings, `generate` returns the answer alone
        with self.pruner(visual_mask) as pruner:
            ids = self.model.generate(**inputs, **options)
        answer = self.processor.batch_decode(ids[:, start:], skip_special_tokens=True)[0]
        for stop in [stops] if isinstance(stops, str) else stops:
            answer = answer.split(stop)[0]
        kept = visual_mask.sum() if pruner is None else pruner.average_tokens()
        return answer.strip(), kept.item()

    def pruner(self, visual_mask: torch.Tensor):
        """The block to generate in: a `TokenPruner`, or one that does nothing and gives None."""
        model, L = self.model, self.model.get_decoder().config.num_hidden_layers
        N = int(visual_mask.sum())
        if self.method == "none":
            return nullcontext()
        if self.method == "meteor":
            return AdaptivePruner(model, visual_mask, lam=self.lam)
        if self.method == "pyramid_drop":
            return pyramid_drop(pyramid_counts(N, self.tokens, L))(model, visual_mask)
        count = fastv_count(N, self.tokens, self.layer, L)
        if self.method == "fastv":
            return fastv(count, self.layer)(model, visual_mask)
        return RandomPruner(model, visual_mask, {self.layer: count}, self.seeds.getrandbits(32))

    def loglikelihood(self, requests: list):
        raise NotImplementedError("tasks must be of output_type generate_until, as POPE is")

    generate_until_multi_round = loglikelihood


def main() -> None:
    """lmms-eval's command line, which then knows `--model pruned_llava`."""
    from lmms_eval.__main__ import cli_evaluate
    from lmms_eval.models import MODEL_REGISTRY_V2
    from lmms_eval.models.registry_v2 import ModelManifest

    path = f"{__name__}.PrunedLlava"
    MODEL_REGISTRY_V2.register_manifest(ModelManifest("pruned_llava", simple_class_path=path))
    cli_evaluate()


if __name__ == "__main__":
    main()
