"""The run's story: how much data there was, what became of it, what was trained and how long it took."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import h5py
import polars as pl

from ctrkit import files
from ctrkit.errors import UserError

SPLITS = ("train", "valid", "test")
PART = 1 << 20
"""Pictures of features.h5 whose rows are in memory at a time."""


def data_facts(convert: Path) -> list[dict[str, Any]]:
    """Return a row a split of the samples that convert wrote, and one for all: counts of what is in it."""
    split_days = files.read_json(convert / "split.json")
    split_of = {day: split for split in SPLITS for day in split_days[split]}
    counted = (
        pl.scan_parquet(convert / "samples" / "*" / "*.parquet", hive_partitioning=True, try_parse_hive_dates=False)
        .select("day", "user", "ad", "click", "unseen_ad")
        .with_columns(split=pl.col("day").cast(pl.String).replace_strict(split_of, default=None))
        .filter(pl.col("split").is_not_null())
    )
    what = {
        "days": pl.col("day").n_unique(),
        "impressions": pl.len(),
        "clicks": pl.col("click").sum().cast(pl.Int64),
        "users": pl.col("user").n_unique(),
        "ads": pl.col("ad").n_unique(),
        "unseen": pl.col("unseen_ad").mean(),
    }
    by_split = {row["split"]: row for row in counted.group_by("split").agg(**what).collect().to_dicts()}
    rows = [by_split[split] for split in SPLITS if split in by_split]
    return [*rows, {"split": "all", **counted.select(**what).collect().row(0, named=True)}]


def rejects(convert: Path) -> list[tuple[str, int]]:
    """Return why convert rejected rows, and how many, most first."""
    counted = pl.scan_parquet(convert / "rejects.parquet").group_by("reason").agg(rows=pl.len())
    return list(counted.sort(["rows", "reason"], descending=[True, False]).collect().iter_rows())


def picture_facts(features: Path) -> list[tuple[str, str]]:
    """Return what features.h5 says of its pictures and of the network, as names and values."""
    try:
        with h5py.File(features) as f:
            vectors, pictures, attributes = f["features"].shape, len(f["row"]), dict(f.attrs)
            missing = sum(int((f["row"][n : n + PART] < 0).sum()) for n in range(0, pictures, PART))
    except (OSError, KeyError) as e:
        raise UserError(f"{features} is not a features.h5 of ctrkit extract-images: {e}") from None

    def name(attribute: str) -> str:
        return str(attributes.get(attribute, "unknown"))

    weights = name("weights")
    if weights.startswith("random"):
        weights += ": an untrained network, which sees colours and textures but knows no objects"
    return [
        ("Pictures", f"{pictures:,}, of these {missing:,} missing or unreadable"),
        ("Distinct pictures", f"{vectors[0]:,}"),
        ("Network", f"{name('backbone')}, layer {name('layer')}, {vectors[1]:,} numbers a picture"),
        ("Weights", weights),
    ]


def days(convert: Path) -> pl.DataFrame:
    """Return a row a day of samples: `day`, `split` String ("" for a day in none), `impressions`, `clicks` Int64."""
    split = files.read_json(convert / "split.json")
    split_of = {day: name for name in SPLITS for day in split[name]}
    counted = (
        pl.scan_parquet(convert / "samples" / "*" / "*.parquet", hive_partitioning=True, try_parse_hive_dates=False)
        .group_by(pl.col("day").cast(pl.String))
        .agg(impressions=pl.len().cast(pl.Int64), clicks=pl.col("click").cast(pl.Int64).sum())
        .sort("day")
        .collect(engine="streaming")
    )
    return counted.select(
        "day", pl.col("day").replace_strict(split_of, default="").alias("split"), "impressions", "clicks"
    )


def model_facts(models: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Return a row a model: what it is, what it looks at, how long it trained. None: its files do not say."""
    rows = []
    for name, model in models.items():
        train = files.read_json(model / "settings.json").get("train", {})
        sidecar = read_sidecar(model)
        counts = sidecar.get("counts", {})
        best = counts.get("best") or {}
        rows.append(
            {
                "variant": name,
                "model": str(train.get("model", "")),
                "looks_at": looks_at(train),
                "samples": best.get("samples"),
                "steps": counts.get("steps"),
                "best_step": best.get("step"),
                "samples_a_second": counts.get("samples a second"),
                "seconds": sidecar.get("seconds"),
            }
        )
    return rows


