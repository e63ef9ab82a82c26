"""Ranks that train one model: each has a share of every batch, and the sum of their gradients is one process's.

Three process groups, of NCCL on GPUs and of gloo on CPUs: one for the gradients of dense parameters, which
DistributedDataParallel sends while the backward pass goes on; one for everything that waits in its place in the
forward or backward pass (rows, statistics); one for what is said between steps. A fourth, always of gloo, is for what a
thread finds out about the next batches (`ctrkit.preparing`). Within each all ranks make the same calls in the same
order, so that none waits for another's.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ctrkit.models.statistics import over_all_ranks, summed
from ctrkit.ranks import Ranks

_BUFFERS: dict[str, Any] = {"forward_sync_buffers": False}
"""Running statistics are the same on all ranks without being sent."""
if "forward_sync_buffers" not in inspect.signature(DistributedDataParallel).parameters:  # before torch 2.13
    _BUFFERS = {"broadcast_buffers": False}


class DataParallel:
    """The ranks' groups, and what they do together.

    Parameters
    ----------
    ranks: more than one, and joined.
    device: of this rank's tensors.
    """

    def __init__(self, ranks: Ranks, device: str) -> None:
        self.ranks, self.device = ranks, torch.device(device)
        backend = "nccl" if self.device.type == "cuda" else "gloo"
        self.dense, self.rows, self.between = (ranks.group(backend) for _ in range(3))
        self.ahead = ranks.group("gloo")
        self.dense_bytes = 0
        """Bytes of gradients of dense parameters that were given to all-reduces."""

    def wrap(self, network: nn.Module) -> nn.Module:
        """Return a network whose gradients are the sums of all ranks', and whose BatchNorm and Dice see all rows.

        Rank 0's parameters count. A loss that is the sum over a rank's samples divided by the samples of all gives the
        gradient of the mean over all.
        """
        over_all_ranks(network, self.rows)
        if not any(p.requires_grad for p in network.parameters()):
            return network
        wrapped = DistributedDataParallel(network, process_group=self.dense, **_BUFFERS)
        wrapped.register_comm_hook(self, _sum)  # DDP's own hook takes the mean over ranks
        return wrapped

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of all ranks' tensors. A collective, between steps."""
        return summed(x, self.between)

    def begin_sum(self, x: Tensor) -> Callable[[], Tensor]:
        """Begin what `sum` does; return what waits for it and returns it."""
        out = x.clone()
        work = dist.all_reduce(out, group=self.between, async_op=True)
        assert work is not None

        def ended() -> Tensor:
            work.wait()
            return out

        return ended


def _sum(parallel: DataParallel, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """All-reduce a bucket of gradients by their sum."""
    x = bucket.buffer()
    parallel.dense_bytes += x.numel() * x.element_size()
    work = dist.all_reduce(x, group=parallel.dense, async_op=True)
    assert work is not None
    return work.get_future().then(lambda done: done.value()[0])
