"""The model: a pre-trained ViT at step 0, blind to padding, the same in training and evaluation statistics."""

from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import SMALL

import kernels
from engine.config import MODELS, ModelConfig
from engine.data.record import Batch
from engine.model.editing import EditingTransformer, sines
from engine.model.fusion import Fusion
from engine.model.instruction import Instruction, build_tokenizer, tokenize
from engine.model.irm import IRM
from engine.model.neck import GlobalBatchNorm
from engine.tasks import TASKS

TINY = MODELS["irm_tiny"]
SHARED = replace(TINY, shared_stem=True)


def vit(size=(64, 32), **options):
    return timm.models.vision_transformer.VisionTransformer(
        img_size=size, patch_size=16, embed_dim=48, depth=3, num_heads=3, num_classes=0, **options
    )


def editing(size=(64, 32), **options) -> EditingTransformer:
    return EditingTransformer(
        size=size, patch=16, stem="patch", width=48, depth=3, heads=3, instruction_width=40, **options
    )


def test_with_gate_zero_it_is_timms_vit():
    torch.manual_seed(0)
    theirs, ours = vit().eval(), editing().eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    report = ours.load_state_dict(theirs.state_dict(), strict=False)
    assert report.unexpected_keys == []
    assert set(report.missing_keys) == {"gates", "kv_ins.weight", "kv_ins.bias"}
    images, words = torch.randn(4, 3, 64, 32), torch.randn(4, 7, 40)
    want = theirs.forward_features(images)
    torch.testing.assert_close(ours(images), want, rtol=1e-5, atol=1e-5)
    assert torch.equal(ours(images, words, torch.tensor([7, 3, 0, 1])), ours(images))
    torch.nn.init.constant_(ours.gates, 0.5)
    assert (ours(images, words) - want).abs().max() > 0.01


def test_the_gate_can_open():
    model = editing()
    model(torch.randn(2, 3, 64, 32), torch.randn(1, 7, 40)).square().sum().backward()
    assert (model.gates.grad != 0).all()
    assert (model.kv_ins.weight.grad == 0).all()


def test_part_tokens_and_one_instruction_for_the_batch():
    model = editing(part_tokens=3)
    torch.nn.init.normal_(model.gates)
    images, words = torch.randn(4, 3, 64, 32), torch.randn(1, 7, 40)
    assert model(images).shape == (4, 1 + 3 + 8, 48)
    torch.testing.assert_close(model(images, words), model(images, words.expand(4, -1, -1)))


def test_initial_position_embeddings_tell_offsets():
    """Products of sines and cosines depend on the offset between two places alone, and are greatest at none."""
    waves = sines(6, 3, 48).view(6, 3, 48)
    for down, right in ((1, 0), (0, 2), (3, 1)):
        products = (waves[down:, right:] * waves[: 6 - down, : 3 - right]).sum(-1)
        torch.testing.assert_close(products, products[:1, :1].expand_as(products))
        assert products.max() < 0.25 * 24 - 0.1  # 24 pairs of sine and cosine, 0.5 high
    assert torch.equal(editing().pos_embed[0, 1:], sines(4, 2, 48))
    assert not editing().pos_embed[0, 0].any()