def looks_at(train: Mapping[str, Any]) -> str:
    """Say in words what the switches of a model's `[train]` table let it look at."""
    model = train.get("model")
    if model != "dicm":
        weighed = {"din": "ids, behaviours by activation unit", "base": "ids, behaviours summed", "lr": "ids, linear"}
        return weighed.get(str(model), "")
    parts = ["ids"] if train.get("ad_id") else ["ids but the ad's"]
    parts += ["the ad's picture"] * bool(train.get("ad_image"))
    if train.get("user_ids"):
        parts.append("behaviour ids" + (" by activation unit" if train["user_ids"] == "din" else ""))
    images = train.get("user_images")
    if images in (True, "simtier+pooled"):
        parts.append(f"the user's pictures ({train.get('pooling')})")
    if images in ("simtier", "simtier+pooled"):
        parts.append("counts of alike pictures")
    parts += ["pictures shuffled among the goods"] * bool(train.get("shuffle_pictures"))
    return ", ".join(parts)


def read_sidecar(output: Path) -> dict[str, Any]:
    """Return the sidecar of an output; empty where there is none."""
    path = files.sidecar_path(output)
    found: dict[str, Any] = files.read_json(path) if path.is_file() else {}
    return found


def stage_seconds(outputs: Mapping[str, Path | None]) -> list[tuple[str, float]]:
    """Return the seconds that each output took to make, as its sidecar says. `outputs`: name ("model din") → path."""
    found = []
    for name, path in outputs.items():
        sidecar = read_sidecar(path) if path is not None else {}
        if "seconds" in sidecar:
            variant = name.partition(" ")[2]
            found.append((f"{sidecar['stage']} {variant}".rstrip(), float(sidecar["seconds"])))
    return found


def tiles(
    rows: Sequence[Mapping[str, Any]],
    rejected: Sequence[tuple[str, int]],
    pictures: Sequence[tuple[str, str]],
    stages: Sequence[tuple[str, float]],
) -> list[tuple[str, str, str]]:
    """Return the run at a glance: (number, what it is, a remark) each."""
    out = []
    whole = next((row for row in rows if row["split"] == "all"), None)
    if whole is not None:
        rate = f"{whole['clicks'] / whole['impressions']:.1%} clicked" if whole["impressions"] else ""
        out.append((f"{whole['impressions']:,}", "impressions", rate))
        out.append((f"{whole['users']:,}", "users", ""))
        test = next((row for row in rows if row["split"] == "test"), None)
        new = f"{test['unseen']:.0%} of test impressions on new ones" if test and test["unseen"] is not None else ""
        out.append((f"{whole['ads']:,}", "ads", new))
    if pictures:
        number, _, rest = pictures[0][1].partition(", of these ")
        out.append((number, "pictures", rest if not rest.startswith("0 ") else ""))
    if rows:
        out.append((f"{sum(n for _, n in rejected):,}", "rows set aside", ""))
    if stages:
        out.append((duration(sum(seconds for _, seconds in stages)), "of work", "all stages added up"))
    return out


def duration(seconds: float) -> str:
    """Format a time: 0.4 s, 42 s, 3 min 20 s, 5 h 10 min."""
    whole = round(seconds)
    if whole < 1:
        return f"{seconds:.1f} s" if seconds >= 0.05 else "under 0.1 s"
    if whole < 60:
        return f"{whole} s"
    minutes, s = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {s} s"
    return f"{minutes // 60} h {minutes % 60} min"
