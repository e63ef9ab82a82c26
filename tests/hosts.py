"""Two network namespaces joined by a cable: to the processes within two machines, of one disk. For root, on Linux."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

WIRE = "wire0"
"""The interface, on both."""


@dataclass(frozen=True)
class Host:
    """One of the two."""

    name: str
    address: str

    @property
    def enter(self) -> list[str]:
        """The words before a command that is to run there."""
        return ["ip", "netns", "exec", self.name]

    def sent(self) -> int:
        """Return the bytes that left through the wire so far, headers included."""
        lines = _run(*self.enter, "cat", "/proc/net/dev").splitlines()
        (fields,) = (line.split(":")[1].split() for line in lines if line.strip().startswith(f"{WIRE}:"))
        return int(fields[8])


@contextlib.contextmanager
def two_hosts() -> Iterator[list[Host]]:
    """Have two hosts within the block; skip the test, and say why, where they cannot be made."""
    hosts = [Host(f"ctrkit-{os.getpid()}-{i}", f"10.213.7.{i + 1}") for i in range(2)]
    made = []
    try:
        try:
            for host in hosts:
                _run("ip", "netns", "add", host.name)
                made.append(host)
            one, other = hosts
            ends = ["type", "veth", "peer", "name", WIRE, "netns", other.name]
            _run("ip", "link", "add", WIRE, "netns", one.name, *ends)
            for host in hosts:
                _run("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", WIRE)
                for link in ("lo", WIRE):
                    _run("ip", "-n", host.name, "link", "set", link, "up")
        except (OSError, subprocess.CalledProcessError) as e:
            why = e.stderr.strip() if isinstance(e, subprocess.CalledProcessError) else e
            pytest.skip(f"NOT TESTED: no network namespaces here, which stand for two machines ({why})")
        yield hosts
    finally:
        for host in made:
            _run("ip", "netns", "del", host.name)


def _run(*words: str) -> str:
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout
