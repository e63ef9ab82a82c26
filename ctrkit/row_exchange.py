"""Rows of a matrix that is spread over ranks: asked of their owners by number, gradients sent back the same way.

Row i belongs to rank i mod W. What travels is numbers of rows, their vectors and the gradients of these, each by one
all-to-all. An owner merges what all ranks ask, so that a row is fetched (or computed) and updated once.

Letters: W ranks, U distinct rows that this rank names, A rows that all ranks ask of this one (in the order of the
ranks), M the distinct ones of these, D width.
"""

import math
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

INT32_ROWS = 1 << 31
ROWS_AT_ONCE = 1 << 18
"""Of each rank, when rank 0 puts a whole matrix together."""


@dataclass(frozen=True)
class Ask:
    """The rows of one matrix that a rank names in a batch."""

    rows_U: Tensor
    """[U] int64, distinct and rising."""
    n_rows: int
    """Of the matrix."""
    of: str
    """What the bytes are counted as: `table`, `picture`."""
    wire: torch.dtype | None = None
    """Dtype of vectors and gradients on their way; None: as they are."""


class RowExchange:
    """Sends rows between the ranks of a process group, and counts the bytes.

    All ranks make the same calls in the same order, also those that have nothing to send.

    Parameters
    ----------
    group: for vectors and gradients.
    ahead: for the numbers of rows, which lie in the host's memory; so that they may be asked for in a thread, while
        vectors and gradients of an earlier batch travel. Default: `group`.
    """

    def __init__(self, group: dist.ProcessGroup, ahead: dist.ProcessGroup | None = None) -> None:
        self.group, self.ahead = group, ahead or group
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.sent: Counter[str] = Counter()
        """Bytes that left this rank for others: `table ids`, `table vectors`, `table gradients`, `table counts`, and so
        for `picture`."""
        self._counting = threading.Lock()

    def sends(self, what: str, size: int) -> None:
        """Count bytes that leave this rank. Threads may call it."""
        with self._counting:
            self.sent[what] += size

    def routes(self, asks: Sequence[Ask]) -> list["Route"]:
        """Tell the owners which rows this rank names of some matrices, and learn which the others ask of it: two
        messages, however many matrices. A collective of the group `ahead`, on the CPU where that is of gloo."""
        if not asks:
            return []
        owners = [ask.rows_U % self.count for ask in asks]
        orders = [torch.argsort(owner_U, stable=True) for owner_U in owners]
        asked_WK = torch.stack([torch.bincount(owner_U, minlength=self.count) for owner_U in owners], 1)
        wanted_WK = torch.empty_like(asked_WK)
        dist.all_to_all_single(wanted_WK, asked_WK, group=self.ahead)
        asked, wanted = asked_WK.tolist(), wanted_WK.tolist()
        small = torch.int32 if max(ask.n_rows for ask in asks) < INT32_ROWS else torch.int64
        lists = [
            torch.split(ask.rows_U[order_U].to(small), [a[k] for a in asked])
            for k, (ask, order_U) in enumerate(zip(asks, orders, strict=True))
        ]
        sizes = [n for per_rank in wanted for n in per_rank]
        out = torch.cat([lists[k][r] for r in range(self.count) for k in range(len(asks))])
        came = _send(out, [sum(a) for a in asked], [sum(w) for w in wanted], self.ahead)
        found = torch.split(came, sizes)
        routes = []
        for k, ask in enumerate(asks):
            rows_M, place_A = torch.unique(torch.cat(found[k :: len(asks)]).long(), return_inverse=True)
            own_asked, own_wanted = [a[k] for a in asked], [w[k] for w in wanted]
            routes.append(Route(self, ask, orders[k], own_asked, own_wanted, rows_M, place_A))
            others = len(ask.rows_U) - own_asked[self.rank]
            self.sends(f"{ask.of} ids", others * out.element_size() + (self.count - 1) * asked_WK.element_size())
        return routes

    def all_gather(self, rows_M: Tensor, x_MD: Tensor, of: str) -> tuple[Tensor, Tensor]:
        """Return ([n] rows, [n, D] gradients): what every rank has, in the order of the ranks. Two messages: lengths,
        and each row's number beside its gradient. A collective."""
        lengths_W = rows_M.new_empty(self.count)
        dist.all_gather_into_tensor(lengths_W, rows_M.new_full((1,), len(rows_M)), group=self.group)
        lengths = lengths_W.tolist()
        most, width = max(lengths), x_MD.shape[1]
        rows_MK = rows_M.unsqueeze(1).view(x_MD.dtype)  # the same bits, as so many numbers of the gradient's dtype
        padded = x_MD.new_zeros((most, width + rows_MK.shape[1]))
        padded[: len(x_MD)] = torch.cat([x_MD, rows_MK], 1)
        all_x = x_MD.new_empty((self.count * most, padded.shape[1]))
        dist.all_gather_into_tensor(all_x, padded, group=self.group)
        for what, numbers in (("ids", rows_MK.shape[1]), ("gradients", width)):
            self.sends(f"{of} {what}", (self.count - 1) * most * numbers * padded.element_size())
        found = torch.cat([all_x[r * most : r * most + n] for r, n in enumerate(lengths)])
        return found[:, width:].contiguous().view(rows_M.dtype).squeeze(1), found[:, :width].contiguous()


