"""Each baseline against a naive version: loops over heads, tokens and groups."""

from functools import partial

import pytest
import timm
import torch
import torch.nn.functional as F

import stage1_encode
from meteor_mini import Budget, baselines, load
from meteor_mini.toy.questions import QUESTION_FAMILIES, images_and_questions, make_example
from meteor_mini.toy.world import SIZE
from stage3_decode import TokenPruner


@pytest.fixture(scope="module")
def model():
    return load("toy")


@pytest.fixture(scope="module")
def batch():
    return images_and_questions([make_example(5, "val", family) for family in QUESTION_FAMILIES])


@torch.no_grad()
def attention_weights(model, embeds, attention_mask, layer):
    """(B, H, S, S) of a layer, as the library's eager attention returns them; nothing pruned."""
    decoder = model.decoder
    decoder.set_attn_implementation("eager")
    output = decoder(inputs_embeds=embeds, attention_mask=attention_mask, output_attentions=True)
    decoder.set_attn_implementation("sdpa")
    return output.attentions[layer]


def prompt_of_24(model, batch, pictures):
    """embeddings, attention mask and visual mask of prompts with 24 visual tokens each."""
    images, questions = batch[0][:pictures], batch[1][:pictures]
    encoded = model.encode(images, Budget(stage1=60, stage2=24))
    return model.prompt(encoded, questions)


@pytest.mark.parametrize(
    "pruner, layer, k, last_only",
    [
        (baselines.fastv(7, layer=2), 2, 8, True),
        (baselines.fastv(7, layer=3, eager=True), 3, 8, True),
        (baselines.pyramid_drop({2: 7, 4: 5, 6: 3}), 2, 8, True),
        (baselines.fixed({1: 7, 3: 4}, k=2), 1, 2, False),
        (baselines.fixed({1: 7}, k=None), 1, 8, False),
    ],
    ids=["FastV", "FastV, eager", "PyramidDrop", "fixed, 2 heads", "fixed, all heads"],
)
@torch.no_grad()
def test_who_is_kept_at_the_first_layer_by_loops(model, batch, pruner, layer, k, last_only):
    embeds, attention_mask, visual_mask = prompt_of_24(model, batch, 3)
    with pruner(model.decoder, visual_mask) as pruner:
        model.decoder(inputs_embeds=embeds, attention_mask=attention_mask)
    weights = attention_weights(model, embeds, attention_mask, layer - 1)
    for b in range(3):
        places = visual_mask[b].nonzero()[:, 0].tolist()
        S = len(visual_mask[b])
        asks = [S - 1] if last_only else range(places[-1] + 1, S)
        rows = [weights[b, :, t, places] for t in asks]
        attention = torch.stack(rows).mean(0)  # (H, 24)
        heads = sorted(range(8), key=lambda h: -attention[h].sum().item())[:k]
        score = attention[heads].sum(0)
        expected = sorted(sorted(range(24), key=lambda i: (-score[i].item(), i))[:7])
        assert [places.index(s) for s in pruner.kept[layer][b].nonzero()[:, 0].tolist()] == expected


def test_eager_fastv_is_on_eager_attention_in_its_block_only(model, batch):
    embeds, attention_mask, visual_mask = prompt_of_24(model, batch, 3)
    with baselines.fastv(7, 2, eager=True)(model.decoder, visual_mask):
        assert model.decoder.config._attn_implementation == "eager"
        model.decoder(inputs_embeds=embeds, attention_mask=attention_mask)
    assert model.decoder.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="did not run"):
        with baselines.fastv(7, 2, eager=True)(model.decoder, visual_mask):
            pass
    assert model.decoder.config._attn_implementation == "sdpa"


def test_fastv_gives_as_many_tokens_on_eager_attention(model, batch):
    encoded = model.encode(batch[0], Budget(stage1=60, stage2=24))
    for eager in (False, True):
        pruner = baselines.fastv(7, 2, eager)
        answers = model.answer(encoded, batch[1], Budget.keep_all(), pruner)
        assert [answer.layers for answer in answers] == [[24, 24] + [7] * 6] * 12


