"""Pre-trained weights: a ViT for E_e, a BERT or ALBEF's two towers for E_i, and a report of what fitted.

Files are safetensors, or torch files of which nothing but tensors is read. What the authors' own code writes:

DeiT   {"model"}: timm's names, head; distilled: also dist_token with its position, and head_dist, which E_e has not
       (facebookresearch/deit, models.py)
HAP    {"model"}: timm's names, decoder_*, mask_token (junkunyuan/HAP, models/models_mae_pose.py, load_save_model.py)
PASS   plain names, or {"teacher"} with module.backbone. before them: cls_token, part_token1..3, a position each:
       cls_pos, part1_pos..; pos_embed of the 16 x 8 patches alone (CASIA-IVA-Lab/PASS-reID, PASS/vision_transformer.py,
       which script/vit-b_full_lup-pass.sh trains as vit_base; the convolutional stem of ours_vit.py is another model's)
ALBEF  {"model"}: visual_encoder and text_encoder.bert, of which layers 0..5 read text and 6..11 fuse, cls, momentum
       copies *_m, vision_proj, text_proj, itm_head, temp, queues (salesforce/ALBEF, models/model_pretrain.py)

A ViT that was trained on pictures of another mean and std than ours gets the difference folded into its patch
convolution. That is exact, as this has no padding, and so nothing that makes pictures has to know of it.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import os
import re
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from timm.layers import resample_abs_pos_embed
from tokenizers import Tokenizer
from torch import Tensor, nn

from engine.config import BACKBONES, Backbone, TrainConfig
from engine.data.pipeline import MEAN, STD
from engine.errors import InputError
from engine.model.editing import EditingTransformer
from engine.model.instruction import SPECIAL, wordpiece
from engine.model.irm import IRM

OWN = {"gates", "kv_ins.weight", "kv_ins.bias"}  # of E_e, which no ViT has
WRAPPERS = ("teacher", "model", "state_dict", "student")  # what a file may keep its tensors under
OUTER = ("", "module.", "backbone.", "module.backbone.")  # what wrappers of modules put before all names
VIT, BERT = "blocks.0.attn.qkv.weight", "embeddings.word_embeddings.weight"  # a name that each of them has
ALBEF, BERTS = "visual_encoder.", ["text_encoder.bert.", "bert.", ""]  # what their names begin with
SIZES = "choose weights that fit the model, another --backbone, or a --config FILE with their sizes"
PLAIN: dict[str, Any] = {
    "stem": "patch",
    "cls_stem": False,
    "shared_stem": False,
}  # what both towers' pre-trained ViTs are


class Report(NamedTuple):
    """What became of one file in one part of the model.

    matched        names of the part that the file filled
    missing        names of the part that begin new
    unexpected     names of the file that the part has no use for
    interpolated   name -> grids before and after, as "14x14 to 16x8"
    """

    part: str
    file: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    interpolated: dict[str, str]

    def __str__(self) -> str:
        line = f"{self.part}: {len(self.matched)} tensors from {self.file}"
        line += "".join(f", {name} interpolated from {grids}" for name, grids in self.interpolated.items())
        groups = collections.Counter(name.split(".")[0] for name in self.unexpected)
        unused = ", ".join(f"{name} ({count})" if count > 1 else name for name, count in groups.items())
        line += f"; new: {', '.join(self.missing)}" if self.missing else ""
        return line + (f"; not used: {unused}" if unused else "")


class Start(NamedTuple):
    """How a run begins. config: completed by what the weights decide; state: weights by the model's names; tokenizer:
    None where the vocabulary is built from the data."""

    config: TrainConfig
    state: dict[str, Tensor]
    reports: tuple[Report, ...]
    tokenizer: Tokenizer | None

    def apply(self, model: IRM) -> None:
        """Copy the weights, and freeze what stays as it came."""
        model.load_state_dict(self.state, strict=False)
        model.instruct.freeze(*(part.removeprefix("instruct.") for part in self.config.frozen))


def prepare(config: TrainConfig) -> Start:
    """Read all files that the configuration names. InputError where one does not fit the model."""
    if not config.backbone and not config.instruction_pretrained:
        return Start(config.but(given=()), {}, (), _tokenizer(config))
    changes: dict[str, Any] = {}
    state: dict[str, Tensor] = {}
    reports: list[Report] = []
    backbone, seen, words, pictures = Backbone(), {}, {}, {}
    option = f"--instruction-pretrained {config.instruction_pretrained}"
    if config.backbone:
        backbone, changes = _backbone(config.backbone)
        seen = read(f"--pretrained {config.pretrained}", config.pretrained) if config.pretrained else _timms(config)
    if config.instruction_pretrained:
        words = _of_bert(config, option)
        own = _prefix(words, [ALBEF], VIT)
        if own is not None:  # the file's second tower
            pictures = {name: words.pop(name) for name in list(words) if name.startswith(own)}
            changes |= PLAIN
    model = replace(config.model, **changes)
    tokenizer = _tokenizer(config)
    tokens = _check_vocabulary(option, words, tokenizer) if words else 1
    with torch.device("meta"):
        blank = IRM(model, tokens, {})

    def take(part: str, weights: dict[str, Tensor], report: Report) -> None:
        reports.append(report)
        state.update({f"{part}.{name}": value for name, value in weights.items()})

    if seen:
        file = f"--pretrained {config.pretrained}" if config.pretrained else f"--backbone {config.backbone}"
        take("edit", *vit_weights(file, seen, backbone, blank.edit, "edit"))
    if words:
        take("instruct.text", *bert_weights(option, words, blank.instruct.text))
    if pictures:
        tower = blank.instruct.picture
        take("instruct.picture", *vit_weights(option, pictures, BACKBONES["albef"], tower, "instruct.picture"))
    config = config.but(model=model, given=tuple(report.part for report in reports))
    return Start(config, state, tuple(reports), tokenizer)


def resumed(config: TrainConfig, stored: TrainConfig, tokenizer: Tokenizer) -> Start:
    """How a run goes on from a checkpoint, which holds everything: no file is opened."""
    changes = _backbone(config.backbone)[1] if config.backbone else {}
    changes |= PLAIN if "instruct.picture" in stored.given else {}
    config = config.but(model=replace(config.model, **changes), given=stored.given)
    return Start(config, {}, (), tokenizer if stored.vocabulary or "instruct.text" in stored.given else None)


def read(option: str, file: str | Path) -> dict[str, Tensor]:
    """The tensors of a file by name. InputError, which begins with the option, for anything else."""
    try:
        with open(file, "rb") as stream:
            head = stream.read(64)
    except OSError as error:
        raise InputError(f"{option}: {error.strerror}; name the file of the weights") from error
    try:
        if head[8:9] == b"{":
            found: Any = load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # the options of a run, which many keep
                found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # of as many kinds as there are ways to cut a file
        raise InputError(f"{option}: {_what_it_is(head, error)}") from error
    while isinstance(found, dict) and any(isinstance(found.get(name), dict) for name in WRAPPERS):
        found = next(found[name] for name in WRAPPERS if isinstance(found.get(name), dict))
    entries = found.items() if isinstance(found, dict) else ()
    tensors = {str(name): value for name, value in entries if isinstance(value, Tensor)}
    if not tensors:
        raise InputError(f"{option}: holds no tensors by name; name a file of a model's weights (its state_dict)")
    return tensors


def _what_it_is(head: bytes, error: Exception) -> str:
    text = " ".join(str(error).split())
    if head.lstrip().startswith(b"<"):
        return "a web page, not weights; download the file itself"
    if head.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not weights; fetch the file itself (git lfs pull)"
    foreign = re.search(r"GLOBAL (\S+)", text)
    if foreign:
        return (
            f"holds {foreign[1]} beside tensors, and code from a file is never run; where you trust it, save its "
            "state_dict alone, best with safetensors"
        )
    return f"no safetensors or torch file, or damaged or cut short ({text[:120]}); download it again"


def vit_weights(
    option: str, state: dict[str, Tensor], backbone: Backbone, tower: EditingTransformer, part: str
) -> tuple[dict[str, Tensor], Report]:
    """Weights of a ViT by `tower`'s names, in its shapes. tower: on the meta device; part: its name in the model."""
    prefix = _prefix(state, [backbone.inside, ""], VIT)
    if prefix is None:
        raise InputError(f"{option}: no ViT ({_contents(state)}); name the file of the --backbone")
    found = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    others = [name for name in state if not name.startswith(prefix)]
    if backbone.part_tokens:
        _join_part_tokens(option, found, backbone.part_tokens)
    elif {"dist_token", "pos_embed"} <= set(found):
        found["pos_embed"] = torch.cat([found["pos_embed"][:, :1], found["pos_embed"][:, 2:]], 1)
    depth = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    if depth != len(tower.blocks):
        raise InputError(f"{option}: {depth} blocks, {part} has {len(tower.blocks)}; {SIZES}")
    interpolated = {}
    if "pos_embed" in found:
        found["pos_embed"], grids = _positions(option, found["pos_embed"], tower)
        interpolated = {"pos_embed": grids} if grids else {}
    weights = _fitting(option, found, tower, part, OWN)
    if (backbone.mean, backbone.std) != (MEAN, STD):
        _fold(weights, backbone)
    unused = [*(prefix + name for name in found if name not in weights), *others]
    return weights, _report(option, part, tower, weights, unused, interpolated)


