"""Pre-trained weights: files laid out as their authors release them become the model they were, or one line says why
not; what comes pre-trained to E_i stays as it is."""

import argparse
import copy
import json
import shutil
from dataclasses import asdict, replace

import pytest
import timm
import torch
from conftest import recipe
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer
from transformers import BertConfig, BertForPreTraining, BertModel

from engine import checkpoint
from engine.config import BACKBONES, MODELS, ModelConfig, TrainConfig
from engine.data.pipeline import MEAN, STD
from engine.data.record import Batch
from engine.errors import InputError
from engine.losses import TrainingModel
from engine.model import pretrained
from engine.model.instruction import SPECIAL, build_tokenizer
from engine.model.irm import IRM
from engine.runtime import Runtime
from engine.schedule import parameter_groups
from recipes import options

TINY = ModelConfig(
    name="tiny", image_size=(64, 32), width=48, depth=3, heads=3, drop_path=0.0, clothes_size=(32, 32),
    picture_depth=2, text_depth=2, text_heads=2, text_tokens=16, instruction_width=32, fusion_depth=1, embed=8,
    gate=0.3, stem="conv", cls_stem=True,
)  # fmt: skip
OWN = ("gates", "kv_ins.weight", "kv_ins.bias")
WORDS = [*SPECIAL, "a", "##n", "blue", "coat", "man"]


# What the released files hold, name -> shape, in their order.


def linear(name: str, out: int, into: int) -> dict:
    return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}


def norm(name: str, width: int) -> dict:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def blocks(width: int, depth: int, name: str = "blocks") -> dict:
    shapes: dict = {}
    for i in range(depth):
        at = f"{name}.{i}."
        shapes |= norm(f"{at}norm1", width) | linear(f"{at}attn.qkv", 3 * width, width)
        shapes |= linear(f"{at}attn.proj", width, width) | norm(f"{at}norm2", width)
        shapes |= linear(f"{at}mlp.fc1", 4 * width, width) | linear(f"{at}mlp.fc2", width, 4 * width)
    return shapes


def vit(width: int, depth: int, positions: int, tokens: tuple[str, ...] = ("cls_token",)) -> dict:
    shapes = dict.fromkeys(tokens, (1, 1, width)) | {"pos_embed": (1, positions, width)}
    shapes |= {"patch_embed.proj.weight": (width, 3, 16, 16), "patch_embed.proj.bias": (width,)}
    return shapes | blocks(width, depth) | norm("norm", width)


def bert(width: int, depth: int, vocabulary: int, fusion: int) -> dict:
    shapes: dict = {"embeddings.position_ids": (1, 512), "embeddings.word_embeddings.weight": (vocabulary, width)}
    shapes |= {"embeddings.position_embeddings.weight": (512, width)}
    shapes |= {"embeddings.token_type_embeddings.weight": (2, width)} | norm("embeddings.LayerNorm", width)
    for i in range(depth):
        at = f"encoder.layer.{i}."
        for kind in ("attention", *(("crossattention",) if i >= fusion else ())):
            for part in ("query", "key", "value"):
                shapes |= linear(f"{at}{kind}.self.{part}", width, width)
            shapes |= linear(f"{at}{kind}.output.dense", width, width) | norm(f"{at}{kind}.output.LayerNorm", width)
        shapes |= linear(f"{at}intermediate.dense", 4 * width, width)
        shapes |= linear(f"{at}output.dense", width, 4 * width) | norm(f"{at}output.LayerNorm", width)
    return shapes


def inside(prefix: str, shapes: dict) -> dict:
    return {prefix + name: shape for name, shape in shapes.items()}


def deit(width=768, depth=12, side=14) -> dict:
    return vit(width, depth, side * side + 1) | linear("head", 1000, width)


def deit_distilled(width=768, depth=12, side=14) -> dict:
    shapes = vit(width, depth, side * side + 2, ("cls_token", "dist_token"))
    return shapes | linear("head", 1000, width) | linear("head_dist", 1000, width)


def hap(width=768, depth=12, grid=128, decoder=512) -> dict:
    shapes = vit(width, depth, grid + 1) | linear("decoder_embed", decoder, width) | {"mask_token": (1, 1, decoder)}
    shapes |= {"decoder_pos_embed": (1, grid + 1, decoder)} | blocks(decoder, 8, "decoder_blocks")
    return shapes | norm("decoder_norm", decoder) | linear("decoder_pred", 768, decoder)


PART_TOKENS = ("cls_token", "part_token1", "part_token2", "part_token3")
PART_POSITIONS = ("cls_pos", "part1_pos", "part2_pos", "part3_pos")


def pass_(width=768, depth=12, grid=128) -> dict:
    return vit(width, depth, grid, (*PART_TOKENS, *PART_POSITIONS))