@torch.no_grad()
def test_random_pruning_keeps_the_count_and_follows_its_seed(model, batch):
    embeds, attention_mask, visual_mask = prompt_of_24(model, batch, 3)
    kept = []
    for seed in (0, 0, 1):
        with baselines.RandomPruner(model.decoder, visual_mask, {2: 7}, seed) as pruner:
            model.decoder(inputs_embeds=embeds, attention_mask=attention_mask)
        assert pruner.counts[2].tolist() == [7, 7, 7]
        kept.append(pruner.kept[2])
    assert torch.equal(kept[0], kept[1]) and not torch.equal(kept[0], kept[2])


@torch.no_grad()
def test_a_recorder_keeps_all_and_notes_the_attention_of_the_layer_before(model, batch):
    embeds, attention_mask, visual_mask = prompt_of_24(model, batch, 3)
    with baselines.AttentionRecorder(model.decoder, visual_mask, [2, 5]) as recorder:
        model.decoder(inputs_embeds=embeds, attention_mask=attention_mask)
    assert all(torch.equal(kept, visual_mask) for kept in recorder.kept.values())
    for layer in (2, 5):
        weights = attention_weights(model, embeds, attention_mask, layer - 1)
        for b in range(3):
            text = visual_mask[b].nonzero()[-1, 0] + 1
            noted = recorder.attention[layer][b][:, -len(visual_mask[b]) :]
            expected = weights[b, :, text:].mean(dim=1) * visual_mask[b]
            real = noted.shape[1]  # padding may be gone
            torch.testing.assert_close(noted, expected[:, -real:], atol=1e-5, rtol=1e-4)


# ------------------------------------------------------------------ in place of stage 2


def three_encoders(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, n, 5, generator=generator) for n in (4, 7, 3)]


@pytest.mark.parametrize("name", ["separate", "greedy", "random"])
def test_other_fusions_keep_the_budget_in_order_and_say_which_tokens(name):
    tokens = three_encoders()
    together = torch.cat(tokens, dim=1)
    owner = [0] * 4 + [1] * 7 + [2] * 3
    for budget in (3, 8, 13):
        fused = baselines.FUSIONS[name](tokens, budget)
        assert fused.keep_idx.shape == (2, budget) and (fused.keep_idx.diff(dim=1) > 0).all()
        for b in range(2):
            for j, place in enumerate(fused.keep_idx[b].tolist()):
                assert torch.equal(fused.tokens[b, j], together[b, place])
                assert fused.encoder_id[b, j] == owner[place]


def cosine(a, b):
    return float(a @ b / (a.norm() * b.norm()))


def test_separate_drops_what_is_alike_within_each_encoder_by_loops():
    tokens = three_encoders()
    fused = baselines.separate(tokens, 7)  # 4, 7 and 3 of 14: two, three or four, one or two
    for b in range(2):
        kept = fused.keep_idx[b].tolist()
        start = 0
        for z in tokens:
            mine = [place - start for place in kept if start <= place < start + z.shape[1]]
            R = [sum(cosine(x, y) for y in z[b]) for x in z[b]]
            assert sorted(mine) == sorted(sorted(range(len(R)), key=R.__getitem__)[: len(mine)])
            assert len(mine) >= 1
            start += z.shape[1]


def test_greedy_drops_one_at_a_time_by_loops():
    tokens = three_encoders()
    fused = baselines.greedy(tokens, 5)
    owner = [0] * 4 + [1] * 7 + [2] * 3
    for b in range(2):
        z = torch.cat(tokens, dim=1)[b]
        left = list(range(14))
        while len(left) > 5:
            R = {i: sum(cosine(z[i], z[m]) for m in left if owner[m] != owner[i]) for i in left}
            left.remove(max(left, key=R.__getitem__))
        assert fused.keep_idx[b].tolist() == left


