"""What leaves the engine: a folder that is all a model needs, with graphs for other runtimes; an index for FAISS.

    DIR/  model.safetensors  config.json  state.json  tokenizer.json  SHA256SUMS
                                                       a checkpoint without optimiser and classifiers
          onnx/  torch-export/                                           engine.graphs, where asked for

`engine.load`, `engine.evaluate` and recipes/evaluate.py open the folder like a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer

from engine import checkpoint, graphs
from engine.checkpoint import State
from engine.config import TrainConfig
from engine.data.index import find_indexes
from engine.errors import InputError, writing
from engine.evaluation import Evaluation, _one_thread_each, measurable
from engine.instructions import SENTENCES
from engine.model.irm import IRM
from engine.results import whole_file
from engine.runtime import Runtime
from engine.tasks import TASKS


def export(path: str | Path, output: str | Path, *, backends: Sequence[str] = (), half: bool = False) -> None:
    """Write the folder `output` from a run or a checkpoint, whole or not at all.

    backends  graphs to write beside the weights: names of graphs.BACKENDS
    half      weights and graphs in float16 (features stay float32)
    InputError where `output` exists, cannot be written, or a graph computes something else than the model."""
    output = Path(output)
    if os.path.lexists(output):
        raise InputError(f"--output {output}: exists already; choose another folder")
    for backend in backends:
        graphs.require(backend, f"--{backend}")
    model, config, state, tokenizer = checkpoint.load_model(Path(path))
    part = output.with_name(f".part-{output.name}")
    try:
        with writing(output, SafetensorError):
            shutil.rmtree(part, ignore_errors=True)  # left by a kill
            part.mkdir(parents=True)
            _write_model(model, config, state, tokenizer, part, half)
            if backends:
                graphs.write(model, state, part, backends, half=half)
            os.rename(part, output)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_model(model: IRM, config: TrainConfig, state: State, tokenizer: Tokenizer, folder: Path, half: bool) -> None:
    weights = {name: value for name, value in model.state_dict().items() if ".classify." not in name}
    if half:  # but for statistics, whose variances may be far below 1
        weights = {name: value if ".running_" in name else value.half() for name, value in weights.items()}
    facts = {"format": checkpoint.FORMAT, **asdict(state), "heads": dict.fromkeys(state.heads, 0)}
    texts = {
        "config.json": config.to_json(),
        "state.json": json.dumps(facts, indent=1),
        "tokenizer.json": tokenizer.to_str(pretty=True),
    }
    checkpoint.write_files(folder, {"model.safetensors": weights}, texts)


def write_index(
    path: str | Path,
    data: str | Path,
    dataset: str,
    task: str,
    file: str | Path,
    *,
    protocol: str | None = None,
    feature: str | None = None,
    device: torch.device | str = "cpu",
) -> int:
    """The gallery of a data set as a FAISS index (IndexIDMap2 of IndexFlatIP), and FILE.npz; how many images that is.

    Inner products of its unit vectors are cosines; ids are row numbers of the data set's index. FILE.npz holds `id`,
    `path`, `pid`, `camera`, `clothes` and `modality` of the gallery, in the index's order, and the same with `query_`
    before it of the protocol's queries, with `query_features` [Q, D] to search by; `instruction`: the sentence that
    all were told. For a task whose sentence is fixed that is the first, as in a --quick evaluation.

    protocol  whose queries and gallery (default: the first of the task on this data set, its first draw)
    """
    graphs.require("faiss", "--faiss")
    import faiss

    file = Path(file)
    facts_file = file.with_name(file.name + ".npz")
    for taken in (file, facts_file):
        if os.path.lexists(taken):
            raise InputError(f"--faiss {taken}: exists already; choose another file")
    model, config, _, tokenizer = checkpoint.load_model(Path(path))
    config = config.but(tasks=(task,), data=str(data), quick=True, feature=feature or config.feature)
    tested, _ = measurable(find_indexes(Path(data), (dataset,)), config)
    known = [(row, one) for row in tested for one in row[2]]
    chosen = [pair for pair in known if protocol in (None, pair[1].name)]
    if not chosen:
        names = ", ".join(one.name for _, one in known)
        raise InputError(f"--dataset {dataset} --task {task}: no such test there; protocols: {names or 'none'}")
    (row, index, _), one = chosen[0]
    runtime = Runtime(torch.device(device))
    with _one_thread_each(runtime.device) as threads:
        given = (row, index, [one], tokenizer, config, runtime, threads)
        run = Evaluation(model.to(runtime.device), *given, rescore=False)
    arrays = run.arrays()
    features = arrays[f"{run.stream}/features"][0]
    gallery, query = (arrays[f"{task}/{one.name}/0/{role}"] for role in ("gallery", "query"))
    facts = {name: arrays[f"{run.stream}/{name}"] for name in ("path", "pid", "camera", "clothes", "modality")}
    facts["id"] = run.rows
    stored = {name: values[gallery] for name, values in facts.items()}
    stored |= {f"query_{name}": values[query] for name, values in facts.items()}
    stored["query_features"] = arrays.get(f"{run.stream}/text_features", features[query])
    stored["instruction"] = np.array(SENTENCES[task][0] if TASKS[task].instruction == "sentence" else "")
    found = faiss.IndexIDMap2(faiss.IndexFlatIP(features.shape[1]))
    found.add_with_ids(features[gallery], run.rows[gallery])
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(facts_file, "wb") as stream:
            np.savez_compressed(stream, **stored)  # type: ignore[arg-type]
        with whole_file(file, "wb") as stream:
            stream.write(faiss.serialize_index(found))
    return len(gallery)