def bert_weights(option: str, state: dict[str, Tensor], tower: nn.Module) -> tuple[dict[str, Tensor], Report]:
    """Weights of BERT's first layers by the names of transformers' BertModel, as many as `tower` has."""
    prefix = _prefix(state, BERTS, BERT)
    assert prefix is not None
    old = (".gamma", ".weight"), (".beta", ".bias")  # of LayerNorm, in the first releases
    found, source = {}, {}
    for name in state:
        if name.startswith(prefix):
            own = name.removeprefix(prefix)
            for before, now in old:
                own = own.removesuffix(before) + now if own.endswith(before) else own
            found[own], source[own] = state[name], name
    weights = _fitting(option, found, tower, "instruct.text", set())
    used = {source[name] for name in weights}
    return weights, _report(option, "instruct.text", tower, weights, [name for name in state if name not in used], {})


def _report(
    option: str, part: str, tower: nn.Module, weights: dict[str, Tensor], unused: list[str], grids: dict[str, str]
) -> Report:
    missing = tuple(name for name in tower.state_dict() if name not in weights)
    return Report(part, option.partition(" ")[2], tuple(weights), missing, tuple(unused), grids)


def _fitting(option: str, found: dict[str, Tensor], tower: nn.Module, part: str, new: set[str]) -> dict[str, Tensor]:
    """What of `found` the tower has, in its order. InputError where a shape differs or a name is not there."""
    wanted = {name: value for name, value in tower.state_dict().items() if name not in new}
    for name, value in wanted.items():
        if name in found and found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)}, {part} has {tuple(value.shape)}"
            raise InputError(f"{option}: {name} is {shapes}; {SIZES}")
    lacking = [name for name in wanted if name not in found]
    if lacking:
        what = f"{len(lacking)} of the {len(wanted)} tensors of {part}, the first {lacking[0]}"
        raise InputError(f"{option}: lacks {what}; {SIZES}")
    return {name: found[name] for name in wanted}


