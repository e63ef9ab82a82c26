"""`ctrkit extract-images` through the command line, on tiny pictures and small networks."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from PIL import Image
from torchvision.transforms._presets import ImageClassification

from ctrkit import bad_pictures, disk_tables, extraction
from ctrkit.cli import main

RECIPE = """
name = "tiny"
[extract-images]
backbone = "squeezenet1_1:features.5"
size = 32
batch = 4
"""


@pytest.fixture
def shop(tmp_path: Path) -> Path:
    """A folder with a recipe, 6 pictures of which b and d are the same, and a vocabulary."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    (tmp_path / "pictures").mkdir()
    for name, seed in zip("abcdef", [1, 2, 3, 2, 5, 6], strict=True):
        noise(seed).save(tmp_path / "pictures" / f"{name}.png")
    write_vocabulary(tmp_path, [("a.png", 9), ("b.png", 6), ("c.png", 8), ("d.png", 5), ("e.png", 0), ("f.png", 8)])
    weights = seeded_network().state_dict()
    torch.save({k: v for k, v in weights.items() if k.startswith("features")}, tmp_path / "weights.pth")
    return tmp_path


def noise(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8))


def write_vocabulary(folder: Path, counts: list[tuple[str, int]]) -> None:
    (folder / "convert" / "vocab").mkdir(parents=True, exist_ok=True)
    pl.DataFrame(
        {"value": [v for v, _ in counts], "index": range(2, len(counts) + 2), "count": [c for _, c in counts]},
        schema={"value": pl.String, "index": pl.UInt32, "count": pl.UInt64},
    ).write_parquet(folder / "convert" / "vocab" / "image.parquet")


def seeded_network() -> torchvision.models.SqueezeNet:
    torch.manual_seed(11)
    return torchvision.models.squeezenet1_1(weights=None).eval()


def extract(shop: Path, *more: str, out: str = "features.h5", convert: bool = True, weights: str = "") -> Result:
    of = ["--convert", str(shop / "convert")] if convert else []
    fixed = ["--recipe", str(shop / "recipe.toml"), "--pictures", str(shop / "pictures")]
    given = ["--weights", weights or str(shop / "weights.pth"), "--out", str(shop / out)]
    return CliRunner().invoke(main, ["extract-images", *fixed, *of, *given, *more])


def read(path: Path) -> tuple[npt.NDArray[np.float16], dict[str, int], dict[str, str]]:
    with h5py.File(path) as h5:
        images = [image.decode() for image in h5["image"][:]]
        return h5["features"][:], dict(zip(images, h5["row"][:].tolist(), strict=True)), dict(h5.attrs)


def leftovers(shop: Path) -> list[str]:
    return [p.name for p in shop.iterdir() if "features.h5" in p.name]


def test_rows_by_use_one_a_content_values_torchvisions(shop: Path) -> None:
    result = extract(shop)
    assert result.exit_code == 0, result.output
    features, row, attributes = read(shop / "features.h5")
    # b and d are used 11 times together, a 9, c and f 8 (c has the lower index), e never.
    assert row == {"a.png": 1, "b.png": 0, "c.png": 2, "d.png": 0, "e.png": 4, "f.png": 3}
    network = seeded_network().features[:6]
    seen = ImageClassification(crop_size=32, resize_size=37)
    for name, place in row.items():
        with torch.inference_mode(), Image.open(shop / "pictures" / name) as picture:
            wanted = network(seen(picture)[None]).mean((2, 3))[0].numpy()
        np.testing.assert_allclose(features[place], wanted, rtol=2e-3, atol=1e-5)
    assert (attributes["backbone"], attributes["layer"]) == ("squeezenet1_1", "features.5")
    assert json.loads(attributes["preprocessing"])["crop"] == "centre 32x32"
    assert "torch" in json.loads(attributes["versions"])
    assert sorted(leftovers(shop)) == ["features.h5", "features.h5.json", "features.h5.rejects.parquet"]
    sidecar = json.loads((shop / "features.h5.json").read_text())
    assert sidecar["counts"]["weights"] == sidecar["inputs"]["weights"] == attributes["weights"]
    assert (sidecar["counts"]["rows"], sidecar["counts"]["pictures"], sidecar["counts"]["width"]) == (5, 6, 128)
    assert pl.read_parquet(shop / "features.h5.rejects.parquet").shape == (0, 3)


