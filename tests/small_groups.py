"""Small groups of samples as plain Python values, and the same as a `Block` or as the files of `ctrkit group`."""

import functools
import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from ctrkit.batches import Block, Column, Ragged, Schema
from ctrkit.digests import Digests
from ctrkit.recipe import Feature, Recipe

Values = dict[str, Any]
Ints = npt.NDArray[np.int64]

# Two widths, a shared vocabulary of each sort, multi-hot features of each owner. The order is not alphabetical.
FEATURES: dict[str, Feature] = Recipe.model_validate(
    {
        "name": "small",
        "features": {
            "gender": {"of": "user", "width": 3},
            "tags": {"of": "user", "multi_hot": True, "vocab": "tag", "width": 4},
            "scene": {"of": "scene", "width": 3},
            "ad_id": {"of": "ad", "switch": "ad_id", "width": 4},
            "ad_goods": {"of": "ad", "vocab": "goods", "width": 4},
            "ad_tags": {"of": "ad", "multi_hot": True, "vocab": "tag", "width": 4},
            "ad_brand": {"of": "ad", "vocab": "brand", "width": 3},
            "ad_image": {"of": "ad", "kind": "image"},
            "goods": {"of": "behaviour", "width": 4},
            "brand": {"of": "behaviour", "width": 3},
            "colour": {"of": "behaviour", "width": 4},
            "image": {"of": "behaviour", "kind": "image"},
        },
    }
).features
SIZES = {"gender": 4, "tag": 6, "scene": 5, "ad_id": 8, "goods": 9, "brand": 5, "colour": 4, "image": 10}


@dataclass
class Group:
    """What a user's samples of a day share, and the samples."""

    user: Values
    behaviours: list[Values]
    samples: list[Values]
    group_id: int = 0


def random_groups(seed: int, n_samples: Sequence[int], n_behaviours: Sequence[int]) -> list[Group]:
    """Return groups of these numbers of samples and behaviours; all ids from 0 (missing) on, lists may be empty."""
    rng = np.random.default_rng(seed)
    sample_id = itertools.count(100)

    def draw(owners: tuple[str, ...]) -> Values:
        values: Values = {}
        for name, feature in FEATURES.items():
            if feature.of in owners:
                size = SIZES[feature.vocab]
                one: Any = int(rng.integers(size))
                values[name] = rng.integers(1, size, rng.integers(4)).tolist() if feature.multi_hot else one
        return values

    groups = []
    for n, (s, b) in enumerate(zip(n_samples, n_behaviours, strict=True)):
        samples = [
            {**draw(("ad", "scene")), "sample_id": next(sample_id), "click": int(rng.integers(2))} for _ in range(s)
        ]
        groups.append(Group(draw(("user",)), [draw(("behaviour",)) for _ in range(b)], samples, 50 + n))
    return groups


def some_groups(seed: int = 1) -> list[Group]:
    """Return seven groups: of one sample and of several, without behaviours (first and last too) and with some."""
    return random_groups(seed, [2, 1, 3, 1, 4, 1, 2], [0, 3, 5, 1, 0, 2, 0])


def alone(groups: Sequence[Group]) -> list[Group]:
    """Return a group for each sample, with its own copy of what its group shared."""
    return [Group(dict(g.user), [dict(b) for b in g.behaviours], [s], g.group_id) for g in groups for s in g.samples]


def to_block(groups: Sequence[Group], features: dict[str, Feature] | None = None) -> Block:
    """Return the groups as flat columns."""
    features = FEATURES if features is None else features

    def offsets(lengths: Sequence[int]) -> Ints:
        return np.array([0, *itertools.accumulate(lengths)], np.int64)

    def column(name: str, rows: Sequence[Values]) -> Column:
        if features[name].multi_hot:
            lists = [row[name] for row in rows]
            return Ragged(np.array([v for values in lists for v in values], np.int64), offsets([len(v) for v in lists]))
        return np.array([row[name] for row in rows], np.int64)

    samples = [s for g in groups for s in g.samples]
    behaviours = [b for g in groups for b in g.behaviours]

    def columns(owners: tuple[str, ...], rows: Sequence[Values]) -> dict[str, Column]:
        return {name: column(name, rows) for name, f in features.items() if f.of in owners}

    meta: dict[str, Column] = {n: np.array([s[n] for s in samples], np.int64) for n in ("sample_id", "click")}
    return Block(
        {"group_id": np.array([g.group_id for g in groups], np.int64), **columns(("user",), [g.user for g in groups])},
        {**meta, **columns(("ad", "scene"), samples)},
        columns(("behaviour",), behaviours),
        offsets([len(g.samples) for g in groups]),
        offsets([len(g.behaviours) for g in groups]),
    )


