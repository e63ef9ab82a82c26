"""What convert, select-clicks and group must give, in plain Python: dicts, loops, datetime. Slow and obvious.

Written from docs/formats.md, not from the code it judges, and without the libraries that the code uses.
"""

import datetime
import math
import re
import zoneinfo
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, getcontext
from typing import Any

Cell = str | int | float | list[str] | None
Row = dict[str, Cell]
"""The file's column → cell. The key `EXTRA` is a cell beyond the header's columns."""
EXTRA = "beyond the header"
LATEST_MS = 7_258_118_400_000
DAY_MS = 86_400_000
LOOKS_IN = {
    "user": ("users", "impressions"),
    "ad": ("ads", "goods", "impressions"),
    "scene": ("impressions", "clock", "users", "ads", "goods"),
    "behaviour": ("behaviours", "goods"),
}
getcontext().prec = 60


class Refused(Exception):
    """The stage must stop with an error."""


@dataclass
class Table:
    """A source: its columns, as the files call them, and the rows of each file."""

    columns: list[str]
    files: list[tuple[str, list[Row]]]

    def rows(self) -> list[tuple[str, int, Row]]:
        """Return (file, row from 1, cells) of every row, in file order."""
        return [(name, n, row) for name, rows in self.files for n, row in enumerate(rows, 1)]


@dataclass
class World:
    """A recipe as TOML reads it, the tables, and in Python what the recipe says in SQL (over cells as text)."""

    recipe: dict[str, Any]
    tables: dict[str, Table]
    where: dict[str, Callable[[Row], bool]] = field(default_factory=dict)
    label: Callable[[Row], object] | None = None


@dataclass
class Converted:
    """What convert must write."""

    samples: list[dict[str, Any]] = field(default_factory=list)
    behaviours: list[dict[str, Any]] = field(default_factory=list)
    vocab: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)
    split: dict[str, list[datetime.date]] = field(default_factory=dict)
    rejects: list[tuple[str, str, int, str, str]] = field(default_factory=list)
    """(source, file, row, kind, a word of the reason)."""
    impressions_read: int = 0


# --- cells ---


def text_of(cell: Cell, null_values: list[str]) -> str | None:
    """Return a cell as an id's text; None where it is missing."""
    if cell is None or isinstance(cell, list):
        return None
    if isinstance(cell, float):
        cell = str(int(cell)) if cell == int(cell) else repr(cell)
    text = str(cell)
    return None if text == "" or text in null_values else text


def number_of(text: str | None) -> float | None:
    """Return the finite number that a text is, or None."""
    if text is None or not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", text):
        return None
    return float(text)


def time_of(text: str | None, unit: str) -> int | None:
    """Return epoch milliseconds, or None where the text is no time."""
    if text is None:
        return None
    if unit == "iso":
        try:
            parsed = datetime.datetime.fromisoformat(text)
        except ValueError:
            return None
        return None if parsed.tzinfo is None else milliseconds(parsed)
    number = number_of(text)
    if number is None:
        return None
    number *= 1000 if unit == "s" else 1
    return math.floor(number + 0.5) if 0 <= number <= LATEST_MS else None


def milliseconds(moment: datetime.datetime) -> int:
    """Return the epoch milliseconds of an aware moment."""
    since = moment - datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
    return since // datetime.timedelta(milliseconds=1)


def local(time: int, zone: str) -> datetime.datetime:
    """Return the local time of epoch milliseconds."""
    utc = datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC) + datetime.timedelta(milliseconds=time)
    return utc.astimezone(zoneinfo.ZoneInfo(zone))


def midnight(day: datetime.date, zone: str) -> int:
    """Return the epoch milliseconds of the first moment of a day."""
    return milliseconds(datetime.datetime(day.year, day.month, day.day, tzinfo=zoneinfo.ZoneInfo(zone)))


