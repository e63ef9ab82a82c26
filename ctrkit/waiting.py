"""How long the threads of torch's operations stay awake after one. Imports no torch, since it must come before it."""

import os


def wait_briefly() -> None:
    """Have these threads sleep some tenths of a millisecond after an operation, unless GOMP_SPINCOUNT says otherwise.

    By default they stay awake for milliseconds, and meanwhile take the cores from threads of ours: those that make
    batches, and those that compute pairs (`ctrkit.models.pair_threads`). Only before torch is imported.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
