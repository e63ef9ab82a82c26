"""What every process that works for another one does."""

import atexit
import gc
import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import wait


def quick_process() -> None:
    """Have this process, which ends when Python does, start and end in less time than by Python's defaults: the many
    objects that imports make are seldom searched for garbage, and not taken apart one by one when all is done."""
    gc.set_threshold(20_000, 10, 10)

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)

    atexit.register(leave)


def die_with_parent() -> None:
    """End this worker when the process that started it is gone, however it went."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
