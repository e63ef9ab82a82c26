"""Which share of a batch each rank has; what ranks send is in test_feature_service."""

import numpy as np
import pytest

from ctrkit.batches import Block
from ctrkit.data_parallel import share
from ctrkit.ranks import Ranks
from tests.small_groups import random_groups, to_block


def ids(block: Block) -> list[int]:
    return np.asarray(block.sample["sample_id"]).tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_shares_are_neighbouring_groups_and_all_there_is(count: int) -> None:
    for sizes in ([1], [2, 5], [1] * 9, [30, 1, 1, 1], [1, 1, 40, 1], [4] * 20):
        block = to_block(random_groups(1, sizes, [2] * len(sizes)))
        shares = [share(block, Ranks(rank, count)) for rank in range(count)]
        assert [i for some in shares for i in ids(some)] == ids(block)
        assert sum(some.n_groups for some in shares) == block.n_groups  # none is cut
        assert sum(int(some.behaviour_offsets[-1]) for some in shares) == int(block.behaviour_offsets[-1])
        for some in shares:
            assert abs(some.n_samples - block.n_samples / count) <= max(sizes)


def test_groups_of_one_size_are_shared_evenly() -> None:
    block = to_block(random_groups(1, [4] * 20, [0] * 20))
    assert [share(block, Ranks(rank, 5)).n_samples for rank in range(5)] == [16] * 5