def day_of(time: int, zone: str) -> datetime.date:
    """Return the day whose midnight is the last at or before a time, though the clock be set back past midnight."""
    date = local(time, zone).date()
    return days_later(date, 1) if midnight(days_later(date, 1), zone) <= time else date


def days_later(day: datetime.date, n: int) -> datetime.date:
    return day + datetime.timedelta(days=n)


# --- xxHash, 64 bits, seed 0 ---

MASK = 2**64 - 1
PRIMES = (
    0x9E3779B185EBCA87,
    0xC2B2AE3D27D4EB4F,
    0x165667B19E3779F9,
    0x85EBCA77C2B2AE63,
    0x27D4EB2F165667C5,
)


def xxhash64(text: str) -> int:
    """Return the XXH64 of a text's UTF-8 bytes."""
    p1, p2, p3, p4, p5 = PRIMES

    def rotate(x: int, n: int) -> int:
        return ((x << n) | (x >> (64 - n))) & MASK

    def round_of(accumulator: int, lane: int) -> int:
        return rotate((accumulator + lane * p2) & MASK, 31) * p1 & MASK

    data, at = text.encode(), 0
    if len(data) >= 32:
        lanes = [(p1 + p2) & MASK, p2, 0, -p1 & MASK]
        while at + 32 <= len(data):
            for i in range(4):
                lanes[i] = round_of(lanes[i], int.from_bytes(data[at + 8 * i : at + 8 * i + 8], "little"))
            at += 32
        h = sum(rotate(lane, n) for lane, n in zip(lanes, (1, 7, 12, 18), strict=True)) & MASK
        for lane in lanes:
            h = ((h ^ round_of(0, lane)) * p1 + p4) & MASK
    else:
        h = p5
    h = (h + len(data)) & MASK
    while at + 8 <= len(data):
        h = (rotate(h ^ round_of(0, int.from_bytes(data[at : at + 8], "little")), 27) * p1 + p4) & MASK
        at += 8
    if at + 4 <= len(data):
        h = (rotate(h ^ int.from_bytes(data[at : at + 4], "little") * p1 & MASK, 23) * p2 + p3) & MASK
        at += 4
    for byte in data[at:]:
        h = rotate(h ^ byte * p5 & MASK, 11) * p1 & MASK
    h = (h ^ h >> 33) * p2 & MASK
    h = (h ^ h >> 29) * p3 & MASK
    return h ^ h >> 32


# --- convert ---


def convert(world: World) -> Converted:
    """Return what convert must write; raise Refused where it must stop."""
    options = world.recipe["convert"]
    out = Converted()
    impressions = read_impressions(world, out)
    if world.label is None:
        label_by_clicks(world, impressions, out)
    users, ads, goods = (read_keyed(world, name, key, out) for name, key in KEYS.items())
    zone = options.get("time_zone", "UTC")
    for sample in impressions:
        at = local(sample["time"], zone)
        sample["day"] = day_of(sample["time"], zone)
        ad_row = ads.get(sample["ad"], {})
        of_goods = ad_row.get("goods") if has(world, "ads", "goods") else sample["cells"].get("goods")
        sample["tables"] = {
            "impressions": sample["cells"],
            "clock": {"hour": str(at.hour), "weekday": str(at.isoweekday())},
            "users": users.get(sample["user"], {}),
            "ads": ad_row,
            "goods": goods.get(text_of(of_goods, []), {}),
        }
    behaviours = read_behaviours(world, goods, out)
    check_rate(world, out)
    if not impressions:
        raise Refused("no samples")
    out.split = split_days(world, impressions)
    training = [s for s in impressions if s["day"] in out.split["train"]]
    known = {s["ad"] for s in training}
    for sample in impressions:
        sample["unseen_ad"] = sample["ad"] not in known
    end = midnight(days_later(out.split["train"][-1], 1), zone)
    earlier = [b for b in behaviours if b["time"] < end]

    features = world.recipe["features"]
    texts: dict[str, list[Any]] = {}
    for name, feature in features.items():
        rows = behaviours if feature["of"] == "behaviour" else impressions
        texts[name] = [feature_text(world, name, row) for row in rows]
    for name in features:
        vocab = vocab_of(name, features[name])
        if vocab not in out.vocab:
            sharing = [n for n in features if vocab_of(n, features[n]) == vocab]
            counted: Counter[str] = Counter()
            everywhere: set[str] = set()
            for other in sharing:
                behaviour = features[other]["of"] == "behaviour"
                rows, seen = (behaviours, earlier) if behaviour else (impressions, training)
                ids = {id(r) for r in seen}
                for row, value in zip(rows, texts[other], strict=True):
                    for one in value if isinstance(value, list) else [value]:
                        if one is not None:
                            everywhere.add(one)
                            counted[one] += id(row) in ids
            out.vocab[vocab] = build_vocab(features[name], counted, everywhere)
    for name, feature in features.items():
        rows = behaviours if feature["of"] == "behaviour" else impressions
        index = {value: i for value, i, _ in out.vocab[vocab_of(name, feature)]}
        for row, value in zip(rows, texts[name], strict=True):
            row[name] = [encode(feature, index, v) for v in value] if isinstance(value, list) else None
            if not isinstance(value, list):
                row[name] = encode(feature, index, value)
    out.samples, out.behaviours = impressions, behaviours
    return out


