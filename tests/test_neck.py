"""BNNeck over ranks: two halves of a batch, each in a process of its own, give what one process gives for the whole."""

import sys

import torch
import torch.distributed as dist
from conftest import recipe

from engine.model.neck import GlobalBatchNorm


def work(folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    norm, rank = GlobalBatchNorm(5), dist.get_rank()
    x = torch.load(f"{folder}/x.pt").split([6, 4])[rank].requires_grad_()
    y = norm(x)
    y.sin().sum().backward()
    torch.save([y.detach(), x.grad, norm.running_mean, norm.running_var, norm.weight.grad], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_normalise_as_one(tmp_path):
    torch.manual_seed(0)
    x = torch.randn(10, 5) * 3 + torch.arange(10.0)[:, None]  # the ranks' own means differ
    torch.save(x, tmp_path / "x.pt")
    norm = GlobalBatchNorm(5)
    x.requires_grad_()
    y = norm(x)
    y.sin().sum().backward()
    done = recipe(__file__, tmp_path, ranks=2)
    assert done.returncode == 0, done.stderr
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([part[0] for part in parts]), y.detach())
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), x.grad, rtol=1e-4, atol=1e-5)
    for part in parts:
        torch.testing.assert_close(part[2], norm.running_mean)
        torch.testing.assert_close(part[3], norm.running_var)
    torch.testing.assert_close(parts[0][4] + parts[1][4], norm.weight.grad, rtol=1e-4, atol=1e-5)


def test_a_batch_that_is_not_finite_leaves_no_trace():
    norm = GlobalBatchNorm(3)
    norm(torch.tensor([[1.0, torch.nan, 2.0], [3.0, 1.0, torch.inf]]))
    assert torch.isfinite(norm.running_mean).all()
    assert torch.isfinite(norm.running_var).all()
    assert norm.running_mean[0] != 0
    assert norm.running_mean[1] == norm.running_mean[2] == 0


if __name__ == "__main__":  # one rank
    work(sys.argv[1])
