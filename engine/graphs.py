"""The model as graphs that run without this engine: ONNX, or programs of torch.export.

    text        ids [T, L], lengths [T], stream           -> tokens [T, L, E], projection [T, embed]
    clothes     clothes [T, 3, h, w]                      -> tokens [T, M, E]
    instructed  images [B, 3, H, W], tokens, lengths, stream -> cls [B, C], fout [B, 2C], image_tokens [B, N, C]
    image       images, stream                            -> cls, projection [B, embed], image_tokens
    match       image_tokens, tokens, lengths, stream     -> logits [B, 2], probability [B]

An instruction is encoded once, by the first or second graph, and then serves any number of images: T = 1 (one for the
whole batch) or T = B. cls, fout and projection are of unit length, behind the stream's BNNeck or whitening; `stream` is
a number of the table in graphs.json, 0 for a data set the model was not trained on. All inputs and outputs are float32
or int64, also where the weights are float16. Attention is its eager reference: plain operators.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.checkpoint import State
from engine.config import ModelConfig
from engine.data.pipeline import MEAN, STD
from engine.errors import InputError
from engine.model.instruction import Instruction
from engine.model.irm import IRM
from engine.model.neck import GlobalBatchNorm

BACKENDS = {"onnx": ".onnx", "torch-export": ".pt2"}  # also the folders' names
NEEDS = {"onnx": ("onnx", "onnxscript", "onnxruntime"), "torch-export": (), "faiss": ("faiss",)}
FORMAT = 1  # of graphs.json
POSITIONS = 512  # of the text tower
TOLERANCE = 1e-4  # float32: greatest difference from torch, of values about 1 or as a share of the greatest
COSINE, PROBABILITY = 0.999, 0.02  # float16: least cosine with torch in float32, greatest difference of probabilities

Run = Callable[..., tuple[Tensor, ...]]
Shapes = dict[str, list[int | str]]  # name -> shape; a letter is a size that may change from call to call


class Graph(NamedTuple):
    """One graph: how to make its module, and its inputs and outputs in order."""

    module: Callable[[IRM, Necks], nn.Module]
    inputs: Shapes
    outputs: Shapes


def graphs(config: ModelConfig) -> dict[str, Graph]:
    """All graphs of a model of these sizes. ids, lengths and stream are int64, everything else float32."""
    (H, W), (h, w) = config.image_size, config.clothes_size
    C, E = config.width, config.instruction_width
    N = 1 + config.part_tokens + H * W // config.patch**2
    M = 1 + h * w // config.patch**2
    stream: Shapes = {"stream": []}
    instruction: Shapes = {"tokens": ["T", "M", E], "lengths": ["T"], **stream}
    images: Shapes = {"images": ["B", 3, H, W]}
    seen: Shapes = {"image_tokens": ["B", N, C]}
    cls: Shapes = {"cls": ["B", C]}
    return {
        "text": Graph(
            _Text,
            {"ids": ["T", "L"], "lengths": ["T"], **stream},
            {"tokens": ["T", "L", E], "projection": ["T", config.embed]},
        ),
        "clothes": Graph(_Clothes, {"clothes": ["T", 3, h, w]}, {"tokens": ["T", M, E]}),
        "instructed": Graph(_Instructed, images | instruction, {**cls, "fout": ["B", 2 * C], **seen}),
        "image": Graph(_Image, images | stream, {**cls, "projection": ["B", config.embed], **seen}),
        "match": Graph(_Match, seen | instruction, {"logits": ["B", 2], "probability": ["B"]}),
    }


class Neck(nn.Module):
    """Batch statistics of all streams as tables [S, C]: x [B, C], stream [] -> [B, C] of unit length, float32."""

    mean: Tensor
    factor: Tensor

    def __init__(self, norms: list[GlobalBatchNorm | None], features: int):
        super().__init__()
        mean, factor = torch.zeros(len(norms), features), torch.ones(len(norms), features)
        for row, norm in enumerate(norms):
            if norm is not None:
                mean[row] = norm.running_mean
                factor[row] = torch.rsqrt(norm.running_var + norm.eps) * norm.weight.detach()
        self.register_buffer("mean", mean)
        self.register_buffer("factor", factor)

    def forward(self, x: Tensor, stream: Tensor) -> Tensor:
        row = stream.view(1)
        return F.normalize((x.float() - self.mean[row]) * self.factor[row], dim=-1)


class Necks(nn.ModuleDict):
    """cls, fout, image, text: what stands behind these features, for streams by number. Without a neck a feature stays
    as it is; without a whitening of its own a stream has the first's, as in the model."""

    def __init__(self, model: IRM, streams: list[str]):
        heads, whitenings = [model.head(name) for name in streams], [model.whitening(name) for name in streams]
        embed, width = model.config.embed, model.config.width

        def of(norms: list[Any], size: int) -> Neck:
            return Neck(norms, size)

        super().__init__(
            {
                "cls": of([head and head.neck["cls"] for head in heads], width),
                "fout": of([head and head.neck["fout"] for head in heads], 2 * width),
                "image": of([whitening and whitening.image for whitening in whitenings], embed),
                "text": of([whitening and whitening.text for whitening in whitenings], embed),
            }
        )