def _prefix(state: Iterable[str], insides: Iterable[str], name: str) -> str | None:
    """What stands before a tensor's name in a file: one of `insides`, after what wrappers add. None: not there."""
    return next((outer + inside for inside in insides for outer in OUTER if outer + inside + name in state), None)


def _contents(state: Iterable[str]) -> str:
    groups = list(dict.fromkeys(name.split(".")[0] for name in state))
    return f"its tensors: {', '.join(groups[:6])}{', ..' if len(groups) > 6 else ''}"


def _join_part_tokens(option: str, found: dict[str, Tensor], count: int) -> None:
    """PASS's class and part tokens and their own positions, into one tensor of each."""
    tokens = [f"part_token{i + 1}" for i in range(count)]
    positions = ["cls_pos", *(f"part{i + 1}_pos" for i in range(count)), "pos_embed"]
    lacking = [name for name in (*tokens, *positions) if name not in found]
    if lacking:
        raise InputError(f"{option}: lacks {', '.join(lacking)}; name the file of PASS, or another --backbone")
    found["part_tokens"] = torch.cat([found.pop(name) for name in tokens], 1)
    found["pos_embed"] = torch.cat([found.pop(name) for name in positions], 1)


def _positions(option: str, positions: Tensor, tower: EditingTransformer) -> tuple[Tensor, str]:
    """[1, tokens, width] for the tower's grid, as timm interpolates them, and the two grids ("" where they are alike).
    The grid in the file: a square, else twice as high as wide, else the tower's own."""
    first, (rows, columns) = tower.class_tokens, tower.grid
    count = positions.shape[1] - first if positions.ndim == 3 else 0
    side, half = math.isqrt(max(0, count)), math.isqrt(max(0, count // 2))
    if side * side == count > 0:
        before = (side, side)
    elif 2 * half * half == count > 0:
        before = (2 * half, half)
    elif count == rows * columns:
        before = (rows, columns)
    else:
        raise InputError(
            f"{option}: pos_embed is {tuple(positions.shape)}: without {first} class token(s) no grid of patches; name "
            "the file of the --backbone"
        )
    if before == (rows, columns):
        return positions, ""
    resampled = resample_abs_pos_embed(positions, [rows, columns], list(before), num_prefix_tokens=first)
    return resampled, f"{before[0]}x{before[1]} to {rows}x{columns}"


def _fold(weights: dict[str, Tensor], backbone: Backbone) -> None:
    """Let the patch convolution take pictures of our mean and std instead of its own."""
    own_mean, own_std, mean, std = (torch.tensor(x).double() for x in (MEAN, STD, backbone.mean, backbone.std))
    weight, bias = (weights[f"patch_embed.proj.{name}"].double() for name in ("weight", "bias"))
    shift = (weight * ((own_mean - mean) / std)[:, None, None]).sum((1, 2, 3))
    weights["patch_embed.proj.weight"] = (weight * (own_std / std)[:, None, None]).float()
    weights["patch_embed.proj.bias"] = (bias + shift).float()


def _backbone(name: str) -> tuple[Backbone, dict[str, Any]]:
    """The row of a --backbone, and what it changes in ModelConfig: the gates begin at 0, so that it is what it was."""
    if not name.startswith("timm:"):
        return BACKBONES[name], {**PLAIN, "gate": 0.0, "part_tokens": BACKBONES[name].part_tokens}
    import timm

    try:
        with torch.device("meta"):
            theirs: Any = timm.create_model(name.removeprefix("timm:"), num_classes=0)
    except Exception as error:  # whatever timm makes of an unknown name
        what = " ".join(str(error).split())[:120]
        raise InputError(
            f"--backbone {name}: timm cannot make it ({what}); timm.list_models('vit*') has names"
        ) from error
    difference = _difference(theirs)
    if difference:
        raise InputError(f"--backbone {name}: no plain ViT ({difference}); try timm:vit_base_patch16_224")
    sizes = {"width": theirs.embed_dim, "depth": len(theirs.blocks), "heads": theirs.blocks[0].attn.num_heads}
    changes = {**PLAIN, "gate": 0.0, "part_tokens": 0, "patch": theirs.patch_embed.patch_size[0], **sizes}
    return Backbone(mean=theirs.pretrained_cfg["mean"], std=theirs.pretrained_cfg["std"]), changes


def _difference(theirs: Any) -> str:
    """What of a timm model EditingTransformer does otherwise, in words; "" for nothing."""
    from timm.models import vision_transformer as timms

    kind: Any = type(theirs)
    if kind is not timms.VisionTransformer:
        return f"it is a {kind.__name__}"
    with torch.device("meta"):
        ours = EditingTransformer(
            size=theirs.patch_embed.img_size,
            patch=theirs.patch_embed.patch_size[0],
            stem="patch",
            width=theirs.embed_dim,
            depth=len(theirs.blocks),
            heads=theirs.blocks[0].attn.num_heads,
        )
    names, own = ({name: value.shape for name, value in model.state_dict().items()} for model in (theirs, ours))
    odd = [name for name in {**names, **own} if names.get(name) != own.get(name)]
    if odd:
        return f"it has {odd[0]} of shape {tuple(names[odd[0]])}" if odd[0] in names else f"it has no {odd[0]}"
    for name, module in theirs.named_modules():
        if isinstance(module, nn.LayerNorm) and module.eps != 1e-6:
            return f"{name}.eps is {module.eps}"
    for name, kind in (("", timms.Block), ("attn", timms.Attention), ("mlp", timms.Mlp), ("mlp.act", nn.GELU)):
        module = theirs.blocks[0].get_submodule(name)
        if type(module) is not kind or getattr(module, "approximate", "none") != "none":
            return f"its blocks have a {type(module).__name__}"
    return ""


def _timms(config: TrainConfig) -> dict[str, Tensor]:
    """Weights that timm fetches itself."""
    import timm

    try:
        return timm.create_model(config.backbone.removeprefix("timm:"), pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of the network, the disk, the hub
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(
            f"--backbone {config.backbone}: timm cannot fetch its weights ({what[:120]}); give a file as --pretrained"
        ) from error


def _of_bert(config: TrainConfig, option: str) -> dict[str, Tensor]:
    """Tensors of --instruction-pretrained, a file or a folder as transformers writes it."""
    place = Path(config.instruction_pretrained)
    if os.path.isdir(place):
        _check_bert(place / "config.json", option, config)
        names = ("model.safetensors", "pytorch_model.bin")
        files = [place / name for name in names if os.path.isfile(place / name)]
        if not files:
            raise InputError(f"{option}: neither {' nor '.join(names)} there; name the folder of a BERT")
        place = files[0]
    state = read(option, place)
    if _prefix(state, BERTS, BERT) is None:
        raise InputError(f"{option}: no BERT ({_contents(state)}); name ALBEF.pth or the folder of a BERT")
    return state


def _check_bert(file: Path, option: str, config: TrainConfig) -> None:
    """InputError where the BERT of a config.json computes otherwise than the text tower."""
    given = _parsed(file, option, _object)
    heads = config.model.text_heads
    expected = {"model_type": "bert", "hidden_act": "gelu", "layer_norm_eps": 1e-12, "num_attention_heads": heads}
    usual = expected | {"num_attention_heads": 12}  # where the file is silent
    for name, value in (expected | {"position_embedding_type": "absolute"}).items():
        found = given.get(name, usual.get(name, value))
        if found != value:
            raise InputError(f"{option}: its {name} is {found}, the text tower's {value}; {SIZES}")


def _tokenizer(config: TrainConfig) -> Tokenizer | None:
    """That of --vocabulary or of a BERT folder; None where neither is given."""
    own = not config.vocabulary and os.path.isdir(config.instruction_pretrained)
    if not own and not config.vocabulary:
        return None
    place = Path(config.instruction_pretrained if own else config.vocabulary)
    option = f"--vocabulary {place}" if not own else f"--instruction-pretrained {place}"
    if os.path.isdir(place):
        files = [place / name for name in ("tokenizer.json", "vocab.txt") if os.path.isfile(place / name)]
        if not files:
            raise InputError(f"{option}: neither tokenizer.json nor vocab.txt there; name its --vocabulary")
        place = files[0]
    if place.suffix == ".json":
        tokenizer = _parsed(place, option, Tokenizer.from_str)
        tokenizer.no_padding()
        tokenizer.no_truncation()
        known = tokenizer.get_vocab()
    else:
        known = {word: i for i, word in enumerate(_parsed(place, option, str).rstrip("\n").split("\n"))}
        settings = place.with_name("tokenizer_config.json")
        facts = _parsed(settings, option, _object) if os.path.isfile(settings) else {}
    lacking = [word for word in SPECIAL if word not in known]
    if lacking or known["[PAD]"] != 0:
        what = f"has no {', '.join(lacking)}" if lacking else f"has [PAD] at {known['[PAD]']}, not at 0"
        raise InputError(f"{option}: {place.name} {what}; name the vocabulary of a BERT")
    return tokenizer if place.suffix == ".json" else wordpiece(known, bool(facts.get("do_lower_case", True)))


def _check_vocabulary(option: str, words: dict[str, Tensor], tokenizer: Tokenizer | None) -> int:
    """Tokens that a BERT knows. InputError where the tokenizer has another number of them."""
    count = len(words[f"{_prefix(words, BERTS, BERT)}{BERT}"])
    if tokenizer is None:
        raise InputError(f"{option}: holds no vocabulary; add --vocabulary with its vocab.txt ({count} tokens)")
    if tokenizer.get_vocab_size() != count:
        raise InputError(
            f"{option}: knows {count} tokens, the vocabulary has {tokenizer.get_vocab_size()}; give the --vocabulary "
            "that it was trained with"
        )
    return count


def _parsed(file: Path, option: str, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(file.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises bare Exception
        what = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise InputError(f"{option}: cannot read {file} ({what}); name another file or folder") from error


def _object(text: str) -> dict[str, Any]:
    return dict(json.loads(text))