KEYS = {"users": "user", "ads": "ad", "goods": "goods"}


def has(world: World, source: str, column: str) -> bool:
    """Say whether a source has a column, by our name."""
    if source not in world.tables:
        return False
    named = world.recipe["convert"][source].get("columns", {})
    return column in named or column in world.tables[source].columns


def read(world: World, source: str, required: list[str], out: Converted) -> list[dict[str, Any]]:
    """Return the good rows: our column → text (a list stays a list), "time" parsed, `order` the place in the files."""
    options = world.recipe["convert"][source]
    named = {ours: f"column_{c}" if isinstance(c, int) else c for ours, c in options.get("columns", {}).items()}
    names = {c: c for c in world.tables[source].columns} | named
    nulls = options.get("null_values", [])
    unit = options.get("time_unit") or world.recipe["convert"].get("time_unit", "s")
    good = []
    for order, (file, number, row) in enumerate(world.tables[source].rows()):
        if source in world.where and not world.where[source](row):
            continue
        if source == "impressions":
            out.impressions_read += 1
        cells: dict[str, Any] = {}
        for ours, theirs in names.items():
            cell = row.get(theirs)
            cells[ours] = [v for v in cell if v != ""] if isinstance(cell, list) else text_of(cell, nulls)
        found: dict[str, Any] = {"cells": cells, "order": order, "file": file, "row": number}
        why = "cells" if row.get(EXTRA) is not None else None
        for column in required:
            value = time_of(cells[column], unit) if column == "time" else cells[column]
            found[column] = value
            if value is None and why is None:
                why = column
        if why is None and source == "impressions" and world.label is not None:
            label = world.label({ours: row.get(theirs) for ours, theirs in names.items()})
            if label in (True, False, 0, 1):
                found["click"] = int(label)  # type: ignore[call-overload]
            else:
                why = "label"
        if why is None:
            good.append(found)
        else:
            out.rejects.append((source, file, number, "reject", why))
    if source in world.where and not any(world.where[source](r) for _, _, r in world.tables[source].rows()):
        raise Refused(f"no row of {source} satisfies where")
    return good


def drop(out: Converted, source: str, row: dict[str, Any], kind: str) -> None:
    out.rejects.append((source, row["file"], row["row"], kind, ""))


def first_of_each(out: Converted, source: str, rows: list[dict[str, Any]], key: list[str]) -> list[dict[str, Any]]:
    """Keep the first row of each key; the others are duplicates."""
    seen, kept = set(), []
    for row in rows:
        value = tuple(row[c] for c in key)
        if value in seen:
            drop(out, source, row, "duplicate")
        else:
            seen.add(value)
            kept.append(row)
    return kept


