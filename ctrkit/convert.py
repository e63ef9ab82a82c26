"""Raw logs to samples and vocabularies (DICM section VI: two weeks of logs to train, the next day to test).

Passes, each a list of independent tasks (see `ctrkit.engine`):

1. scan each piece of the logs: parse, set bad rows aside, turn texts into codes, deal rows to partitions of users;
2. unify each column's dictionaries, and match impressions with clicks by id;
3. label each partition: drop duplicates, label, sort by day, user and time;
4. count what training has; build each vocabulary;
5. encode each partition: codes to indexes.

Memory holds some pieces or partitions, and dictionaries: it grows with the distinct values, not with the rows. Nothing
later than the training days decides what a vocabulary holds; pictures are only given keys.
"""

import dataclasses
import datetime
import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from ctrkit import columns, daily, days, dictionaries, indexing, labelling, labels, parsing, partitions, spool
from ctrkit.engine import Engine
from ctrkit.errors import UsageError, UserError
from ctrkit.files import Behind
from ctrkit.job import Chunk, Counts, Job, Labelled, state, write_state
from ctrkit.pieces import ROW
from ctrkit.recipe import Feature, Recipe, Source
from ctrkit.rejects import Rejects
from ctrkit.scan import Log, scan
from ctrkit.tables import RawTable

PARTITION_BYTES = 128 << 20
"""Of raw logs, for each partition of users."""
URL_BYTES = 32 << 20
"""What a file behind a URL counts, whose size is not known."""
LOGS = ("impressions", "clicks", "behaviours")
OF_INDEXES = {"of", "kind", "vocab", "multi_hot", "separator", "hash_buckets", "edges", "quantiles"}
"""Keys of a feature that decide what its indexes mean, with where its values come from."""
SMALL_BYTES = 32 << 20
"""Below this, starting other processes takes longer than the work."""


def input_bytes(recipe: Recipe, tables: Mapping[str, RawTable]) -> int:
    """Return the size of the logs' files; URLs and compressed files count as if they were plain and large."""
    total = 0
    for name in LOGS:
        for file in tables[name].files if name in tables else ():
            total += URL_BYTES if file.url else Path(file.path).stat().st_size * (4 if file.compression else 1)
    return total


