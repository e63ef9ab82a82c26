"""Which share of a batch each rank has; what ranks send is in test_feature_service."""

from pathlib import Path

import pytest

from ctrkit.batches import Block, GroupedData
from ctrkit.ranks import ALONE, Ranks
from tests.small_groups import FEATURES, random_groups, write_groups
from tests.test_batches import equal


def shares(folder: Path, sizes: list[int], batch: int, count: int, block_groups: int = 4) -> list[list[Block]]:
    """Return each rank's shares of the batches of groups of these sizes, in file order; first those of one process."""
    groups = random_groups(1, sizes, [2] * len(sizes))
    write_groups(folder, {"train": groups}, block_groups=block_groups, part_groups=10)
    data = GroupedData(folder, "train", list(FEATURES))
    found = [list(data.shares(batch, ranks)) for ranks in (ALONE, *(Ranks(rank, count) for rank in range(count)))]
    blocks, samples = ([[share[i] for share in of_rank] for of_rank in found] for i in (0, 1))
    assert samples == [[block.n_samples for block in blocks[0]]] * (count + 1)
    return blocks


SIZES = ([1], [2, 5], [1] * 9, [30, 1, 1, 1], [1, 1, 40, 1], [4] * 20)


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("sizes", SIZES)
def test_shares_are_neighbouring_groups_and_all_there_is(count: int, sizes: list[int], tmp_path: Path) -> None:
    """Also of blocks and files that end in the middle of a batch."""
    (block,), *found = shares(tmp_path, sizes, sum(sizes), count)
    own = [of_rank[0] for of_rank in found]
    equal(Block.concat(own), block)
    assert sum(some.n_groups for some in own) == block.n_groups  # none is cut
    for some in own:
        assert abs(some.n_samples - block.n_samples / count) <= max(sizes)


@pytest.mark.parametrize("batch", [1, 2, 7, 11, 64])
def test_shares_of_batches_that_cut_groups(batch: int, tmp_path: Path) -> None:
    """A share is what a batch has there; a group that a batch ends in is in both."""
    sizes = [3, 1, 9, 2, 30, 1, 1, 5, 5, 2, 8, 1, 4, 4]
    whole, *found = shares(tmp_path, sizes, batch, 3)
    assert sum(b.n_samples for b in whole) == sum(sizes)
    for n, block in enumerate(whole):
        begin = 0
        for of_rank in found:
            share = of_rank[n]
            if share.n_samples:
                equal(share, block.samples(begin, begin + share.n_samples))
            assert share.n_groups == 0 or share.n_samples > 0
            begin += share.n_samples
        assert begin == block.n_samples


def test_groups_of_one_size_are_shared_evenly(tmp_path: Path) -> None:
    found = shares(tmp_path, [4] * 20, 80, 5)
    assert [of_rank[0].n_samples for of_rank in found[1:]] == [16] * 5