class _Module(nn.Module):
    """Computes in the model's precision; casts what comes and goes."""

    def __init__(self, model: IRM, necks: Necks):
        super().__init__()
        self.model, self.necks = model, necks

    def cast(self, x: Tensor) -> Tensor:
        return x.to(self.model.match.weight.dtype)

    def instruction(self, tokens: Tensor, lengths: Tensor, count: int) -> Instruction:
        """One row for each of `count` images; a single instruction is repeated."""
        given = torch.ones_like(lengths).sum()  # a tensor: exporters know no remainder by a size
        rows = torch.arange(count, device=tokens.device) % given
        tokens = self.cast(tokens)[rows]
        return Instruction(tokens, lengths[rows], tokens[:, 0])


class _Text(_Module):
    def forward(self, ids: Tensor, lengths: Tensor, stream: Tensor) -> tuple[Tensor, ...]:
        told = self.model.instruct.of_text(ids, lengths)
        return told.tokens.float(), self.necks["text"](self.model.project_text(told.cls), stream)


class _Clothes(_Module):
    def forward(self, clothes: Tensor) -> tuple[Tensor, ...]:
        return (self.model.instruction_of_clothes(self.cast(clothes)).tokens.float(),)


class _Instructed(_Module):
    def forward(self, images: Tensor, tokens: Tensor, lengths: Tensor, stream: Tensor) -> tuple[Tensor, ...]:
        told = self.instruction(tokens, lengths, images.shape[0])
        seen = self.model.features(self.cast(images), told)
        return self.necks["cls"](seen.cls, stream), self.necks["fout"](seen.fout, stream), seen.tokens.float()


class _Image(_Module):
    def forward(self, images: Tensor, stream: Tensor) -> tuple[Tensor, ...]:
        seen = self.model.features(self.cast(images), None)
        embedding = self.necks["image"](self.model.project_image(seen.cls), stream)
        return self.necks["cls"](seen.cls, stream), embedding, seen.tokens.float()


class _Match(_Module):
    def forward(self, image_tokens: Tensor, tokens: Tensor, lengths: Tensor, stream: Tensor) -> tuple[Tensor, ...]:
        told = self.instruction(tokens, lengths, image_tokens.shape[0])
        seen = self.cast(image_tokens)
        picture = self.necks["image"](self.model.project_image(seen[:, 0]), stream)
        text = self.necks["text"](self.model.project_text(told.cls), stream)
        logits = self.model.match_scores(seen, told, "", self.cast((picture * text).sum(-1))).float()
        return logits, logits.softmax(-1)[:, 1]


def require(what: str, option: str) -> None:
    """InputError where a package that `option` needs is not installed."""
    missing = [name for name in NEEDS[what] if importlib.util.find_spec(name) is None]
    if missing:
        packages = " ".join(missing).replace("faiss", "faiss-cpu")
        raise InputError(f"{option}: {', '.join(missing)} not installed; pip install {packages}")


def write(model: IRM, state: State, folder: Path, backends: Sequence[str], *, half: bool = False) -> None:
    """All graphs of a model on the CPU, and graphs.json, in a new folder for each backend below `folder`. half: weights
    in float16.

    Each is opened again and run on random input beside torch in float32: InputError where they differ."""
    streams = ["", *state.streams]  # number 0: none of them
    exact = _plain(model, state)
    necks = Necks(model, streams)
    stored = _plain(model, state).half() if half else exact
    for backend in backends:
        (folder / backend).mkdir()
    for name, graph in graphs(model.config).items():
        wanted, module = graph.module(exact, necks).eval(), graph.module(stored, necks).eval()
        program = _traced(module, graph, state.vocabulary)
        for backend in backends:
            file = folder / backend / _file(name, backend)
            _save(program, graph, file)
            found = open_graph(file)
            for sizes in ({"B": 1, "T": 1, "L": 3, "M": 4}, {"B": 3, "T": 1, "L": 1, "M": 1}, {"B": 4, "T": 4, "L": 9}):
                inputs = _random(graph.inputs, {"M": 6, **sizes}, state.vocabulary, len(streams))
                with torch.inference_mode():
                    _compare(file, graph, found(*inputs), wanted(*inputs), half)
    for backend in backends:
        facts = _facts(model.config, streams, backend, half)
        (folder / backend / "graphs.json").write_text(json.dumps(facts, indent=1) + "\n")


