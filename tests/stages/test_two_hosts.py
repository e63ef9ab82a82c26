"""`torchrun --nnodes 2` in two network namespaces: the model of one process, and bytes counted as they are sent."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from tests.hosts import WIRE, two_hosts
from tests.tiny_run import TinyRun

SETTINGS = {"epochs": 1, "activation": "dice", "user_ids": "true", "clip_norm": 0.5, "patience": 0}
SETTINGS |= {"precision": "float64", "placement": "shard", "save_optimiser": "true"}
SETS = [word for key, value in SETTINGS.items() for word in ("--set", f"train.{key}={value}")]
SECONDS = 150.0


def test_two_machines_train_the_model_of_one_process(tiny_run: TinyRun, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    env = {**os.environ, "OMP_NUM_THREADS": "1", "POLARS_MAX_THREADS": "1", "GLOO_SOCKET_IFNAME": WIRE}
    with two_hosts() as hosts:
        before = [host.sent() for host in hosts]
        launchers = []
        for rank, host in enumerate(hosts):
            torchrun = ["-m", "torch.distributed.run", "--nnodes", 2, "--nproc-per-node", 1, "--node-rank", rank]
            torchrun += ["--master-addr", hosts[0].address, "--master-port", 29_500, "-m", "ctrkit", "train"]
            words = [*torchrun, "--recipe", tiny_run.recipe, *tiny_run.reads(), *SETS, "--out", two]
            command = [*host.enter, sys.executable, *map(str, words)]
            launchers.append(subprocess.Popen(command, env=env, text=True, stderr=subprocess.PIPE))
        tiny_run.train(one, *SETS)
        try:
            told = [launcher.communicate(timeout=SECONDS)[1] for launcher in launchers]
        finally:
            for launcher in launchers:
                launcher.kill()
        assert [launcher.returncode for launcher in launchers] == [0, 0], told
        sent = sum(host.sent() for host in hosts) - sum(before)
    assert sum(text.count("train: 2 processes sent each other") for text in told) == 1
    for file in ("model.pt", "optimiser.pt"):
        ours, plain = (torch.load(model / file) for model in (two, one))
        assert ours.keys() == plain.keys()
        for name, tensor in plain.items():
            of_padding = 1 if name.endswith((".m", ".v")) else 0  # moments that nobody reads
            mine, its = (t.numpy()[of_padding:] if t.ndim else t.numpy() for t in (ours[name], tensor))
            np.testing.assert_allclose(mine, its, rtol=1e-6, atol=1e-9, err_msg=name)
    # What an all-reduce is given by two ranks is what they send in it: each half of it, twice.
    traffic = json.loads((tmp_path / "two.json").read_text())["counts"]["ranks"]
    counted = sum(n for kind, n in traffic.items() if kind.startswith("bytes"))
    assert traffic["bytes of picture vectors"] > 0
    assert counted < sent < counted + 3_000_000  # the rest: start, statistics, checkpoints, packets' heads