def by_id(world: World) -> bool:
    return world.label is None and has(world, "impressions", "id") and has(world, "clicks", "id")


def read_impressions(world: World, out: Converted) -> list[dict[str, Any]]:
    required = ["user", "ad", "time", *(["id"] if has(world, "impressions", "id") else [])]
    rows = read(world, "impressions", required, out)
    if "id" in required:
        rows = first_of_each(out, "impressions", rows, ["id"])
    asked = world.recipe["convert"].get("drop_repeats")
    if asked and "id" in required:
        raise Refused("an id says already which impressions are the same")
    if asked or (asked is None and world.label is None and "id" not in required):
        rows = first_of_each(out, "impressions", rows, ["user", "ad", "time"])
    return rows


def label_by_clicks(world: World, impressions: list[dict[str, Any]], out: Converted) -> None:
    """Give each impression its `click`."""
    for impression in impressions:
        impression["click"] = 0
    if by_id(world):
        clicks = first_of_each(out, "clicks", read(world, "clicks", ["id"], out), ["id"])
        of_id = {i["id"]: i for i in impressions}
        for click in clicks:
            if click["id"] in of_id:
                of_id[click["id"]]["click"] = 1
            else:
                drop(out, "clicks", click, "unmatched")
        return
    window = round(world.recipe["convert"].get("attribution_window", 3600.0) * 1000)
    clicks = first_of_each(out, "clicks", read(world, "clicks", ["user", "ad", "time"], out), ["user", "ad", "time"])
    for click in sorted(clicks, key=lambda c: c["time"]):
        latest = None
        for impression in impressions:
            same = impression["user"] == click["user"] and impression["ad"] == click["ad"]
            if (
                same
                and impression["time"] <= click["time"]
                and (latest is None or impression["time"] >= latest["time"])
            ):
                latest = impression
        if latest is None or click["time"] - latest["time"] > window:
            drop(out, "clicks", click, "unmatched")
        elif latest["click"]:
            drop(out, "clicks", click, "unmatched")  # it changes nothing
        else:
            latest["click"] = 1


def read_keyed(world: World, source: str, key: str, out: Converted) -> dict[Any, dict[str, Any]]:
    """Return key → the cells of its first row, for a table that a feature needs."""
    if source not in world.tables or not any(s == source for s in looked_up(world)):
        return {}
    rows = first_of_each(out, source, read(world, source, [key], out), [key])
    return {row[key]: row["cells"] for row in rows}


def looked_up(world: World) -> list[str]:
    """Return the tables in which features find their columns, and those that link to them."""
    found = []
    for feature, column in ((f, c) for n, f in world.recipe["features"].items() for c in fields(n, f)):
        table = find(world, feature["of"], column)
        found.append(table)
        if table == "goods" and feature["of"] != "behaviour" and has(world, "ads", "goods"):
            found.append("ads")
    return found


def fields(name: str, feature: dict[str, Any]) -> list[str]:
    column = feature.get("column", name)
    return re.findall(r"\{(\w+)\}", column) or [column]


def find(world: World, owner: str, column: str) -> str:
    """Return the table in which a feature of an owner finds a column."""
    if column in ("user", "ad") and owner != "behaviour":
        return "impressions"
    for table in LOOKS_IN[owner]:
        if (table == "clock" and column in ("hour", "weekday")) or (table != "clock" and has(world, table, column)):
            return table
    raise Refused(f"no column {column}")


def feature_text(world: World, name: str, row: dict[str, Any]) -> Any:
    """Return a feature's text, a list of texts if it is multi-hot, or None."""
    feature = world.recipe["features"][name]
    column = feature.get("column", name)
    cells = {c: row["tables"][find(world, feature["of"], c)].get(c) for c in fields(name, feature)}
    if feature.get("kind") == "image" or "{" in column:
        return None if None in cells.values() else column.format(**cells) if "{" in column else cells[column]
    value = cells[column]
    if feature.get("multi_hot"):
        pieces = value if isinstance(value, list) else (value or "").split(feature.get("separator", "|"))
        return [piece for piece in pieces if piece]
    return value


def vocab_of(name: str, feature: dict[str, Any]) -> str:
    default = "image" if feature.get("kind") == "image" else name
    return str(feature.get("vocab", default))


def build_vocab(feature: dict[str, Any], counted: Counter[str], everywhere: set[str]) -> list[tuple[str, int, int]]:
    """Return (value, index, count) by index; of buckets, which have names of their own, the value is ""."""
    if "hash_buckets" in feature or feature.get("kind") == "number":
        size = feature["hash_buckets"] if "hash_buckets" in feature else len(feature["edges"]) + 1
        found = Counter({encode(feature, {}, v): 0 for v in everywhere})
        for value in everywhere:
            found[encode(feature, {}, value)] += counted[value]
        return [("", i, found[i]) for i in range(2, size + 2)]
    picture = feature.get("kind") == "image"
    least = 0 if picture else feature.get("min_count", 1)
    values = [v for v in everywhere if counted[v] >= least]
    values.sort(key=lambda v: (-counted[v], v.encode()))
    if "top" in feature:
        values = values[: feature["top"]]
    return [(value, i, counted[value]) for i, value in enumerate(values, 2)]


def encode(feature: dict[str, Any], index: dict[str, int], value: str | None) -> int:
    """Return 0 for a missing value, 1 for an unknown one, else its index."""
    if value is None:
        return 0
    if "hash_buckets" in feature:
        return 2 + xxhash64(value) % int(feature["hash_buckets"])
    if feature.get("kind") == "number" and "edges" in feature:
        number = number_of(value)
        return 1 if number is None else 2 + sum(number >= edge for edge in feature["edges"])
    return index.get(value, 1)


def read_behaviours(world: World, goods: dict[Any, dict[str, Any]], out: Converted) -> list[dict[str, Any]]:
    if not any(f["of"] == "behaviour" for f in world.recipe["features"].values()):
        return []
    required = ["user", "time", *(["goods"] if has(world, "behaviours", "goods") else [])]
    rows = read(world, "behaviours", required, out)
    for row in rows:
        dwell = number_of(row["cells"].get("dwell"))
        row["dwell"] = math.floor(dwell * 1000 + 0.5) if dwell is not None and 0 <= dwell <= 1e9 else None
        row["type text"] = row["cells"].get("type")
        row["goods text"] = row.pop("goods", None)
        row["day"] = day_of(row["time"], world.recipe["convert"].get("time_zone", "UTC"))
        row["tables"] = {"behaviours": row["cells"], "goods": goods.get(row["goods text"], {})}
    return rows


def check_rate(world: World, out: Converted) -> None:
    rate = world.recipe["convert"].get("max_reject_rate", 0.01)
    for source, table in world.tables.items():
        rows = sum(source not in world.where or world.where[source](r) for _, _, r in table.rows())
        if sum(r[0] == source and r[3] == "reject" for r in out.rejects) > rate * rows:
            raise Refused(f"too many rejects of {source}")


def split_days(world: World, samples: list[dict[str, Any]]) -> dict[str, list[datetime.date]]:
    """Deal the days that have samples to train, valid and test, by numbers of days from the end."""
    left = sorted({s["day"] for s in samples})
    split = {}
    for part in ("test", "valid"):
        n = world.recipe.get("split", {}).get(part, 1)
        split[part] = left[max(len(left) - n, 0) :]
        left = left[: max(len(left) - n, 0)]
    if not left:
        raise Refused("no day to train on")
    return {"train": left, **split}


# --- select-clicks ---


