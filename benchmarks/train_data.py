"""What `train.py` trains on: impressions in groups of 12, histories, ids of long tails; as a groups folder and as rows.

Seeded, and of no meaning. The groups folder is written by the writer of `ctrkit group`; `rows` gives the same samples
as padded arrays, which the peers need.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import polars as pl

from ctrkit.blocks import write_blocks

Ints = npt.NDArray[np.int64]
GROUP = 12
LONGEST, MEAN = 64, 32.6
CATEGORIES = 5_000
SIZES = (3, 7, 12, 24, 50, 120, 400, 1_000, 5_000, 20_000)
"""Vocabularies of the user's features; those of ad and scene are some of these."""
ONE_HOT = {
    "user": [f"user_{i}" for i in range(10)],
    "ad": [f"ad_{i}" for i in range(8)],
    "scene": [f"scene_{i}" for i in range(8)],
}
BLOCK_GROUPS = 2_000
FIRST = 2
"""The first index that means a value."""


@dataclass
class World:
    """Samples [S], groups [G], behaviours [B]; all ids are indexes."""

    goods: int
    sizes: dict[str, int]
    user_G: dict[str, Ints]
    sample_S: dict[str, Ints]
    history_B: Ints
    offsets: Ints
    category_V: Ints
    click_S: Ints


def world(impressions: int, goods: int, seed: int = 1) -> World:
    """Draw the data: goods by Zipf 1.2, histories Poisson 32.6 capped at 64, the other ids towards small ones."""
    rng = np.random.default_rng([seed, goods])
    groups = impressions // GROUP
    samples = groups * GROUP
    share_V = np.arange(1, goods + 1, dtype=np.float64) ** -1.2
    edges_V = np.cumsum(share_V / share_V.sum())

    def draw(n: int) -> Ints:
        return FIRST + np.minimum(np.searchsorted(edges_V, rng.random(n)), goods - 1)

    sizes = {name: SIZES[i % len(SIZES)] for names in ONE_HOT.values() for i, name in enumerate(names)}
    lengths = np.minimum(rng.poisson(MEAN, groups), LONGEST)
    columns = {
        name: FIRST + (size * rng.random(groups if name.startswith("user") else samples) ** 2).astype(np.int64)
        for name, size in sizes.items()
    }
    category_V = np.concatenate([[0, 1], FIRST + rng.integers(0, CATEGORIES, goods)])
    ad = draw(samples)
    sample_S = {n: columns[n] for n in (*ONE_HOT["ad"], *ONE_HOT["scene"])}
    return World(
        goods,
        {name: size + FIRST for name, size in sizes.items()},
        {n: columns[n] for n in ONE_HOT["user"]},
        {"ad_goods": ad, "ad_category": category_V[ad], **sample_S},
        draw(int(lengths.sum())),
        np.concatenate([[0], np.cumsum(lengths)]),
        category_V,
        (rng.random(samples) < 0.05 + 0.3 * (ad % 7 == 0)).astype(np.int64),
    )


def features(pictures: bool) -> dict[str, dict[str, Any]]:
    """Return `[features]` of the recipe that these data have."""
    out: dict[str, dict[str, Any]] = {n: {"of": of} for of, names in ONE_HOT.items() for n in names}
    if pictures:  # DICM: 27 features of user, ad and scene, and the pictures of ad and behaviours
        out |= {"ad_goods": {"of": "ad", "vocab": "goods", "switch": "ad_id"}}
        return out | {n: {"of": of, "kind": "image"} for n, of in (("ad_image", "ad"), ("image", "behaviour"))}
    out |= {f"ad_{n}": {"of": "ad", "vocab": n} for n in ("goods", "category")}
    return out | {n: {"of": "behaviour"} for n in ("goods", "category")}


