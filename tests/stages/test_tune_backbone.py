"""`ctrkit tune-backbone` through the command line: pictures whose colour says the category, and a small network."""

import colorsys
import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import polars as pl
import pytest
import torch
import torchvision
from click.testing import CliRunner, Result
from PIL import Image
from torch import Tensor

from ctrkit import pipeline, state_dict, tuning
from ctrkit.cli import main
from ctrkit.errors import Resumable
from ctrkit.labelled_pictures import AMBIGUOUS
from ctrkit.recipe import TuneBackbone
from tests.tiny_world import RECIPE as TINY

RECIPE = """
[tune-backbone]
model = "squeezenet1_1"
weights = "random"
seed = 3
size = 32
min_count = 5
valid_share = 0.2
epochs = 12
batch = 16
optimiser = "adamw"
learning_rate = 0.0003
head_rate = 1.0
patience = 0
threads = 1

[extract-images]
backbone = "squeezenet1_1:features"
size = 32
"""
HUES = {"red": 0.0, "yellow": 0.16, "green": 0.38, "blue": 0.6}
EACH = 40
OUTPUTS = ["categories.parquet", "head.pth", "metrics.jsonl", "pictures.parquet", "squeezenet1_1.pth"]


def disc(hue: float, seed: int) -> Image.Image:
    """A disc of about this hue, anywhere on grey noise."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(150, 256, (40, 40, 1)).repeat(3, axis=2)
    (x, y), r = rng.uniform(14, 26, 2), rng.uniform(9, 14)
    down, across = np.mgrid[:40, :40]
    colour = colorsys.hsv_to_rgb((hue + rng.uniform(-0.04, 0.04)) % 1, 1, rng.uniform(0.5, 0.9))
    pixels[(across - x) ** 2 + (down - y) ** 2 < r * r] = 255 * np.array(colour)
    return Image.fromarray(pixels.astype(np.uint8))


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe, 160 pictures in 4 categories, and their labels. Not to be changed."""
    folder = tmp_path_factory.mktemp("shop")
    (folder / "pictures").mkdir()
    rows = []
    for number in range(4 * EACH):
        name = list(HUES)[number % 4]
        disc(HUES[name], number).save(folder / "pictures" / f"{number}.png")
        rows.append((f"{number}.png", name))
    write_labels(folder / "labels.csv", rows)
    (folder / "recipe.toml").write_text(RECIPE)
    return folder


@pytest.fixture(scope="module")
def tuned(shop: Path) -> Path:
    """What tuning gives in that shop. Not to be changed."""
    result = tune(shop, shop / "tuned")
    assert result.exit_code == 0, result.output
    assert "compare pictures: 160/160 pictures" in result.stderr
    assert " pictures/s" in result.stderr
    return shop / "tuned"


def write_labels(path: Path, rows: list[tuple[str, str]]) -> None:
    path.write_text("image,category\n" + "".join(f"{image},{category}\n" for image, category in rows))


def tune(shop: Path, out: Path, *more: object, labels: Path | None = None) -> Result:
    given = ["--recipe", shop / "recipe.toml", "--pictures", shop / "pictures", "--out", out]
    given += ["--labels", labels or shop / "labels.csv", *more]
    return CliRunner().invoke(main, ["tune-backbone", *map(str, given)])


def sets(**keys: object) -> list[str]:
    return [word for key, value in keys.items() for word in ("--set", f"tune-backbone.{key}={value}")]


def best(folder: Path) -> dict[str, Any]:
    counts = json.loads(folder.with_name(folder.name + ".json").read_text())["counts"]
    found: dict[str, Any] = counts["best"]
    return found


