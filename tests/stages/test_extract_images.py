"""`ctrkit extract-images` through the command line, on tiny pictures and small networks."""

import json
import signal
import subprocess
import sys
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
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for name, place in row.items():
        pixels = torch.from_numpy(np.array(Image.open(shop / "pictures" / name)))
        x = ((pixels / 255 - mean) / std).permute(2, 0, 1)[None]
        with torch.inference_mode():
            wanted = network(x).mean((2, 3))[0].numpy()
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


KILLED = """
import os, signal, sys
from ctrkit import extraction
from ctrkit.cli import main

extraction.PART_PICTURES = 8
add = extraction._Part.add

def add_or_die(part, batch, network):
    if part.end == 28:  # three parts are closed, the fourth is half done
        os.kill(os.getpid(), signal.SIGKILL)
    add(part, batch, network)

extraction._Part.add = add_or_die
main(sys.argv[1:])
"""


def test_killed_in_the_middle_then_run_again(shop: Path) -> None:
    counts = []
    for n in range(120):
        noise(1000 + n).save(shop / "pictures" / f"p{n}.png")
        counts.append((f"p{n}.png", n % 10))
    (shop / "pictures" / "p77.png").write_bytes(b"not a picture")
    write_vocabulary(shop, counts)
    assert extract(shop, out="undisturbed.h5").exit_code == 0
    given = ["--recipe", shop / "recipe.toml", "--pictures", shop / "pictures", "--convert", shop / "convert"]
    command = [sys.executable, "-c", KILLED, "extract-images", *given]
    command += ["--weights", shop / "weights.pth", "--out", shop / "features.h5"]
    killed = subprocess.run([str(part) for part in command], stderr=subprocess.DEVNULL)
    assert killed.returncode == -signal.SIGKILL
    assert not (shop / "features.h5").exists()
    assert len(list(shop.glob(".features.h5.parts-*/part-*.npz"))) == 3
    again = extract(shop)
    assert again.exit_code == 0
    assert "24 of 120 pictures were done before" in again.stderr
    for found, wanted in zip(read(shop / "features.h5"), read(shop / "undisturbed.h5"), strict=True):
        np.testing.assert_equal(found, wanted)
    assert sorted(leftovers(shop)) == ["features.h5", "features.h5.json", "features.h5.rejects.parquet"]
    assert pl.read_parquet(shop / "features.h5.rejects.parquet")["image"].to_list() == ["p77.png"]