def albef(width=768, depth=12, side=16, text=12, vocabulary=30522, text_width=768, vocabulary_width=256) -> dict:
    shapes: dict = {"temp": (), "image_queue": (256, 65536), "text_queue": (256, 65536), "queue_ptr": (1,)}
    for m in ("", "_m"):
        shapes |= inside(f"visual_encoder{m}.", vit(width, depth, side * side + 1))
        shapes |= inside(f"text_encoder{m}.bert.", bert(text_width, text, vocabulary, text // 2))
        shapes |= linear(f"vision_proj{m}", 256, width) | linear(f"text_proj{m}", 256, text_width)
        at = f"text_encoder{m}.cls.predictions."
        shapes |= {f"{at}bias": (vocabulary,)} | linear(f"{at}transform.dense", text_width, text_width)
        shapes |= norm(f"{at}transform.LayerNorm", text_width) | linear(f"{at}decoder", vocabulary, text_width)
    return shapes | linear("itm_head", 2, text_width)


def empty(shapes: dict) -> dict:
    """Tensors of these shapes that take no space, in memory and in a file."""
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def drawn(shapes: dict) -> dict:
    torch.manual_seed(1)
    return {
        name: (torch.randn(shape) * 0.2 if "queue" not in name else torch.zeros(())) for name, shape in shapes.items()
    }


def start(model=TINY, **options) -> pretrained.Start:
    return pretrained.prepare(TrainConfig(model=model, **{key: str(value) for key, value in options.items()}))


def begun(model=TINY, **options) -> IRM:
    """The model with these weights, all else as drawn."""
    begin = start(model, **options)
    torch.manual_seed(0)
    irm = IRM(begin.config.model, len(WORDS), {"trad/a": 3})
    begin.apply(irm)
    return irm.eval()


@pytest.fixture
def vocabulary(tmp_path):
    file = tmp_path / "vocab.txt"
    file.write_text("\n".join(WORDS) + "\n")
    return file


# The layouts in full.


@pytest.mark.parametrize(
    ("backbone", "shapes", "wrap", "grids", "unexpected"),
    [
        ("deit", deit(), lambda state: {"model": state}, "14x14 to 16x8", ["head.weight", "head.bias"]),
        (
            "deit",
            deit_distilled(),
            lambda state: {"model": state},
            "14x14 to 16x8",
            ["dist_token", "head.weight", "head.bias", "head_dist.weight", "head_dist.bias"],
        ),
        (
            "hap",
            hap(),
            lambda state: {"epoch": 399, "arch": "pose_mae_vit_base_patch16", "model": state, "optimizer": {}},
            None,
            [name for name in hap() if "decoder" in name or name == "mask_token"],
        ),
        ("pass", pass_(), lambda state: state, None, []),
        (
            "pass",
            inside("module.backbone.", pass_()) | linear("module.head.last_layer", 65536, 256),
            lambda state: {"student": {}, "teacher": state, "epoch": 100, "args": argparse.Namespace(lr=1e-3)},
            None,
            ["module.head.last_layer.weight", "module.head.last_layer.bias"],
        ),
        (
            "albef",
            albef(),
            lambda state: {"model": state, "optimizer": {"state": {}}, "config": {"image_res": 256}, "epoch": 29},
            "16x16 to 16x8",
            [name for name in albef() if not name.startswith("visual_encoder.")],
        ),
    ],
)
def test_released_files_fit_irm_base(tmp_path, backbone, shapes, wrap, grids, unexpected):
    """Every name and shape of the files, and what is told of them."""
    torch.save(wrap(empty(shapes)), tmp_path / "weights.pth")
    begin = start(MODELS["irm_base"], backbone=backbone, pretrained=tmp_path / "weights.pth")
    (report,) = begin.reports
    assert (report.part, report.file) == ("edit", str(tmp_path / "weights.pth"))
    assert len(report.matched) == 4 + 12 * 12 + 2 + (backbone == "pass")
    assert set(report.missing) == set(OWN)
    assert sorted(report.unexpected) == sorted(unexpected)
    assert report.interpolated == ({"pos_embed": grids} if grids else {})
    assert begin.config.given == ("edit",)
    assert begin.config.model == replace(MODELS["irm_base"], part_tokens=3 if backbone == "pass" else 0)
    assert set(begin.state) == {f"edit.{name}" for name in report.matched}
    text = str(report)
    assert f"{len(report.matched)} tensors from {tmp_path}" in text
    assert (f"pos_embed interpolated from {grids}" in text) == (grids is not None)
    if backbone == "albef":
        assert "; not used: temp, image_queue, text_queue, queue_ptr, text_encoder (265)" in text


def test_albef_in_full_fits_both_towers(tmp_path):
    torch.save({"model": empty(albef())}, tmp_path / "ALBEF.pth")
    words = [*SPECIAL, *(f"w{i}" for i in range(30522 - len(SPECIAL)))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    given = {"instruction_pretrained": tmp_path / "ALBEF.pth", "vocabulary": tmp_path / "vocab.txt"}
    begin = start(MODELS["irm_base"], **given)
    text, picture = begin.reports
    assert (text.part, len(text.matched), text.missing) == ("instruct.text", 5 + 6 * 16, ())
    assert (picture.part, len(picture.matched), picture.missing) == ("instruct.picture", 150, ())
    assert picture.interpolated == {"pos_embed": "16x16 to 8x8"}
    used = {f"text_encoder.bert.{name}" for name in text.matched}
    seen = {name for name in albef() if name.startswith("visual_encoder.")}
    assert set(text.unexpected) == set(albef()) - used - seen
    assert picture.unexpected == ()
    assert "text_encoder.bert.encoder.layer.6.crossattention.self.key.weight" in text.unexpected
    assert (begin.config.given, begin.config.frozen) == (("instruct.text", "instruct.picture"),) * 2
    assert begin.config.but(train_instruction=True).frozen == ()
    assert begin.config.model == MODELS["irm_base"]
    assert begin.tokenizer.get_vocab_size() == 30522


# The same function.


def timms(state: dict, grid=(4, 2), prefix="", depth=3) -> VisionTransformer:
    """timm's own ViT with these weights, on a grid of patches."""
    model = VisionTransformer(
        img_size=(16 * grid[0], 16 * grid[1]), patch_size=16, embed_dim=48, depth=depth, num_heads=3, num_classes=0
    )
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    own = {name: own[name] for name in model.state_dict()}
    own["pos_embed"] = resample_abs_pos_embed(own["pos_embed"], list(grid))
    model.load_state_dict(own)
    return model.eval()


def normalised(pictures: torch.Tensor, mean, std) -> torch.Tensor:
    return (pictures - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@pytest.mark.parametrize("backbone", ["deit", "hap", "albef"])
def test_the_model_begins_as_the_vit_of_the_file(tmp_path, backbone):
    """Also where that saw pictures of another mean and std, and with an instruction: the gates begin at 0."""
    shapes = {"deit": deit(48, 3, 6), "hap": hap(48, 3, 36, 16), "albef": albef(48, 3, 6, 2, 9, 32)}[backbone]
    state = drawn(shapes)
    torch.save({"model": state}, tmp_path / "weights.pth")
    irm = begun(backbone=backbone, pretrained=tmp_path / "weights.pth")
    row, pictures = BACKBONES[backbone], torch.rand(4, 3, 64, 32)
    assert ((row.mean, row.std) == (MEAN, STD)) == (backbone != "albef")
    want = timms(state, prefix=row.inside).forward_features(normalised(pictures, row.mean, row.std))
    got = irm.edit(normalised(pictures, MEAN, STD))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    words = torch.randn(4, 7, 32)
    assert torch.equal(irm.edit(normalised(pictures, MEAN, STD), words, torch.tensor([7, 3, 0, 1])), got)
    assert not irm.edit.gates.any()


def test_a_distilled_deit_without_its_second_token(tmp_path):
    state = drawn(deit_distilled(48, 3, 6))
    save_file(state, tmp_path / "weights.safetensors")
    irm = begun(backbone="deit", pretrained=tmp_path / "weights.safetensors")
    positions = state["pos_embed"]
    plain = state | {"pos_embed": torch.cat([positions[:, :1], positions[:, 2:]], 1)}
    pictures = torch.randn(2, 3, 64, 32)
    torch.testing.assert_close(irm.edit(pictures), timms(plain).forward_features(pictures), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("size", "grid"), [((64, 32), (4, 2)), ((96, 48), (6, 3))])
def test_pass_has_part_tokens_with_positions_of_their_own(tmp_path, size, grid):
    """Tokens by PASS's own formula, through the blocks of timm; on another grid the patches' positions alone change."""
    state = drawn(pass_(48, 3, 8))
    torch.save(state, tmp_path / "weights.pth")
    irm = begun(replace(TINY, image_size=size), backbone="pass", pretrained=tmp_path / "weights.pth")
    pictures = torch.randn(2, 3, *size)
    model = VisionTransformer(img_size=size, patch_size=16, embed_dim=48, depth=3, num_heads=3, num_classes=0).eval()
    model.load_state_dict({name: state[name] for name in model.state_dict() if name != "pos_embed"}, strict=False)
    special = torch.cat([state[a] + state[b] for a, b in zip(PART_TOKENS, PART_POSITIONS, strict=True)], 1)
    positions = resample_abs_pos_embed(state["pos_embed"], list(grid), [4, 2], num_prefix_tokens=0)
    x = torch.cat([special.expand(2, -1, -1), model.patch_embed(pictures) + positions], 1)
    torch.testing.assert_close(irm.edit(pictures), model.norm(model.blocks(x)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("count", "before", "size", "first"),
    [
        (196, (14, 14), (256, 128), 1),
        (576, (24, 24), (256, 128), 1),
        (128, (16, 8), (384, 192), 4),
        (128, (16, 8), (384, 192), 1),
        (128, (16, 8), (256, 128), 4),
        (288, (24, 12), (256, 128), 1),
        (256, (16, 16), (128, 128), 1),
        (192, (24, 8), (384, 128), 1),
    ],
)
def test_positions_are_interpolated_as_timm_does(count, before, size, first):
    tower = pretrained.EditingTransformer(
        size=size, patch=16, stem="patch", width=8, depth=1, heads=1, part_tokens=first - 1
    )
    positions = torch.randn(1, first + count, 8)
    got, grids = pretrained._positions("--pretrained FILE", positions, tower)
    after = [size[0] // 16, size[1] // 16]
    assert torch.equal(got, resample_abs_pos_embed(positions, after, list(before), num_prefix_tokens=first))
    assert torch.equal(got[:, :first], positions[:, :first])
    assert torch.equal(got, positions) == (grids == "") == (list(before) == after)


def test_the_towers_of_albef(tmp_path, vocabulary):
    """Text: transformers' BERT of the first layers. Clothes: timm's ViT, with pictures as ALBEF saw them."""
    state = drawn(albef(48, 2, 4, 4, len(WORDS), 48))
    torch.save({"model": state}, tmp_path / "ALBEF.pth")
    model = replace(TINY, text_heads=3, instruction_width=48)
    irm = begun(model, instruction_pretrained=tmp_path / "ALBEF.pth", vocabulary=vocabulary)
    theirs = BertModel(
        BertConfig(
            vocab_size=len(WORDS), hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192
        ),
        add_pooling_layer=False,
    ).eval()
    at = "text_encoder.bert."
    assert not theirs.load_state_dict(
        {name.removeprefix(at): value for name, value in state.items() if name.startswith(at)}, strict=False
    ).missing_keys
    ids, lengths = torch.randint(len(WORDS), (3, 8)), torch.tensor([8, 3, 5])
    mask = (torch.arange(8) < lengths[:, None]).long()
    want = theirs(input_ids=ids, attention_mask=mask).last_hidden_state
    for got, wanted, length in zip(irm.instruct.of_text(ids, lengths).tokens, want, lengths, strict=True):
        torch.testing.assert_close(got[:length], wanted[:length])
    pictures, row = torch.rand(2, 3, 32, 32), BACKBONES["albef"]
    want = timms(state, (2, 2), "visual_encoder.", 2).forward_features(normalised(pictures, row.mean, row.std))
    got = irm.instruction_of_clothes(normalised(pictures, MEAN, STD)).tokens
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def folder(tmp_path, vocabulary):
    """A BERT as transformers writes it."""
    torch.manual_seed(2)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=128
    )
    BertForPreTraining(config).save_pretrained(tmp_path / "bert")
    shutil.copy(vocabulary, tmp_path / "bert" / "vocab.txt")
    return tmp_path / "bert"


@pytest.mark.parametrize("old", [False, True])
def test_the_folder_of_a_bert(folder, old):
    """As it is written now, and as the first releases were: a pickle, LayerNorm's gamma and beta."""
    theirs = BertModel.from_pretrained(folder).eval()
    if old:
        state = BertForPreTraining.from_pretrained(folder).state_dict()
        names = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
        for now, before in names.items():
            state = {name.replace(now, before): value for name, value in state.items()}
        torch.save(state, folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    begin = start(instruction_pretrained=folder)
    (report,) = begin.reports
    assert (len(report.matched), report.missing) == (5 + 2 * 16, ())
    assert {name.split(".")[0] for name in report.unexpected} == {"bert", "cls"}
    assert {name for name in report.unexpected if "layer" in name} == {
        name for name in report.unexpected if "layer.2." in name
    }
    assert begin.config.given == begin.config.frozen == ("instruct.text",)
    assert begin.config.model == TINY  # the picture tower is not touched
    irm = begun(instruction_pretrained=folder)
    encoded = begin.tokenizer.encode("A blue coatman")
    assert encoded.tokens == ["[CLS]", "a", "blue", "[UNK]", "[SEP]"]
    ids = torch.tensor([encoded.ids])
    theirs.encoder.layer = theirs.encoder.layer[:2]
    want = theirs(input_ids=ids).last_hidden_state
    torch.testing.assert_close(irm.instruct.of_text(ids, torch.tensor([5])).tokens, want)


def test_a_vocabulary_of_its_own(tmp_path, folder):
    tokenizer = build_tokenizer(["an blue"])
    tokenizer.enable_padding(length=99)
    tokenizer.enable_truncation(3)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    begin = start(vocabulary=tmp_path / "tokenizer.json")
    assert begin.config.given == begin.reports == ()
    assert begin.tokenizer.encode("an blue an").tokens == ["[CLS]", "an", "blue", "an", "[SEP]"]
    assert start().tokenizer is None
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert start(vocabulary=folder).tokenizer.encode("A blue").tokens == ["[CLS]", "[UNK]", "blue", "[SEP]"]


# timm.


def test_a_plain_vit_of_timm(tmp_path, monkeypatch):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5)
    torch.save(theirs.state_dict(), tmp_path / "weights.pth")
    model, pictures = replace(TINY, drop_path=0.1), torch.rand(2, 3, 64, 32)
    begin = start(model, backbone="timm:vit_tiny_patch16_224", pretrained=tmp_path / "weights.pth")
    plain = {"stem": "patch", "cls_stem": False, "gate": 0.0}
    assert begin.config.model == replace(model, width=192, depth=12, heads=3, **plain)
    assert begin.reports[0].unexpected == ("head.weight", "head.bias")
    irm = begun(model, backbone="timm:vit_tiny_patch16_224", pretrained=tmp_path / "weights.pth")
    theirs.set_input_size((64, 32))
    want = theirs.eval().forward_features((pictures - 0.5) / 0.5)  # what its weights of the hub were trained on
    torch.testing.assert_close(irm.edit(normalised(pictures, MEAN, STD)), want, rtol=1e-4, atol=1e-4)

    make = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **more: make(name, **more))
    assert len(start(backbone="timm:vit_tiny_patch16_224").state) == 150  # as if fetched

    def offline(name, pretrained=False, **more):
        if pretrained:
            raise ConnectionError("no\nroute to host")
        return make(name, **more)

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(InputError, match=r"timm cannot fetch its weights \(no route to host\); give a file as --pre"):
        start(backbone="timm:vit_tiny_patch16_224")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no_such_model", "timm cannot make it"),
        ("resnet18", "it is a ResNet"),
        ("deit_tiny_distilled_patch16_224", "it is a VisionTransformerDistilled"),
        ("deit3_small_patch16_224", r"it has (pos_embed|blocks.0.ls1.gamma) of shape"),
        ("vit_small_patch14_reg4_dinov2", r"it has reg_token of shape"),
        ("vit_base_patch16_clip_224", r"it has (norm_pre.weight of shape|no patch_embed.proj.bias)"),
        ("vit_base_patch16_siglip_224", "it has"),
        ("eva02_tiny_patch14_224", "it is a Eva"),
        ("vit_base_patch16_rpn_224", "it has"),
    ],
)
def test_other_models_of_timm_are_refused(name, message):
    with pytest.raises(InputError, match=f"--backbone timm:{name}: .*{message}"):
        start(backbone=f"timm:{name}", pretrained="anything")


def test_small_differences_of_a_timm_model(monkeypatch):
    make = timm.create_model
    for given, message in (
        ({"norm_layer": lambda width, **_: torch.nn.LayerNorm(width, eps=1e-5)}, "norm1.eps is 1e-05"),
        ({"act_layer": "gelu_tanh"}, "its blocks have a GELUTanh"),
        ({"act_layer": "quick_gelu"}, "its blocks have a QuickGELU"),
        ({"qkv_bias": False}, "it has no blocks.0.attn.qkv.bias"),
        ({"qk_norm": True}, "it has blocks.0.attn.q_norm.weight"),
        ({"mlp_ratio": 2}, "it has blocks.0.mlp.fc1.weight of shape"),
        ({"no_embed_class": True}, "it has pos_embed of shape"),
        ({"class_token": False, "global_pool": "avg"}, "it has pos_embed of shape"),
        ({"block_fn": timm.models.vision_transformer.ResPostBlock}, "its blocks have a ResPostBlock"),
        ({}, None),
    ):
        with torch.device("meta"):
            theirs = make("vit_tiny_patch16_224", num_classes=0, **given)
        assert (message is None) == (pretrained._difference(theirs) == "")
        assert (message or "") in pretrained._difference(theirs)


# Files that are something else.


def damaged(tmp_path, kind: str):
    file = tmp_path / "file"
    state = drawn(deit(48, 3, 6))
    if kind == "page":
        file.write_text("\n<!DOCTYPE html><html>sign in</html>")
    elif kind == "pointer":
        file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\n")
    elif kind in ("cut", "cut safetensors"):
        torch.save(state, file) if kind == "cut" else save_file(state, file)
        file.write_bytes(file.read_bytes()[:20000])
    elif kind == "empty":
        file.touch()
    elif kind == "code":
        torch.save({"model": state, "run": print}, file)
    elif kind == "old code":
        torch.save({"model": state, "run": print}, file, _use_new_zipfile_serialization=False)
    elif kind == "numbers":
        torch.save([1, 2], file)
    elif kind == "no names":
        torch.save({"epoch": 3}, file)
    else:
        shapes = {
            "resnet": {"conv1.weight": (64, 3, 7, 7), "bn1.weight": (64,), "layer1.0.conv1.weight": (64, 64, 1, 1)},
            "width": deit(96, 3, 6),
            "depth": deit(48, 4, 6),
            "shallow": deit(48, 2, 6),
            "albef": albef(48, 3, 6, 2, 9, 32),
            "pass": pass_(48, 3, 8),
            "stem": deit(48, 3, 6) | {"patch_embed.proj.weight": (48, 64, 8, 8)},
            "block": {name: shape for name, shape in deit(48, 3, 6).items() if not name.startswith("blocks.1.mlp")},
            "norm": {name: shape for name, shape in deit(48, 3, 6).items() if not name.startswith("norm.")},
            "grid": deit(48, 3, 6) | {"pos_embed": (1, 24, 48)},
            "flat": deit(48, 3, 6) | {"pos_embed": (37, 48)},
        }[kind]
        torch.save(drawn(shapes), file)
    return file


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("page", "a web page, not weights; download the file itself"),
        ("pointer", r"a Git LFS pointer, not weights; fetch the file itself \(git lfs pull\)"),
        ("cut", "no safetensors or torch file, or damaged or cut short .*; download it again"),
        ("cut safetensors", "no safetensors or torch file, or damaged or cut short .*; download it again"),
        ("empty", "no safetensors or torch file, or damaged or cut short .*; download it again"),
        ("code", r"holds .*print beside tensors, and code from a file is never run; .*save its state_dict alone"),
        ("old code", r"holds .*print beside tensors, and code from a file is never run; .*save its state_dict alone"),
        ("numbers", r"holds no tensors by name; name a file of a model's weights"),
        ("no names", r"holds no tensors by name; name a file of a model's weights"),
        ("resnet", r"no ViT \(its tensors: conv1, bn1, layer1\); name the file of the --backbone"),
        ("albef", r"no ViT \(its tensors: temp, image_queue, .*\); name the file of the --backbone"),
        (
            "width",
            r"cls_token is \(1, 1, 96\), edit has \(1, 1, 48\); choose weights that fit the model, another",
        ),
        ("depth", "4 blocks, edit has 3; choose weights that fit the model, another --backbone, or a --config FILE"),
        ("shallow", "2 blocks, edit has 3; choose weights that fit the model, another --backbone, or a --config FILE"),
        ("stem", r"patch_embed.proj.weight is \(48, 64, 8, 8\), edit has \(48, 3, 16, 16\); choose"),
        ("block", "lacks 4 of the 42 tensors of edit, the first blocks.1.mlp.fc1.weight; choose weights that fit"),
        ("norm", "lacks 2 of the 42 tensors of edit, the first norm.weight; choose weights that fit the model"),
        ("grid", r"pos_embed is \(1, 24, 48\): without 1 class token\(s\) no grid of patches; name the file of the"),
        ("flat", r"pos_embed is \(37, 48\): without 1 class token\(s\) no grid of patches; name the file of the"),
        ("pass", r"pos_embed is \(1, 8, 48\): without 1 class token\(s\) no grid of patches; name the file of the"),
    ],
)
def test_a_wrong_file_is_named_in_one_line(tmp_path, kind, message):
    file = damaged(tmp_path, kind)
    with pytest.raises(InputError, match=rf"^--pretrained {file}: {message}"):
        start(backbone="deit", pretrained=file)


