"""Rows between ranks, as real processes: what is asked comes, gradients are sums, bytes are counted."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ctrkit.ranks import Ranks
from ctrkit.row_exchange import Ask, RowExchange, interleave
from tests.ranks import on_ranks

ROWS, WIDTH = 23, 3
MATRIX = np.arange(ROWS * WIDTH, dtype=np.float64).reshape(ROWS, WIDTH)


def named(rank: int, count: int) -> list[int]:
    """The rows that a rank names: some of all owners, of one owner only, or none."""
    return [[0, 1, 2, 5, 22], [], [count, 2 * count], [1, 5, 7, 21]][rank]


def slope(rank: int, rows: list[int]) -> Any:
    """A gradient that tells rank and row."""
    return np.array([[100.0**rank * (row + 1)] * WIDTH for row in rows]).reshape(-1, WIDTH)


def exchange(ranks: Ranks, folder: Path) -> dict[str, Any]:
    group: Any = dist.new_group()
    rows = named(ranks.rank, ranks.count)
    own = MATRIX[ranks.rank :: ranks.count]
    out: dict[str, Any] = {}
    for wire in (None, torch.bfloat16):
        way = RowExchange(group)
        asks = [
            Ask(torch.tensor(some, dtype=torch.int64), ROWS, of, wire) for of, some in (("x", rows), ("y", rows[1:]))
        ]
        route, other = way.routes(asks)
        assert {r % ranks.count for r in other.rows_M.tolist()} <= {ranks.rank}
        leaf = torch.from_numpy(own[route.rows_M.numpy() // ranks.count]).requires_grad_()
        seen_UD = route.spread(leaf)
        seen_UD.backward(torch.from_numpy(slope(ranks.rank, rows)))  # type: ignore[no-untyped-call]
        count_M = route.sum(torch.ones(len(rows)))
        assert leaf.grad is not None
        out[str(wire)] = {"rows": route.rows_M.tolist(), "seen": seen_UD.detach().numpy(), "grad": leaf.grad.numpy()}
        out[str(wire)] |= {"count": count_M.tolist(), "other": other.rows_M.tolist(), "sent": dict(way.sent)}
    rows_A, grad_AD = way.all_gather(route.rows_M, leaf.grad, "x")
    whole = torch.empty(ROWS, WIDTH, dtype=torch.float64) if ranks.rank == 0 else None
    interleave(torch.from_numpy(own), ROWS, whole, group)
    out |= {"all rows": rows_A.tolist(), "all": grad_AD.numpy(), "whole": None if whole is None else whole.numpy()}
    return out


def test_rows_are_asked_of_their_owners_who_sum_the_gradients(tmp_path: Path) -> None:
    for count, ranks in on_ranks(exchange, [2, 4], tmp_path).items():
        rows = [named(rank, count) for rank in range(count)]
        for rank, found in enumerate(ranks):
            mine = [row for row in sorted({r for some in rows for r in some}) if row % count == rank]
            exact = found["None"]
            assert exact["rows"] == mine
            assert exact["other"] == sorted({r for some in rows for r in some[1:] if r % count == rank})
            np.testing.assert_array_equal(exact["seen"], MATRIX[rows[rank]])
            total = np.zeros((len(mine), WIDTH))
            for other in range(count):
                for row, g in zip(rows[other], slope(other, rows[other]), strict=True):
                    if row in mine:
                        total[mine.index(row)] += g
            np.testing.assert_array_equal(exact["grad"], total)
            assert exact["count"] == [sum(row in some for some in rows) for row in mine]
            # 4 bytes an id and 8 an owner's count, 24 a vector or gradient of float64, 4 a count; none to itself.
            asked = sum(row % count != rank for row in rows[rank])
            served = sum(row in mine for other in range(count) if other != rank for row in rows[other])
            assert exact["sent"]["x ids"] == 4 * asked + 8 * (count - 1)
            assert (exact["sent"]["x vectors"], exact["sent"]["x gradients"]) == (24 * served, 24 * asked)
            assert exact["sent"]["x counts"] == 4 * asked
            short = found["torch.bfloat16"]
            assert (short["sent"]["x vectors"], short["sent"]["x gradients"]) == (6 * served, 6 * asked)
            np.testing.assert_allclose(short["seen"], exact["seen"], rtol=2**-8)
            np.testing.assert_allclose(short["grad"], exact["grad"], rtol=2**-7)
            assert found["all rows"] == [row for other in ranks for row in other["None"]["rows"]]
            np.testing.assert_array_equal(found["all"], np.concatenate([o["torch.bfloat16"]["grad"] for o in ranks]))
        np.testing.assert_array_equal(ranks[0]["whole"], MATRIX)
        assert ranks[1]["whole"] is None