def test_cls_may_begin_with_all_patches():
    """The first block gets cls_token + the map of the patches, in their order, as CLS."""
    torch.manual_seed(0)
    model, images, seen = editing(cls_stem=True), torch.randn(2, 3, 64, 32), []
    model.blocks[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    model(images)
    patches = model.patch_embed(images)
    want = model.cls_token[0] + patches.reshape(2, -1) @ model.cls_stem.weight.T + model.cls_stem.bias
    torch.testing.assert_close(seen[0], torch.cat([want[:, None], patches + model.pos_embed[:, 1:]], 1))


def test_a_shared_stem_is_one():
    model = IRM(SHARED, 50, {"ctcc/a": 3})
    names = [name for name, _ in model.named_parameters()]
    assert any(name.startswith("edit.patch_embed.") for name in names)
    assert not any(name.startswith("instruct.picture.patch_embed.") for name in names)
    pictures = torch.randn(2, 3, *SHARED.clothes_size)
    patches = model.edit.patch_embed(pictures)
    want = model.instruct.picture(patches, stem=torch.nn.Identity())
    assert torch.equal(model.instruction_of_clothes(pictures).tokens, want)
    own = IRM(replace(SHARED, shared_stem=False), 50, {"ctcc/a": 3})
    assert torch.equal(own.instruction_of_clothes(pictures).tokens, own.instruct.picture(pictures))


def test_irm_base_fits_a_vit_base_checkpoint():
    with torch.device("meta"):
        theirs = timm.models.vision_transformer.VisionTransformer(img_size=(256, 128), num_classes=0)
        ours = IRM(MODELS["irm_base"], 30522, {"trad/market1501": 751})
    shapes = {name: tensor.shape for name, tensor in ours.edit.state_dict().items()}
    for name, tensor in theirs.state_dict().items():
        assert shapes[name] == tensor.shape


@pytest.fixture
def irm() -> IRM:
    torch.manual_seed(0)
    model = IRM(TINY, 50, {"trad/a": 5, "ctcc/b": 4}).eval()
    torch.nn.init.normal_(model.edit.gates)
    return model


def test_padding_changes_nothing(irm):
    images = torch.randn(3, 3, *TINY.image_size)
    words, lengths = torch.randint(4, 50, (3, 9)), torch.tensor([9, 4, 2])
    longer = torch.cat([words, torch.randint(4, 50, (3, 6))], 1)
    for row, length in enumerate(lengths):
        longer[row, length:] = torch.randint(4, 50, (15 - int(length),))
    a = irm.features(images, irm.instruct.of_text(words, lengths))
    b = irm.features(images, irm.instruct.of_text(longer, lengths))
    torch.testing.assert_close(a.cls, b.cls, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a.fout, b.fout, rtol=1e-5, atol=1e-5)


def test_fusion_looks_at_valid_tokens_only():
    fusion = Fusion(32, 2, 4, 24).eval()
    image, words = torch.randn(2, 5, 32), torch.randn(2, 6, 24)
    changed = words.clone()
    changed[0, 4:] = 99.0
    lengths = torch.tensor([4, 6])
    out = [fusion(image, Instruction(t, lengths, t[:, 0])) for t in (words, changed)]
    torch.testing.assert_close(out[0], out[1])
    changed[1, 5] = 99.0
    assert not torch.allclose(fusion(image, Instruction(changed, lengths, changed[:, 0]))[1], out[0][1])


def test_every_kind_of_batch(irm):
    images, labels = torch.randn(4, 3, *TINY.image_size), torch.tensor([0, 0, 1, 1])
    sentence = Batch(0, images, labels, torch.randint(4, 50, (1, 6)), torch.tensor([6]), None)
    pictures = Batch(1, images, labels, None, None, torch.randn(4, 3, *TINY.clothes_size))
    for batch in (sentence, pictures):
        features = irm(batch)
        assert features.cls.shape == (4, TINY.width)
        assert features.fout.shape == (4, 2 * TINY.width)
        for kind, size in (("cls", 1), ("fout", 2), ("concat", 3)):
            value = irm.test_feature(features, "trad/a", kind)
            assert value.shape == (4, size * TINY.width)
            torch.testing.assert_close(value.norm(dim=1), torch.ones(4))
    alone = irm(Batch(0, images, labels, None, None, None))
    assert alone.fout is None


def test_batch_norm_statistics_agree_with_torch():
    torch.manual_seed(0)
    ours, theirs = GlobalBatchNorm(6), torch.nn.BatchNorm1d(6)
    for _ in range(3):
        x = torch.randn(10, 6) * 3 + 2
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        torch.testing.assert_close(ours(a), theirs(b))
        grads = [torch.autograd.grad(layer(t).sin().sum(), t)[0] for layer, t in ((ours, a), (theirs, b))]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    torch.testing.assert_close(ours.eval()(x), theirs.eval()(x))


def test_after_many_steps_of_one_stream_training_and_evaluation_agree():
    norm = GlobalBatchNorm(4)
    x = torch.randn(64, 4) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 3
    for _ in range(200):
        norm(x)
    expected = norm(x)
    assert (norm.eval()(x) - expected).abs().max() < 0.05  # n / (n - 1) in the running variance


def test_streams_keep_their_own_statistics(irm):
    irm.train()
    irm.head("trad/a").neck["cls"](torch.randn(8, TINY.width) + 5)
    assert irm.head("trad/a").neck["cls"].running_mean.mean() > 0.4
    assert (irm.head("ctcc/b").neck["cls"].running_mean == 0).all()
    assert irm.head("vi/unknown") is None


def test_tokenizer_is_bert_like_and_deterministic(tmp_path):
    corpus = ["A man in a blue coat.", "a woman in blue trousers"]
    tokenizer = build_tokenizer(corpus)
    assert tokenizer.to_str() == build_tokenizer(list(reversed(corpus))).to_str()
    encoded = tokenizer.encode("Blue coatman!")
    assert encoded.tokens[:2] == ["[CLS]", "blue"]
    assert encoded.tokens[-1] == "[SEP]"
    assert "".join(token.removeprefix("##") for token in encoded.tokens[2:-2]) == "coatman"
    ids, lengths = tokenize(tokenizer, ["a blue coat", "a " * 50], longest=8)
    assert ids.shape == (2, 8)
    assert lengths.tolist() == [5, 8]
    assert ids[1, -1] == tokenizer.token_to_id("[SEP]")
    assert (ids[0, 5:] == 0).all()


def test_sizes_are_checked():
    from engine.errors import InputError

    for change in ({"image_size": (250, 128)}, {"stem": "dense"}, {"heads": 5}):
        with pytest.raises(InputError):
            ModelConfig(**change)


def test_test_features_rank_by_direction(irm):
    features = irm.features(torch.randn(4, 3, *TINY.image_size), None)
    value = irm.test_feature(features, "vi/unknown", "cls")
    torch.testing.assert_close(value, F.normalize(features.cls, dim=-1))


def test_whitening_belongs_to_the_stream():
    """Two text-to-image streams never mix; train = eval once the running statistics have arrived; a stream not trained
    on takes the first's; match_scores finds the same cosine; without embed_norm there is none."""
    torch.manual_seed(0)
    model = IRM(TINY, 50, {}, ["t2i/a", "t2i/b"])
    images = torch.randn(8, 3, *TINY.image_size)
    text, lengths = torch.randint(4, 50, (8, 9)), torch.full((8,), 9)
    with torch.no_grad():
        seen, words = model.features(images, None), model.instruct.of_text(text, lengths)
        for _ in range(400):
            trained = model.image_embedding(seen, "t2i/b"), model.text_embedding(words, "t2i/b")
        model.eval()
        tested = model.image_embedding(seen, "t2i/b"), model.text_embedding(words, "t2i/b")
        for a, b in zip(trained, tested, strict=True):  # running variance is the unbiased one
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
        plain = F.normalize(model.project_image(seen.cls), dim=-1), F.normalize(model.project_text(words.cls), dim=-1)
        for stream in ("t2i/a", "t2i/unknown"):
            torch.testing.assert_close(model.image_embedding(seen, stream), plain[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(model.text_embedding(words, stream), plain[1], rtol=1e-4, atol=1e-5)
        assert (tested[0] - plain[0]).abs().max() > 0.1
        given = model.match_scores(seen.tokens, words, "t2i/b", (tested[0] * tested[1]).sum(-1))
        torch.testing.assert_close(model.match_scores(seen.tokens, words, "t2i/b"), given)
        assert not torch.allclose(model.match_scores(seen.tokens, words, "t2i/a"), given)
    assert not IRM(replace(TINY, embed_norm=False), 50, {}, ["t2i/a"]).whiten


def test_kernels_and_their_reference_give_the_same_model():
    """fused=False: the same features and gradients, of clothes pictures and of sentences of several lengths."""
    results = []
    for fused in (True, False):
        torch.manual_seed(0)
        model = IRM(replace(TINY, fused=fused), 50, {})
        assert (model.edit.blocks[0].attn.attend is kernels.gated_attention_packed) == fused
        assert (model.instruct.picture.blocks[0].attn.attend is kernels.gated_attention_packed) == fused
        images, words = torch.randn(4, 3, *TINY.image_size), torch.randint(4, 50, (4, 9))
        asked = [model.instruct.of_text(words, torch.tensor([9, 4, 1, 7]))]
        asked += [model.instruction_of_clothes(torch.randn(1, 3, *TINY.clothes_size))]
        features = [model.features(images, instruction).fout for instruction in asked]
        torch.stack(features).square().sum().backward()
        results.append([*features, *(p.grad for p in model.edit.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_drop_path_leaves_branches_out_at_their_rates():
    """Each sample, layer and branch by itself; what is kept is enlarged, so that the mean stays."""
    torch.manual_seed(0)
    model = editing(drop_path=0.4)
    x = torch.randn(4000, 9, 48)
    keep = model._keep(x)
    assert keep.shape == (3, 2, 4000, 1, 1)
    for rate, layer in zip((0.0, 0.2, 0.4), keep.flatten(2), strict=True):
        assert set(layer.unique().tolist()) <= {0.0, torch.tensor(1 / (1 - rate)).item()}
        assert ((layer == 0).float().mean(1) - rate).abs().max() < 0.03
    assert not torch.equal(keep[2, 0], keep[2, 1])
    block, tokens = model.blocks[2], torch.randn(2, 9, 48)
    given = torch.tensor([[0.0, 2.0], [3.0, 0.0]])[..., None, None]
    middle = tokens + given[0] * block.attn(block.norm1(tokens), None, None, None)
    torch.testing.assert_close(
        block(tokens, None, None, None, given), middle + given[1] * block.mlp(block.norm2(middle))
    )
    images = torch.randn(2, 3, 64, 32)
    assert torch.equal(model.eval()(images), model(images))


def test_checkpointing_and_compiling_change_no_number():
    """Of features and gradients, drop path included; memory is what checkpointing saves: of what E_e's blocks keep for
    the backward pass, but their inputs."""
    images, words = torch.randn(4, 3, 64, 32), torch.randn(4, 7, 40)
    results, kept = [], []
    for way in ("plain", "checkpointing", "compile"):
        torch.manual_seed(0)
        model = editing(drop_path=0.4, gate=0.5)
        model.checkpointing = way == "checkpointing"
        for block in model.blocks if way == "compile" else ():
            block.compile(backend="aot_eager")
        model.chance.manual_seed(1)
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.nbytes) or x, lambda x: x):
            features = model(images, words, torch.tensor([7, 3, 0, 1]))
        features.square().sum().backward()
        results.append([features, *(parameter.grad for parameter in model.parameters())])
        kept.append(sum(sizes))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1], strict=True))
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize(
    ("tasks", "frozen"),
    [(("trad", "li", "t2i"), ("picture",)), (("ctcc",), ("text",)), (("ctcc", "vi"), ())],
)
def test_towers_that_no_task_asks_are_frozen(tasks, frozen):
    model = IRM(SMALL, 40, {})
    model.freeze_unused(TASKS[task] for task in tasks)
    assert model.instruct.frozen == frozen
    still = {name.split(".")[1] for name, value in model.named_parameters() if not value.requires_grad}
    assert still == set(frozen)


def test_without_editing_the_instruction_reaches_fusion_alone():
    torch.manual_seed(0)
    model = IRM(replace(TINY, editing=False), 50, {"trad/a": 5}).eval()
    assert not any("kv_ins" in name or "gates" in name for name, _ in model.named_parameters())
    images, lengths = torch.randn(2, 3, *TINY.image_size), torch.tensor([9, 9])
    a, b = (model.features(images, model.instruct.of_text(torch.randint(4, 50, (2, 9)), lengths)) for _ in range(2))
    assert torch.equal(a.cls, b.cls)
    assert (a.fout - b.fout).abs().max() > 1e-3
    assert torch.equal(a.tokens, model.features(images, None).tokens)