def test_files_that_are_not_there_or_of_another_backbone(tmp_path):
    with pytest.raises(InputError, match="--pretrained nowhere: No such file or directory; name the file"):
        start(backbone="deit", pretrained="nowhere")
    file = damaged(tmp_path, "stem")
    with pytest.raises(InputError, match=r"lacks part_token1, part_token2, part_token3, cls_pos, .*another --backbone"):
        start(backbone="pass", pretrained=file)
    for given, message in (
        ({"backbone": "vgg", "pretrained": "x"}, "--backbone 'vgg': expected deit, albef, hap, pass or timm:NAME"),
        ({"backbone": "pass"}, "--backbone pass --pretrained : .*give both"),
        ({"pretrained": "x"}, "--backbone  --pretrained x: .*give both"),
    ):
        with pytest.raises(InputError, match=message):
            TrainConfig(**given)


def test_instructions_and_vocabularies_that_do_not_fit(tmp_path, folder, vocabulary):
    def refused(message: str, model=TINY, **options):
        with pytest.raises(InputError, match=message):
            start(model, **options)

    torch.save({"model": drawn(albef(32, 2, 4, 4, len(WORDS), 32))}, tmp_path / "ALBEF.pth")
    file = {"instruction_pretrained": tmp_path / "ALBEF.pth"}
    refused(r"ALBEF.pth: holds no vocabulary; add --vocabulary with its vocab.txt \(9 tokens\)", **file)
    assert len(start(**file, vocabulary=folder).reports) == 2
    vocabulary.write_text("\n".join([*WORDS, "more"]))
    refused("knows 9 tokens, the vocabulary has 10; give the --vocabulary that it was", **file, vocabulary=vocabulary)
    refused("lacks 32 of the 101 tensors of instruct.text, the first encoder.layer.4", replace(TINY, text_depth=6),
            **file, vocabulary=folder)  # fmt: skip
    refused("2 blocks, instruct.picture has 3; choose", replace(TINY, picture_depth=3), **file, vocabulary=folder)
    vocabulary.write_text("\n".join(WORDS[1:]))
    refused(r"vocab.txt has no \[PAD\]; name the vocabulary of a BERT", **file, vocabulary=vocabulary)
    vocabulary.write_text("\n".join(reversed(WORDS)))
    refused(r"vocab.txt has \[PAD\] at 8, not at 0", **file, vocabulary=vocabulary)
    vocabulary.write_bytes(b"\xff\xfe")
    refused("cannot read .*vocab.txt", **file, vocabulary=vocabulary)
    refused("cannot read nowhere .No such file", **file, vocabulary="nowhere")
    (tmp_path / "tokenizer.json").write_text("{}")
    refused("cannot read .*tokenizer.json", **file, vocabulary=tmp_path / "tokenizer.json")
    refused("no BERT .its tensors: cls_token", instruction_pretrained=damaged(tmp_path, "norm"))
    file = {"instruction_pretrained": folder}
    refused("its num_attention_heads is 2, the text tower's 4", replace(TINY, text_heads=4), **file)
    refused(r"embeddings.word_embeddings.weight is \(9, 32\), instruct.text has \(9, 16\)",
            replace(TINY, instruction_width=16), **file)  # fmt: skip
    settings = json.loads((folder / "config.json").read_text())
    for change, value in (
        ({"hidden_act": "relu"}, "relu"),
        ({"layer_norm_eps": 1e-5}, "1e-05"),
        ({"model_type": "roberta"}, "rob"),
    ):
        (folder / "config.json").write_text(json.dumps(settings | change))
        refused(f"its {next(iter(change))} is {value}", **file)
    (folder / "config.json").unlink()
    refused("cannot read .*config.json", **file)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "vocab.txt").unlink()
    refused("neither tokenizer.json nor vocab.txt there; name its --vocabulary", **file)
    (folder / "model.safetensors").unlink()
    refused("neither model.safetensors nor pytorch_model.bin there; name the folder of a BERT", **file)