def test_greedy_keeps_one_copy_of_what_two_encoders_share():
    e = torch.eye(3)
    A = torch.stack([e[0], e[1]])[None]
    B = torch.stack([e[0], 0.8 * e[1] + 0.6 * e[2]])[None]
    assert baselines.greedy([A, B], 2).keep_idx.tolist() == [[2, 3]]


def test_reverse_ranks_share_in_proportion_to_one_over_rank():
    ranks = torch.tensor([[40.0, 30.0, 20.0, 10.0]])
    shares = {
        strategy: stage1_encode.allocate_budget(
            25, baselines.reranked(ranks, strategy)[0].tolist(), [144] * 4
        )
        for strategy in baselines.STRATEGIES
    }
    assert shares == {
        "rank": [10, 8, 5, 2],
        "average": [7, 6, 6, 6],
        "rank_reverse": [3, 4, 6, 12],
    }


# ------------------------------------------------------------------ dropping all


class DropAll(TokenPruner):
    """A rule of one's own, at its limit."""

    def choose(self, layer, attention, visual):
        return torch.zeros_like(visual)


def without_picture(model, images, questions, budget, layer):
    """Last logits by a dense mask, layer by layer: from `layer` on, nobody sees a visual token."""
    encoded = model.encode(images, budget)
    hidden, attention_mask, visual_mask = model.prompt(encoded, questions)
    llama, S = model.decoder.model, hidden.shape[1]
    place = torch.arange(S)
    position = (place - (attention_mask == 0).sum(dim=1, keepdim=True)).clamp(min=0)  # (B, S)
    rotary = llama.rotary_emb(hidden, position)
    sees = (place[:, None] >= place) & attention_mask.bool()[:, None]  # (B, S, S)
    sees |= torch.eye(S, dtype=torch.bool)  # padding sees itself, so that no row is empty
    blind = sees & (~visual_mask[:, None] | torch.eye(S, dtype=torch.bool))
    for i, block in enumerate(llama.layers):
        mask = (blind if i >= layer else sees)[:, None]
        hidden = block(hidden, attention_mask=mask, position_embeddings=rotary)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
    return model.decoder.lm_head(llama.norm(hidden))[:, -1]


@pytest.mark.parametrize("layer", [1, 3, 7])
@torch.no_grad()
def test_dropping_all_tokens_equals_a_dense_mask_that_hides_them(model, batch, layer):
    images, questions = batch[0][:4], batch[1][:4]
    budget = Budget(stage1=60, stage2=24)
    embeds, attention_mask, visual_mask = model.prompt(model.encode(images, budget), questions)
    with DropAll(model.decoder, visual_mask, [layer]) as pruner:
        logits = model.decoder(inputs_embeds=embeds, attention_mask=attention_mask).logits[:, -1]
    expected = without_picture(model, images, questions, budget, layer)
    torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)
    assert not pruner.kept[layer].any() and pruner.counts[layer].tolist() == [0] * 4
    assert (expected - without_picture(model, images, questions, budget, 99)).abs().max() > 1e-2


def test_answers_without_tokens_have_their_books(model, batch):
    pruner = partial(DropAll, layers=[4])
    answers = model.answer(*batch, Budget(stage1=60, stage2=24), pruner)
    for answer in answers:
        assert answer.layers == [24] * 4 + [0] * 4 and answer.tokens["stage3"] == 12
        assert set(answer.survivors["stage3"].values()) == {0}
        assert sum(answer.survivors["stage2"].values()) == 24


def siglip():
    torch.manual_seed(0)
    vit = timm.create_model(
        "vit_base_patch16_siglip_224",
        img_size=64,
        depth=3,
        embed_dim=48,
        num_heads=4,
        global_pool="",
        num_classes=0,
    ).eval()
    return vit, 2 * torch.rand(2, 3, 64, 64) - 1  # 4 x 4 patches