def spread(routes: Sequence["Route"], xs_MD: Sequence[Tensor]) -> list[Tensor]:
    """Return for each route [U, D], the rows that this rank names, from [M, D], those that it owns: all by one message,
    for which they have to be of one exchange, dtype and width D. A collective, and so is its gradient: the sum over the
    ranks that named a row, in their order."""
    return list(_Spread.apply(tuple(routes), *xs_MD))


def _send(x: Tensor, to: list[int], of: list[int], group: dist.ProcessGroup) -> Tensor:
    """Send runs of rows to the ranks, `to` of these lengths; return those that come, `of` these lengths."""
    out = x.new_empty((sum(of), *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), of, to, group=group)
    return out


@dataclass(frozen=True)
class Route:
    """Which rows a rank asks of which, for one batch."""

    exchange: RowExchange
    ask: Ask
    order_U: Tensor
    """This rank's rows in the order of their owners: positions in U."""
    asked: list[int]
    """Of each rank, how many rows this one asks."""
    wanted: list[int]
    """By each rank, how many rows are asked of this one."""
    rows_M: Tensor
    """[M] int64, rising: the distinct rows that are asked of this rank."""
    place_A: Tensor
    """Positions in M of the rows asked."""

    def to(self, device: str) -> "Route":
        """Return the route with its tensors on a device."""
        order_U, rows_M, place_A = (x.to(device, non_blocking=True) for x in (self.order_U, self.rows_M, self.place_A))
        return replace(self, order_U=order_U, rows_M=rows_M, place_A=place_A)

    def spread(self, x_MD: Tensor) -> Tensor:
        """Return [U, D], the rows that this rank names, from [M, D], those that it owns. A collective, and so is its
        gradient: the sum over the ranks that named a row, in their order."""
        return spread([self], [x_MD])[0]

    def sum(self, x_UD: Tensor) -> Tensor:
        """Return [M, …]: the sum, over the ranks that named a row, of what each has for it. A collective."""
        return self._collect(x_UD, "counts", x_UD.dtype)

    def collect(self, grad_UD: Tensor) -> Tensor:
        """Return [M, D], the sum of gradients, as the gradient of `spread` gives it. A collective."""
        return self._collect(grad_UD, "gradients", self.ask.wire or grad_UD.dtype)

    def _collect(self, x_UD: Tensor, what: str, wire: torch.dtype) -> Tensor:
        return _collect([self], [x_UD], what, wire)[0]

    def _count(self, x: Tensor, what: str, to: list[int]) -> None:
        """Count what leaves this rank."""
        row_bytes = x.element_size() * math.prod(x.shape[1:])
        self.exchange.sends(f"{self.ask.of} {what}", (len(x) - to[self.exchange.rank]) * row_bytes)