# Frozen.


def sentence(stream=0) -> Batch:
    images, labels = torch.randn(4, 3, 64, 32), torch.tensor([0, 0, 1, 1])
    return Batch(stream, images, labels, torch.tensor([[2, 4, 6, 7, 3]]), torch.tensor([5]), None)


@pytest.mark.parametrize("given", ["backbone", "bert", "albef", "vocabulary"])
def test_a_resumed_run_has_the_model_and_words_of_its_begin(tmp_path, vocabulary, given):
    """Without the files, which may be gone."""
    torch.save({"model": drawn(albef(32, 2, 4, 4, len(WORDS), 32))}, tmp_path / "ALBEF.pth")
    torch.save({"model": drawn(deit(48, 3, 6))}, tmp_path / "deit.pth")
    files: dict = {
        "backbone": {"backbone": "deit", "pretrained": tmp_path / "deit.pth"},
        "bert": {"instruction_pretrained": tmp_path / "ALBEF.pth", "vocabulary": vocabulary},
        "albef": {"instruction_pretrained": tmp_path / "ALBEF.pth", "vocabulary": vocabulary},
        "vocabulary": {"vocabulary": vocabulary},
    }[given]
    if given == "bert":
        torch.save(
            {name: value for name, value in drawn(albef(32, 2, 4, 4, len(WORDS), 32)).items() if "visual" not in name},
            tmp_path / "ALBEF.pth",
        )
    asked = TrainConfig(
        model=replace(TINY, stem="conv", cls_stem=True, gate=0.3), **{name: str(file) for name, file in files.items()}
    )
    begin = pretrained.prepare(asked)
    words = begin.tokenizer or build_tokenizer(["a man"])
    again = pretrained.resumed(asked.but(resume=True), begin.config, words)
    assert again.config == begin.config.but(resume=True)
    assert (again.config.model != asked.model) == (given in ("backbone", "albef"))
    assert again.tokenizer is (None if given == "backbone" else words)


