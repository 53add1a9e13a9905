"""DeepSpeed as the engine uses it: model and optimiser under a ZeRO stage, one step, and their state as a whole.

The optimiser's state is kept by the names of parameters, not by what a rank holds of them. So a checkpoint fits every
ZeRO stage and every number of ranks, and is read without pickle.
"""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.config import TrainConfig
from engine.errors import InputError
from engine.runtime import Runtime
from engine.schedule import parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


def initialize(module: nn.Module, config: TrainConfig, micro_batch: int, window: int, runtime: Runtime) -> Any:
    """DeepSpeed's engine around the module and AdamW. micro_batch: images of one rank; window: micro-steps of a step.
    InputError for settings that DeepSpeed refuses."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    optimizer = torch.optim.AdamW(parameter_groups(module, config))
    settings = {
        "zero_optimization": {"stage": 0},
        "torch_autocast": {"enabled": runtime.device.type == "cuda", "dtype": "bfloat16"},
        **(config.deepspeed or {}),
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": window,
        # ZeRO 0: by `step`, which needs the norm anyway
        "gradient_clipping": config.clip if config.zero_stage else 0.0,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 1 << 60,
    }
    try:
        deepspeed.DeepSpeedConfig(settings)
        return deepspeed.initialize(model=module, optimizer=optimizer, config=settings)[0]
    except (torch.OutOfMemoryError, torch.distributed.DistError):
        raise
    except Exception as error:  # of many kinds, assertions and bare ones among them
        what = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"--deepspeed_config: DeepSpeed refuses the settings ({what[:300]})") from error


def step(ds_engine: Any, rate: float, clip: float) -> float:
    """DeepSpeed's step, which changes weights at the end of a window. Returns the gradient's norm before clipping over
    all ranks, infinite or NaN where the gradient was not finite: then the weights and the optimiser are as before."""
    for group in ds_engine.optimizer.param_groups:
        group["lr"] = rate * group["multiplier"]
    ends = ds_engine.is_gradient_accumulation_boundary()
    if ds_engine.zero_optimization_stage() > 0:  # looks at the gradients itself
        ds_engine.step()
        if ends and ds_engine.zero_optimization_stage() == 3:
            # DeepSpeed 0.19 overwrites a gradient in the first micro-step only: what a later stream's head has from the
            # step before would be counted again, and a NaN would never leave
            ds_engine.optimizer.grad_partitions_flat_buffer.zero_()
        return float(ds_engine.get_global_grad_norm() or 0.0)
    norm = 0.0
    if ends:
        gradients = [p.grad for p in ds_engine.module.parameters() if p.grad is not None]
        total = torch.nn.utils.get_total_norm(gradients)
        norm = float(total)
        if not math.isfinite(norm):
            ds_engine.zero_grad()  # to None: the optimiser passes over such parameters
        elif clip:
            torch.nn.utils.clip_grads_with_norm_(ds_engine.module.parameters(), clip, total)
    ds_engine.step()
    return norm


def weights(ds_engine: Any, model: nn.Module, *, keep: bool = True) -> dict[str, Tensor]:
    """All weights and buffers on the CPU. ZeRO 3 keeps them in parts, put together here: every rank has to call it;
    keep: whether this one wants the result."""
    if ds_engine.zero_optimization_stage() < 3:
        return {key: value.detach().contiguous().cpu() for key, value in model.state_dict().items()} if keep else {}
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(list(model.parameters())):
        return {key: value.detach().clone().cpu() for key, value in model.state_dict().items()} if keep else {}


def optimizer_state(ds_engine: Any, *, keep: bool) -> dict[str, Tensor]:
    """AdamW's state on the CPU: "exp_avg/NAME" and "exp_avg_sq/NAME" of the parameter's shape, "step/NAME" a number.
    A parameter that no step has changed has none. Every rank has to call it; keep: whether this one wants the result.
    """
    from deepspeed.utils import safe_get_full_optimizer_state

    result: dict[str, Tensor] = {}
    stage, optimizer = ds_engine.zero_optimization_stage(), ds_engine.optimizer
    if stage:
        steps = [state["step"] for state in optimizer.optimizer.state.values() if "step" in state]
        if not steps:
            return result
    if stage in (1, 2):
        _link(optimizer)
    for name, parameter in _trained(ds_engine):
        if stage:
            own = {what: safe_get_full_optimizer_state(parameter, what) for what in MOMENTS}
            own["step"] = steps[0].clone()
        else:
            own = optimizer.state.get(parameter, {})
        if keep:
            result |= {f"{what}/{name}": value.detach().contiguous().cpu() for what, value in own.items()}
    return result


def load_optimizer_state(ds_engine: Any, stored: dict[str, Tensor]) -> None:
    """Put back what `optimizer_state` gave, under any ZeRO stage and number of ranks. InputError for another model's.
    What is not trained any more is passed over. (Steps are the same for all parameters: one that a window leaves out
    has a gradient of 0 from DeepSpeed.)"""
    known = {name.removeprefix("model."): value for name, value in ds_engine.module.named_parameters()}
    for key, value in stored.items():
        what, _, name = key.partition("/")
        if name not in known or (what in MOMENTS and value.shape != _shape(known[name])):
            raise InputError(f"--resume: optimizer.safetensors: {key} is of another model; use another checkpoint")
    stage, optimizer = ds_engine.zero_optimization_stage(), ds_engine.optimizer
    trained = dict(_trained(ds_engine))
    names = [name for name in trained if f"step/{name}" in stored]
    if not stage:
        for name in names:
            own = {what: stored[f"{what}/{name}"].to(trained[name].device) for what in MOMENTS}
            optimizer.state[trained[name]] = own | {"step": stored[f"step/{name}"].clone()}
        return
    if not names:
        return
    count = torch.stack([stored[f"step/{name}"] for name in names]).max()
    parts = optimizer.fp32_partitioned_groups_flat if stage == 3 else optimizer.single_partition_of_fp32_groups
    for part in parts:
        moments = {what: torch.zeros_like(part, requires_grad=False) for what in MOMENTS}
        optimizer.optimizer.state[part] = {"step": count.clone(), **moments}
    if stage < 3:
        _link(optimizer)
    for name in names:
        for what in MOMENTS:
            _set(ds_engine, trained[name], what, stored[f"{what}/{name}"])


def _link(optimizer: Any) -> None:
    """Let parameters know their moments under ZeRO 1 and 2: DeepSpeed 0.19 does so when the first of its groups has
    been stepped, and the others have none yet."""
    optimizer._hp_optimizer_states_linked = False
    optimizer._lazy_init_hp_params_optimizer_state()


def _set(ds_engine: Any, parameter: nn.Parameter, what: str, value: Tensor) -> None:
    """This rank's part of a whole moment."""
    from deepspeed.utils import safe_set_full_optimizer_state

    if ds_engine.zero_optimization_stage() < 3:
        return safe_set_full_optimizer_state(parameter, value, what)
    # DeepSpeed 0.19 reads past the end of what does not divide by the number of ranks
    part, _ = ds_engine.optimizer._get_fp32_opt_state_partition(
        parameter, release_swap_buffers=False, optim_state_key=what
    )
    rank, world, size = torch.distributed.get_rank(), torch.distributed.get_world_size(), part.numel()
    padded = F.pad(value.flatten(), (0, size * world - value.numel()))
    part.copy_(padded[rank * size : (rank + 1) * size])


def _trained(ds_engine: Any) -> list[tuple[str, nn.Parameter]]:
    """Names as in the model's own state and parameters that the optimiser changes."""
    parameters = ds_engine.module.named_parameters()
    return [(name.removeprefix("model."), value) for name, value in parameters if value.requires_grad]


def _shape(parameter: nn.Parameter) -> torch.Size:
    """Of the whole, where ZeRO 3 has emptied the parameter."""
    return getattr(parameter, "ds_shape", parameter.shape)