@torch.no_grad()
def test_tome_that_merges_nothing_is_the_vit_itself():
    vit, images = siglip()
    expected = vit.forward_features(images)
    torch.testing.assert_close(baselines.tome(vit, images, 0), expected, atol=1e-5, rtol=1e-5)
    assert baselines.tome(vit, images, 4).shape == (2, 16 - 3 * 4, 48)


@pytest.mark.parametrize("eager", [False, True])
@torch.no_grad()
def test_tome_equals_the_vit_on_pictures_whose_merged_patches_are_alike(monkeypatch, eager):
    """A token that counts twice is two tokens that are the same: what log(size) is for."""
    vit, images = siglip()
    vit.pos_embed.data[:, 1::2] = vit.pos_embed[:, ::2]  # pairs of patches with one position
    images[..., 16:32], images[..., 48:] = images[..., :16], images[..., 32:48]  # and one content
    every, merge_pairs = vit.forward_features(images), baselines.merge_pairs

    def once(x, size, keys, r, prefix):  # the first block merges, the others do not
        return merge_pairs(x, size, keys, r if x.shape[1] == 16 else 0, prefix)

    monkeypatch.setattr(baselines, "merge_pairs", once)
    merged = baselines.tome(vit, images, 4, eager)  # 4 of 8 pairs
    assert merged.shape == (2, 12, 48)
    for b in range(2):
        distance = torch.cdist(merged[b], every[b, 1::2])
        assert distance.min(dim=1).values.max() < 1e-4  # each is one of the 8 pairs' tokens
        assert distance.min(dim=0).values.max() < 1e-4  # and each pair is there


def test_pairs_are_merged_by_loops():
    torch.manual_seed(0)
    x, keys = torch.randn(2, 8, 5), torch.randn(2, 8, 3)
    size = torch.randint(1, 4, (2, 8, 1)).float()
    merged, sizes = baselines.merge_pairs(x, size, keys, r=2, prefix=1)
    for b in range(2):
        givers, takers = [1, 3, 5, 7], [2, 4, 6]
        cos = F.cosine_similarity(keys[b, :, None], keys[b, None], dim=-1).tolist()
        best = {i: max(takers, key=cos[i].__getitem__) for i in givers}
        most_alike = sorted((-cos[i][best[i]], i) for i in givers)
        gone = [i for _, i in most_alike[:2]]
        rows = []
        for i in range(8):
            group = [i] + [g for g in gone if best[g] == i]
            if i not in gone:
                weight = sum(size[b, g] for g in group)
                rows.append((sum(x[b, g] * size[b, g] for g in group) / weight, weight))
        torch.testing.assert_close(merged[b], torch.stack([r for r, _ in rows]))
        torch.testing.assert_close(sizes[b], torch.stack([w for _, w in rows]))
    with pytest.raises(ValueError, match="r must be 0 to 3"):
        baselines.merge_pairs(x, size, keys, r=4, prefix=1)


def test_tome_refuses_what_is_no_plain_vit(model):
    with pytest.raises(TypeError, match="VisionTransformer of timm"):
        baselines.tome(model.encoders["eva"], torch.rand(1, 3, SIZE, SIZE), 2)


def test_pyramid_drop_drops_after_each_quarter(model, batch):
    images, questions = batch
    answers = model.answer(
        images,
        questions,
        Budget(stage1=60, stage2=40),
        baselines.pyramid_drop(baselines.pyramid_counts(40, 75 / 4, 8)),
    )
    assert all(a.layers == [40] * 2 + [20] * 2 + [10] * 2 + [5] * 2 for a in answers)