@pytest.mark.parametrize("trains", [False, True])
def test_a_pretrained_instruction_encoder_stays_as_it_is(tmp_path, vocabulary, trains):
    """Through a training step: unchanged and out of the optimiser, unless --train-instruction; all else moves."""
    torch.save({"model": drawn(albef(32, 2, 4, 4, len(WORDS), 32))}, tmp_path / "ALBEF.pth")
    begin = start(instruction_pretrained=tmp_path / "ALBEF.pth", vocabulary=vocabulary)
    config = begin.config.but(train_instruction=trains, lr=1e-2)
    torch.manual_seed(0)
    irm = IRM(config.model, len(WORDS), {"trad/a": 3, "ctcc/a": 3}, ["t2i/a"])
    begin._replace(config=config).apply(irm)
    torch.nn.init.constant_(irm.edit.gates, 0.5)
    module = TrainingModel(irm, config, ["trad/a", "ctcc/a", "t2i/a"], [False, False, True]).train()
    assert irm.instruct.text.training == irm.instruct.picture.training == trains
    assert irm.training
    assert irm.edit.training
    optimizer = torch.optim.AdamW(parameter_groups(module, config))
    before = {name: value.clone() for name, value in irm.named_parameters()}
    told = torch.randint(4, len(WORDS), (4, 6)), torch.tensor([6, 3, 4, 5])
    clothes = sentence(1)._replace(text=None, text_lengths=None, clothes=torch.randn(4, 3, 32, 32))
    for batch in (sentence(), clothes, sentence(2)._replace(text=told[0], text_lengths=told[1])):
        module(batch)[0].backward()
    optimizer.step()
    still = {name for name, value in irm.named_parameters() if torch.equal(value, before[name])}
    frozen = {name for name in before if name.startswith("instruct.")}
    inside_optimizer = {id(p) for group in optimizer.param_groups for p in group["params"]}
    names = {name for name, value in irm.named_parameters() if id(value) not in inside_optimizer}
    assert {name for name, value in irm.named_parameters() if not value.requires_grad} == names
    assert names == (set() if trains else frozen)
    assert (still & frozen == frozen) == (not trains)
    assert not still - frozen - {"instruct.text.embeddings.token_type_embeddings.weight"}
    assert {"project_text.weight", "project_image.weight", "temperature.value"}.isdisjoint(still)