def _file(graph: str, backend: str) -> str:
    return f"{graph}{BACKENDS[backend]}"


def _facts(config: ModelConfig, streams: list[str], backend: str, half: bool) -> dict[str, Any]:
    """Content of graphs.json: all that a program without this engine has to know."""

    def named(shapes: Shapes) -> dict[str, Any]:
        return {name: {"dtype": _dtype(name), "shape": shape} for name, shape in shapes.items()}

    pixels = {"channels": "RGB", "scale": 1 / 255, "mean": MEAN, "std": STD}
    return {
        "format": FORMAT,
        "weights": "float16" if half else "float32",
        "streams": {name: number for number, name in enumerate(streams)},
        "images": {"size": config.image_size, **pixels},
        "clothes": {"size": config.clothes_size, **pixels},
        "text_tokens": config.text_tokens,
        "graphs": {
            name: {"file": _file(name, backend), "inputs": named(graph.inputs), "outputs": named(graph.outputs)}
            for name, graph in graphs(config).items()
        },
    }


def _plain(model: IRM, state: State) -> IRM:
    """A copy whose attention is the eager reference, without classifiers."""
    copy = IRM(replace(model.config, fused=False), state.vocabulary, dict.fromkeys(state.heads, 0), state.matching)
    copy.load_state_dict(model.state_dict(), strict=False)
    return copy.eval().requires_grad_(False)


def _dtype(name: str) -> str:
    return "int64" if name in ("ids", "lengths", "stream") else "float32"


def _random(shapes: Shapes, sizes: Mapping[str, int], vocabulary: int, streams: int) -> tuple[Tensor, ...]:
    """Inputs of these sizes."""
    most = sizes["L"] if "ids" in shapes else sizes["M"]
    inputs = []
    for name, shape in shapes.items():
        given = [sizes[size] if isinstance(size, str) else size for size in shape]
        below = {"ids": vocabulary, "lengths": most + 1, "stream": streams}
        least = int(name == "lengths")
        inputs.append(torch.randint(least, below[name], given) if name in below else torch.randn(given))
    return tuple(inputs)


def _traced(module: nn.Module, graph: Graph, vocabulary: int) -> torch.export.ExportedProgram:
    inputs = _random(graph.inputs, {"B": 3, "T": 2, "L": 7, "M": 5}, vocabulary, 1)
    letters = {size for shape in graph.inputs.values() for size in shape if isinstance(size, str)}
    dims = {letter: torch.export.Dim(letter, max=POSITIONS if letter == "L" else None) for letter in letters}
    free = tuple(
        {place: dims[size] for place, size in enumerate(shape) if isinstance(size, str)}
        for shape in graph.inputs.values()
    )
    with torch.no_grad(), _open_layers():
        program = torch.export.export(module, inputs, dynamic_shapes=free)
    for node in program.graph.nodes:  # else the files would name the folders of this machine
        node.meta.pop("stack_trace", None)
    return program


def _save(program: torch.export.ExportedProgram, graph: Graph, file: Path) -> None:
    """In the form that the file's name says."""
    if file.suffix == ".pt2":
        from torch.export.graph_signature import InputKind

        used = {node.name for node in program.graph.nodes if node.users}
        for one in program.graph_signature.input_specs:  # weights of the model that this graph has no use for
            if one.kind == InputKind.PARAMETER and one.arg.name not in used:
                program.state_dict[one.target] = nn.Parameter(torch.empty(0), requires_grad=False)
        torch.export.save(program, file)
        return
    import onnx

    exported = torch.onnx.export(
        program, input_names=list(graph.inputs), output_names=list(graph.outputs), dynamo=True, verbose=False
    )
    assert exported is not None
    exported.save(file, external_data=False)
    onnx.checker.check_model(str(file))