def test_pyramid_counts_where_4_does_not_divide_the_layers():
    counts = baselines.pyramid_counts(1000, 400, 30)
    assert list(counts) == [7, 15, 22]
    a, b, c = counts.values()
    assert (7 * 1000 + 8 * a + 7 * b + 8 * c) / 30 == pytest.approx(400, abs=0.5)
    assert a / 1000 == pytest.approx(b / a, abs=0.01) == pytest.approx(c / b, abs=0.01)
    assert baselines.pyramid_counts(64, (64 + 32 + 16 + 8) / 4, 8) == {2: 32, 4: 16, 6: 8}
    with pytest.raises(ValueError, match="average 20 is out of reach with 100 tokens"):
        baselines.pyramid_counts(100, 20, 8)


def test_fastv_counts_make_the_average():
    assert baselines.fastv_count(100, 40, 2, 8) == 20  # (2 * 100 + 6 * 20) / 8
    assert baselines.fastv_count(576, 297, 1, 32) == 288  # the paper's row
    with pytest.raises(ValueError, match="average 20 is out of reach with 100 tokens"):
        baselines.fastv_count(100, 20, 2, 8)


@pytest.mark.parametrize("k", [1, 5, None])
def test_fixed_counts_are_the_same_for_every_question(model, batch, k):
    images, questions = batch
    answers = model.answer(
        images, questions, Budget(stage1=60, stage2=40), baselines.fixed({1: 30, 3: 8}, k)
    )
    assert all(a.layers == [40, 30, 30] + [8] * 5 for a in answers)


def test_merged_tokens_are_the_means_of_their_groups():
    torch.manual_seed(0)
    tokens, keep_idx = torch.randn(2, 9, 5), torch.tensor([[0, 4, 7], [2, 3, 8]])
    merged = baselines.merge(tokens, keep_idx)
    for b in range(2):
        groups = {j: [tokens[b, j]] for j in keep_idx[b].tolist()}
        for i in range(9):
            if i not in groups:
                cos = {
                    j: F.cosine_similarity(tokens[b, i], tokens[b, j], dim=0).item() for j in groups
                }
                groups[max(cos, key=cos.get)].append(tokens[b, i])
        for place, group in enumerate(groups.values()):
            torch.testing.assert_close(merged[b, place], torch.stack(group).mean(0))
    assert torch.equal(baselines.merge(tokens, torch.arange(9).expand(2, 9)), tokens)


@torch.no_grad()
def test_prumerge_shares_equally_and_knows_its_patches(model, batch):
    images, questions = batch
    encoded = baselines.prumerge(model, images, ["clip", "convnext", "eva", "pix2struct"], 34)
    assert encoded.fused.tokens.shape[:2] == (12, 34)
    answer = model.answer(encoded, questions, Budget.keep_all())[0]
    assert sorted(answer.survivors["stage2"].values()) == [8, 8, 9, 9]
    pixels = model.views["clip"](images)
    _, attended = stage1_encode.encode(model.encoders["clip"], pixels, (None, None, 9))
    assert torch.equal(encoded.stage1_idx[0], attended)


@torch.no_grad()
@pytest.mark.parametrize("K", [9, 144])
def test_prumerge_has_all_tokens_and_its_choice_from_one_run(model, batch, K):
    for encoder, pixels in zip(model.encoders.values(), model.pixels(batch[0])):
        every_token, keep_idx = baselines.attended(encoder, pixels, K)
        alone, _ = stage1_encode.encode(encoder, pixels)
        torch.testing.assert_close(every_token, alone, atol=1e-5, rtol=1e-5)
        _, chosen = stage1_encode.encode(encoder, pixels, (K,), baselines.AttentionPruner)
        assert torch.equal(keep_idx, chosen)