def write_groups(
    folder: Path,
    splits: dict[str, Sequence[Group]],
    features: dict[str, Feature] | None = None,
    sizes: dict[str, int] | None = None,
    *,
    block_groups: int = 4,
    part_groups: int = 10,
) -> Path:
    """Write the folder that `ctrkit group` would write: a user a group unless its values say otherwise.

    Of neighbours with the same `group_id` in a row group only the first carries user features and behaviours.
    """
    features, sizes = features or FEATURES, sizes or SIZES
    types: dict[str, pl.DataType] = {
        "user": pl.String(),
        "day": pl.Date(),
        "group_id": pl.Int64(),
        "common": pl.Int32(),
    }
    of_samples: dict[str, pl.DataType] = {"sample_id": pl.Int64(), "time": pl.Int64(), "ad": pl.String()}
    of_samples |= {"click": pl.Int8(), "unseen_ad": pl.Boolean()}
    for name, feature in features.items():
        one = pl.List(pl.UInt32()) if feature.multi_hot else pl.UInt32()
        if feature.of in ("ad", "scene"):
            of_samples[name] = one
        else:
            types[name] = pl.List(pl.UInt32()) if feature.of == "behaviour" else one
    types |= {name: pl.List(one) for name, one in of_samples.items()}
    shared = [name for name, feature in features.items() if feature.of in ("user", "behaviour")]
    for split, groups in splits.items():
        (folder / split).mkdir(parents=True)
        for part in range(0, len(groups), part_groups):
            own = groups[part : part + part_groups]
            rows = [_row(g, features, _carrier(own, i, block_groups)) for i, g in enumerate(own)]
            for i, row in enumerate(rows):
                if row["common"] != i % block_groups:
                    row |= {n: [] if isinstance(row[n], list) else 0 for n in shared}
            frame = pl.DataFrame(rows, schema=types)
            frame.write_parquet(folder / split / f"part-{part // part_groups:04}.parquet", row_group_size=block_groups)
    (folder / "counts").mkdir()
    counts = count(splits.get("train", []), features, sizes)
    for vocab, n in counts.items():
        frame = pl.DataFrame({"index": np.arange(len(n), dtype=np.uint32), "count": n.astype(np.uint64)})
        frame.write_parquet(folder / "counts" / f"{vocab}.parquet")
    plain = {name: feature.model_dump(mode="json") for name, feature in features.items()}
    schema = {"features": plain, "vocab_sizes": sizes, "vocab_digest": vocab_digest(), "block_groups": block_groups}
    (folder / "schema.json").write_text(json.dumps(schema), encoding="utf-8")
    return folder


def _carrier(groups: Sequence[Group], at: int, block: int) -> int:
    """Return the place in its row group of the row that carries what the group at `at` shares."""
    first = at
    while first % block and groups[first - 1].group_id == groups[at].group_id:
        first -= 1
    return first % block


def _row(group: Group, features: dict[str, Feature], common: int) -> Values:
    day = np.datetime64("2024-03-01").astype(object)
    row: Values = {"user": group.user.get("user", f"u{group.group_id}"), "day": day, "group_id": group.group_id}
    row["common"] = common
    row |= {"sample_id": [s["sample_id"] for s in group.samples], "time": [0] * len(group.samples)}
    row |= {"ad": [f"a{n}" for n in range(len(group.samples))], "unseen_ad": [False] * len(group.samples)}
    row |= {"click": [s["click"] for s in group.samples]}
    for name, feature in features.items():
        if feature.of == "user":
            row[name] = group.user[name]
        else:
            owners = group.behaviours if feature.of == "behaviour" else group.samples
            row[name] = [owner[name] for owner in owners]
    return row


def count(groups: Sequence[Group], features: dict[str, Feature], sizes: dict[str, int]) -> dict[str, Ints]:
    """Return vocabulary → [size]: the samples that contain each id, histories expanded."""
    counts = {vocab: np.zeros(size, np.int64) for vocab, size in sizes.items()}
    for group in groups:
        for sample in group.samples:
            named: set[tuple[str, int]] = set()
            for owner in (group.user, sample, *group.behaviours):
                for name in set(owner) & set(features):
                    value = owner[name]
                    named |= {(features[name].vocab, v) for v in (value if isinstance(value, list) else [value])}
            for vocab, index in named:
                counts[vocab][index] += index > 0
    return counts


def write_features(path: Path, images: Sequence[str], row: Sequence[int], vectors: npt.NDArray[Any]) -> None:
    """Write a features.h5."""
    with h5py.File(path, "w") as h5:
        h5.create_dataset("features", data=vectors.astype(np.float16))
        h5.create_dataset("image", data=np.array(images, dtype=object), dtype=h5py.string_dtype("utf-8"))
        h5.create_dataset("row", data=np.array(row, dtype=np.int64))
        h5.attrs["backbone"] = "none"


def write_image_vocabulary(convert: Path, images: Sequence[str], counts: Sequence[int]) -> None:
    """Write `convert/vocab/image.parquet`: the images have the indexes 2, 3, …

    By pyarrow: this module is imported before processes are forked, which polars' threads would not survive.
    """
    (convert / "vocab").mkdir(parents=True)
    types = {"value": pa.large_string(), "index": pa.uint32(), "count": pa.uint64()}
    columns = (images, range(2, 2 + len(images)), counts)
    table = pa.table([pa.array(c, t) for c, t in zip(columns, types.values(), strict=True)], names=list(types))
    pq.write_table(table, convert / "vocab" / "image.parquet")


def write_pictures_of_sizes(convert: Path) -> None:
    """Write the vocabulary `image` of `SIZES`: p0, p1, …, each seen once."""
    n = SIZES["image"] - 2
    write_image_vocabulary(convert, [f"p{i}" for i in range(n)], [1] * n)


@functools.cache
def vocab_digest() -> str:
    """Return the digest of the folder of vocabularies that `write_pictures_of_sizes` writes."""
    with tempfile.TemporaryDirectory() as folder:
        write_pictures_of_sizes(Path(folder))
        return Digests().of(Path(folder) / "vocab")


SCHEMA = Schema(FEATURES, SIZES, vocab_digest(), 4)