def read_bytes(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


def small(path: Path, each: int = 6) -> Path:
    """Labels of the first few pictures only."""
    write_labels(path, [(f"{n}.png", list(HUES)[n % 4]) for n in range(4 * each)])
    return path


def test_categories_that_show_are_learned(tuned: Path) -> None:
    assert sorted(p.name for p in tuned.iterdir()) == OUTPUTS
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert [line["step"] for line in lines] == list(range(8, 97, 8))
    assert best(tuned) in lines
    assert best(tuned)["valid_top1"] == max(line["valid_top1"] for line in lines) >= 0.9
    assert best(tuned)["valid_top5"] == 1
    assert [p.name for p in tuned.parent.iterdir() if p.name.startswith(".")] == []


def test_shuffled_categories_are_not(shop: Path, tmp_path: Path) -> None:
    names = np.random.default_rng(1).permutation([name for name in HUES for _ in range(EACH)])
    write_labels(tmp_path / "shuffled.csv", [(f"{n}.png", str(name)) for n, name in enumerate(names)])
    result = tune(shop, tmp_path / "tuned", *sets(epochs=6), labels=tmp_path / "shuffled.csv")
    assert result.exit_code == 0, result.output
    assert best(tmp_path / "tuned")["valid_top1"] <= 0.5  # the best of 6 epochs on 32 pictures, by luck
    assert "always the most frequent category: top-1 0.250" in result.stderr


def whole_network(folder: Path) -> torchvision.models.SqueezeNet:
    """The tuned network, put together by torchvision alone."""
    network = torchvision.models.squeezenet1_1(weights=None, num_classes=4).eval()
    parts = [torch.load(folder / name, weights_only=True) for name in ("squeezenet1_1.pth", "head.pth")]
    assert parts[1].keys() == {"classifier.1.weight", "classifier.1.bias"}
    assert not parts[0].keys() & parts[1].keys()
    network.load_state_dict(parts[0] | parts[1], strict=True)
    return network


def as_seen(folder: Path, images: list[str]) -> Tensor:
    """The pictures as extract-images sees them: shorter side to 37, centre 32 × 32."""
    seen = []
    for image in images:
        pixels = Image.open(folder / image).resize((37, 37), Image.Resampling.BILINEAR)
        seen.append(np.asarray(pixels)[2:34, 2:34] / 255)
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.from_numpy((np.stack(seen) - mean) / std).permute(0, 3, 1, 2).float()


def test_the_kept_network_has_the_accuracy_that_is_told(shop: Path, tuned: Path) -> None:
    categories = pl.read_parquet(tuned / "categories.parquet")
    assert categories.to_dict(as_series=False) == {
        "index": [0, 1, 2, 3],
        "category": ["blue", "green", "red", "yellow"],
        "train": [32] * 4,
        "valid": [8] * 4,
    }
    told = pl.read_parquet(tuned / "pictures.parquet")
    assert told.select("image", "category").equals(pl.read_csv(shop / "labels.csv"))
    assert told["split"].value_counts().sort("split")["count"].to_list() == [128, 32]
    valid = told.filter(pl.col("split") == "valid")
    with torch.inference_mode():
        guess = whole_network(tuned)(as_seen(shop / "pictures", valid["image"].to_list())).argmax(1)
    right = categories["category"].gather(guess.numpy()) == valid["category"]
    assert right.mean() == best(tuned)["valid_top1"]


def extract(shop: Path, weights: Path, out: Path, *more: str) -> Result:
    given = ["--recipe", shop / "recipe.toml", "--pictures", shop / "pictures", "--all", "--out", out]
    return CliRunner().invoke(main, ["extract-images", *map(str, [*given, "--weights", weights, *more])])


@pytest.mark.parametrize("name", [".", "squeezenet1_1.pth"])
def test_extract_images_takes_it(shop: Path, tuned: Path, tmp_path: Path, name: str) -> None:
    result = extract(shop, tuned / name, tmp_path / "f.h5")
    assert result.exit_code == 0, result.output
    with h5py.File(tmp_path / "f.h5") as h5:
        row = dict(zip((image.decode() for image in h5["image"][:]), h5["row"][:].tolist(), strict=True))
        vectors = h5["features"][:]
    with torch.inference_mode():
        wanted = whole_network(tuned).features(as_seen(shop / "pictures", ["7.png", "8.png"])).mean((2, 3))
    np.testing.assert_allclose(vectors[[row["7.png"], row["8.png"]]], wanted.numpy(), rtol=0.01, atol=0.02)


def test_the_last_layer_cannot_be_mistaken_for_imagenets(shop: Path, tuned: Path, tmp_path: Path) -> None:
    result = extract(shop, tuned, tmp_path / "f.h5", "--set", "extract-images.backbone=squeezenet1_1:classifier.1")
    assert result.exit_code == 1
    assert "no weights for 2 of the 52 tensors" in result.output
    assert "classifier.1.bias" in result.output
    assert tuning.start(TuneBackbone(weights="random")).head == ["classifier.6.weight", "classifier.6.bias"]  # fc8


KILLED = """
import os, signal, sys
from ctrkit import tuning
from ctrkit.cli import main

train = tuning.Tuner._train

def train_or_die(tuner, *batch):
    if tuner.step == 7:  # the second epoch is half done
        os.kill(os.getpid(), signal.SIGKILL)
    train(tuner, *batch)

tuning.Tuner._train = train_or_die
main(sys.argv[1:])
"""


def test_killed_in_the_middle_of_an_epoch_then_run_again(shop: Path, tmp_path: Path) -> None:
    labels, few = small(tmp_path / "labels.csv", each=25), sets(epochs=3)
    assert tune(shop, tmp_path / "undisturbed", *few, labels=labels).exit_code == 0
    given = ["--recipe", shop / "recipe.toml", "--pictures", shop / "pictures", "--labels", labels]
    given += ["--out", tmp_path / "tuned", *few, *sets(checkpoint_minutes=1e-6)]
    command = [sys.executable, "-c", KILLED, "tune-backbone", *map(str, given)]
    killed = subprocess.run(command, capture_output=True, text=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert not (tmp_path / "tuned").exists()
    result = tune(shop, tmp_path / "tuned", *few, labels=labels)  # how often it is kept does not count
    assert result.exit_code == 0, result.output
    assert "7 of 15 steps were done before" in result.stderr
    assert "look at pictures" not in result.stderr
    assert read_bytes(tmp_path / "tuned") == read_bytes(tmp_path / "undisturbed")
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_checkpoints_of_other_work_are_not_taken_up(shop: Path, tmp_path: Path) -> None:
    labels = small(tmp_path / "labels.csv")
    old = tmp_path / ".tuned.checkpoint-0123456789abcdef"
    old.mkdir()
    (old / "last.pt").write_bytes(b"of another run")
    result = tune(shop, tmp_path / "tuned", *sets(epochs=1), labels=labels)
    assert result.exit_code == 0, result.output
    assert "were done before" not in result.stderr
    assert not old.exists()


def test_pictures_that_are_left_out(shop: Path, tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    rows = []
    for n in range(24):  # six of each hue
        (pictures / f"{n}.png").write_bytes((shop / "pictures" / f"{n}.png").read_bytes())
        rows.append((f"{n}.png", list(HUES)[n % 4]))
    for copy in range(30):  # one red picture under many ids more
        (pictures / f"copy{copy}.png").write_bytes((shop / "pictures" / "0.png").read_bytes())
        rows.append((f"copy{copy}.png", "red"))
    for n, name in enumerate(["red", "yellow"]):  # a picture for want of another
        disc(0.8, 999).save(pictures / f"none{n}.png")
        rows.append((f"none{n}.png", name))
    for n in range(5):  # five ids of one picture are no category of five
        disc(0.5, 555).save(pictures / f"cyan{n}.png")
        rows.append((f"cyan{n}.png", "cyan"))
    whole = (shop / "pictures" / "40.png").read_bytes()
    (pictures / "half.png").write_bytes(whole[: len(whole) // 2])
    rows += [("gone.png", "red"), ("half.png", "green"), ("23.png", ""), ("pink.png", "pink")]
    write_labels(tmp_path / "labels.csv", rows)
    given = ["--pictures", pictures, *sets(epochs=1)]
    result = tune(shop, tmp_path / "tuned", *given, labels=tmp_path / "labels.csv")
    assert result.exit_code == 0, result.output
    told = pl.read_parquet(tmp_path / "tuned" / "pictures.parquet")
    assert told.height == len(rows)
    why = dict(zip(told["image"], told["reason"], strict=True))
    assert why.pop("gone.png") == "missing"
    assert why.pop("half.png").startswith("broken: ")
    assert why["none0.png"] == why["none1.png"] == AMBIGUOUS
    assert why["cyan0.png"] == why["pink.png"] == "its category has fewer than 5 pictures"
    assert told.filter(pl.col("image") == "23.png")["reason"].to_list() == [None, "no category"]
    assert told.filter(pl.col("image") == "0.png")["split"].is_in(["train", "valid"]).all()
    same = told.filter(pl.col("image").str.starts_with("copy") | (pl.col("image") == "0.png"))
    assert same["split"].n_unique() == 1
    categories = pl.read_parquet(tmp_path / "tuned" / "categories.parquet")
    assert categories.select("train", "valid").rows() == [(5, 1)] * 4
    counts = json.loads((tmp_path / "tuned.json").read_text())["counts"]
    assert {k: v for k, v in counts.items() if k not in ("weights", "best")} == {
        "labelled pictures": 65,
        "rows without a picture": 0,
        "without a category": 1,
        "unusable pictures": 2,
        "pictures in several categories": 1,
        "categories": 4,
        "categories with too few pictures": 2,
        "training pictures": 20,
        "validation pictures": 4,
        "epochs": 1,
        "validation pictures of the most frequent category": 0.25,
    }
    result = tune(shop, tmp_path / "tuned", *given, *sets(max_bad_rate=0.01), labels=tmp_path / "labels.csv")
    assert result.exit_code == 1
    assert "2 of 63 labelled pictures (3.2%) cannot be used" in result.output
    assert "1 × missing (such as gone.png)" in result.output


def test_labels_of_the_recipes_goods(shop: Path, tmp_path: Path) -> None:
    table = '[convert.goods]\nfiles = "g.tsv.gz"\ncolumns = { goods = "id" }\n'
    (tmp_path / "recipe.toml").write_text(RECIPE + table)
    (tmp_path / "raw").mkdir()
    lines = "".join(f"{n}\t{list(HUES)[n % 4]} > disc > {n}\n" for n in range(24))
    pl.read_csv(f"id\tpath\n{lines}".encode(), separator="\t").write_csv(
        tmp_path / "raw" / "g.tsv.gz", separator="\t", compression="gzip"
    )
    command = ["tune-backbone", "--recipe", tmp_path / "recipe.toml", "--pictures", shop / "pictures"]
    command += ["--raw", tmp_path / "raw", "--out", tmp_path / "tuned"]
    command += sets(image="{goods}.png", category="path", separator=">", epochs=1)
    result = CliRunner().invoke(main, list(map(str, command)))
    assert result.exit_code == 0, result.output
    assert pl.read_parquet(tmp_path / "tuned" / "categories.parquet")["category"].to_list() == sorted(HUES)
    assert pl.read_parquet(tmp_path / "tuned" / "pictures.parquet")["image"].head(2).to_list() == ["0.png", "1.png"]


def test_first_layers_stay_as_they_are(shop: Path, tmp_path: Path) -> None:
    """A network with batch norms, whose running means must not move either."""
    labels = small(tmp_path / "labels.csv")
    torch.manual_seed(1)
    begin = torchvision.models.resnet18(weights=None).state_dict()
    torch.save(begin, tmp_path / "start.pth")
    more = [*sets(model="resnet18", epochs=1, freeze="layer1"), "--weights", tmp_path / "start.pth"]
    result = tune(shop, tmp_path / "tuned", *more, labels=labels)
    assert result.exit_code == 0, result.output
    end = torch.load(tmp_path / "tuned" / "resnet18.pth", weights_only=True)
    assert end.keys() == {name for name in begin if not name.startswith("fc")}
    same = {name for name, tensor in end.items() if torch.equal(tensor, begin[name])}
    assert same == {name for name in end if name.startswith(("conv1", "bn1", "layer1"))}


def test_mixed_precision_keeps_float32_weights(shop: Path, tmp_path: Path) -> None:
    labels = small(tmp_path / "labels.csv")
    result = tune(shop, tmp_path / "tuned", *sets(epochs=1, dtype="bfloat16"), labels=labels)
    assert result.exit_code == 0, result.output
    state = torch.load(tmp_path / "tuned" / "squeezenet1_1.pth", weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float32}


def test_training_ends_early_without_progress(shop: Path, tmp_path: Path) -> None:
    labels = small(tmp_path / "labels.csv")
    slow = sets(epochs=9, patience=2, learning_rate=1e-30, weight_decay=0.0)
    result = tune(shop, tmp_path / "tuned", *slow, labels=labels)
    assert result.exit_code == 0, result.output
    lines = (tmp_path / "tuned" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 3
    assert best(tmp_path / "tuned")["epoch"] == 1


def test_a_loss_that_is_no_number(shop: Path, tmp_path: Path) -> None:
    labels = small(tmp_path / "labels.csv")
    result = tune(shop, tmp_path / "tuned", *sets(learning_rate=1e30), labels=labels)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert "is not a finite number" in result.output
    assert "Lower tune-backbone.learning_rate (now 1e+30)" in result.output
    assert not (tmp_path / "tuned").exists()


def test_a_full_disk_is_told_and_can_be_mended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OSError, match="No space") as full:
        state_dict.write(Path("/dev/full"), {"x": torch.zeros(1 << 20)})
    assert full.value.errno == errno.ENOSPC
    monkeypatch.setattr(torch, "save", lambda *_: Path("/dev/full").write_bytes(bytes(1 << 20)))
    tuner = object.__new__(tuning.Tuner)
    tuner.folder = tmp_path
    with pytest.raises(Resumable, match="the disk is full"):
        tuner._write("last.pt", {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "code", "said"),
    [
        (sets(model="squeezenet1_2"), 2, "no such classification model; did you mean 'squeezenet1_1'"),
        (sets(freeze="features.33"), 2, "squeezenet1_1 has no such layer; did you mean 'features.3'"),
        (sets(freeze="classifier"), 2, "leaves nothing to learn"),
        (sets(size=32, model="inception_v3"), 2, "tune-backbone.size = 32: inception_v3 cannot take such pictures"),
        (sets(weights="nowhere.pth"), 1, "'nowhere.pth' is neither 'published' nor 'random'"),
        (sets(category="kind"), 1, "has no column 'kind'; known: category, image. Name the column with --set"),
        (sets(image="{goods}.png"), 1, "has no column 'goods'"),
        (sets(min_count=41), 1, "0 categories with at least tune-backbone.min_count = 41 pictures"),
        (sets(device="toaster"), 2, "tune-backbone.device = 'toaster' is not a device"),
        (("--set", "extract-images.template={image}.jpg"), 1, "160 × missing (such as 0.png)"),
        (("--labels", "nowhere.csv"), 1, "--labels nowhere.csv is not a file"),
        (("--weights", "LABELS"), 1, "is not a state dict that torch can load"),
    ],
)
def test_mistakes_are_told(shop: Path, tmp_path: Path, more: tuple[str, ...], code: int, said: str) -> None:
    result = tune(shop, tmp_path / "tuned", *(shop / "labels.csv" if word == "LABELS" else word for word in more))
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit)
    assert said in result.output
    assert not (tmp_path / "tuned").exists()


def test_neither_labels_nor_raw(shop: Path, tmp_path: Path) -> None:
    command = ["tune-backbone", "--recipe", shop / "recipe.toml", "--pictures", shop / "pictures"]
    for raw, told in (([], ""), (["--raw", shop], "(and the recipe has no [convert.goods])")):
        result = CliRunner().invoke(main, list(map(str, [*command, "--out", tmp_path / "tuned", *raw])))
        assert result.exit_code == 2
        assert "Give --labels FILE" in result.output
        assert told in result.output


def test_weights_that_do_not_fit(shop: Path, tmp_path: Path) -> None:
    state = torchvision.models.squeezenet1_1(weights=None).state_dict()
    torch.save({name: tensor for name, tensor in state.items() if "features.3" not in name}, tmp_path / "w.pth")
    result = tune(shop, tmp_path / "tuned", "--weights", tmp_path / "w.pth")
    assert result.exit_code == 1
    assert "no weights for 6 of the 50 tensors of squeezenet1_1 before its last layer" in result.output
    torch.save(state | {"features.0.bias": torch.zeros(3)}, tmp_path / "w.pth")
    result = tune(shop, tmp_path / "tuned", "--weights", tmp_path / "w.pth")
    assert result.exit_code == 1
    assert "does not fit squeezenet1_1: features.0.bias is [3], not [64]" in result.output


def test_in_a_run_only_where_a_variant_asks_for_it(tmp_path: Path) -> None:
    asking = '[variants.vgg16-tuning.extract-images]\nweights = "tuned"\n'
    chains = {}
    for name, text in (("plain", TINY), ("asking", TINY + asking)):
        (tmp_path / f"{name}.toml").write_text(text.replace('name = "tiny"', f'name = "{name}"'))
        setting = pipeline.Setting(str(tmp_path / f"{name}.toml"), None, "start.pth", (), Path("runs"))
        chains[name] = pipeline.Graph(setting)
    assert "tune-backbone" not in [step.stage for step in chains["plain"].steps]
    steps = {step.output: step for step in chains["asking"].steps}
    step = steps[Path("runs/asking/vgg16-tuning/backbone")]
    assert [need.stage for need in step.needs] == ["simulate"]
    assert step.options[-2:] == ("--weights", "start.pth")
    features = steps[Path("runs/asking/vgg16-tuning/features.h5")]
    assert step in features.needs
    assert features.options[-2:] == ("--weights", str(step.output))
    assert steps[Path("runs/asking/features.h5")].options[-2:] == ("--weights", "start.pth")


@pytest.mark.parametrize(
    ("pictures", "batch", "ends"),
    [
        (54, 32, [32, 54]),
        (64, 32, [32, 64]),
        (65, 32, [32, 65]),
        (33, 32, [33]),
        (5, 32, [5]),
        (3, 2, [3]),
        (4, 3, [4]),
    ],
)
def test_every_picture_trains_in_every_epoch(pictures: int, batch: int, ends: list[int]) -> None:
    assert tuning.batch_ends(pictures, batch) == ends


def test_rows_without_a_picture_are_listed(shop: Path, tmp_path: Path) -> None:
    labels = small(tmp_path / "labels.csv")
    labels.write_text(labels.read_text() + ",red\n,red\n")
    result = tune(shop, tmp_path / "tuned", *sets(epochs=1, max_bad_rate=0.1), labels=labels)
    assert result.exit_code == 0, result.output
    assert "2 rows of" in result.stderr
    table = pl.read_parquet(tmp_path / "tuned" / "pictures.parquet")
    rows = table.filter(pl.col("image").is_null()).rows()
    assert rows == [(None, "red", None, "the row names no picture")] * 2
    # 24 pictures of which 4 validate: batches of 16 and 4.
    assert json.loads((tmp_path / "tuned" / "metrics.jsonl").read_text())["step"] == 2
    counts = json.loads((tmp_path / "tuned.json").read_text())["counts"]
    assert (counts["labelled pictures"], counts["rows without a picture"]) == (24, 2)
    told = tune(shop, tmp_path / "tuned", *sets(epochs=1, max_bad_rate=0.05), labels=labels)
    assert told.exit_code == 1
    assert "2 of 26 labelled pictures (7.7%) cannot be used" in told.output
    assert "2 × the row names no picture" in told.output


def test_labels_or_raw(shop: Path, tmp_path: Path) -> None:
    told = tune(shop, tmp_path / "tuned", "--raw", tmp_path)
    assert told.exit_code == 2
    assert "give one of the two" in told.output
