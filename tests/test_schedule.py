"""Learning rate and parameter groups."""

from dataclasses import replace

import pytest
import torch
from conftest import SMALL

from engine.average import Average
from engine.config import TrainConfig
from engine.losses import TrainingModel
from engine.model.irm import IRM
from engine.schedule import learning_rate, parameter_groups


def test_warm_up_then_cosine_of_the_paper():
    config = TrainConfig(steps=24000)
    assert learning_rate(0, config) == 1e-7
    assert learning_rate(500, config) == pytest.approx((1e-7 + 1e-5) / 2)
    assert learning_rate(1000, config) == pytest.approx(1e-5)
    assert learning_rate(12500, config) == pytest.approx(1e-5 * 0.505)  # half way down
    assert learning_rate(24000, config) == pytest.approx(1e-7)


def rates(config: TrainConfig) -> dict[str, tuple[float, float]]:
    """Parameter -> factor of its rate, weight decay."""
    torch.manual_seed(0)
    irm = IRM(replace(config.model, embed_norm=True), 40, {"trad/a": 3}, ["t2i/a"])
    module = TrainingModel(irm, config, ["trad/a", "t2i/a"], [False, True])
    names = {parameter: name.removeprefix("model.") for name, parameter in module.named_parameters()}
    groups = parameter_groups(module, config)
    found = {names[p]: (g["multiplier"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found.keys() == set(names.values())  # each once
    return found


def test_new_layers_learn_faster_and_vectors_do_not_decay():
    found = rates(TrainConfig(model=SMALL, lr_new=7.0))
    assert found["edit.blocks.0.attn.qkv.weight"] == (1.0, 5e-4)
    assert found["edit.blocks.0.attn.qkv.bias"] == (1.0, 0.0)
    assert found["edit.pos_embed"] == (1.0, 0.0)
    assert found["edit.kv_ins.weight"] == (7.0, 5e-4)
    assert found["edit.gates"] == (7.0, 0.0)
    assert found["heads.trad__a.classify.cls.weight"] == (7.0, 5e-4)
    for part in ("fuse.project", "match", "project_image", "project_text"):
        assert found[f"{part}.weight"] == (7.0, 5e-4)
    assert found["temperature.value"] == found["whiten.t2i__a.text.weight"] == (7.0, 0.0)


def test_layer_decay():
    found = rates(TrainConfig(model=replace(SMALL, depth=3), layer_decay=0.5, lr_new=7.0))
    assert [found[f"edit.blocks.{i}.mlp.fc1.weight"][0] for i in range(3)] == [0.25, 0.5, 1.0]
    stem = next(name for name in found if name.startswith("edit.patch_embed.") and name.endswith("weight"))
    assert found[stem][0] == found["edit.cls_token"][0] == found["edit.pos_embed"][0] == 0.125
    assert found["edit.norm.weight"][0] == 1.0
    assert found["edit.kv_ins.weight"][0] == found["edit.gates"][0] == 7.0
    assert found["instruct.picture.blocks.0.mlp.fc1.weight"][0] == 1.0


def test_an_average_follows_its_formula():
    model = torch.nn.BatchNorm1d(2)  # parameters, buffers and a counter
    average, want = Average(model, 0.5), model.weight.detach().double().clone()
    for step in range(1, 20):
        with torch.no_grad():
            model.weight.normal_()
            model.running_mean.normal_()
            model.num_batches_tracked += 1
        average.update(model, step)
        decay = min(0.5, step / (10 + step))
        want = decay * want + (1 - decay) * model.weight.detach().double()
    torch.testing.assert_close(average.values["weight"].double(), want, rtol=1e-5, atol=1e-6)
    assert average.values["num_batches_tracked"] == 19
    other = Average(model, 0.5)
    other.load(average.state())
    assert all(other.values[name].equal(value) for name, value in average.values.items())
    assert not average.values["running_mean"].equal(model.running_mean)