def test_rates_of_what_is_new(tmp_path, folder):
    """Without weights all of E_e and E_i learn at lr; with some, the parts that have none are new."""
    torch.save(drawn(deit(48, 3, 6)), tmp_path / "weights.pth")
    backbone = {"backbone": "deit", "pretrained": tmp_path / "weights.pth"}
    for given, new in (
        ({}, set()),
        (backbone, {"instruct.text", "instruct.picture"}),
        ({"instruction_pretrained": folder}, {"edit", "instruct.picture"}),
        (backbone | {"instruction_pretrained": folder}, {"instruct.picture"}),
    ):
        config = start(**given).config.but(train_instruction=True)
        irm = IRM(config.model, len(WORDS), {})
        rate = {id(p): group["multiplier"] for group in parameter_groups(irm, config) for p in group["params"]}
        for part in ("edit.blocks", "instruct.text", "instruct.picture"):
            rates = {rate[id(p)] for p in irm.get_submodule(part).parameters()}
            assert rates == {config.lr_new if part.removesuffix(".blocks") in new else 1.0}
        assert rate[id(irm.edit.gates)] == rate[id(irm.fuse.norm.weight)] == config.lr_new


def test_fixed_sentences_are_encoded_once(folder):
    """The same bits, until weights or their place change; not where the tower learns, nor sentences of an image."""
    irm = begun(instruction_pretrained=folder)
    encoder, (ids, lengths) = irm.instruct, (torch.tensor([[2, 4, 6, 3]]), torch.tensor([4]))
    calls = []
    encoder.text.register_forward_hook(lambda *_: calls.append(1))
    want = encoder._encode(ids, lengths)
    names = set(irm.state_dict())
    calls.clear()
    with torch.inference_mode():  # who asks first may be a test; training goes on with it
        encoder.of_text(ids, lengths)
    got = encoder.of_text(ids, lengths)
    assert len(calls) == 1
    assert torch.equal(got.tokens, want.tokens)
    assert torch.equal(got.cls, want.cls)
    torch.nn.init.constant_(irm.edit.gates, 0.5)
    irm.features(torch.randn(2, 3, 64, 32), got).fout.sum().backward()
    assert irm.edit.kv_ins.weight.grad.any()
    assert set(irm.state_dict()) == names
    other = encoder.of_text(torch.tensor([[2, 4, 4, 3]]), lengths)
    shorter = encoder.of_text(ids, torch.tensor([3]))
    assert len(calls) == 3
    assert not torch.equal(other.cls, got.cls)
    assert not torch.equal(shorter.cls, got.cls)
    encoder.of_text(ids.expand(2, -1), lengths.expand(2))
    assert len(calls) == 4
    assert len(encoder.known) == 3

    doubled = copy.deepcopy(irm).double()
    assert doubled.instruct.of_text(ids, lengths).tokens.dtype == torch.float64
    meta = copy.deepcopy(irm).to("meta")
    assert not meta.instruct.known
    irm.load_state_dict({name: value * 2 for name, value in irm.state_dict().items()})
    assert not torch.equal(encoder.of_text(ids, lengths).tokens, got.tokens)
    assert torch.equal(encoder.of_text(ids, lengths).tokens, encoder._encode(ids, lengths).tokens)

    learning = IRM(TINY, len(WORDS), {}).instruct
    learning.of_text(ids, lengths)
    assert not learning.known