@torch.no_grad()
def test_a_single_encoder_gives_its_own_tokens_and_books(model, batch):
    images, questions = batch
    pixels = model.views["eva"](images)
    features, kept = stage1_encode.encode_all(
        [model.encoders["eva"]], [pixels], 20, model.ranks[:, [2]]
    )
    encoded = baselines.only(model, ["eva"], features, kept)
    torch.testing.assert_close(encoded.fused.tokens, model.projectors["eva"](features[0]))
    answer = model.answer(encoded, questions, Budget.keep_all())[3]
    assert answer.survivors["stage2"] == {"clip": 0, "convnext": 0, "eva": 20, "pix2struct": 0}
    assert answer.kept["stage2"]["eva"].flatten().nonzero()[:, 0].tolist() == kept[0][3].tolist()


# ------------------------------------------------------------------ fewer tokens without METEOR


def test_divprune_equals_a_loop_over_tokens():
    torch.manual_seed(0)
    tokens = [torch.randn(2, 6, 5), torch.randn(2, 4, 5)]
    fused = baselines.divprune(tokens, 4)
    for b, rows in enumerate(torch.cat(tokens, dim=1)):

        def distance(i, j, rows=rows):
            return 1 - F.cosine_similarity(rows[i], rows[j], dim=0).item()

        everyone = range(10)
        chosen = [max(everyone, key=lambda i: min(distance(i, j) for j in everyone if j != i))]
        while len(chosen) < 4:
            others = [i for i in everyone if i not in chosen]
            chosen.append(max(others, key=lambda i: min(distance(i, j) for j in chosen)))
        assert fused.keep_idx[b].tolist() == sorted(chosen)


def test_a_regular_grid_takes_every_nth_patch_of_each_encoder():
    tokens = [torch.zeros(2, 9, 3), torch.zeros(2, 9, 3)]
    fused = baselines.regular(tokens, 6)
    assert fused.keep_idx.tolist() == [[0, 4, 8, 9, 13, 17]] * 2


@pytest.mark.parametrize("budget", [22, 36, 58, 86])
def test_smaller_grids_have_the_budget_together_and_are_nearly_alike(budget):
    grids = baselines.grids_for(budget, [(12, 12)] * 4)
    cells = [r * c for r, c in grids]
    assert sum(cells) == budget
    assert max(cells) - min(cells) <= 6


def test_grids_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match="budget 7 is no sum of grids for 1 encoders"):
        baselines.grids_for(7, [(12, 12)])  # 7 x 1 is too long


@torch.no_grad()
def test_pooling_takes_the_mean_of_the_projected_tokens_of_a_cell(model, batch):
    images, questions = batch
    encoded = baselines.pool(model, images, 36)  # 3 x 3 of each encoder's 12 x 12
    unpruned = model.encode(images, Budget.keep_all()).fused.tokens.unflatten(1, (4, 12, 12))
    corner = unpruned[:, 1, 8:12, 0:4].mean(dim=(1, 2))  # of the second encoder, below left
    torch.testing.assert_close(encoded.fused.tokens[:, 9 + 6], corner, atol=1e-5, rtol=1e-4)
    (answer, *_) = model.answer(encoded, questions, Budget.keep_all())
    assert answer.tokens["stage3"] == 36


@torch.no_grad()
def test_a_smaller_picture_of_all_patches_is_the_picture(model, batch):
    images, _ = batch
    whole = baselines.shrink(model, images[:2], 576)
    unpruned = model.encode(images[:2], Budget.keep_all()).fused.tokens
    torch.testing.assert_close(whole.fused.tokens, unpruned, atol=1e-4, rtol=1e-4)
    small = baselines.shrink(model, images[:2], 36)
    assert small.fused.tokens.shape[1] == 36


@torch.no_grad()
def test_a_smaller_picture_does_not_show_what_was_cut_off_but_the_whole(model, batch):
    images = batch[0][:1].clone()
    other = images.clone()
    other[:, :, 160:, 160:] = 1 - other[:, :, 160:, 160:]  # the lower right corner
    one, two = (baselines.shrink(model, x, 36).fused.tokens for x in (images, other))
    assert not torch.allclose(one[:, 8], two[:, 8], atol=1e-2)  # CLIP's last cell shows it
