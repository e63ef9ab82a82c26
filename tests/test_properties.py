"""convert, select-clicks and group on random small logs, through the command line, against tests/reference_data.py.

The examples are the same in every run. EXAMPLES=20 tries twenty times as many, new ones each time,
and looks for a smaller one where one fails.
"""

import csv
import datetime
import gzip
import io
import itertools
import json
import math
import os
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import zstandard
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from ctrkit import parquet_footer, pieces
from tests import reference_data as reference
from tests import shop
from tests.reference_data import EXTRA, Converted, Refused, Row, Table, World

MORE = int(os.environ.get("EXAMPLES", "0"))


def examples(n: int) -> settings:
    return settings(
        max_examples=n * (MORE or 1),
        derandomize=not MORE,
        deadline=None,
        database=None,
        phases=[Phase.generate, *([Phase.shrink] if MORE else [])],
        suppress_health_check=list(HealthCheck),
    )


# --- random logs ---

ZONES = [
    ("UTC", datetime.date(2024, 3, 1)),
    ("Asia/Shanghai", datetime.date(2024, 2, 27)),
    ("America/New_York", datetime.date(2024, 3, 8)),  # clocks go forward on the 10th
    ("America/New_York", datetime.date(2024, 11, 1)),  # and back on the 3rd
    ("Australia/Lord_Howe", datetime.date(2024, 4, 5)),  # back by half an hour on the 7th
    ("America/Havana", datetime.date(2024, 3, 8)),  # the 10th begins at one o'clock
    ("America/Havana", datetime.date(2024, 11, 1)),  # the 3rd has its first hour twice
    ("America/St_Johns", datetime.date(2010, 11, 5)),  # the 7th begins twice: back to 23:01 at 00:01
]
USERS = ["u1", "u1", "007", "ü 2"]
ADS = ["a1", "a1", "a2", "a3", "0x1"]
GOODS = ["g1", "g1", "g2", "g3", "é,\"'"]
TEXTS = ["", "x", "X", "y", "01", "1.0", "1", " s ", 'q"q', "a,b", "two\nlines", "ü", "中文" * 11]
DAYS = 5
MILLISECONDS = [0, 0, 0, 1, 3_600_000, 43_200_000, 43_200_000, 86_399_999, 90_000_000]
"""After a midnight; some are the next day's where a day is short."""


def moment(zone: str, first: datetime.date) -> st.SearchStrategy[int]:
    starts = [reference.midnight(reference.days_later(first, n), zone) for n in range(DAYS)]
    after = st.one_of(*4 * [st.sampled_from(MILLISECONDS)], st.integers(0, 86_399_999))
    return st.tuples(st.sampled_from(starts), after).map(sum)