def select_clicks(world: World, converted: Converted) -> dict[tuple[str, datetime.date], list[dict[str, Any]]]:
    """Return (user, day) → the behaviours picked, oldest first, where there are any."""
    options = world.recipe.get("select-clicks", {})
    zone = world.recipe["convert"].get("time_zone", "UTC")
    names = [n for n, f in world.recipe["features"].items() if f["of"] == "behaviour"]
    with_goods = has(world, "behaviours", "goods")
    types = options.get("types", [])
    usable = [
        b
        for b in converted.behaviours
        if (not types or b["type text"] in types)
        and (b["dwell"] is None or b["dwell"] >= options.get("min_dwell", 0.0) * 1000)
    ]
    picked = {}
    for user, day in {(s["user"], s["day"]) for s in converted.samples}:
        end = midnight(day, zone)
        window = options.get("window_days", 14)
        start = -math.inf if window == "all" else midnight(days_later(day, -window), zone)
        seen: dict[Any, list[dict[str, Any]]] = {}
        for b in usable:
            if b["user"] == user and start <= b["time"] < end:
                key = b["goods text"].encode() if with_goods else tuple(b[n] for n in names)
                seen.setdefault(key, []).append(b)
        candidates = []
        for key, visits in seen.items():
            last = max(visits, key=lambda b: (b["time"], b["order"]))
            dwell = sum(b["dwell"] or 0 for b in visits)
            weights = sum(Decimal(str(options.get("type_weights", {}).get(b["type text"], 1))) for b in visits)
            pick = {n: last[n] for n in names} | {
                "key": key,
                "visits": len(visits),
                "dwell": dwell / 1000,
                "last_time": last["time"],
                "score": score(weights, dwell, end - last["time"], options),
            }
            candidates.append(pick)
        candidates.sort(key=lambda p: (-p["score"], -p["last_time"], p["key"]))
        best = candidates[: options.get("max_behaviours", 50)]
        if best:
            picked[user, day] = sorted(best, key=lambda p: (p["last_time"], p["key"]))
    return picked


def names_no_known_type(world: World, converted: Converted) -> bool:
    """Say whether no behaviour before the last day of samples is of a type that the recipe names; it may be refused."""
    options = world.recipe.get("select-clicks", {})
    last = max(s["day"] for s in converted.samples)
    known = {b["type text"] for b in converted.behaviours if b["day"] < last}
    wanted = set(options.get("types", []))
    return bool(wanted) and not known & wanted


def score(visits: Decimal | int, dwell: int, age: int, options: dict[str, Any]) -> Decimal:
    """Return the score to 40 digits, so that what is equal in exact arithmetic is equal here."""
    scale, half_life = (Decimal(str(options.get(k, d))) for k, d in (("dwell_scale", 30.0), ("half_life_days", 7.0)))
    interest = visits + Decimal(dwell) / 1000 / scale
    aged = Decimal(age) / (DAY_MS * half_life)
    return (interest * Decimal(2) ** -aged).quantize(Decimal(10) ** -40)


# --- group ---


def counts(world: World, converted: Converted, picked: dict[Any, Any]) -> dict[str, dict[int, int]]:
    """Return vocabulary → index → training samples that contain it."""
    found: dict[str, dict[int, int]] = {}
    for name, feature in world.recipe["features"].items():
        found.setdefault(vocab_of(name, feature), Counter())
    for sample in converted.samples:
        if sample["day"] not in converted.split["train"]:
            continue
        ids: dict[str, set[int]] = {}
        for name, feature in world.recipe["features"].items():
            if feature["of"] == "behaviour":
                values = [p[name] for p in picked.get((sample["user"], sample["day"]), [])]
            else:
                values = sample[name] if isinstance(sample[name], list) else [sample[name]]
            ids.setdefault(vocab_of(name, feature), set()).update(values)
        for vocab, some in ids.items():
            for index in some - {0}:
                found[vocab][index] += 1
    return {vocab: dict(c) for vocab, c in found.items()}
