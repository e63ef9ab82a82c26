"""Which tables are spread over the ranks of a training, and whether pictures are: `[train] placement`."""

from ctrkit.errors import UsageError
from ctrkit.models.plan import Plan

SPREAD_BYTES = 64 << 20
"""With "auto" a table is spread if it and its moments are larger. A smaller one is cheaper to keep everywhere: its rows
need not be asked for."""
BYTES = {"float32": 4, "bfloat16": 4, "float64": 8}


def is_spread(plan: Plan, width: int, ranks: int) -> bool:
    """Say whether the table of a width is spread over this many ranks."""
    if ranks == 1:
        return False
    placement = plan.train.placement
    if placement != "auto":
        return placement == "shard"
    rows = 1 + sum(plan.schema.vocab_sizes[vocab] for vocab in plan.vocabularies()[width])
    return 3 * rows * width * BYTES[plan.train.precision] > SPREAD_BYTES


def spreads_pictures(plan: Plan, ranks: int) -> bool:
    """Say whether pictures are read and extracted on the rank on which they lie. SimTier compares the vectors
    themselves, so each rank then reads those that it names."""
    train = plan.train
    if ranks == 1 or not train.looks_at_pictures:
        return False
    if train.picture_placement == "shard" and train.counts_tiers:
        raise UsageError(
            f'[train] picture_placement = "shard" sends extracted vectors only, but user_images = '
            f'"{train.user_images}" compares pictures as they were read. Use "replicate" or "auto": each rank then '
            "reads the pictures of its samples"
        )
    return train.picture_placement != "replicate" and not train.counts_tiers