def _give(routes: Sequence[Route], xs_MD: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return for each route [U, D], the rows that this rank names. A collective."""
    sent = []
    for route, x_MD in zip(routes, xs_MD, strict=True):
        sent.append(x_MD.index_select(0, route.place_A).to(route.ask.wire or x_MD.dtype))
        route._count(sent[-1], "vectors", route.wanted)
    came = _exchanged(sent, [route.wanted for route in routes], [route.asked for route in routes], routes[0])
    found = [x_UD.to(x_MD.dtype) for x_UD, x_MD in zip(came, xs_MD, strict=True)]
    return tuple(
        torch.empty_like(x_UD).index_copy_(0, route.order_U, x_UD) for route, x_UD in zip(routes, found, strict=True)
    )


def _collect(routes: Sequence[Route], xs_UD: Sequence[Tensor], what: str, wire: torch.dtype) -> list[Tensor]:
    """Return for each route [M, …], sums over the ranks for the rows that it owns. A collective."""
    sent = []
    for route, x_UD in zip(routes, xs_UD, strict=True):
        sent.append(x_UD.index_select(0, route.order_U).to(wire))
        route._count(sent[-1], what, route.asked)
    came = _exchanged(sent, [route.asked for route in routes], [route.wanted for route in routes], routes[0])
    found = []
    for route, x, x_UD in zip(routes, came, xs_UD, strict=True):
        x_AD = x.to(x_UD.dtype)
        found.append(x_AD.new_zeros((len(route.rows_M), *x_AD.shape[1:])).index_add_(0, route.place_A, x_AD))
    return found


def _exchanged(
    sent: Sequence[Tensor], to: Sequence[list[int]], of: Sequence[list[int]], route: Route
) -> tuple[Tensor, ...]:
    """Send runs of rows of some tensors to the ranks, `to` of these lengths; return those that come, `of` these
    lengths. One message, in which what is for a rank lies together."""
    if len(sent) == 1:
        return (_send(sent[0], to[0], of[0], route.exchange.group),)
    parts = [torch.split(x, lengths) for x, lengths in zip(sent, to, strict=True)]
    ranks = range(route.exchange.count)
    out = torch.cat([part[r] for r in ranks for part in parts])
    came = _send(
        out, [sum(n) for n in zip(*to, strict=True)], [sum(n) for n in zip(*of, strict=True)], route.exchange.group
    )
    found = torch.split(came, [lengths[r] for r in ranks for lengths in of])
    return tuple(torch.cat(found[k :: len(of)]) for k in range(len(of)))


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, routes: tuple[Route, ...], *xs_MD: Tensor) -> tuple[Tensor, ...]:
        ctx.routes = routes
        return _give(routes, xs_MD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *douts_UD: Tensor) -> tuple[Tensor | None, ...]:
        wire = ctx.routes[0].ask.wire or douts_UD[0].dtype
        return None, *_collect(ctx.routes, douts_UD, "gradients", wire)


def interleave(x_nD: Tensor, n_rows: int, whole: Tensor | None, group: dist.ProcessGroup) -> None:
    """Fill at rank 0 the `whole` matrix [n_rows, …], whose row i is row i div W of rank i mod W. Some rows at a time.

    A collective.
    """
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    # One buffer, and no gather: what that takes anew for each part stays with the process.
    buffer = x_nD.new_empty((min(ROWS_AT_ONCE, n_rows), *x_nD.shape[1:]))
    for start in range(0, n_rows, ROWS_AT_ONCE * count):
        stop = min(start + ROWS_AT_ONCE * count, n_rows)
        own = x_nD[start // count :][: len(range(start + rank, stop, count))]
        if whole is None:
            if len(own):
                dist.send(own.contiguous(), group_dst=0, group=group)
            continue
        whole[start:stop:count] = own
        for other in range(1, count):
            part = buffer[: len(range(start + other, stop, count))]
            if len(part):
                dist.recv(part, group_src=other, group=group)
                whole[start + other : stop : count] = part
