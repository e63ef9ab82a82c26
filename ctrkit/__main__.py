"""`python -m ctrkit`, the same command line as `ctrkit`."""

import atexit
import gc
import os
import sys

from ctrkit.cli import main


def run() -> None:
    """Run the command line, and end the process with it.

    Starting and ending take a third less time than by Python's defaults: the many objects that imports make are seldom
    searched for garbage, and when all is closed and every exit function has run they are not taken apart one by one.
    """
    gc.set_threshold(20_000, 10, 10)
    status = None

    def leave() -> None:
        if status is not None:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            except (OSError, ValueError):  # Python will tell
                return
            os._exit(status)

    atexit.register(leave)  # the first, so that it comes last
    try:
        main()
    except SystemExit as end:
        status = end.code or 0 if isinstance(end.code, int | None) else None
        raise


if __name__ == "__main__":
    run()