@contextmanager
def _open_layers() -> Iterator[None]:
    """Transformer layers by their parts, not by torch's one operator for a whole layer, which no other runtime has."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


def _compare(file: Path, graph: Graph, found: tuple[Tensor, ...], wanted: tuple[Tensor, ...], half: bool) -> None:
    for name, ours, torchs in zip(graph.outputs, found, wanted, strict=True):
        difference = float((ours - torchs).abs().max())
        if not half:
            alike = difference <= TOLERANCE * max(1.0, float(torchs.abs().max()))
        elif name == "probability":
            alike = difference <= PROBABILITY
        else:
            alike = float(F.cosine_similarity(ours.flatten(1), torchs.flatten(1)).min()) >= COSINE
        if not alike:
            raise InputError(f"{file.name}: its {name} differs from torch's by {difference:.2g}; nothing was published")


def open_graph(file: Path, device: torch.device | str = "cpu") -> Run:
    """A graph as a function of tensors, in the order of its inputs. ONNX runs on the CPU, whatever the device."""
    if file.suffix == ".pt2":
        from torch.export.passes import move_to_device_pass

        program = torch.export.load(file)
        if torch.device(device).type != "cpu":
            program = move_to_device_pass(program, str(device))
        return program.module()  # type: ignore[return-value]
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # one level higher, onnxruntime 1.32's NchwcTransformer brings the process down on float16
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads wait asleep, others may work
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    names = [one.name for one in session.get_inputs()]

    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        given = {name: value.cpu().numpy() for name, value in zip(names, inputs, strict=True)}
        return tuple(torch.from_numpy(np.asarray(value)).to(device) for value in session.run(None, given))

    return run


class Graphs:
    """The graphs of an exported folder, in the place of the model where features are extracted: `at` a stream."""

    def __init__(self, folder: Path, backend: str, device: torch.device | str = "cpu"):
        """InputError where the folder has none of this kind, or damaged ones."""
        require(backend, f"--backend {backend}")
        self.folder, self.device = folder / backend, torch.device(device)
        try:
            facts = json.loads((self.folder / "graphs.json").read_text())
            if facts["format"] > FORMAT:
                raise InputError(f"format {facts['format']}, this engine reads up to {FORMAT}")
            self.streams: dict[str, int] = facts["streams"]
            self.graphs = {
                name: open_graph(self.folder / graph["file"], device) for name, graph in facts["graphs"].items()
            }
        except FileNotFoundError as error:
            raise InputError(
                f"--backend {backend}: no {error.filename}; write one by recipes/export.py --{backend}"
            ) from error
        except Exception as error:  # whatever damaged files make the runtimes raise
            what = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"{self.folder}: damaged or of another engine ({what}); export it again") from error

    def eval(self) -> Graphs:
        return self

    def at(self, stream: str) -> StreamGraphs:
        return StreamGraphs(self, self.streams.get(stream, 0))


class Seen(NamedTuple):
    """In the place of Features: of unit length, behind the neck or whitening; None for what was not asked for."""

    cls: Tensor
    fout: Tensor | None
    embedding: Tensor | None
    tokens: Tensor


class StreamGraphs:
    """The methods of IRM by which test features are made, for one stream, whatever stream they are called with: it is
    named before anything is computed. An Instruction's `cls` is the sentence's embedding."""

    def __init__(self, graphs: Graphs, number: int):
        self.graphs, self.stream = graphs.graphs, torch.tensor(number, device=graphs.device)
        self.instruct = self

    def of_text(self, ids: Tensor, lengths: Tensor) -> Instruction:
        tokens, embedding = self.graphs["text"](ids, lengths, self.stream)
        return Instruction(tokens, lengths, embedding)

    def instruction_of_clothes(self, pictures: Tensor) -> Instruction:
        (tokens,) = self.graphs["clothes"](pictures)
        return Instruction(tokens, torch.full((len(tokens),), tokens.shape[1], device=tokens.device), tokens[:, 0])

    def features(self, images: Tensor, instruction: Instruction | None) -> Seen:
        if instruction is None:
            cls, embedding, tokens = self.graphs["image"](images, self.stream)
            return Seen(cls, None, embedding, tokens)
        assert instruction.lengths is not None
        cls, fout, tokens = self.graphs["instructed"](images, instruction.tokens, instruction.lengths, self.stream)
        return Seen(cls, fout, None, tokens)

    def test_feature(self, seen: Seen, stream: str, kind: str) -> Tensor:
        parts = [part for name, part in (("cls", seen.cls), ("fout", seen.fout)) if kind in (name, "concat")]
        return F.normalize(torch.cat([part for part in parts if part is not None], -1), dim=-1)

    def image_embedding(self, seen: Seen, stream: str) -> Tensor:
        assert seen.embedding is not None
        return seen.embedding

    def text_embedding(self, instruction: Instruction, stream: str) -> Tensor:
        return instruction.cls

    def match_scores(self, tokens: Tensor, instruction: Instruction, stream: str) -> Tensor:
        assert instruction.lengths is not None
        return self.graphs["match"](tokens, instruction.tokens, instruction.lengths, self.stream)[0]
