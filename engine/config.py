"""What a run is made of: `ModelConfig` and `TrainConfig`, frozen, validated, to and from JSON."""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from engine.errors import InputError
from engine.tasks import TASKS


def _known(kind: type, values: Any) -> dict[str, Any]:
    """The fields of a JSON object, all of them known to this dataclass."""
    if not isinstance(values, dict):
        raise InputError("expected a JSON object")
    known = {item.name for item in fields(kind)}
    extra = sorted(set(values) - known)
    if extra:
        raise InputError(f"unknown fields {', '.join(extra)}; known: {', '.join(sorted(known))}")
    return values


def _check_types(config: Any) -> None:
    """InputError for a number, text or flag that is none; annotations are strings here."""
    kinds: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,), "bool": (bool,)}
    for item in fields(config):
        value, expected = getattr(config, item.name), kinds.get(str(item.type))
        if expected and type(value) not in expected:
            raise InputError(f"{item.name} {value!r}: expected {item.type}")


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the Instruct-ReID model. Pictures are (height, width) in pixels; widths are features.

    stem          "patch": ViT's patch x patch convolution; "conv": strided 3x3 convolutions down to `patch`
    cls_stem      CLS begins as a linear map of all patches side by side: from nothing, attention takes long to learn
                  where on the body to look
    part_tokens   extra class tokens beside CLS (PASS has 3)
    clothes_size  size of a clothes picture before the picture tower
    shared_stem   the picture tower sees through E_e's stem (of its width): from nothing, every task teaches that one
    text_tokens   longest instruction in tokens, CLS and SEP included; what is longer is cut
    embed         size of the projections that text-to-image search compares
    embed_norm    whiten the projections by batch statistics: from nothing, all sentences are nearly parallel (cosine
                  0.99) and the contrastive loss finds no way out; pre-trained towers need it not
    gate          initial value of all gates: 0 keeps a pre-trained ViT what it is; a model that starts from nothing has
                  nothing to keep, and with 0 its instruction moves nothing for hundreds of steps
    editing       False: E_e is a plain ViT, and the instruction reaches the features through E_f alone (the paper's
                  Table 5, "w/o editing")
    fused         attention by the kernels; False: by their eager reference
    """

    name: str = "irm_base"
    image_size: tuple[int, int] = (256, 128)
    patch: int = 16
    stem: str = "patch"
    cls_stem: bool = False
    width: int = 768
    depth: int = 12
    heads: int = 12
    part_tokens: int = 0
    drop_path: float = 0.1
    clothes_size: tuple[int, int] = (128, 128)
    picture_depth: int = 12
    shared_stem: bool = False
    text_depth: int = 6
    text_heads: int = 12
    text_tokens: int = 70
    instruction_width: int = 768
    fusion_depth: int = 2
    embed: int = 256
    embed_norm: bool = False
    gate: float = 0.0
    editing: bool = True
    fused: bool = True

    def __post_init__(self) -> None:
        _check_types(self)
        least = {"width": 1, "depth": 1, "embed": 1, "picture_depth": 1, "text_depth": 1, "instruction_width": 1}
        for what, bound in {**least, "fusion_depth": 1, "text_tokens": 3, "part_tokens": 0}.items():
            if getattr(self, what) < bound:
                raise InputError(f"{what} {getattr(self, what)}: expected at least {bound}")
        if self.text_tokens > 512:  # BERT's positions
            raise InputError(f"text_tokens {self.text_tokens}: expected at most 512")
        if not (0 <= self.drop_path < 1 and math.isfinite(self.gate)):
            raise InputError(
                f"drop_path {self.drop_path}, gate {self.gate}: expected 0 <= drop_path < 1, a finite gate"
            )
        object.__setattr__(self, "image_size", tuple(self.image_size))
        object.__setattr__(self, "clothes_size", tuple(self.clothes_size))
        if self.patch < 1 or (self.stem == "conv" and self.patch & (self.patch - 1)):
            raise InputError(f"patch {self.patch}: expected a positive number, with a conv stem a power of two")
        for what in ("image_size", "clothes_size"):
            size = getattr(self, what)
            if len(size) != 2 or any(type(side) is not int or side <= 0 or side % self.patch for side in size):
                raise InputError(f"{what} {size}: expected height and width, multiples of the patch ({self.patch})")
        if self.stem not in ("patch", "conv"):
            raise InputError(f"stem {self.stem!r}: expected 'patch' or 'conv'")
        for width, heads in ((self.width, self.heads), (self.instruction_width, self.text_heads)):
            if heads < 1 or width % heads:
                raise InputError(f"width {width} is not a multiple of heads {heads}")
            if width % 4:
                raise InputError(f"width {width}: expected a multiple of 4")
        if self.shared_stem and self.width != self.instruction_width:
            raise InputError(f"shared_stem: expected width {self.width} = instruction_width {self.instruction_width}")


MODELS: dict[str, ModelConfig] = {
    "irm_base": ModelConfig(),
    "irm_tiny": ModelConfig(
        name="irm_tiny",
        image_size=(128, 64),
        patch=16,
        stem="conv",
        cls_stem=True,
        width=128,
        depth=3,
        heads=4,
        drop_path=0.0,
        clothes_size=(64, 64),
        picture_depth=1,
        shared_stem=True,
        text_depth=1,
        text_heads=4,
        text_tokens=64,
        instruction_width=128,
        fusion_depth=1,
        embed=128,
        embed_norm=True,
        gate=0.3,
    ),
}


class Backbone(NamedTuple):
    """A pre-trained ViT as its authors release it. inside: where in the file its names begin; part_tokens: as in
    ModelConfig; mean, std: of the RGB pictures in 0..1 that it was trained with."""

    inside: str = ""
    part_tokens: int = 0
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)  # ImageNet
    std: tuple[float, ...] = (0.229, 0.224, 0.225)


# All of them: patches of 16 x 16 by one convolution, bias on q, k and v, LayerNorm eps 1e-6. `timm:NAME` beside them.
BACKBONES: dict[str, Backbone] = {
    "deit": Backbone(),
    "albef": Backbone("visual_encoder.", 0, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "hap": Backbone(),
    "pass": Backbone(part_tokens=3),
}
PARTS = ("edit", "instruct.text", "instruct.picture")  # of the model that may begin pre-trained


@dataclass(frozen=True)
class TrainConfig:
    """One training run. The recipes' options are these fields; `recipes/mtl.py --help` explains them."""

    data: str = "data/mini-omnireid"
    output: str = "runs/train"
    model: ModelConfig = field(default_factory=lambda: MODELS["irm_tiny"])
    tasks: tuple[str, ...] = tuple(TASKS)
    datasets: tuple[str, ...] | None = None
    backbone: str = ""  # whose weights E_e begins with: of BACKBONES, or timm:NAME; "": from nothing
    pretrained: str = ""  # their file; "" with timm:NAME: timm's own
    instruction_pretrained: str = ""  # file or BERT folder that E_i begins with; "": from nothing
    vocabulary: str = ""  # vocab.txt, tokenizer.json or their folder; "": of the BERT folder, else built from the data
    train_instruction: bool = False  # a pre-trained E_i learns as well
    given: tuple[str, ...] = ()  # the PARTS that began pre-trained; engine.model.pretrained fills it in
    steps: int = 24000
    seed: int = 0
    ids: int = 32
    images_per_id: int = 4
    shares: dict[str, int] = field(default_factory=dict)  # task -> micro-steps of each of its streams per cycle (1)
    loss_weights: dict[str, float] = field(default_factory=dict)  # task or stream -> factor of its loss (1)
    temperature: float = 0.0  # above 0: streams in proportion to images^(1/temperature) instead of `shares`
    leaders: tuple[str, ...] = ()  # tasks whose streams train alone at first, `ahead` micro-steps of each
    ahead: int = 0
    window: int = 0  # micro-steps (one stream each) per optimiser step; 0 = Sampler.window
    lr: float = 1e-5
    lr_start: float = 1e-7
    lr_new: float = 10.0  # multiplier for layers that no pre-training covers: heads, gates, instruction projections
    layer_decay: float = 1.0  # multiplier of E_e's rate for each layer further from its output
    warmup: int = 1000
    weight_decay: float = 5e-4
    clip: float = 5.0
    ema: float = 0.0  # above 0: evaluate weights averaged over steps with this decay
    checkpointing: bool = False  # E_e's blocks are computed again in the backward pass: less memory, more time
    compile: bool = False  # E_e's blocks by torch.compile
    margin: float = 0.3
    mining: str = "all"
    plain_triplet: bool = False  # one margin for all: the instructions are taken to be alike
    centre: bool = False  # compare a batch's instructions about their mean (engine.losses.centred)
    global_losses: bool = False  # pairs and triplets of the batches of all ranks, not of each rank's own
    label_smoothing: float = 0.0
    triplet_weight: float = 1.0
    colour_jitter: float = 0.0
    checkpoint_every: int = 1000
    keep: int = 2
    eval_every: int = 0  # steps between evaluations while training; 0: only at the end
    evaluate: bool = True
    quick: bool = False
    baselines: bool = False  # measure what needs no learning beside the model (--check)
    resume: bool = False
    feature: str = "cls"
    allow_missing: bool = False  # measure without the test images that are damaged
    released: bool = False  # measure as the released code's evaluator does (engine.protocols.INSTRUCT)
    device: str = "auto"
    workers: int = 2
    save_features: bool = False
    log_samples: bool = False
    deepspeed: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        _check_types(self)
        if isinstance(self.model, dict):
            object.__setattr__(self, "model", ModelConfig(**_known(ModelConfig, self.model)))
        if not isinstance(self.model, ModelConfig):
            raise InputError(f"model {self.model!r:.80}: expected a JSON object")
        object.__setattr__(self, "tasks", tuple(self.tasks))
        object.__setattr__(self, "leaders", tuple(self.leaders))
        object.__setattr__(self, "given", tuple(self.given))
        if self.datasets is not None:
            object.__setattr__(self, "datasets", tuple(self.datasets))
        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            raise InputError(f"--tasks {','.join(unknown) or '(none)'}: expected names among {', '.join(TASKS)}")
        least = {"steps": 1, "ids": 2, "images_per_id": 1, "checkpoint_every": 1, "keep": 1, "workers": 1}
        for name, bound in least.items():
            if getattr(self, name) < bound:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected at least {bound}")
        finite = ["seed", "window", "warmup", "weight_decay", "margin", "lr", "lr_start", "lr_new", "clip", "ahead"]
        finite += ["eval_every", "temperature"]
        for name in finite:
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 or more")
        if self.seed >= 1 << 63:
            raise InputError(f"--seed {self.seed}: expected less than 2**63")
        if not 0 <= self.label_smoothing < 1:
            raise InputError(f"--label-smoothing {self.label_smoothing}: expected 0 or more and less than 1")
        for name, fits in (("ema", 0 <= self.ema < 1), ("layer_decay", 0 < self.layer_decay <= 1)):
            if not fits:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)}: expected 0 to 1")
        if self.ema and self.zero_stage == 3:
            raise InputError("--ema: ZeRO 3 keeps no rank whole weights to average; use stage 0, 1 or 2")
        for name, weight in self.loss_weights.items():
            if name.partition("/")[0] not in TASKS or type(weight) not in (int, float) or not 0 <= weight < math.inf:
                raise InputError(
                    f"--loss-weights {name}={weight}: expected TASK=W or TASK/DATASET=W with W of 0 or more"
                )
        if self.mining not in ("all", "hard"):
            raise InputError(f"--mining {self.mining!r}: expected all or hard")
        for task, share in [*self.shares.items(), *((task, 1) for task in self.leaders)]:
            if task not in TASKS or type(share) is not int or share < 1:
                raise InputError(f"shares {self.shares}, leaders {self.leaders}: expected tasks, shares of 1 or more")
        if self.temperature and self.shares:
            shares = ",".join(f"{task}={share}" for task, share in self.shares.items())
            raise InputError(
                f"--temperature {self.temperature}, --shares {shares}: both say how often streams train; leave one out"
            )
        own = self.backbone.startswith("timm:")
        if self.backbone and not own and self.backbone not in BACKBONES:
            raise InputError(f"--backbone {self.backbone!r}: expected {', '.join(BACKBONES)} or timm:NAME")
        if bool(self.backbone) != bool(self.pretrained) and not own:
            raise InputError(
                f"--backbone {self.backbone} --pretrained {self.pretrained}: one says what the weights are, the other "
                "in which file; give both"
            )
        if self.feature not in ("cls", "fout", "concat"):
            raise InputError(f"--feature {self.feature!r}: expected cls, fout or concat")
        if self.device not in ("auto", "cpu", "cuda"):
            raise InputError(f"--device {self.device!r}: expected auto, cpu or cuda")

    @property
    def zero_stage(self) -> int:
        """What DeepSpeed shares out: 0 nothing, 1 the optimiser's state, 2 gradients as well, 3 weights as well."""
        return (self.deepspeed or {}).get("zero_optimization", {}).get("stage", 0)

    @property
    def frozen(self) -> tuple[str, ...]:
        """The parts of E_i that stay as they came."""
        return () if self.train_instruction else tuple(part for part in self.given if part.startswith("instruct."))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> TrainConfig:
        """InputError for what is not JSON, for unknown fields and for values of the wrong type."""
        try:
            return cls(**_known(cls, json.loads(text)))
        except json.JSONDecodeError as error:
            raise InputError(f"not JSON ({error})") from error
        except TypeError as error:
            raise InputError(f"a field has the wrong type ({error})") from error

    def but(self, **changes: Any) -> TrainConfig:
        """A copy with these fields changed."""
        return replace(self, **changes)


def model_config(name: str, **changes: Any) -> ModelConfig:
    """A named configuration or a JSON file of ModelConfig fields. InputError for an unknown name, key or value."""
    if name in MODELS:
        return replace(MODELS[name], **changes)
    path = Path(name)
    if not os.path.isfile(path):
        raise InputError(f"--config {name}: expected {', '.join(MODELS)} or a JSON file of model fields")
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise InputError(f"--config {name}: {error.strerror}; mend its permissions") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"--config {name}: not JSON ({error})") from error
    try:
        return ModelConfig(**{"name": path.stem, **_known(ModelConfig, values), **changes})
    except InputError as error:
        raise InputError(f"--config {name}: {error}") from error
    except TypeError as error:
        raise InputError(f"--config {name}: a field has the wrong type ({error})") from error