def convert(
    recipe: Recipe,
    tables: Mapping[str, RawTable],
    out: Path,
    engine: Engine,
    today: datetime.date | None = None,
    previous: Path | None = None,
) -> Counts:
    """Write `samples/`, `behaviours/`, `vocab/`, `split.json`, … (docs/formats.md) into the folder `out`.

    today: leave out what is later, and what left the window of `[daily]`.
    previous: the folder of an earlier day to extend: only today's rows are read, the other days are taken from there.

    Returns the counts. Raises UserError, with nothing to keep in `out`, where the raw data cannot be used.
    """
    if not recipe.features:
        raise UsageError('the recipe has no [features]; name at least one, such as [features.ad_id] with of = "ad"')
    parsing.check_labels(recipe.convert, dict(tables))
    inputs = columns.plan(recipe, tables)
    wanted = recipe.convert.partitions or math.ceil(input_bytes(recipe, tables) / PARTITION_BYTES)
    ids = {name for name in ("impressions", "clicks") if name in tables and "id" in tables[name].names}
    if "impressions" not in ids:
        ids = set()
    meaning = _meaning(recipe, inputs, ids)
    if previous is not None:
        wanted = daily.check_previous(recipe, previous, today, meaning)
    job = Job(recipe, inputs, engine.folder, out, min(max(wanted, 1), 4096), previous)
    with_behaviours = any(one.log == "behaviours" for one in inputs.values())
    if with_behaviours and "behaviours" not in tables:
        raise UsageError("the recipe has behaviour features but no [convert.behaviours] to take them from")

    rejects = Rejects()
    counts = daily.tell(recipe, previous, today) if today is not None else {}
    counts |= _read_keyed(job, tables, rejects)
    logs = [name for name in LOGS if name in tables and (name != "behaviours" or with_behaviours)]
    if ids and recipe.convert.drop_repeats:
        raise UsageError(
            "convert.drop_repeats is for impressions without an id, and these have one: those of the same id are "
            "duplicates; leave drop_repeats out"
        )
    chunks = _scan(job, tables, logs, ids, today, engine, rejects, counts)
    rejects.check(recipe.convert.max_reject_rate)
    if not chunks["impressions"]:
        rejects.check_left("impressions")
        files = ", ".join(f.name for f in tables["impressions"].files)
        raise UserError(f"{files} ([convert.impressions]) has no rows{f' of {today}' if today else ''}")

    midnights = _midnights(chunks, recipe.convert.time_zone)
    write_state(job, "scan", {"chunks": chunks, "midnights": midnights, "ids": sorted(ids)})
    _unify_and_match(job, chunks, ids, engine, counts, today)
    parts = range(job.partitions)
    if recipe.convert.sampled_negatives:
        engine.run("first days", labelling.first_days, [(job, p) for p in parts])
        labelling.order_ads(job)
    labelled = engine.run("label impressions", labelling.label_impressions, [(job, p) for p in parts])
    write_state(job, "label", labelled)
    split = _split(job, labelled, midnights)
    with Behind() as behind:
        behind.remove(f"{c['stem']}{end}" for c in chunks["impressions"] for end in (".rows", ".at", ".ids"))
        counted = engine.run("count", indexing.count, [(job, p) for p in parts])
        write_state(job, "count", counted)
        names = list(dict.fromkeys(f.vocab for f in recipe.features.values()))
        largest_first = sorted(names, key=lambda name: (-indexing.texts_of(job, name), name))
        built, _ = engine.run_together(
            [
                ("vocabularies", indexing.build_vocabulary, [(job, name) for name in largest_first]),
                ("words", indexing.write_words, [(job, name) for name in indexing.WORDS]),
            ]
        )
        sizes = dict(zip(largest_first, built, strict=True))
        engine.run("encode impressions", indexing.encode_impressions, [(job, p) for p in parts])
        if recipe.convert.negative_rate == 1:
            behind.remove(job.work / "labelled" / f"impressions-{p:04}.rows" for p in parts)
        behind.flush(out / "samples")
        if with_behaviours:
            engine.run("encode behaviours", indexing.encode_behaviours, [(job, p) for p in parts])
        behind.remove(f"{c['stem']}.rows" for c in chunks["behaviours"])
    if previous is not None and today is not None:
        held_out = [d for d in (*split["valid"], *split["test"]) if d < today]
        engine.run("held-out days", indexing.hold_out, [(job, d, p) for d in held_out for p in parts])

    _list_unused(job, tables, chunks, rejects)
    rejects.write(out / "rejects.parquet")
    facts: dict[str, Any] = {part: [str(d) for d in split[part]] for part in split}
    facts |= {"negative_rate": recipe.convert.negative_rate, "partitions": job.partitions, "recipe": meaning}
    made = sum(sum(one["days"]) for one in counted)
    facts["next_sample_id"] = made
    if previous is not None and today is not None:
        facts["next_sample_id"] += daily.next_sample_id(previous)
        facts["known_before"] = daily.known_before(recipe, previous, today)
        counts |= daily.link_days(recipe, previous, today, out)
    (out / "split.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    counts |= _summary(job, labelled, counted, split)
    return counts | {f"vocabulary {name}": sizes[name] for name in names}


def _meaning(recipe: Recipe, inputs: Mapping[str, columns.Input], ids: Collection[str]) -> daily.Meaning:
    """Return what of a recipe decides what samples, labels and indexes mean.

    inputs: what the features are made from; ids: which logs have an id that counts.

    Not how the files are written, which may change from day to day; nor `min_count` and `top`, which decide only which
    new values get an index.
    """
    options = recipe.convert
    by_time = options.clicks is not None and "clicks" not in ids
    own: dict[str, Any] = {"time_zone": options.time_zone, "label": options.label}
    if options.clicks is not None:
        own["clicks"] = "joined by user, ad and time" if by_time else "joined by id"
    if by_time:
        own["attribution_window"] = options.attribution_window
    repeats = (options.clicks is not None and not ids) if options.drop_repeats is None else options.drop_repeats
    own["drop_repeats"] = "those of the same id" if ids else repeats
    for log in LOGS:
        source: Source | None = getattr(options, log)
        if source is not None:
            own[f"{log}.where"] = source.where
    found = {"convert": own}
    for name, one in inputs.items():
        feature = recipe.features[name]
        kept = feature.model_dump(mode="json", include=OF_INDEXES - (set() if feature.multi_hot else {"separator"}))
        found[f"features.{name}"] = {**kept, "column": _column(feature, one)}
    return found


def _column(feature: Feature, source: columns.Input) -> str:
    """Say where a feature's values come from: "goods.category by ad"."""
    column = feature.column
    for table, field in source.pairs:
        column = column.replace(f"{{{field}}}", f"{{{table}.{field}}}")
    if "{" not in column:
        column = f"{source.pairs[0][0]}.{column}"
    return f"{column} by {', '.join(source.keys)}"


def _read_keyed(job: Job, tables: Mapping[str, RawTable], rejects: Rejects) -> Counts:
    """Read the tables of users, ads and goods that features need."""
    counts: Counts = {}
    for name, wanted in columns.table_columns(job.inputs, tables).items():
        frame, read = parsing.keyed(tables[name], columns.KEYS[name], wanted, rejects)
        counts |= read
        (job.work / "keyed").mkdir(parents=True, exist_ok=True)
        spool.write_frame(job.work / "keyed" / f"{name}.ipc", frame)
    return counts


def _scan(
    job: Job,
    tables: Mapping[str, RawTable],
    logs: Sequence[str],
    ids: Collection[str],
    today: datetime.date | None,
    engine: Engine,
    rejects: Rejects,
    counts: Counts,
) -> dict[str, list[Chunk]]:
    """Scan all logs; return their chunks in the order of the logs, each with the row of its file it begins after."""
    tasks, owners = [], []
    for name in logs:
        with_id = name in ids
        keys = {} if name == "clicks" and with_id else job.keys(name, tables)
        if name == "clicks" and not with_id:
            keys = {"ad": ("ad",)}
        log = Log(tables[name], keys, with_id, job.partitions, job.recipe.convert.time_zone)
        if today is not None:
            begin, end = daily.times(job.recipe, name, today, extending=job.previous is not None)
            log = dataclasses.replace(log, begin=begin, end=end)
        tables[name].prepare(log.columns())
        for i, (number, piece) in enumerate(tables[name].pieces()):
            tasks.append((log, number, piece, job.work / "chunks" / f"{name}-{i:06}"))
            owners.append(name)
    (job.work / "chunks").mkdir(parents=True, exist_ok=True)
    results = engine.run("scan", scan, tasks)
    chunks: dict[str, list[Chunk]] = {name: [] for name in LOGS}
    for name in logs:
        ends: dict[int, int] = {}
        read = left_out = other_days = rejected = 0
        bad_rows = []
        own = [(task, one) for task, owner, one in zip(tasks, owners, results, strict=True) if owner == name]
        for task, result in own:
            begin = ends.get(result["file"], 0)
            ends[result["file"]] = begin + result["rows"]
            for chunk in result["chunks"]:
                chunks[name].append({**chunk, "file": result["file"], "first_row": chunk["first_row"] + begin})
            if result["rejected"]:
                bad = pl.read_parquet(f"{task[3]}-rejects.parquet")
                bad_rows.append(_located(bad, result["file"], begin))
            read += result["read"]
            left_out += result["rows"] - result["read"]
            other_days += result["other days"]
            rejected += result["rejected"]
        empty = pl.DataFrame(schema={ROW: pl.Int64, "reason": pl.String, "cell": pl.String})
        read -= other_days
        rejects.add(tables[name], pl.concat(bad_rows) if bad_rows else _located(empty, 0, 0), read)
        counts |= {f"{name} read": read, f"{name} rejected": rejected}
        if left_out:
            counts[f"{name} left out by where"] = left_out
        if other_days:
            counts[f"{name} of other days"] = other_days
        if read == other_days == 0 and left_out:
            source = tables[name].source
            raise UserError(
                f"none of the {left_out:,} rows of [convert.{name}] satisfies convert.{name}.where = {source.where!r}"
            )
    return chunks


def _located(rows: pl.DataFrame, file: int, begin: int) -> pl.DataFrame:
    return rows.with_columns(pl.col(ROW) + begin, pl.lit(file, dtype=pl.UInt32).alias("file"))


def _midnights(chunks: Mapping[str, Sequence[Chunk]], zone: str) -> list[list[Any]]:
    """Return each day from the first to the last of all logs, and the epoch milliseconds at which it begins."""
    times = [t for some in chunks.values() for c in some if "times" in c for t in c["times"]]
    first, last = (
        datetime.datetime.fromtimestamp(t / 1000, datetime.UTC).astimezone(days.zone_info(zone)).date()
        for t in (min(times), max(times))
    )
    some = [first + datetime.timedelta(days=i) for i in range((last - first).days + 1)]
    return [[str(day), days.midnight(day, zone)] for day in some]


def _unify_and_match(
    job: Job,
    chunks: Mapping[str, Sequence[Chunk]],
    ids: Collection[str],
    engine: Engine,
    counts: Counts,
    today: datetime.date | None,
) -> None:
    every = [c for some in chunks.values() for c in some]
    names = list(
        dict.fromkeys([*(one.dictionary for one in job.inputs.values()), *(n for c in every for n in c["words"])])
    )
    folder = job.work / "dictionaries"
    own = {name: [c for c in every if name in c["words"]] for name in names}
    shares = [
        (some, every, folder, ["behaviours.goods", "behaviours.type"]) for some in dictionaries.tasks(names, every)
    ]
    clicks = chunks["clicks"] if "clicks" in ids else []
    (job.work / "marks").mkdir(parents=True, exist_ok=True)
    tasks = [
        (p, job.partitions, chunks["impressions"], clicks, job.work / "marks" / f"{p:04}", today is not None)
        for p in (range(job.partitions) if ids else ())
    ]
    # The largest dictionary takes as long as all that is left for the other processes.
    unified, matched = engine.run_together(
        [("dictionaries", dictionaries.unify, shares), ("match", labels.match_ids, tasks)]
    )
    found = {k: v for one in unified for k, v in one.items()}
    order = {name: [c["stem"] for c in own[name]] for name in names}
    write_state(job, "dictionaries", {"found": found, "order": order})
    if ids:
        timed = any("other_day" in c["layout"] for c in clicks)
        for key in ("clicks of other days", "repeated clicks", "clicks without an impression"):
            if any(key in one["counts"] for one in matched):
                counts[key] = sum(one["counts"].get(key, 0) for one in matched)
        if today is not None and clicks and not timed:
            del counts["clicks without an impression"]
            counts["clicks of other days or without an impression"] = counts.pop("clicks of other days")
    write_state(job, "match", [one["begins"] for one in matched])


def _split(
    job: Job, labelled: Sequence[Mapping[str, Any]], midnights: Sequence[Sequence[Any]]
) -> dict[str, list[datetime.date]]:
    by_day = np.sum([one["days"] for one in labelled], axis=0)
    zone = job.recipe.convert.time_zone
    present = [datetime.date.fromisoformat(day) for (day, _), n in zip(midnights, by_day, strict=True) if n]
    times = [t for one in labelled for t in one["times"]]
    if job.previous is not None:
        kept = daily.kept_days(job.recipe, job.previous, present[-1])
        times += [days.midnight(d, zone) for d in kept]
        present = [*kept, *present]
    split = days.split_days(present, min(times), max(times), job.recipe.split, zone)
    training = {str(d) for d in split["train"]}
    last = split["train"][-1]
    if job.previous is not None:
        # Today extends the vocabularies whatever it is for; group hides from a model what its training days lack.
        training |= {day for day, _ in midnights}
        last = present[-1]
        spool.write_frame(job.work / daily.TRAINING_ADS, daily.training_ads(job.previous, split["train"]).to_frame())
    end = days.midnight(last + datetime.timedelta(days=1), zone)
    facts = {"training": [day in training for day, _ in midnights], "end": end}
    write_state(job, "split", facts | {"trains": present[-1] in split["train"]})
    return split


def _list_unused(
    job: Job, tables: Mapping[str, RawTable], chunks: Mapping[str, Sequence[Chunk]], rejects: Rejects
) -> None:
    """List the rows that are good but became nothing: duplicates, clicks without an impression, dropped negatives."""
    reasons = {
        "duplicate": "repeats an earlier row",
        "unmatched": "no impression to this click",
        "further": "its impression has a click already",
        "negative": "not drawn (negative_rate)",
    }

    def add(log: str, frame: pl.DataFrame, kind: str) -> None:
        if frame.height:
            files = pl.Series("file", [c["file"] for c in chunks[log]], dtype=pl.UInt32)
            ordered = frame.sort("chunk", "row")
            rows = ordered.select(
                pl.col("row").alias(ROW),
                pl.lit(reasons[kind]).alias("reason"),
                pl.lit(None, dtype=pl.String).alias("cell"),
                files.gather(ordered["chunk"]).alias("file"),
            )
            rejects.add(tables[log], rows, 0, "unmatched" if kind == "further" else kind)

    parts = range(job.partitions)
    stems = [job.work / "labelled" / f"impressions-{p:04}" for p in parts]
    add("impressions", pl.concat([pl.read_ipc(f"{s}.duplicates") for s in stems]), "duplicate")
    if job.recipe.convert.negative_rate < 1:
        frames = []
        for p in parts:
            rows = Labelled(job, p)
            dropped = ~np.fromfile(f"{rows.stem}.kept", bool)
            frames.append(
                pl.DataFrame({"chunk": rows.columns["__chunk"][dropped], "row": rows.columns["__row"][dropped]})
            )
        add("impressions", pl.concat(frames), "negative")
    if chunks["clicks"]:
        if "clicks" in state(job.work, "scan")["ids"]:
            useless = pl.concat([pl.read_ipc(job.work / "marks" / f"{p:04}.clicks") for p in parts])
            useless = _click_rows(useless, chunks["clicks"])
        else:
            useless = pl.concat([pl.read_ipc(f"{s}.clicks") for s in stems])
        for kind in ("duplicate", "unmatched", "further"):
            add("clicks", useless.filter(pl.col("kind") == kind).select("chunk", "row"), kind)


def _click_rows(useless: pl.DataFrame, chunks: Sequence[Chunk]) -> pl.DataFrame:
    """Replace `at`, the place in a chunk's file, by the row of the raw file."""
    frames = [pl.DataFrame(schema={"chunk": pl.UInt32, "row": pl.Int64, "kind": pl.String})]
    for (number,), some in useless.partition_by("chunk", as_dict=True, maintain_order=True).items():
        chunk = chunks[int(number)]
        row = spool.Columns(Path(f"{chunk['stem']}.rows"), chunk["layout"], 0, chunk["rows"])["row"]
        rows = row[some["at"].to_numpy()].astype(np.int64) + chunk["first_row"]
        frames.append(pl.DataFrame({"chunk": some["chunk"], "row": rows, "kind": some["kind"]}))
    return pl.concat(frames)


def _summary(
    job: Job,
    labelled: Sequence[Mapping[str, Any]],
    counted: Sequence[Mapping[str, Any]],
    split: Mapping[str, Sequence[datetime.date]],
) -> Counts:
    found: Counts = {"duplicate impressions dropped": sum(one["counts"]["duplicates"] for one in labelled)}
    for key in (
        "repeated clicks",
        "further clicks on a clicked impression",
        "clicks without an impression",
        "sampled negatives",
        "negatives that no ad was left for",
    ):
        if any(key in one["counts"] for one in labelled):
            found[key] = sum(one["counts"].get(key, 0) for one in labelled)
    if job.recipe.convert.negative_rate < 1:
        found["dropped negatives"] = sum(one["dropped negatives"] for one in counted)
    by_day = np.sum([one["days"] for one in counted], axis=0)
    dates = [day for day, _ in state(job.work, "scan")["midnights"]]
    found["samples"] = int(by_day.sum())
    found["clicks among samples"] = sum(one["clicks"] for one in counted)
    of_day = dict(zip(dates, by_day.tolist(), strict=True))
    if job.previous is not None:
        earlier = {str(d): daily.samples_of(job.out, d) for d in partitions.days_there(job.out / "samples")}
        of_day = earlier | {day: n for day, n in of_day.items() if n}
        found["samples taken over"] = sum(of_day.values()) - found["samples"]
    for part, chosen in split.items():
        found[f"{part} days"] = len(chosen)
        found[f"{part} samples"] = sum(of_day.get(str(d), 0) for d in chosen)
    used = sum(found[f"{part} samples"] for part in split)
    if used < sum(of_day.values()):
        found["samples on days of no split"] = sum(of_day.values()) - used
    if split["test"]:
        unseen = partitions.read_by_day(job.out / "samples", split["test"], ["unseen_ad"])
        found["test samples of unseen ads"] = int(unseen["unseen_ad"].sum()) if unseen is not None else 0
    return found