def time_text(time: int, unit: str, zone: str) -> str:
    if unit == "iso":
        return reference.local(time, zone if time % 2 else "UTC").isoformat()
    return str(time) if unit == "ms" else f"{time // 1000}.{time % 1000:03}" if time % 1000 else str(time // 1000)


@st.composite
def worlds(draw: st.DrawFn) -> World:
    """Draw a recipe and its tables."""
    zone, first = draw(st.sampled_from(ZONES))
    unit = draw(st.sampled_from(["s", "ms", "iso"]))
    mode = draw(st.sampled_from(["id", "pair", "label"]))
    moments = moment(zone, first)
    bad = draw(st.sampled_from([0, 0, 0.5]))
    null_values = draw(st.sampled_from([[], ["NULL", "x"]]))

    def rows(strategy: st.SearchStrategy[Row], most: int) -> list[Row]:
        least = draw(st.sampled_from([1, most // 3, most // 2]))
        return draw(st.lists(strategy, min_size=max(least, 1), max_size=most))

    def row(**cells: st.SearchStrategy[Any]) -> st.SearchStrategy[Row]:
        return st.fixed_dictionaries(cells)

    def damaged(good: st.SearchStrategy[Any], wrong: list[str]) -> st.SearchStrategy[Any]:
        """Mostly good cells."""
        return st.integers(0, 19).flatmap(lambda n: st.sampled_from(wrong) if n < 2 * bad else good)

    def time(good: st.SearchStrategy[int]) -> st.SearchStrategy[str]:
        wrong = ["", "noon", "-1", "99999999999999999", "nan", "2024-03-01T00:00:00"]
        return damaged(good.map(lambda t: time_text(t, unit, zone)), wrong)

    user, ad = damaged(st.sampled_from(USERS), [""]), damaged(st.sampled_from(ADS), [""])
    number = st.sampled_from(["", "0", "1", "1.5", "2", "2.25", "-3", "1e3", "0.001", "many"])
    impression = {
        "user": user,
        "ad": ad,
        "time": time(moments),
        "position": st.sampled_from(TEXTS),
        "place": st.sampled_from(["x", "y", "NULL", ""]),
        "clicked": damaged(st.sampled_from(["0", "1"]), ["", "2"]),
        "hobby": st.sampled_from(["", "x", "x|y", "|y||x|", "z"]),
        "number": number,
    }
    tags = st.sampled_from(["", "red", "new|red", "red|red"])
    of_ad = {"goods": st.sampled_from(["", *GOODS]), "tags": tags, "price": number}
    with_ads = draw(st.integers(0, 3)) > 0
    impression |= {} if with_ads else of_ad
    if mode == "id" or draw(st.integers(0, 2)) == 0:
        impression["id"] = damaged(st.integers(0, 30).map(lambda n: f"i{n}"), [""])
    options: dict[str, Any] = {"time_zone": zone, "time_unit": unit, "max_reject_rate": 1.0}
    tables = {"impressions": rows(row(**impression), 25)}
    for again in draw(st.lists(st.sampled_from(tables["impressions"]), max_size=6)):
        new = {c: draw(impression[c]) for c in ("position", "clicked", "id") if c in impression}
        tables["impressions"].append(again | new)
    label = None
    if mode == "label":
        options["label"] = draw(st.sampled_from(list(LABELS)))
        label = LABELS[options["label"]]
    elif mode == "id":
        tables["clicks"] = rows(row(id=damaged(st.integers(0, 34).map(lambda n: f"i{n}"), [""])), 16)
    else:
        window = options["attribution_window"] = draw(st.sampled_from([0.0, 1.0, 3600.0, 5400.5]))
        seen = [(r["user"], r["ad"], reference.time_of(str(r["time"]), unit)) for r in tables["impressions"]]
        delays = [-1, 0, 1, 1000, 60_000, round(window * 1000), round(window * 1000) + 1]
        after = st.tuples(st.sampled_from(seen), st.sampled_from(delays)).map(
            lambda c: {"user": c[0][0], "ad": c[0][1], "time": time_text((c[0][2] or 0) + c[1], unit, zone)}
        )
        tables["clicks"] = rows(st.one_of(after, row(user=user, ad=ad, time=time(moments))), 16)
    if draw(st.booleans()):
        options["drop_repeats"] = draw(st.sampled_from([False] * 9 + [True] if "id" in impression else [False, True]))
    tables["users"] = rows(row(user=user, gender=st.sampled_from([*TEXTS, "NULL"])), 4)
    if with_ads:
        tables["ads"] = rows(row(ad=ad, **of_ad), 5)
    tables["goods"] = rows(row(goods=damaged(st.sampled_from(GOODS), [""]), category=st.sampled_from(TEXTS)), 5)
    with_goods = draw(st.integers(0, 3)) > 0
    behaviour = {"user": user, "time": time(moments), "type": st.sampled_from(["click", "click", "cart", "fav", ""])}
    if draw(st.booleans()):
        behaviour["dwell"] = st.sampled_from(["", "", "5", "5", "0", "4.999", "30.125", "-1", "x"])
    behaviour |= {"goods": damaged(st.sampled_from(GOODS), [""])} if with_goods else {"kind": st.sampled_from("kl ")}
    tables["behaviours"] = rows(row(**behaviour), 60)

    least = {"min_count": draw(st.integers(1, 3))}
    limit = draw(st.sampled_from([{}, {"top": 1}, {"top": 3}, {"hash_buckets": 1}, {"hash_buckets": 1000}]))
    tag = {"multi_hot": True, "vocab": "tag"} | draw(st.sampled_from([{}, {"min_count": 2}, {"hash_buckets": 5}]))
    edges = draw(st.sampled_from([[0], [0, 1.5, 2], [-10, 0.5, 1000, 2000]]))
    features: dict[str, Any] = {
        "gender": {"of": "user"} | least,
        "user_id": {"of": "user", "column": "user"},
        "ad_id": {"of": "ad", "column": "ad"} | least,
        "ad_goods": {"of": "ad", "column": "goods", "vocab": "goods"},
        "ad_tags": {"of": "ad", "column": "tags"} | tag,
        "ad_image": {"of": "ad", "kind": "image", "column": "{goods}.jpg"},
        "price": {"of": "ad", "kind": "number", "edges": edges},
        "number": {"of": "scene", "kind": "number", "edges": edges, "vocab": "price"},
        "hobby": {"of": "scene"} | tag,
        "position": {"of": "scene"} | limit,
        "place": {"of": "scene"} | least,
        "hour": {"of": "scene"},
        "weekday": {"of": "scene"},
        "slot": {"of": "scene", "column": "{weekday}-{hour}"},
        "cross": {"of": "scene", "column": "{place}/{gender}/{category}"} | limit,
    }
    if with_goods:
        features["goods"] = {"of": "behaviour"}
        features["category"] = {"of": "behaviour"} | limit
        features["way"] = {"of": "behaviour", "column": "{type} {goods} {category}"} | least
        features["image"] = {"of": "behaviour", "kind": "image", "column": "{goods}.jpg"}
    else:
        features["kind"] = {"of": "behaviour"} | least
        features["type"] = {"of": "behaviour"}
    select = {
        "window_days": draw(st.sampled_from([1, 2, 3, 14, "all"])),
        "min_dwell": draw(st.sampled_from([0.0, 5.0])),
        "max_behaviours": draw(st.sampled_from([1, 2, 3, 50])),
        "dwell_scale": draw(st.sampled_from([30.0, 2.5])),
        "half_life_days": draw(st.sampled_from([7.0, 1.0, 0.1])),
        "types": draw(st.sampled_from([[], [], ["click", "cart"]])),
        "type_weights": draw(st.sampled_from([{}, {"cart": 3.0, "fav": 0.5}, {"click": 0.0, "cart": 0.0}])),
    }
    recipe = {
        "workers": 1,
        "convert": options | {"partitions": draw(st.sampled_from([0, 1, 3]))},
        "split": {"test": draw(st.integers(0, 2)), "valid": draw(st.integers(0, 1))},
        "features": features,
        "select-clicks": select,
        "group": {"block_groups": draw(st.sampled_from([1, 3, 2000])), "max_samples": draw(st.sampled_from([1, 2, 9]))},
    }
    where: dict[str, Callable[[Row], bool]] = {}
    world = World(recipe, {s: Table([], [("", rows)]) for s, rows in tables.items()}, where, label)
    spread(draw, world, null_values, damage=bad > 0)
    if "header" not in recipe["convert"]["behaviours"] and draw(st.integers(0, 3)) == 0:
        recipe["convert"]["behaviours"]["where"] = "type <> 'fav'"
        where["behaviours"] = lambda r: r["type"] not in ("", "fav")
    return world


def as_int(row: Row) -> int | None:
    return None if row["clicked"] == "" else int(str(row["clicked"]))


LABELS: dict[str, Callable[[Row], object]] = {
    "clicked": as_int,
    "clicked = 1": lambda r: None if as_int(r) is None else as_int(r) == 1,
    "clicked > 0": lambda r: None if as_int(r) is None else as_int(r) != 0,
}
FORMATS = ["csv", "tsv", "jsonl", "parquet", "csv.gz", "tsv.zst", "jsonl.gz", "jsonl.zst", "csv.zst"]
ODD = [{"separator": ";"}, {"separator": "::"}, {"encoding": "gbk"}, {"encoding": "latin-1"}, {"header": False}]


def spread(draw: st.DrawFn, world: World, null_values: list[str], *, damage: bool) -> None:
    """Deal each table's rows to files of random formats, and say in the recipe how to read them."""
    for source, table in world.tables.items():
        rows = table.files[0][1]
        columns = list(rows[0])
        options: dict[str, Any] = {"null_values": null_values} if null_values else {}
        # SQL sees the cells of text files as numbers, so all files of the labelled log are of one sort.
        labelled = source == "impressions" and world.label is not None
        sort = draw(st.sampled_from(["ct", "jp"] if labelled else ["ct", "jp", "ctjp"]))
        if sort == "jp" and draw(st.booleans()):
            rows = [{c: str(v).split("|") if c in ("tags", "hobby") else v for c, v in r.items()} for r in rows]
        formats = [f for f in FORMATS if f[0] in sort]
        if sort == "ct" and draw(st.integers(0, 3)) == 0:
            formats = [f for f in formats if f[0] == "c"]
            options |= odd(draw(st.sampled_from(ODD)), rows)
        names = {c: c for c in columns}
        if draw(st.integers(0, 3)) == 0:
            names = {c: f"their {c}" if c in ("user", "ad", "goods", "id", "time") else c for c in columns}
            options["columns"] = {c: theirs for c, theirs in names.items() if c != theirs}
        if options.get("header") is False:
            names = {c: f"column_{n}" for n, c in enumerate(columns, 1)}
            options["columns"] = {c: n for n, c in enumerate(columns, 1)}
        cut = draw(st.integers(1, len(rows)))
        folders = draw(st.integers(0, 4)) == 0
        files = []
        for n, part in enumerate((rows[:cut], rows[cut:])):
            if part:
                ending = draw(st.sampled_from(formats))
                # Where there is no header, the first row says how many columns there are.
                if damage and ending[0] in "ct" and len(part) > 1 and draw(st.integers(0, 9)) == 0:
                    part = [*part[:-1], part[-1] | {EXTRA: "more"}]
                renamed = [{names.get(c, c): cell for c, cell in r.items()} for r in part]
                files.append((f"{source}/shard={n}/x.{ending}" if folders else f"{source}-{n}.{ending}", renamed))
        world.tables[source] = Table(list(names.values()), files)
        by_glob = f"{source}-*" if draw(st.booleans()) else [name for name, _ in files]
        world.recipe["convert"][source] = options | {"files": source if folders else by_glob}


def odd(wanted: dict[str, Any], rows: list[Row]) -> dict[str, Any]:
    """Return the way to write cells that was wanted, if these can be written so."""
    cells = [str(c) for r in rows for c in r.values() if c is not None]
    if wanted.get("separator") == "::" and any(c in cell for cell in cells for c in '":\n'):
        return {}
    try:
        "".join(cells).encode(wanted.get("encoding", "utf-8"))
    except UnicodeEncodeError:
        return {}
    return wanted


# --- writing them ---


def write_world(world: World, folder: Path) -> None:
    raw = folder / "raw"
    raw.mkdir(parents=True)
    for source, table in world.tables.items():
        for name, rows in table.files:
            (raw / name).parent.mkdir(parents=True, exist_ok=True)
            write_file(raw / name, table.columns, rows, world.recipe["convert"][source])
    (folder / "recipe.toml").write_text(toml(world.recipe), encoding="utf-8")


def write_file(path: Path, columns: list[str], rows: list[Row], options: dict[str, Any]) -> None:
    kind = path.name.split(".")[1]
    if kind == "parquet":
        frame = pl.DataFrame({c: typed([r.get(c) for r in rows]) for c in columns}, strict=False)
        nulls = [c for c in columns if frame.schema[c] == pl.Null]
        frame.cast({c: pl.Int64 if c == "clicked" else pl.String for c in nulls}).write_parquet(path)
        return
    text = io.StringIO(newline="")
    if kind == "jsonl":
        typed_columns = {c: typed([r.get(c) for r in rows]) for c in columns}
        for n in range(len(rows)):
            text.write(json.dumps({c: typed_columns[c][n] for c in columns}, ensure_ascii=n % 2 == 0) + "\n")
    else:
        separator = options.get("separator") or ("\t" if kind == "tsv" else ",")
        end = "\r\n" if len(rows) % 2 else "\n"
        out = csv.writer(text, delimiter=separator[0], lineterminator=end)
        cells = [[*(r[c] for c in columns), *([r[EXTRA]] if EXTRA in r else [])] for r in rows]
        for line in [*([columns] if options.get("header", True) else []), *cells]:
            if len(separator) == 1:
                out.writerow(line)
            else:
                text.write(separator.join(map(str, line)) + end)
    data = text.getvalue().encode(options.get("encoding", "utf-8"))
    if kind != "jsonl" and "encoding" not in options and len(rows) % 3 == 0:
        data = b"\xef\xbb\xbf" + data.removesuffix(end.encode())
    compress = {".gz": gzip.compress, ".zst": zstandard.compress}.get(path.suffix, bytes)
    half = len(data) // 2
    path.write_bytes(compress(data[:half]) + compress(data[half:]))  # two members, as of files joined by cat


def typed(cells: list[Any]) -> list[Any]:
    """Return a column's cells with missing ones as None, and as numbers where each number's text is the cell's."""
    some = [c for c in cells if c not in ("", None)]
    for kind in (int, float):
        if some and all(text_of_number(c, kind) == c for c in some):
            return [None if c in ("", None) else kind(c) for c in cells]
    return [None if c == "" else c for c in cells]


def text_of_number(cell: Any, kind: type) -> str | None:
    if isinstance(cell, list) or reference.number_of(cell) is None:
        return None
    try:
        return reference.text_of(kind(cell), [])
    except ValueError:
        return None


def toml(value: Any, names: tuple[str, ...] = ()) -> str:
    """Return a recipe as TOML: every table under its full name."""
    own = {k: v for k, v in value.items() if not isinstance(v, dict)}
    text = f"[{'.'.join(names)}]\n" if names and (own or not value) else ""
    text += "".join(f"{k} = {json.dumps(v, ensure_ascii=False)}\n" for k, v in own.items())
    return text + "".join(toml(v, (*names, k)) for k, v in value.items() if isinstance(v, dict))


# --- running them ---


@contextmanager
def written(world: World) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_world(world, folder)
        yield folder


STAGES = {
    "convert": ["--raw", "raw", "--out", "convert"],
    "select-clicks": ["--convert", "convert", "--out", "behaviours"],
    "group": ["--convert", "convert", "--behaviours", "behaviours", "--out", "groups"],
}


def run(folder: Path, stage: str, *more: str) -> tuple[int, str]:
    """Run a stage on the files of a folder. Anything but an error told in words fails the test."""
    options = [w if w.startswith("--") else str(folder / w) for w in STAGES[stage]]
    result = shop.ctrkit(stage, "--recipe", folder / "recipe.toml", *options, *more)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        traceback.print_exception(result.exception)
        raise AssertionError(f"{stage}: {result.exception!r}") from result.exception
    assert result.exit_code in (0, 1, 2)
    return result.exit_code, result.output


def by_day(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a folder of day=*/part-* in order of file name, with `day` and `part`."""
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("day=*/part-*")):
        day = datetime.date.fromisoformat(path.parent.name.removeprefix("day="))
        part = int(path.stem.removeprefix("part-"))
        frame = pl.read_ipc(path) if path.suffix == ".arrow" else pl.read_parquet(path)
        rows += [{**row, "day": day, "part": part} for row in frame.to_dicts()]
    return rows


# --- the properties ---


def check_convert(world: World, folder: Path) -> Converted | None:
    """Convert, and compare all that was written; None where it must be, and was, refused."""
    try:
        expected = reference.convert(world)
    except Refused:
        expected = None
    code, printed = run(folder, "convert")
    assert (code == 0) == (expected is not None), printed
    assert (folder / "convert").exists() == (expected is not None)
    if expected is None:
        return None
    out = folder / "convert"
    split = json.loads((out / "split.json").read_text())
    assert {p: split[p] for p in expected.split} == {p: [str(d) for d in ds] for p, ds in expected.split.items()}
    features = world.recipe["features"]
    for name in {reference.vocab_of(n, f) for n, f in features.items()}:
        frame = pl.read_parquet(out / "vocab" / f"{name}.parquet")
        assert frame.schema == {"value": pl.String, "index": pl.UInt32, "count": pl.UInt64}
        wanted = pl.DataFrame(expected.vocab[name], frame.schema, orient="row")
        named = not (wanted["value"] == "").all()
        assert frame.select(frame.columns[not named :]).equals(wanted.select(frame.columns[not named :])), name

    samples = by_day(out / "samples")
    part_of: dict[str, int] = {}
    for s in samples:
        assert part_of.setdefault(s["user"], s["part"]) == s["part"], "a user in two partitions"
    order = sorted(expected.samples, key=lambda s: (s["day"], part_of[s["user"]], s["user"], s["time"], s["order"]))
    own = [n for n, f in features.items() if f["of"] != "behaviour"]
    columns = ["user", "ad", "time", "click", "day", "unseen_ad", *own]
    assert [{c: s[c] for c in columns} for s in samples] == [{c: s[c] for c in columns} for s in order]
    ids = [s["sample_id"] for s in samples]
    assert ids == sorted(set(ids))
    for sample, row in zip(order, samples, strict=True):
        sample["sample_id"] = row["sample_id"]
    check_rejects(expected, out, len(samples), printed)
    return expected


def check_rejects(expected: Converted, out: Path, samples: int, printed: str) -> None:
    rejects = pl.read_parquet(out / "rejects.parquet")
    assert rejects.columns == ["source", "file", "row", "kind", "reason"]
    found = sorted((r[:4], r[4]) for r in rejects.rows())
    wanted = sorted((r[:4], r[4]) for r in expected.rejects)
    differing = {f for f, _ in found} ^ {w for w, _ in wanted}
    assert [f for f, _ in found] == [w for w, _ in wanted], sorted(differing)
    for (place, reason), (_, word) in zip(found, wanted, strict=True):
        assert word in reason, (place, reason)
        assert reason
    of_impressions = [place[3] for place, _ in found if place[0] == "impressions"]
    assert samples + len(of_impressions) == expected.impressions_read
    identity = next(line for line in printed.splitlines() if "impressions read" in line)
    assert f"{samples:,} samples" in identity, identity
    assert f"{of_impressions.count('reject'):,} rejects" in identity, identity
    assert f"{of_impressions.count('duplicate'):,} duplicates" in identity, identity


def check_behaviours(world: World, folder: Path, expected: Converted) -> dict[Any, Any] | None:
    """Select clicks and compare; return the picks expected, or None where it may be, and was, refused."""
    code, printed = run(folder, "select-clicks")
    assert (folder / "behaviours").exists() == (code == 0)
    if code:
        assert reference.names_no_known_type(world, expected), printed
        return None
    picked = reference.select_clicks(world, expected)
    names = [n for n, f in world.recipe["features"].items() if f["of"] == "behaviour"]
    rows = by_day(folder / "behaviours")
    columns = [*names, "visits", "dwell", "last_time"]
    found = {(r["user"], r["day"]): [{c: r[c][i] for c in columns} for i in range(len(r["visits"]))] for r in rows}
    assert len(found) == len(rows)
    wanted = {k: [{c: p[c] for c in columns} for p in picks] for k, picks in picked.items()}
    for pick in (p for both in (found, wanted) for picks in both.values() for p in picks):
        pick["dwell"] = round(pick["dwell"], 3)
    assert found == wanted
    return picked


def check_groups(world: World, folder: Path, expected: Converted, picked: dict[Any, Any]) -> None:
    """Group and compare: ungrouped by hand, the rows are the samples with their histories."""
    code, printed = run(folder, "group")
    assert code == 0, printed
    features = world.recipe["features"]
    own = [n for n, f in features.items() if f["of"] in ("ad", "scene")]
    of_user = [n for n, f in features.items() if f["of"] == "user"]
    of_behaviour = [n for n, f in features.items() if f["of"] == "behaviour"]
    most = world.recipe["group"].get("max_samples", 1000)
    ids: set[int] = set()
    for part, dates in expected.split.items():
        found: list[dict[str, Any]] = []
        groups = []
        for path in sorted((folder / "groups" / part).glob("part-*.parquet")):
            for rows in row_groups(path):
                assert len(rows) <= max(world.recipe["group"]["block_groups"], 1) or "common" in rows[0]
                for position, row in enumerate(rows):
                    bearer = row
                    if "common" in row:
                        bearer = rows[row["common"]]
                        assert bearer["common"] == row["common"] <= position
                        assert (bearer["user"], bearer["day"]) == (row["user"], row["day"])
                        if bearer is not row:
                            assert not any(row[n] for n in of_behaviour)
                            assert rows[position - 1]["group_id"] == row["group_id"]
                    assert 1 <= len(row["sample_id"]) <= most
                    groups.append((row["group_id"], row["user"], row["day"]))
                    for i in range(len(row["sample_id"])):
                        sample = {c: row[c][i] for c in ("sample_id", "time", "ad", "click", "unseen_ad", *own)}
                        shared = {c: bearer[c] for c in (*of_user, *of_behaviour)}
                        found.append({"user": row["user"], "day": row["day"], **sample, **shared})
        wanted = []
        for s in expected.samples:
            if s["day"] in dates:
                history = picked.get((s["user"], s["day"]), [])
                lists = {n: [p[n] for p in history] for n in of_behaviour}
                wanted.append({c: s[c] for c in found[0] if c in s and c not in of_behaviour} | lists)
        assert sorted(found, key=lambda s: s["sample_id"]) == sorted(wanted, key=lambda s: s["sample_id"])
        of_id = {g: (user, day) for g, user, day in groups}
        assert len(set(of_id.values())) == len(of_id), "a user and day in two groups"
        assert all(of_id[g] == (user, day) for g, user, day in groups)
        assert len(list(itertools.groupby(g for g, _, _ in groups))) == len(of_id), "a group in two places"
        assert not ids & set(of_id)
        ids |= set(of_id)
    sizes = json.loads((folder / "groups" / "schema.json").read_text())["vocab_sizes"]
    for vocab, of_index in reference.counts(world, expected, picked).items():
        frame = pl.read_parquet(folder / "groups" / "counts" / f"{vocab}.parquet")
        assert frame["index"].to_list() == list(range(sizes[vocab]))
        assert {i: n for i, n in frame.rows() if n} == of_index, vocab


def row_groups(path: Path) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows of each Parquet row group."""
    rows, start = pl.read_parquet(path).to_dicts(), 0
    for n in parquet_footer.row_groups(path):
        yield rows[start : start + n]
        start += n


def check_all(world: World) -> None:
    with written(world) as folder:
        expected = check_convert(world, folder)
        picked = check_behaviours(world, folder, expected) if expected else None
        if expected and picked is not None:
            check_groups(world, folder, expected, picked)


@examples(25)
@given(worlds(), st.sampled_from([400, 32 << 20]))
def test_the_data_stages_do_what_the_reference_does(world: World, piece_bytes: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pieces, "PIECE_BYTES", piece_bytes)
        patch.setattr(pieces, "PIECE_ROWS", piece_bytes // 100)
        patch.setattr(pieces, "LONGEST_CELL", piece_bytes // 2)
        check_all(world)


@examples(8)
@given(worlds(), st.integers(1, 9), st.data())
def test_nothing_at_or_after_midnight_changes_a_days_histories(world: World, n: int, data: st.DataObject) -> None:
    """Behaviours and clicks from a day's midnight on are dropped, moved and added: what serves the day stays."""
    with written(world) as folder:
        if run(folder, "convert")[0] or run(folder, "select-clicks")[0]:
            return
        split = json.loads((folder / "convert" / "split.json").read_text())
        day = data.draw(st.sampled_from(sorted(split["train"] + split["valid"] + split["test"])))
        before = until(folder, day)
        vocab = {p.name: pl.read_parquet(p) for p in (folder / "convert" / "vocab").iterdir()}
    held_out = day not in split["train"]
    options = world.recipe["convert"]
    midnight = reference.midnight(datetime.date.fromisoformat(day), options["time_zone"])
    shaken = {"behaviours": midnight} | ({"clicks": midnight + 3_600_000 * 2} if "clicks" in world.tables else {})
    for source, start in shaken.items():
        if "time" in our_columns(world, source):
            world.tables[source] = shake(world, source, start, n)
    with written(world) as folder:
        assert run(folder, "convert")[0] == 0
        if run(folder, "select-clicks")[0]:  # the last behaviour of a type that the recipe names is gone
            return
        if held_out or "goods" in our_columns(world, "behaviours"):  # else indexes tell what was visited
            assert comparable(until(folder, day), held_out) == comparable(before, held_out)
        for path in (folder / "convert" / "vocab").iterdir() if held_out else ():
            then, now = vocab[path.name], pl.read_parquet(path)
            if path.stem == "image":  # pictures are keys, with those of later days
                then, now = (v.filter(pl.col("count") > 0) for v in (then, now))
            assert then.equals(now), path.stem


def our_columns(world: World, source: str) -> dict[str, str]:
    """Return our name of a column → the file's."""
    named = world.recipe["convert"][source].get("columns", {})
    columns = world.tables[source].columns
    return {c: c for c in columns} | {c: columns[n - 1] if isinstance(n, int) else n for c, n in named.items()}


def shake(world: World, source: str, start: int, n: int) -> Table:
    """Drop some of the rows at or after `start`, move some to another such time, repeat some at such a time."""
    names, table, options = our_columns(world, source), world.tables[source], world.recipe["convert"]
    files = []
    for name, rows in table.files:
        kept = []
        for i, row in enumerate(rows):
            time = reference.time_of(str(row[names["time"]]), options["time_unit"])
            later = {names["time"]: time_text(start + 977 * i * n * n, options["time_unit"], options["time_zone"])}
            if time is None or time < start:
                kept.append(row)
                kept += [row | later] if (i + n) % 3 == 0 else []
            elif (i + n) % 3:
                kept.append(row | later if (i + n) % 3 == 1 else row)
        files.append((name, kept or [dict.fromkeys(table.columns, "")]))
    return Table(table.columns, files)


def until(folder: Path, day: str) -> list[dict[str, Any]]:
    """Return the histories of the days up to a day."""
    rows = by_day(folder / "behaviours")
    kept = [{c: v for c, v in r.items() if c != "part"} for r in rows if str(r["day"]) <= day]
    return sorted(kept, key=lambda r: (r["day"], r["user"]))


def comparable(histories: list[dict[str, Any]], with_indexes: bool) -> list[dict[str, Any]]:
    """Leave out the indexes where the training days themselves are changed: a vocabulary may be."""
    plain = ("user", "day", "visits", "dwell", "last_time")
    return [h if with_indexes else {c: h[c] for c in plain} for h in histories]


# --- cases that random logs meet too seldom ---


def test_an_id_twice_in_a_history_is_in_each_sample_once(tmp_path: Path) -> None:
    shop.write(
        tmp_path,
        impressions=[f"i{n},{shop.at(1 + n // 2)},u1,a1,0" for n in range(8)],
        clicks=["i0,0"],
        behaviours=[f"u1,{goods},{shop.at(0)},click,9" for goods in ("g1", "g3", "g2")],
    )
    shop.run_all(tmp_path)
    convert, groups = tmp_path / "convert", tmp_path / "groups"
    index = dict(pl.read_parquet(convert / "vocab" / "category.parquet").select("value", "index").rows())
    counts = dict(pl.read_parquet(groups / "counts" / "category.parquet").rows())
    split = json.loads((convert / "split.json").read_text())
    samples = 2 * len(split["train"])
    assert counts == {0: 0, 1: 0, index["shoes"]: samples, index["hats"]: samples}


def test_impressions_of_one_id_are_duplicates_though_clicks_have_none(tmp_path: Path) -> None:
    rows = [f"i{n},{shop.at(n)},u1,a1,0" for n in range(3)]
    recipe = shop.RECIPE.replace('files = "clicks.csv"\ncolumns = { id = "impression" }', 'files = "clicked.csv"')
    shop.write(tmp_path, recipe, impressions=[*rows, f"i1,{shop.at(1, 14)},u2,a2,0"])
    (tmp_path / "raw" / "clicked.csv").write_text(f"user,ad,time\nu1,a1,{shop.at(1) + 60}\n")
    result = shop.run(tmp_path, "convert")
    assert result.exit_code == 0, result.output
    assert [(s["user"], s["click"]) for s in by_day(tmp_path / "convert" / "samples")] == [
        ("u1", 0),
        ("u1", 1),
        ("u1", 0),
    ]
    assert pl.read_parquet(tmp_path / "convert" / "rejects.parquet").select("row", "kind").rows() == [(4, "duplicate")]


def test_drop_repeats_is_for_impressions_without_an_id(tmp_path: Path) -> None:
    shop.write(tmp_path, impressions=[f"i{n},{shop.at(n)},u1,a1,0" for n in range(3)], clicks=["i0,0"])
    result = shop.run(tmp_path, "convert", {"convert.drop_repeats": "true"})
    assert result.exit_code == 2
    assert "drop_repeats is for impressions without an id" in result.output
    assert not (tmp_path / "convert").exists()


def test_quantiles_are_of_training_and_about_even(tmp_path: Path) -> None:
    rows = shop.random_rows(41, users=120)
    training = {str(d) for d in (shop.FIRST_DAY + datetime.timedelta(days=n) for n in range(5))}
    prices = {f"a{n}": f"{math.exp(n / 3):.6g}" for n in range(40)}
    rows["ads"] = [f"{line.rpartition(',')[0]},{prices[line.split(',')[0]]}" for line in rows["ads"]]
    rows["ads"] += ["a29,g1,dear"]
    recipe = shop.RECIPE.replace('vocab = "tag", multi_hot = true', 'kind = "number", quantiles = 6')
    shop.write(tmp_path, recipe, **rows)
    result = shop.run(tmp_path, "convert")
    assert result.exit_code == 0, result.output
    of_price: dict[float, int] = {}
    in_training = Counter[int]()
    for s in by_day(tmp_path / "convert" / "samples"):
        index = s["ad_tags"]
        if s["ad"] == "a29":
            assert index == 1
        else:
            assert of_price.setdefault(float(prices[s["ad"]]), index) == index
        in_training[index] += str(s["day"]) in training
    in_order = [of_price[p] for p in sorted(of_price)]
    assert in_order == sorted(in_order)
    assert set(in_order) == set(range(2, 8))
    vocab = pl.read_parquet(tmp_path / "convert" / "vocab" / "ad_tags.parquet")
    assert dict(vocab.select("index", "count").rows()) == {i: in_training[i] for i in range(2, 8)}
    even = sum(in_training[i] for i in range(2, 8)) / 6
    assert all(abs(in_training[i] - even) < 0.5 * even for i in range(2, 8))


# --- thinned and sampled negatives: drawn, so not predicted but judged ---


def shop_with(folder: Path, options: str, rows: dict[str, list[str]], *, clicks: bool = True) -> Path:
    """Write a shop with some more settings of [convert]."""
    recipe = "workers = 1\n" + shop.RECIPE.replace("[convert]\n", f"[convert]\n{options}\n")
    if not clicks:
        recipe = recipe.replace('[convert.clicks]\nfiles = "clicks.csv"\ncolumns = { id = "impression" }\n', "")
    shop.write(folder, recipe, **rows)
    result = shop.run(folder, "convert")
    assert result.exit_code == 0, result.output
    return folder / "convert"


def keyed_samples(out: Path) -> Counter[tuple[Any, ...]]:
    return Counter((s["user"], s["ad"], s["time"], s["click"]) for s in by_day(out / "samples"))


def test_negatives_are_thinned_on_training_days_alone(tmp_path: Path) -> None:
    rows = shop.random_rows(23, users=200)
    rows["impressions"] = list(dict.fromkeys(rows["impressions"]))
    whole = shop_with(tmp_path / "whole", "", rows)
    thin = shop_with(tmp_path / "thin", "negative_rate = 0.3", rows)
    split = json.loads((thin / "split.json").read_text())
    assert split["negative_rate"] == 0.3
    assert json.loads((whole / "split.json").read_text())["negative_rate"] == 1.0
    negatives = kept = 0
    before = Counter(row_of(s) for s in by_day(whole / "samples"))
    after = Counter(row_of(s) for s in by_day(thin / "samples"))
    assert not after - before, "a sample that was none"
    for row, n in before.items():
        if row[0] in split["train"] and row[-1] == 0:
            negatives, kept = negatives + n, kept + after[row]
        else:
            assert after[row] == n
    assert abs(kept - 0.3 * negatives) < 4 * (0.3 * 0.7 * negatives) ** 0.5
    rejects = pl.read_parquet(thin / "rejects.parquet").filter(pl.col("source") == "impressions")
    dropped = rejects.filter(pl.col("kind") == "negative")
    assert dropped.height == negatives - kept
    cells = [rows["impressions"][row - 1].split(",") for row in dropped["row"]]
    lost = Counter((user, ad, 1000 * int(time)) for _, time, user, ad, _ in cells)
    assert lost == Counter(row[1:4] for row in (before - after).elements())


def row_of(sample: dict[str, Any]) -> tuple[Any, ...]:
    return str(sample["day"]), sample["user"], sample["ad"], sample["time"], sample["click"]


def test_which_negatives_are_kept_depends_on_the_rows_alone(tmp_path: Path) -> None:
    rows = shop.random_rows(24, users=60)
    first = shop_with(tmp_path / "a", "negative_rate = 0.5", rows)
    turned = rows | {"impressions": rows["impressions"][::-1]}
    other = shop_with(tmp_path / "b", "negative_rate = 0.5\npartitions = 5", turned)
    assert keyed_samples(first) == keyed_samples(other)
    assert keyed_samples(first) != keyed_samples(shop_with(tmp_path / "c", "negative_rate = 0.5\nseed = 1", rows))


def test_sampled_negatives_are_other_ads_at_the_same_time(tmp_path: Path) -> None:
    rows = shop.random_rows(25, users=100, goods=12)
    # Two ads come up late: no row of an earlier day may have them.
    noon = shop.at(3)
    rows["impressions"] = [
        line if int(line.split(",")[1]) > noon else line.replace(",a10,", ",a1,").replace(",a11,", ",a2,")
        for line in rows["impressions"]
    ]
    out = shop_with(tmp_path, "sampled_negatives = 3", rows, clicks=False)
    zone = "Asia/Shanghai"
    positives = Counter[tuple[str, int]]()
    owned: dict[str, set[str]] = {}
    first: dict[str, datetime.date] = {}
    for line in rows["impressions"]:
        _, time, user, ad, _ = line.split(",")
        positives[user, 1000 * int(time)] += 1
        owned.setdefault(user, set()).add(ad)
        day = reference.day_of(1000 * int(time), zone)
        first[ad] = min(first.get(ad, day), day)
    assert len(set(first.values())) > 1
    drawn = Counter[str]()
    negatives: dict[tuple[str, int], list[str]] = {}
    for user, ad, time, click in keyed_samples(out).elements():
        if click:
            positives[user, time] -= 1
        else:
            negatives.setdefault((user, time), []).append(ad)
            drawn[ad] += 1
    assert not +positives, "a positive is lost"
    expected = Counter[str]()
    wanting = 0
    for line in rows["impressions"]:
        _, seconds, user, _, _ = line.split(",")
        time = 1000 * int(seconds)
        free = {ad for ad in set(first) - owned[user] if first[ad] <= reference.day_of(time, zone)}
        found = negatives.pop((user, time), [])
        assert set(found) <= free
        assert len(set(found)) == len(found) == min(3, len(free))
        wanting += 3 - len(found)
        for ad in free:
            expected[ad] += len(found) / len(free)  # type: ignore[assignment]
    assert not negatives
    chi_square = sum((drawn[ad] - expected[ad]) ** 2 / expected[ad] for ad in expected)
    assert chi_square < len(expected) + 5 * (2 * len(expected)) ** 0.5
    counts = json.loads((tmp_path / "convert.json").read_text())["counts"]
    assert (counts["sampled negatives"], counts["negatives that no ad was left for"]) == (drawn.total(), wanting)
    assert counts["impressions read"] + drawn.total() == counts["samples"] == sum(keyed_samples(out).values())


# --- what must change nothing ---


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file below a folder."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_workers_pieces_and_partitions_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes stay with other workers and pieces; with other partitions, rows stay but for their order."""
    rows = shop.random_rows(31, users=60)
    made = {}
    for name, parts, size, workers in (("a", 3, 32 << 20, 1), ("b", 3, 5000, 1), ("c", 7, 900, 1), ("d", 3, 5000, 2)):
        folder = made[name] = tmp_path / name
        recipe = shop.RECIPE.replace("[convert]\n", f"[convert]\npartitions = {parts}\n")
        shop.write(folder, f"workers = {workers}\n{recipe}", **rows)
        monkeypatch.setattr(pieces, "PIECE_BYTES", size)
        for stage in STAGES if workers == 1 else ["convert"]:
            assert run(folder, stage)[0] == 0
    for out in ("convert", "behaviours", "groups"):
        assert contents(made["a"] / out) == contents(made["b"] / out)
    assert contents(made["a"] / "convert") == contents(made["d"] / "convert")
    assert keyed_samples(made["a"] / "convert") == keyed_samples(made["c"] / "convert")
    assert contents(made["a"] / "convert" / "vocab") == contents(made["c"] / "convert" / "vocab")
    assert until(made["a"], "9999") == until(made["c"], "9999")