def write_groups(data: World, folder: Path, *, pictures: int = 0, ungrouped: bool = False) -> None:
    """Write a groups folder, as `ctrkit group` would.

    pictures: of as many pictures every goods has one, instead of being known by id and category in histories.
    ungrouped: every sample is its own group, with its own copy of the user's features and history.
    """
    from ctrkit.recipe import Feature

    listed = {n: Feature(**f) for n, f in features(bool(pictures)).items()}
    sizes = {**data.sizes, "goods": data.goods + FIRST, "category": CATEGORIES + FIRST, "image": pictures + FIRST}
    of_group = np.repeat(np.arange(len(data.offsets) - 1), GROUP) if ungrouped else np.arange(len(data.offsets) - 1)
    each = 1 if ungrouped else GROUP
    rng = np.random.default_rng(7)
    order = rng.permutation(len(of_group))  # as `ctrkit group` shuffles the training groups

    def lists(values: Ints, offsets: Ints, dtype: pl.DataType) -> pl.Series:
        inner = pl.Series(values, dtype=dtype)
        index = pl.Series(np.repeat(np.arange(len(offsets) - 1), np.diff(offsets)))
        frame = pl.DataFrame({"i": index, "v": inner}).group_by("i", maintain_order=True).agg("v")
        every = pl.DataFrame({"i": np.arange(len(offsets) - 1)}).join(frame, on="i", how="left", maintain_order="left")
        return every["v"].fill_null([])

    behaviour = {"goods": data.history_B, "category": data.category_V[data.history_B]}
    behaviour["image"] = FIRST + (data.history_B - FIRST) % max(pictures, 1)
    sample = {**data.sample_S, "ad_image": FIRST + (data.sample_S["ad_goods"] - FIRST) % max(pictures, 1)}
    per_group = {n: lists(behaviour[n], data.offsets, pl.UInt32()) for n, f in listed.items() if f.of == "behaviour"}
    each_S = np.arange(0, len(data.click_S) + 1, each)
    columns = {
        "user": pl.Series(of_group).cast(pl.String),
        "day": pl.repeat(pl.date(2024, 3, 1), len(of_group), eager=True),
        "group_id": pl.Series(each_S[:-1], dtype=pl.Int64),
    }
    columns |= {n: pl.Series(data.user_G[n][of_group], dtype=pl.UInt32) for n in ONE_HOT["user"]}
    columns |= {n: s.gather(of_group) for n, s in per_group.items()}
    columns["sample_id"] = lists(np.arange(len(data.click_S)), each_S, pl.Int64())
    columns["click"] = lists(data.click_S, each_S, pl.Int8())
    columns |= {n: lists(sample[n], each_S, pl.UInt32()) for n, f in listed.items() if f.of in ("ad", "scene")}
    frame = pl.DataFrame(columns)[order]
    block = BLOCK_GROUPS * (GROUP // each)
    frame = frame.with_columns(common=pl.Series(np.arange(len(frame)) % block, dtype=pl.Int32))
    for part in ("train", "counts"):
        (folder / part).mkdir(parents=True)
    write_blocks(frame, folder / "train" / "part-0000.parquet", block)
    for vocab in {f.vocab or n for n, f in listed.items() if f.kind == "id"}:
        count_V = _count(data, listed, vocab, sizes[vocab])
        table = pl.DataFrame({"index": np.arange(len(count_V), dtype=np.uint32), "count": count_V.astype(np.uint64)})
        table.write_parquet(folder / "counts" / f"{vocab}.parquet")
    schema = {"features": {n: f.model_dump(mode="json") for n, f in listed.items()}, "order": list(listed)}
    for name, f in listed.items():
        schema["features"][name]["vocab"] = f.vocab or ("image" if f.kind == "image" else name)
    used = {f["vocab"] for f in schema["features"].values()}
    schema |= {"vocab_sizes": {v: n for v, n in sizes.items() if v in used}, "vocab_digest": "0" * 32}
    (folder / "schema.json").write_text(json.dumps(schema | {"block_groups": block, "negative_rate": 1.0}))


def _count(data: World, listed: dict[str, Any], vocab: str, size: int) -> Ints:
    """Return [size], the samples that name an index; one that a history has twice counts twice, which is close enough
    to measure speed with."""
    count_V = np.zeros(size, np.int64)
    for name, feature in listed.items():
        if (feature.vocab or name) != vocab:
            continue
        if feature.of == "behaviour":
            ids = data.history_B if name == "goods" else data.category_V[data.history_B]
            count_V += np.bincount(ids, minlength=size) * GROUP
        else:
            repeats = GROUP if feature.of == "user" else 1
            count_V += np.bincount((data.user_G | data.sample_S)[name], minlength=size) * repeats
    return count_V


def write_pictures(folder: Path, pictures: int, width: int) -> None:
    """Write features.h5 and convert/vocab/image.parquet."""
    (folder / "convert" / "vocab").mkdir(parents=True)
    names = [f"{i}.jpg" for i in range(pictures)]
    rng = np.random.default_rng(5)
    with h5py.File(folder / "features.h5", "w") as h5:
        out = h5.create_dataset("features", (pictures, width), np.float16)
        for start in range(0, pictures, 4096):
            out[start : start + 4096] = rng.random((min(4096, pictures - start), width), np.float32).astype(np.float16)
        h5.create_dataset("image", data=np.array(names, dtype=object), dtype=h5py.string_dtype("utf-8"))
        h5.create_dataset("row", data=np.arange(pictures))
        h5.attrs["backbone"] = "none"
    vocab = {"value": names, "index": range(FIRST, FIRST + pictures), "count": [1] * pictures}
    types = {"value": pl.String, "index": pl.UInt32, "count": pl.UInt64}
    pl.DataFrame(vocab, schema=types).write_parquet(folder / "convert" / "vocab" / "image.parquet")


def rows(data: World, n: int, seed: int = 3) -> dict[str, npt.NDArray[np.int32]]:
    """Return n samples in random order as the peers want them: one-hot columns [n], histories [n, 64] padded with 0
    behind, `length` and `click`."""
    s = np.random.default_rng(seed).permutation(len(data.click_S))[:n]
    g = s // GROUP
    out = {name: column[g] for name, column in data.user_G.items()} | {k: c[s] for k, c in data.sample_S.items()}
    out["length"], out["click"] = np.diff(data.offsets)[g], data.click_S[s]
    there = np.arange(LONGEST) < out["length"][:, None]
    place = np.minimum(data.offsets[g][:, None] + np.arange(LONGEST), len(data.history_B) - 1)
    out["hist_goods"] = np.where(there, data.history_B[place], 0)
    out["hist_category"] = np.where(there, data.category_V[out["hist_goods"]], 0)
    return {name: column.astype(np.int32) for name, column in out.items()}