# A run.


def test_a_run_begins_with_the_files_and_goes_on_without_them(mini, tmp_path, folder):
    (tmp_path / "model.json").write_text(json.dumps(asdict(TINY)))
    torch.save(drawn(pass_(48, 3, 8)), tmp_path / "pass.pth")
    command = [
        "recipes/stl.py", "--dataset", "market1501", "--data", mini, "--config", tmp_path / "model.json", "--ids", "4",
        "--warmup", "1", "--no-eval", "--checkpoint-every", "1", "--output", tmp_path / "run", "--backbone", "pass",
        "--pretrained", tmp_path / "pass.pth", "--instruction-pretrained", folder, "--device", "cpu",
    ]  # fmt: skip
    first = recipe(*command, "--steps", "1")
    assert first.returncode == 0, first.stderr[-3000:]
    assert f"edit: 43 tensors from {tmp_path}/pass.pth; new: " in first.stdout
    assert f"instruct.text: 37 tensors from {folder}; not used: bert (18), cls (7); it stays as it is" in first.stdout
    before = checkpoint.load_model(tmp_path / "run")[0].state_dict()
    theirs = BertModel.from_pretrained(folder).state_dict()
    (tmp_path / "pass.pth").unlink()
    shutil.rmtree(folder)
    second = recipe(*command, "--steps", "2", "--resume")
    assert second.returncode == 0, second.stderr[-3000:]
    assert "resumed after step 1" in second.stdout
    irm, config, state, tokenizer = checkpoint.load_model(tmp_path / "run")
    assert (state.step, config.given, config.model.part_tokens) == (2, ("edit", "instruct.text"), 3)
    assert tokenizer.get_vocab_size() == len(WORDS)
    for name, value in irm.state_dict().items():
        own = name.removeprefix("instruct.text.")
        if own != name:
            assert torch.equal(value, theirs[own])
        elif name.startswith("edit.blocks.0.attn"):
            assert not torch.equal(value, before[name])
    at, runtime = tmp_path / "run" / "checkpoints", Runtime(torch.device("cpu"))
    with pytest.raises(InputError, match="has train_instruction False, this run has True"):
        checkpoint.resume(at, None, state, config.but(train_instruction=True), tokenizer, runtime)


def test_options_name_what_a_run_begins_with(tmp_path):
    def config(*arguments) -> TrainConfig:
        parser = options.training_parser("test")
        return options.training_config("mtl", parser.parse_args([str(argument) for argument in arguments]))

    gone = ["--backbone", "hap", "--pretrained", tmp_path / "gone", "--vocabulary", tmp_path]
    with pytest.raises(InputError, match=f"^--pretrained {tmp_path}/gone: not there; name a file that is"):
        config(*gone)
    resumed = config(*gone, "--resume", "--train-instruction", "--instruction-pretrained", tmp_path)
    assert (resumed.backbone, resumed.pretrained, resumed.vocabulary) == ("hap", f"{tmp_path}/gone", str(tmp_path))
    assert (resumed.instruction_pretrained, resumed.train_instruction) == (str(tmp_path), True)
    assert (config().backbone, config().given, config().train_instruction) == ("", (), False)
    assert TrainConfig.from_json(resumed.but(given=("edit",)).to_json()) == resumed.but(given=("edit",))