def test_two_runs_give_the_same_bytes(shop: Path) -> None:
    assert extract(shop).exit_code == extract(shop, out="again.h5").exit_code == 0
    assert (shop / "features.h5").read_bytes() == (shop / "again.h5").read_bytes()


def test_an_id_that_no_file_can_have(shop: Path) -> None:
    write_vocabulary(shop, [("a.png", 9), ("a.png\0", 6), ("", 1), ("x" * 300, 1)])
    result = extract(shop, "--set", "extract-images.max_bad_rate=0.75")
    assert result.exit_code == 0, result.output
    _, row, _ = read(shop / "features.h5")
    assert row == {"a.png": 0, "a.png\ufffd": -1, "": -1, "x" * 300: -1}
    reasons = pl.read_parquet(shop / "features.h5.rejects.parquet")["reason"].to_list()
    assert "NUL character" in reasons[0]
    assert "File name too long" in reasons[2]


def test_tuned_weights_are_named_by_hand(shop: Path) -> None:
    result = extract(shop, weights="tuned")
    assert result.exit_code == 2
    assert "`ctrkit tune-backbone … --out backbone` comes first, and then --weights backbone" in result.output
    assert leftovers(shop) == []


def spoil(shop: Path) -> None:
    (shop / "pictures" / "a.png").unlink()
    whole = (shop / "pictures" / "c.png").read_bytes()
    (shop / "pictures" / "c.png").write_bytes(whole[: len(whole) // 2])


def test_a_few_bad_pictures_are_counted(shop: Path) -> None:
    spoil(shop)
    result = extract(shop, "--set", "extract-images.max_bad_rate=0.34")
    assert result.exit_code == 0, result.output
    _, row, _ = read(shop / "features.h5")
    assert row == {"a.png": -1, "b.png": 0, "c.png": -1, "d.png": 0, "e.png": 2, "f.png": 1}
    rejects = pl.read_parquet(shop / "features.h5.rejects.parquet")
    assert rejects["image"].to_list() == rejects["path"].to_list() == ["a.png", "c.png"]
    assert rejects["reason"][0] == "missing"
    assert rejects["reason"][1].startswith("broken: ")
    assert json.loads((shop / "features.h5.json").read_text())["counts"]["rejected"] == 2


def test_too_many_bad_pictures_are_an_error_and_the_old_output_stays(shop: Path) -> None:
    assert extract(shop).exit_code == 0
    before = {name: (shop / name).read_bytes() for name in leftovers(shop)}
    spoil(shop)
    result = extract(shop, "--set", "extract-images.max_bad_rate=0.33")
    assert result.exit_code == 1
    assert "2 of 6 pictures (33.3%) cannot be used" in result.output
    assert "1 missing (such as a.png)" in result.output
    assert "truncated" in result.output or "broken" in result.output
    assert {name: (shop / name).read_bytes() for name in before} == before


def test_all_pictures_missing_hints_at_the_template(shop: Path) -> None:
    result = extract(shop, "--set", "extract-images.template={image}.jpg")
    assert result.exit_code == 1
    assert "6 missing (such as a.png, b.png, c.png)" in result.output
    assert "extract-images.template" in result.output
    assert leftovers(shop) == []


def test_whole_folder_without_a_vocabulary(shop: Path) -> None:
    result = extract(shop, "--all", "--set", "extract-images.template={image}.png", convert=False)
    assert result.exit_code == 0, result.output
    assert read(shop / "features.h5")[1] == {"a": 0, "b": 1, "c": 2, "d": 1, "e": 3, "f": 4}


def test_random_weights_are_said_everywhere(shop: Path) -> None:
    result = extract(shop, weights="random")
    assert result.exit_code == 0
    assert "RANDOM" in result.stderr
    assert read(shop / "features.h5")[2]["weights"] == "random, seed 0"
    assert json.loads((shop / "features.h5.json").read_text())["counts"]["weights"] == "random, seed 0"
    assert extract(shop, weights=str(shop / "weights.pth")).exit_code == 0
    assert "RANDOM" not in extract(shop).stderr


@pytest.mark.parametrize(
    ("more", "convert", "code", "said"),
    [
        ((), False, 2, "--all"),
        (("--set", "extract-images.backbone=squeezenet1_1:features.55"), True, 2, "did you mean 'features.5'"),
        (("--set", "extract-images.template=x.jpg"), True, 2, "{image}"),
        (("--pictures", "nowhere"), True, 1, "not a folder"),
        (("--convert", "nowhere"), True, 1, "image.parquet is not there"),
        (("--weights", "nowhere.pth"), True, 1, "'nowhere.pth'"),
    ],
)
def test_mistakes_are_told(shop: Path, more: tuple[str, ...], convert: bool, code: int, said: str) -> None:
    result = extract(shop, *more, convert=convert)
    assert result.exit_code == code
    assert isinstance(result.exception, SystemExit)
    assert said in result.output
    assert leftovers(shop) == []


def test_values_beyond_float16_are_clipped_and_counted(shop: Path) -> None:
    weights = torch.load(shop / "weights.pth", weights_only=True)
    weights["features.5.weight"] = torch.empty(0)  # not needed, and so not looked at
    weights["features.0.weight"] *= 1e7
    torch.save(weights, shop / "weights.pth")
    result = extract(shop, "--set", "extract-images.backbone=squeezenet1_1:features.0")
    assert result.exit_code == 0, result.output
    features = read(shop / "features.h5")[0]
    clipped = json.loads((shop / "features.h5.json").read_text())["counts"]["values clipped"]
    assert clipped == (np.abs(features) == 65504).sum() > 0
    assert "clipped" in result.stderr


def test_values_that_are_no_numbers_are_an_error(shop: Path) -> None:
    weights = torch.load(shop / "weights.pth", weights_only=True)
    weights["features.0.weight"][0] = float("nan")
    torch.save(weights, shop / "weights.pth")
    result = extract(shop)
    assert result.exit_code == 1
    assert "not numbers" in result.output


def test_list_layers_needs_nothing_else() -> None:
    result = CliRunner().invoke(main, ["extract-images", "--list-layers", "alexnet"])
    assert result.exit_code == 0
    names = result.output.split()
    assert names[0] == "features.0"
    assert names[-1] == "fc8"


MANY = 122
"""Pictures of `many`: 31 batches of 4, the last of 2."""

AT = """
import os, signal, sys, threading, time
import torch
from ctrkit import backbones, batch_log, extraction, provenance
from ctrkit.cli import main

provenance.code_digest("extract-images")  # what the children would each do again
backbones.layer_names("squeezenet1_1")

arguments = sys.argv[1:]

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def at_call(owner, name, number, before=die):
    real, calls = getattr(owner, name), []
    def patched(*given, **named):
        calls.append(0)
        if len(calls) == number:
            before(*given)
        return real(*given, **named)
    setattr(owner, name, patched)

def torn(number):
    def half(log, record):
        os.write(log._writer, record[:len(record) // 2])
        die()
    at_call(batch_log.BatchLog, "_write", number, half)

forward = backbones.Backbone.forward
def counted(network, x):
    with open("forwards", "ab", buffering=0) as f:
        f.write(b".")
    return forward(network, x)
backbones.Backbone.forward = counted

def run(*patches):
    pid = os.fork()
    if pid == 0:
        for patch, *given in patches:
            patch(*given)
        main(arguments)
    return os.waitpid(pid, 0)[1]
"""


@pytest.fixture
def many(shop: Path) -> Path:
    """The shop with `MANY` pictures, the 78th of them broken."""
    for n in range(MANY):
        noise(1000 + n).save(shop / "pictures" / f"p{n}.png")
    (shop / "pictures" / "p77.png").write_bytes(b"not a picture")
    write_vocabulary(shop, [(f"p{n}.png", n % 10) for n in range(MANY)])
    return shop


def arguments(shop: Path, *more: object, convert: bool = True) -> list[str]:
    given = ["--recipe", shop / "recipe.toml", "--pictures", shop / "pictures"]
    given += ["--convert", shop / "convert"] if convert else ["--all"]
    given += ["--weights", shop / "weights.pth", "--out", shop / "features.h5", *more]
    return ["extract-images", *map(str, given)]


def in_process(shop: Path, script: str, *more: object, convert: bool = True) -> subprocess.CompletedProcess[str]:
    """Run a script that starts with `AT`, whose `run` calls the command in a child."""
    command = [sys.executable, "-c", AT + script, *arguments(shop, *more, convert=convert)]
    done = subprocess.run(command, cwd=shop, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def same_values(shop: Path, one: str = "features.h5", other: str = "undisturbed.h5") -> None:
    for found, wanted in zip(read(shop / one), read(shop / other), strict=True):
        np.testing.assert_equal(found, wanted)


KILLS = """
def die_after(seconds):
    at_call(extraction, "remove_parts", 1, lambda *_: time.sleep(600))  # once all is done it would begin anew
    threading.Timer(seconds, die).start()

moments = [
    [(torn, 1)],
    [(at_call, backbones.Backbone, "forward", 6)],
    [(torn, 7)],
    [(at_call, batch_log.BatchLog, "append", 5)],
    *[[(die_after, seconds)] for seconds in (0.1, 0.25)],
    [(at_call, batch_log.BatchLog, "read", 9)],
    [(at_call, extraction, "_write_map", 1)],
    [(at_call, extraction, "remove_parts", 1)],
]
ends = [run(*moment) for moment in moments]
killed = [os.WIFSIGNALED(end) for end in ends]
print(killed.count(True), flush=True)  # or the child prints it too
print(run())
print(ends, file=sys.stderr)
"""


def test_killed_at_any_moment_it_goes_on_and_does_at_most_one_batch_again(many: Path) -> None:
    assert extract(many, out="undisturbed.h5").exit_code == 0
    done = in_process(many, KILLS)
    assert done.stdout.split() == ["9", "0"], done.stderr
    same_values(many)
    assert 31 <= (many / "forwards").stat().st_size <= 31 + 9, done.stderr
    # A torn batch, none, five, and then died in the next.
    assert f"20 of {MANY} pictures were done before" in done.stderr, done.stderr
    assert sorted(leftovers(many)) == FILES
    assert pl.read_parquet(many / "features.h5.rejects.parquet")["image"].to_list() == ["p77.png"]


FILES = ["features.h5", "features.h5.json", "features.h5.rejects.parquet"]

FULL = """
import resource
small = (resource.setrlimit, resource.RLIMIT_FSIZE, (20_000, -1))
print(run(small), run(small), run())
"""


def test_a_full_disk_is_told_and_the_work_goes_on_when_there_is_room(many: Path) -> None:
    assert extract(many, out="undisturbed.h5").exit_code == 0
    done = in_process(many, FULL)
    full = f"Error: cannot write {many / 'features.h5'}: a file would become larger than is allowed (`ulimit -f` tells"
    told = [line[: len(full)] for line in done.stderr.splitlines() if "were done" in line or "Error" in line]
    before = [int(line.split()[1]) for line in told if "were done" in line]
    # The log does not hold all batches; then it does, and the file itself is too large; then there is room.
    assert told == [full, told[1], full, told[3]]
    assert 40 < before[0] < before[1] == MANY
    assert "Make room there and run the same command again" in done.stderr
    assert done.stdout.split() == ["256", "256", "0"]
    assert (many / "forwards").stat().st_size == 31 + 1
    same_values(many)
    assert sorted(leftovers(many)) == FILES


GROWTH = """
import resource
peaks = []
for pictures in ("few", "pictures"):
    arguments[arguments.index("--pictures") + 1] = pictures
    pid = os.fork()
    if pid == 0:
        main(arguments)
    _, status, usage = os.wait4(pid, 0)
    peaks.append(usage.ru_maxrss)
    assert status == 0
print(peaks[0], peaks[1])
"""


def test_memory_does_not_grow_with_the_vectors(shop: Path) -> None:
    one = (shop / "pictures" / "a.png").read_bytes()
    for n in range(2000):  # what follows the end of a PNG is not looked at, and makes its content another
        (shop / "pictures" / f"p{n}.png").write_bytes(one + b"%d" % n)
    (shop / "few").mkdir()
    for n in range(100):
        (shop / "few" / f"p{n}.png").write_bytes(one + b"%d" % n)
    wide = ("--set", "extract-images.backbone=squeezenet1_1:features.0:flat")
    peaks = in_process(shop, GROWTH, *wide, convert=False).stdout.split()
    assert read(shop / "features.h5")[0].nbytes > 55 << 20
    assert int(peaks[1]) - int(peaks[0]) < 12 << 10, peaks


IDS_GROWTH = """
import tracemalloc
from ctrkit import bad_pictures, disk_tables, disk_texts, packed_pictures, picture_names, picture_sources

# So that what is sorted, read or written at a time is full with both.
disk_tables.RUN = disk_texts.RUN = extraction.SLICE = bad_pictures.ROWS = 1 << 11
disk_texts.AT_ONCE = packed_pictures.AT_ONCE = picture_names.AT_ONCE = picture_sources.AT_ONCE = 1 << 11
for some in ("few", "many"):
    pid = os.fork()
    if pid == 0:
        tracemalloc.start()
        try:
            main([word.replace("SOME", some) for word in arguments])
        finally:
            print(tracemalloc.get_traced_memory()[1], flush=True)
    assert os.waitpid(pid, 0)[1] == 0
"""
IDS = {"few": 5_000, "many": 15_000}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["missing", "zip"])
def test_memory_does_not_grow_with_the_ids(shop: Path, kind: str) -> None:
    for some, number in IDS.items():
        ids = [f"p{n:013}.png" for n in range(number)]
        if kind == "missing":
            write_vocabulary(shop, [(image, 1) for image in ids])
            (shop / "convert").rename(shop / some)
        else:
            with zipfile.ZipFile(shop / f"{some}.zip", "w") as archive:
                for image in ids:
                    archive.writestr(image, b"")
    where = ("--convert", shop / "SOME") if kind == "missing" else ("--pictures", shop / "SOME.zip")
    loose = ("--set", "extract-images.max_bad_rate=1")
    done = in_process(shop, IDS_GROWTH, *where, *loose, convert=kind == "missing")
    few, many = map(int, done.stdout.split())
    assert many - few < 300_000  # 30 bytes for each of 10,000
    rejects = pl.read_parquet(shop / "features.h5.rejects.parquet")
    assert rejects["image"].to_list() == [f"p{n:013}.png" for n in range(IDS["many"])]
    assert rejects["reason"].unique().to_list() == ["missing" if kind == "missing" else "empty file"]


def test_in_runs_on_disk_as_in_memory(many: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (many / "pictures" / "p9.png").write_bytes(b"")
    for n in range(0, MANY, 5):
        (many / "pictures" / f"p{n}.png").write_bytes((many / "pictures" / "a.png").read_bytes())
    (many / "pictures" / "p78.png").write_bytes(b"not a picture")
    loose = ("--set", "extract-images.max_bad_rate=0.5")
    assert extract(many, *loose, out="undisturbed.h5").exit_code == 0
    monkeypatch.setattr(disk_tables, "RUN", 7)
    monkeypatch.setattr(disk_tables, "LEAST_BLOCK", 2)
    monkeypatch.setattr(extraction, "SLICE", 5)
    monkeypatch.setattr(bad_pictures, "ROWS", 2)
    assert extract(many, *loose).exit_code == 0
    same_values(many)
    rejects = pl.read_parquet(many / "features.h5.rejects.parquet")
    assert rejects.equals(pl.read_parquet(many / "undisturbed.h5.rejects.parquet"))
    assert rejects["image"].to_list() == ["p9.png", "p77.png", "p78.png"]
    row = read(many / "features.h5")[1]
    assert {row[f"p{n}.png"] for n in range(0, MANY, 5)} == {0}


def test_a_vocabulary_out_of_order_is_told(shop: Path) -> None:
    path = shop / "convert" / "vocab" / "image.parquet"
    pl.read_parquet(path).reverse().write_parquet(path)
    result = extract(shop)
    assert result.exit_code == 1
    assert "image.parquet is not in the order of its index, as convert writes it; run convert again" in result.output


def test_processes_that_decode_give_the_same(many: Path) -> None:
    assert extract(many, out="undisturbed.h5").exit_code == 0
    result = extract(many, "--set", "extract-images.workers=2")
    assert result.exit_code == 0, result.output
    same_values(many)
