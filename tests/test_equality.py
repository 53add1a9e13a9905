"""The same samples on one rank or shared by several: equal statistics, losses and gradients.

The triplet, contrastive and matching terms use the pairs within one rank's share unless `global_losses` is set, so by
themselves they are left out here.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import SMALL as SMALLER
from conftest import recipe

from engine.config import TrainConfig
from engine.data.record import Batch
from engine.losses import identity_losses, matching_losses
from engine.model.irm import IRM
from engine.model.neck import GlobalBatchNorm

pytestmark = pytest.mark.xdist_group("equality")  # one worker, or `results` is made twice
B, C = 24, 16
SMALL = replace(SMALLER, depth=3, drop_path=0.4)


def neck(dtype: torch.dtype, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Two batches through a neck with a mean far from 0; everything for the whole batch."""
    generator = torch.Generator().manual_seed(0)
    layer = GlobalBatchNorm(C).to(dtype)
    share = slice(B // world * rank, B // world * (rank + 1))
    result = {}
    for number in range(2):
        whole = 3 + torch.randn(B, C, generator=generator, dtype=dtype)
        toward = torch.randn(B, C, generator=generator, dtype=dtype)
        x = whole[share].clone().requires_grad_()
        out = layer(x)
        (out * toward[share]).sum().backward()
        assert x.grad is not None
        for name, part in (("out", out.detach()), ("input_grad", x.grad)):
            parts = [torch.empty_like(part) for _ in range(world)]
            dist.all_gather(parts, part)
            result[f"{name}{number}"] = torch.cat(parts)
    assert layer.weight.grad is not None
    dist.all_reduce(layer.weight.grad)
    return result | {"weight_grad": layer.weight.grad, "mean": layer.running_mean, "var": layer.running_var}


def identity(dtype: torch.dtype, rank: int, world: int) -> dict[str, torch.Tensor]:
    """Identity loss of the whole model on F and F_out, its value and gradients averaged over ranks as DeepSpeed does.
    The engine's losses are float32; float64 is for the same sum of the same modules, here."""
    torch.manual_seed(0)
    model = IRM(SMALL, 20, {"trad/x": 6}).to(dtype)
    model.edit.chance.manual_seed(1)
    images = torch.randn(B, 3, *SMALL.image_size, dtype=dtype)
    labels, text = torch.arange(6).repeat_interleave(B // 6), torch.randint(4, 20, (1, 8))
    share = slice(B // world * rank, B // world * (rank + 1))
    batch = Batch(0, images[share], labels[share], text, torch.tensor([8]), None)
    if dtype == torch.float32:
        terms = identity_losses(model, batch, "trad/x", TrainConfig(model=SMALL))
        loss = terms["id_cls"] + terms["id_fout"]
    else:
        features, head = model(batch), model.head("trad/x")
        logits = [head.classify[name](head.neck[name](getattr(features, name))) for name in ("cls", "fout")]
        loss = sum(F.cross_entropy(part, batch.labels) for part in logits)
    loss.backward()
    result = {"loss": loss.detach()} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    result |= {name: value for name, value in model.named_buffers() if "running" in name}
    for name, value in result.items():
        if "running" not in name:
            dist.all_reduce(value)
            value /= world
    return result


def pairs(dtype: torch.dtype, rank: int, world: int, mining: str = "all") -> dict[str, torch.Tensor]:
    """Every term with global_losses, values and gradients averaged over ranks as DeepSpeed does. Shares cut through
    identities; each rank's sentences are padded to the longest of its own. The engine's losses are float32."""
    torch.manual_seed(0)
    model = IRM(SMALL, 20, {"li/x": 6}, ["t2i/y"])
    model.edit.chance.manual_seed(1)
    torch.nn.init.normal_(model.edit.gates)
    images = torch.randn(B, 3, *SMALL.image_size)
    labels, text = torch.arange(6).repeat_interleave(B // 6), torch.randint(4, 20, (B, 9))
    lengths = 2 + torch.arange(B) * 7 // (B - 1)
    share = slice(B // world * rank, B // world * (rank + 1))
    text = text[share, : int(lengths[share].max())]
    batch = Batch(0, images[share], labels[share], text, lengths[share], None)
    config = TrainConfig(model=SMALL, global_losses=True, centre=True, mining=mining)
    terms = identity_losses(model, batch, "li/x", config)
    terms |= matching_losses(model, batch, "t2i/y", config, torch.Generator().manual_seed(2))
    torch.stack(list(terms.values())).sum().backward()
    result = {n: t.detach() for n, t in terms.items()}
    result |= {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for value in result.values():
        dist.all_reduce(value)
        value /= world
    return result


def hard_pairs(dtype: torch.dtype, rank: int, world: int) -> dict[str, torch.Tensor]:
    return pairs(dtype, rank, world, "hard")


def worker(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    result = {
        (what.__name__, dtype): what(dtype, rank, world)
        for what in (neck, identity, pairs, hard_pairs)
        for dtype in (torch.float64, torch.float32)
        if dtype == torch.float32 or what in (neck, identity)
    }
    torch.save(result, f"{folder}/{world}.{rank}")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Callable[[int], list[dict]]:
    """World size -> what each rank found."""
    folder = str(tmp_path_factory.mktemp("equality"))

    @functools.cache
    def found(world: int) -> list[dict]:
        done = recipe(__file__, folder, ranks=world)
        assert done.returncode == 0, done.stderr
        return [torch.load(f"{folder}/{world}.{rank}") for rank in range(world)]

    return found


@pytest.mark.xdist_group("equality")
@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("what", "dtype", "tolerance"),
    [
        ("neck", torch.float64, 1e-10),
        ("neck", torch.float32, 2e-5),
        ("identity", torch.float64, 1e-10),
        ("identity", torch.float32, 2e-5),
        ("pairs", torch.float32, 1e-4),
        ("hard_pairs", torch.float32, 1e-4),
    ],
)
def test_ranks_compute_what_one_does(results, what, dtype, tolerance, world):
    """float32: 2e-5 of each tensor's largest entry, for sums in another order; gates are used in float32 everywhere. A
    BNNeck takes all gradient from the bias before it: what is left there is rounding."""
    whole = results(1)[0][what, dtype]
    assert len(whole) > (6 if what == "neck" else 40)
    for rank in range(world):
        shared = results(world)[rank][what, dtype]
        assert shared.keys() == whole.keys()
        for name, value in whole.items():
            scale = max(1e-2, value.abs().max().item())
            bound = max(tolerance, 1e-6) if name == "edit.gates" else tolerance
            assert (shared[name] - value).abs().max().item() <= bound * scale, name


def test_one_rank_agrees_with_torch_batch_norm(results):
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.BatchNorm1d(C).double()
    for number in range(2):
        x = (3 + torch.randn(B, C, generator=generator, dtype=torch.float64)).requires_grad_()
        toward = torch.randn(B, C, generator=generator, dtype=torch.float64)
        out = F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias, True, 0.1, 1e-5)
        (out * toward).sum().backward()
        mine = results(1)[0]["neck", torch.float64]
        torch.testing.assert_close(mine[f"out{number}"], out, rtol=0, atol=1e-10)
        torch.testing.assert_close(mine[f"input_grad{number}"], x.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(mine["weight_grad"], layer.weight.grad, rtol=0, atol=1e-10)
    torch.testing.assert_close(mine["var"], layer.running_var, rtol=0, atol=1e-10)


if __name__ == "__main__":  # one rank
    worker(sys.argv[1])
