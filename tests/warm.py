"""`ctrkit` without the seconds in which each process imports torch: a server that has imported all forks for each call.

`python -P tests/warm.py serve SOCKET` serves until its standard input ends. To its caller
`python -IS tests/warm.py ask SOCKET WORD…` is `python -P -m ctrkit WORD…`: folder, environment, standard streams and
exit code are the caller's. Only killing it kills nothing: tests that kill use real processes, which make `built` too.
"""

import array
import os
import select
import socket
import sys
from typing import NoReturn

NUMBER = 8
"""Bytes of a length or an exit code."""
LATE = ["matplotlib.backends.backend_agg", "matplotlib.offsetbox", "sklearn.manifold", "tensorboard.summary.writer"]
"""What our modules import when they need it. That starts no thread."""


def ask(path: str, words: list[str]) -> int:
    """Have the server run a command; return its exit code."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        data = repr((os.getcwd(), words, dict(os.environ))).encode()
        streams = array.array("i", [0, 1, 2])
        server.sendmsg([len(data).to_bytes(NUMBER, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, streams)])
        server.sendall(data)
        answer = server.recv(NUMBER)
    return int.from_bytes(answer, "big") if answer else 1


def serve(path: str) -> None:
    """Import everything, then answer at a socket, each call by a process of its own."""
    import gc
    import importlib
    import pkgutil
    import signal
    from pathlib import Path

    import ctrkit

    for module in pkgutil.walk_packages(ctrkit.__path__, "ctrkit."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name in LATE:
        importlib.import_module(name)
    threads = {(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()}
    assert "polars-0" not in threads, "a forked process waits for polars' threads forever: import nothing that uses it"
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those that answer
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        print("ready", flush=True)
        while listener in select.select([listener, sys.stdin], [], [])[0]:
            caller = listener.accept()[0]
            if not os.fork():
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                answer(caller)
            caller.close()
    os._exit(0)  # nothing of what was imported needs to be taken apart


def answer(caller: socket.socket) -> NoReturn:
    """Run what is asked for in a process of its own; tell its exit code."""
    import ast
    import runpy

    length, streams, *_ = socket.recv_fds(caller, NUMBER, 3)
    data = b""
    while len(data) < int.from_bytes(length, "big"):
        data += caller.recv(1 << 20)
    folder, words, environment = ast.literal_eval(data.decode())
    if command := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(command, 0)[1])
        caller.sendall((code if code >= 0 else 128 - code).to_bytes(NUMBER, "big"))
        os._exit(0)
    caller.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["ctrkit", *words]
    runpy.run_module("ctrkit", run_name="__main__", alter_sys=True)
    sys.exit(0)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[2], sys.argv[3:]))
