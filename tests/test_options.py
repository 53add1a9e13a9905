"""Options and files a user writes: the right configuration, or one line that names what is wrong."""

import json

import pytest

from engine.config import MODELS, TrainConfig, model_config
from engine.errors import InputError
from recipes import options


def config(*arguments: str) -> TrainConfig:
    parser = options.training_parser("test")
    options.add_tasks(parser)
    return options.training_config("mtl", parser.parse_args([*arguments]))


def test_the_mini_data_get_the_tiny_model_and_real_data_the_papers():
    mini, real = config(), config("--data", "somewhere")
    assert (mini.model, mini.steps, mini.ids) == (MODELS["irm_tiny"], 1200, 32)
    assert (real.model, real.steps, real.lr, real.warmup) == (MODELS["irm_base"], 24000, 1e-5, 1000)
    assert (real.ids, real.images_per_id, real.weight_decay, real.margin) == (32, 4, 5e-4, 0.3)
    assert config("--steps", "10").warmup == 2
    assert config("--steps", "10", "--warmup", "7").warmup == 7
    assert config("--image-size", "384x192", "--config", "irm_base").model.image_size == (384, 192)
    assert (mini.model.fused, config("--no-fused").model.fused) == (True, False)
    assert (config().shares["vi"], config().leaders, config().ahead) == (12, ("trad",), 25)
    assert config("--shares", "vi=3,li=2", "--ahead", "0").shares == {"vi": 3, "li": 2}
    assert (real.shares, real.ahead) == ({}, 0)
    assert (mini.temperature, config("--temperature", "2.5").temperature) == (0, 2.5)
    assert config("--temperature", "2").shares == {}  # in place of the preset's
    assert config("--temperature", "0").shares == mini.shares
    assert config("--temperature", "0", "--shares", "vi=3").shares == {"vi": 3}


@pytest.mark.parametrize("text", ["", "vi", "vi=", "vi=x", "other=2", "vi=-1", "vi=1,"])
def test_malformed_shares(text):
    with pytest.raises(InputError, match="expected TASK=N"):
        config("--shares", text)
    with pytest.raises(InputError, match="shares of 1 or more"):
        config("--shares", "vi=0")


def test_a_configuration_survives_its_file():
    one = config("--tasks", "vi,trad", "--seed", "3")
    assert TrainConfig.from_json(one.to_json()) == one


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "expected a JSON object"),
        ("{", "not JSON"),
        ('{"bf16": {"enabled": true}}', "remove bf16; .*torch_autocast"),
        ('{"train_batch_size": 8, "optimizer": {}}', "remove train_batch_size, optimizer"),
        ('{"zero_optimization": 2}', "zero_optimization: expected a JSON object"),
        ('{"zero_optimization": {"stage": 4}}', "stage: expected 0, 1, 2 or 3"),
        ('{"zero_optimization": {"stage": 1, "compute_grad_norm": false}}', "remove compute_grad_norm"),
        ('{"torch_autocast": {"enabled": true, "dtype": "float16"}}', "expected bfloat16"),
    ],
)
def test_deepspeed_settings(tmp_path, content, message):
    file = tmp_path / "settings.json"
    file.write_text(content)
    with pytest.raises(InputError, match=message):
        config("--deepspeed_config", str(file))
    file.write_text('{"zero_optimization": {"stage": 2}}')
    assert config("--deepspeed_config", str(file)).deepspeed == {"zero_optimization": {"stage": 2}}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"width": 100, "heads": 3}, "not a multiple of heads"),
        ({"patch": 0}, "patch 0"),
        ({"patch": 12, "stem": "conv"}, "patch 12"),
        ({"depht": 3}, "unknown fields depht"),
        ({"width": "wide"}, "expected int"),
        ({"width": 0}, "width 0: expected at least 1"),
        ({"depth": -1}, "depth -1: expected at least 1"),
        ({"part_tokens": -1}, "part_tokens -1"),
        ({"text_tokens": 600}, "text_tokens 600"),
        ({"drop_path": float("nan")}, "drop_path nan"),
        ({"width": 18, "heads": 3}, "width 18: expected a multiple of 4"),
        ({"shared_stem": True, "width": 64, "heads": 4}, "shared_stem: expected width 64 = instruction_width 768"),
        ([], "expected a JSON object"),
    ],
)
def test_model_files(tmp_path, values, message):
    file = tmp_path / "model.json"
    file.write_text(json.dumps(values))
    with pytest.raises(InputError, match=message):
        model_config(str(file))


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_rates_are_finite(value):
    with pytest.raises(InputError, match="--lr"):
        config(f"--lr={value}")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "abc"}, "steps 'abc': expected int"),
        ({"steps": 1.5}, "steps 1.5: expected int"),
        ({"steps": True}, "steps True: expected int"),
        ({"lr": None}, "lr None: expected float"),
        ({"quick": "no"}, "quick 'no': expected bool"),
        ({"tasks": 3}, "wrong type"),
        ({"tasks": "trad"}, "--tasks t,r,a,d"),
        ({"stepz": 1}, "unknown fields stepz"),
        ({"model": {"widht": 3}}, "unknown fields widht"),
        ({"model": {"image_size": 5}}, "wrong type"),
        ({"model": {"image_size": ["a", "b"]}}, "image_size"),
        ({"mining": "some"}, "--mining 'some'"),
        ({"model": None}, "model None: expected a JSON object"),
        ({"model": []}, "expected a JSON object"),
    ],
)
def test_run_configurations_edited_by_hand(values, message):
    with pytest.raises(InputError, match=message):
        TrainConfig.from_json(json.dumps(values))
    for text in ("[]", "{"):
        with pytest.raises(InputError, match="JSON"):
            TrainConfig.from_json(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--image-size", "256"), "HEIGHTxWIDTH"),
        (("--image-size", "-256x128"), "--image-size"),
        (("--image-size", "0x0", "--config", "irm_tiny"), "image_size"),
        (("--image-size", "100x50", "--config", "irm_tiny"), "multiples of the patch"),
        (("--steps", "many"), "--steps"),
        (("--seed", str(1 << 63)), "--seed"),
        (("--seed", "-1"), "--seed -1"),
        (("--temperature", "warm"), "--temperature"),
        (("--temperature=-1",), "--temperature -1.0: expected 0 or more"),
        (("--temperature", "nan"), "--temperature nan: expected 0 or more"),
        (("--temperature", "inf"), "--temperature inf: expected 0 or more"),
        (("--temperature", "2", "--shares", "vi=3,li=2"), "--temperature 2.0, --shares vi=3,li=2: .*leave one out"),
        (("--tasks", ""), "--tasks"),
        (("--tasks", "trad,,cc"), "--tasks"),
        (("--deepspeed_config", "/nowhere.json"), "/nowhere.json: No such file"),
        (("--config", "/nowhere.json"), "--config /nowhere.json"),
        (("--config", "x" * 300), "--config xxx"),
        (("--check", "--no-eval"), "--check --no-eval: what is checked has to be evaluated"),
    ],
)
def test_options_that_make_no_sense(arguments, message):
    with pytest.raises(InputError, match=message):
        config(*arguments)
