"""`ctrkit extract-images` by two processes, as torchrun starts them: the values of one; what happens when one dies."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from PIL import Image

from ctrkit import shards
from ctrkit.cli import main
from ctrkit.features import FeatureStore
from ctrkit.ranks import Ranks

RECIPE = """
name = "tiny"
[extract-images]
backbone = "squeezenet1_1:features.5"
weights = "random"
size = 32
batch = 4
threads = 1
"""
PICTURES = 90

RANKS = """
import os, signal, socket, sys
import torch
from ctrkit import backbones, batch_log, provenance
from ctrkit.cli import main

provenance.code_digest("extract-images")  # what the children would each do again
backbones.layer_names("squeezenet1_1")

def start(patch=lambda rank: None, **more):
    \"\"\"Fork two ranks with what torchrun gives them; return their processes.\"\"\"
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    given = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **more}
    found = []
    for rank in range(2):
        found.append(os.fork())
        if not found[-1]:
            os.environ.update({name: str(value) for name, value in given.items()}, RANK=str(rank), LOCAL_RANK=str(rank))
            patch(rank)
            main(sys.argv[1:])
    return found

def ends(ranks):
    print(*[os.waitstatus_to_exitcode(os.waitpid(rank, 0)[1]) for rank in ranks])

def at_append(of_rank, number, act):
    def patch(rank):
        append, calls = batch_log.BatchLog.append, []
        def patched(*given):
            calls.append(0)
            if rank == of_rank and len(calls) == number:
                act()
            append(*given)
        batch_log.BatchLog.append = patched
    return patch

def die():
    os.kill(os.getpid(), signal.SIGKILL)

ends(start(at_append(1, 4, die)))
ends(start(at_append(1, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))))
"""


def arguments(folder: Path, *more: object, out: str = "features.h5") -> list[str]:
    given = ["--recipe", folder / "recipe.toml", "--pictures", folder / "pictures", "--convert", folder / "convert"]
    return ["extract-images", *map(str, [*given, "--out", folder / out, *more])]


def run(command: list[object], **env: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *map(str, command)]
    return subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1", **env})


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """90 pictures, the 70th broken, every tenth the same, one missing; and what one process makes of them."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "recipe.toml").write_text(RECIPE)
    (folder / "pictures").mkdir()
    for n in range(PICTURES):
        pixels = np.random.default_rng(0 if n % 10 == 0 else n).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "pictures" / f"{n}.png")
    (folder / "pictures" / "69.png").write_bytes(b"not a picture")
    (folder / "pictures" / "8.png").unlink()
    (folder / "convert" / "vocab").mkdir(parents=True)
    pl.DataFrame(
        {"value": [f"{n}.png" for n in range(PICTURES)], "index": range(2, PICTURES + 2), "count": [1] * PICTURES},
        schema={"value": pl.String, "index": pl.UInt32, "count": pl.UInt64},
    ).write_parquet(folder / "convert" / "vocab" / "image.parquet")
    done = run(["-m", "ctrkit", *arguments(folder, out="one.h5")])
    assert done.returncode == 0, done.stderr
    return folder


def contents(path: Path) -> tuple[Any, Any, Any, dict[str, str]]:
    with h5py.File(path) as h5:
        attributes = {name: value for name, value in h5.attrs.items() if name != "shards"}
        return h5["features"][:], h5["image"][:], h5["row"][:], attributes


def test_ranks_that_die_or_are_stopped_then_torchrun_goes_on(shop: Path) -> None:
    done = run(["-c", RANKS, *arguments(shop)])
    assert done.returncode == 0, done.stderr
    died, stopped = done.stdout.splitlines()[-2:]
    again = "What was done is kept: run the same command again and it goes on from there"
    errors = [line for line in done.stderr.splitlines() if line.startswith("Error")]
    assert died == "1 -9"
    assert errors[0].startswith("Error: rank 0 of 2 has lost another one, whose own message says why")
    assert stopped == "1 1"
    assert any("rank 1 of 2 was told to stop" in line for line in errors[1:])
    assert any("rank 0 of 2 has lost another one" in line for line in errors[1:])
    assert all(again in line for line in errors)
    assert "Traceback" not in done.stderr
    assert not (shop / "features.h5").exists()

    # 81 distinct contents in 21 batches: rank 0 had done all its 10, rank 1 three, then two more.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "ctrkit"]
    done = run([*launch, *arguments(shop)])
    assert done.returncode == 0, done.stderr
    assert "extract-images, rank 0 of 2: 40 of 40 pictures were done before" in done.stderr
    assert "extract-images, rank 1 of 2: 20 of 41 pictures were done before" in done.stderr
    for found, wanted in zip(contents(shop / "features.h5"), contents(shop / "one.h5"), strict=True):
        np.testing.assert_equal(found, wanted)
    rejects = [pl.read_parquet(shop / f"{name}.rejects.parquet") for name in ("features.h5", "one.h5")]
    assert rejects[0].equals(rejects[1])
    assert rejects[0]["image"].to_list() == ["8.png", "69.png"]
    counts = [json.loads((shop / f"{name}.json").read_text())["counts"] for name in ("features.h5", "one.h5")]
    names = counts[0].pop("shards")
    assert counts[0] == counts[1]
    assert (
        [shop / name for name in names]
        == sorted((shop / "features.h5.shards").iterdir())
        == shards.of(shop / "features.h5")
    )
    assert [h5py.File(shop / name)["features"].shape for name in names] == [(40, 128), (40, 128)]
    assert sorted(p.name for p in shop.iterdir() if "features.h5" in p.name) == [
        *("features.h5", "features.h5.json", "features.h5.rejects.parquet", "features.h5.shards")
    ]
    store = FeatureStore(shop / "features.h5")
    np.testing.assert_array_equal(store.read(np.array([78, 3, 40])), contents(shop / "one.h5")[0][[78, 3, 40]])


def test_a_lost_shard_is_made_again_and_one_process_leaves_none(shop: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (shop / "features.h5.shards").is_dir()
    monkeypatch.setenv("CTRKIT_UNLESS_FRESH", "1")
    fresh = CliRunner().invoke(main, arguments(shop))
    assert "is what it would be made again" in fresh.output
    shards.of(shop / "features.h5")[1].unlink()
    assert np.isnan(contents(shop / "features.h5")[0][40:]).all()  # not zeros, which would pass for vectors
    again = CliRunner().invoke(main, arguments(shop))
    assert again.exit_code == 0, again.output
    for found, wanted in zip(contents(shop / "features.h5"), contents(shop / "one.h5"), strict=True):
        np.testing.assert_equal(found, wanted)
    assert not (shop / "features.h5.shards").exists()


FRESH = RANKS.replace("ends(start(at", "# ") + "ends(start(CTRKIT_UNLESS_FRESH=1))"


@pytest.mark.long
def test_ranks_go_home_where_there_is_nothing_to_do(shop: Path) -> None:
    done = run(["-c", FRESH, *arguments(shop, out="one.h5")])
    assert done.stdout.splitlines()[-1] == "0 0", done.stderr
    assert done.stderr.count("is what it would be made again") == 1
    assert "Error" not in done.stderr


def test_shares_are_neighbours_and_all_there_is() -> None:
    for count in (1, 3, 8):
        for total in (0, 1, 7, 100):
            shares = [Ranks(rank, count).share(total) for rank in range(count)]
            assert [n for share in shares for n in share] == list(range(total))
            assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert Ranks().name == ""
