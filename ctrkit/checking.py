"""What is wrong with the inputs of a recipe, and what will be dropped, seen from a sample before hours are spent.

All faults are collected: an *error* is one that a stage would stop at, or that leaves nothing to learn; a *warning* is
one that costs rows or is likely a mistake. The rows are read and parsed by the code of `convert` itself.
"""

import contextlib
import datetime
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import polars as pl

from ctrkit import columns, days, labels, parsing, picture_sources, pictures
from ctrkit.columns import KEYS, LOOKS_IN, Input
from ctrkit.errors import UserError, nearest
from ctrkit.job import Job
from ctrkit.pictures import BadPicture
from ctrkit.pieces import ROW
from ctrkit.recipe import Recipe, Source
from ctrkit.rejects import none_left
from ctrkit.sampling import TABLE_BYTES, TABLE_ROWS, WINDOW, Sample, distinct_in_all, sample, share_of_visits
from ctrkit.scan import Log
from ctrkit.sources import SOURCES, picture_paths
from ctrkit.tables import RawTable, as_time, open_table, path_parts, say_skipped

LIKELY_MS = (788_918_400_000, 4_102_444_800_000)
"""The years 1995 to 2099: times outside are likely in another unit."""
SURE = 20
"""Where so many matches were to be expected in a sample by chance alone and there is none, there is none at all."""
YEAR_MS = 366 * days.DAY_MS
NONE_OF = {
    "clicks": "no impression counts as clicked",
    "behaviours": "no sample has a history",
    "users": "what features take from there is missing",
    "ads": "what features take from there is missing",
    "goods": "what features take from there is missing",
}
"""What follows where a table is empty."""
SHOWN = 3
LOOKED_FOR, DECODED = 2000, 20
"""Pictures."""


@dataclass
class Findings:
    """Errors and warnings, each a line for people."""

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def error(self, text: str) -> None:
        """Add an error, once."""
        if text not in self.errors:
            self.errors.append(text)

    def warning(self, text: str) -> None:
        """Add a warning."""
        self.warnings.append(text)

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Turn a UserError of the block into an error found."""
        try:
            yield
        except UserError as e:
            for line in e.message.split("\n"):
                self.error(line)


@dataclass
class Seen:
    """The sample of a table, parsed."""

    sample: Sample
    good: pl.DataFrame
    """As `parsing.parse` gives it, and WINDOW."""
    bad: pl.DataFrame
    stretches: pl.DataFrame
    """As `good`, of the rows of the sample's stretches."""

    @property
    def name(self) -> str:
        """The table's key."""
        return self.sample.table.name

    def distinct(self, values: Callable[[pl.DataFrame], pl.Series]) -> float:
        """Estimate how many distinct values the whole table has in a column that is made from `good`."""
        of_sample, windows, share = values(self.good), self.good[WINDOW], self.sample.share
        if self.stretches.height:
            long = values(self.stretches), self.stretches[WINDOW]
            share = max(share, share_of_visits(of_sample, windows, *long, self.sample.read))
        return distinct_in_all(of_sample, windows, share)


@dataclass
class Inputs:
    """All that was found out about a recipe's inputs."""

    tables: dict[str, RawTable]
    plan: dict[str, Input]
    seen: dict[str, Seen]
    ids: Collection[str]
    """Of impressions and clicks those whose rows are known by an id."""
    split: dict[str, list[datetime.date]]
    broken: bool = False
    """Whether the recipe and the files' columns do not fit each other, so that nothing can be tried."""

    @property
    def usable(self) -> bool:
        """Whether the logs have rows to try the stages on."""
        shown = self.seen.get("impressions")
        return not self.broken and shown is not None and bool(shown.good.height)


def look(recipe: Recipe, raw: Path, found: Findings) -> Inputs:
    """Open, sample and check the inputs of a recipe."""
    tables, failed = _open_all(recipe, raw, found)
    _check_recipe(recipe, tables, failed, found)
    plan = _plan(recipe, tables, failed, found)
    ids = {name for name in ("impressions", "clicks") if name in tables and "id" in tables[name].names}
    inputs = Inputs(tables, plan, {}, ids if "impressions" in ids else set(), {})
    used = {one.log for one in plan.values()} | {"impressions", "clicks", *columns.table_columns(plan, tables)}
    read = [name for name in SOURCES if name in tables and name in used]
    for name in read:
        with found.catching():
            inputs.seen[name] = _see(recipe, inputs, name)
    inputs.broken = bool(found.errors) or len(inputs.seen) < len(read)
    _check_folder_of_pictures(recipe, raw, found)
    for seen in inputs.seen.values():
        _check_rows(recipe, seen, found)
    _check_click_labels(recipe, inputs, found)
    _check_keys(inputs, found)
    _check_days(recipe, inputs, found)
    _check_behaviours(recipe, inputs, found)
    if "behaviours" in inputs.seen:
        _check_visits(recipe, inputs.seen["behaviours"], found)
    return inputs


# --- the recipe against the files' columns -----------------------------------------------------------------------


def _open_all(recipe: Recipe, raw: Path, found: Findings) -> tuple[dict[str, RawTable], set[str]]:
    """Return the tables that can be opened, and the names of those that cannot."""
    tables, failed = {}, set()
    for name in SOURCES:
        source: Source | None = getattr(recipe.convert, name)
        if source is None:
            continue
        try:
            tables[name] = open_table(name, source, raw, recipe)
            _check_files(tables[name], found)
        except UserError as e:
            failed.add(name)
            told = [e.message]
            for ours, theirs in source.columns.items():  # each wrong column for itself
                try:
                    open_table(name, source.model_copy(update={"columns": {ours: theirs}}), raw, recipe)
                except UserError as one:
                    told.append(one.message)
            for message in told:
                found.error(message)
    return tables, failed


def _check_files(table: RawTable, found: Findings) -> None:
    """Tell of files without anything in them, and of columns that the paths of others give in vain."""
    if table.skipped:
        found.warning(f"[convert.{table.name}]: {say_skipped(table)}")
    hidden: dict[str, str] = {}
    for file in table.files:
        for part in path_parts(file.name):
            if part not in file.parts:
                hidden.setdefault(part[0], file.name)
    for column, name in hidden.items():
        found.warning(
            f"{name} ([convert.{table.name}]) has a column {column!r} of its own, as its folder has: the file's counts"
        )


def _check_recipe(recipe: Recipe, tables: dict[str, RawTable], failed: set[str], found: Findings) -> None:
    if not failed & {"impressions", "clicks"}:
        with found.catching():
            parsing.check_labels(recipe.convert, tables)
    if not recipe.features:
        found.error('the recipe has no [features]; name at least one, such as [features.ad_id] with of = "ad"')
    histories = recipe.select(of="behaviour") | recipe.select(of="behaviour", kind="image")
    if histories and recipe.convert.behaviours is None:
        found.error(
            f"the recipe has behaviour features ({', '.join(histories)}) but no [convert.behaviours] to take them from"
        )
    options = recipe.select_clicks
    if (options.types or options.type_weights) and "behaviours" in tables and "type" not in tables["behaviours"].names:
        found.error(
            "[select-clicks] speaks of types, but the behaviour log has no column `type`; name it with "
            '--set convert.behaviours.columns.type="ITS NAME"'
        )


def are_pictures_there(recipe: Recipe, raw: Path) -> bool:
    """Say whether there is what `extract-images.folder` names."""
    try:
        return bool(picture_paths(raw / recipe.extract_images.folder))
    except UserError:
        return False


def _check_folder_of_pictures(recipe: Recipe, raw: Path, found: Findings) -> None:
    if any(f.kind == "image" for f in recipe.features.values()) and not recipe.import_features.files:
        folder = raw / recipe.extract_images.folder
        if not are_pictures_there(recipe, raw):
            found.error(
                f"the folder of pictures {folder} is not there; name another with --set extract-images.folder=NAME, "
                f"or leave out the features of kind image"
            )
        weights = recipe.extract_images.weights
        if weights not in ("published", "random", "tuned") and not Path(weights).exists():
            found.error(
                f"extract-images.weights = {weights!r} is neither 'published' nor 'random' nor a file or folder"
            )


def _plan(recipe: Recipe, tables: dict[str, RawTable], failed: set[str], found: Findings) -> dict[str, Input]:
    """Return what each feature is made from; of features whose tables could not be opened nothing is said."""
    plan: dict[str, Input] = {}
    for name, feature in recipe.features.items():
        try:
            plan |= columns.plan(recipe.model_copy(update={"features": {name: feature}}), tables)
        except UserError as e:
            if not failed & {"impressions", *LOOKS_IN[feature.of]}:
                found.error(e.message)
    return plan


def _see(recipe: Recipe, inputs: Inputs, name: str) -> Seen:
    """Sample and parse a table."""
    table = inputs.tables[name]
    if name in KEYS:
        needed = [KEYS[name]]
        extra = [c for c in columns.table_columns(inputs.plan, inputs.tables).get(name, []) if c in table.names]
        taken = sample(table, [*needed, *extra], TABLE_ROWS, TABLE_BYTES, stretched=False)
    else:
        with_id = name in inputs.ids
        needed = parsing.core(table, with_id=with_id)
        _require(table, needed)
        job = Job(recipe, inputs.plan, Path(), Path(), 1)
        keys: dict[str, tuple[str, ...]] = {}
        if name != "clicks":
            keys = job.keys(name, inputs.tables)
        elif not with_id:
            keys = {"ad": ("ad",)}
        extra = Log(table, keys, with_id, 1, recipe.convert.time_zone).columns()
        taken = sample(table, extra)
    good, bad = _parsed(table, taken.frame, needed, extra)
    return Seen(taken, good, bad, _parsed(table, taken.stretches, needed, extra)[0])


def _parsed(
    table: RawTable, frame: pl.DataFrame, needed: Sequence[str], extra: Sequence[str]
) -> tuple[pl.DataFrame, pl.DataFrame]:
    good, bad = parsing.parse(table, frame.drop(WINDOW), needed, extra)
    ids = [c for c in good.columns if c not in (ROW, "time", "click", "dwell")]
    good = good.with_columns(pl.col(ids).cast(pl.String))  # whole numbers of one table may be texts of another
    return good.join(frame.select(ROW, WINDOW), on=ROW, how="left", maintain_order="left"), bad


def _require(table: RawTable, needed: Sequence[str]) -> None:
    """Raise one UserError for all the columns that are missing."""
    told = []
    for column in needed if table.names else needed[:1]:
        try:
            table.require(column)
        except UserError as e:
            told.append(e.message)
    if told:
        raise UserError("\n".join(told))


# --- the rows ----------------------------------------------------------------------------------------------------


def _check_rows(recipe: Recipe, seen: Seen, found: Findings) -> None:
    taken, table = seen.sample, seen.sample.table
    place = f"[convert.{seen.name}]"
    if not taken.rows:
        text = f"{', '.join(f.name for f in table.files[:SHOWN])} ({place}) has no rows"
        if seen.name == "impressions":
            found.error(text)
        else:
            found.warning(f"{text}: {NONE_OF[seen.name]}")
        return
    if not taken.frame.height:
        of = "" if taken.whole else "sampled "
        found.error(
            f"none of the {taken.rows:,} {of}rows of {place} satisfies convert.{seen.name}.where = "
            f"{table.source.where!r}"
        )
        return
    if taken.unknown:
        found.warning(
            f"how many rows {', '.join(taken.unknown[:SHOWN])} ({place}) has is not known without reading all of it; "
            f"the figures below count only the first {taken.rows:,}"
        )
    _check_rejects(recipe, seen, found)
    if "time" in seen.good.columns and seen.good.height:
        _check_times(seen, found)
    moments = taken.frame.schema.get("time")
    if isinstance(moments, pl.Datetime) and moments.time_zone is None:
        found.warning(
            f"the times of {seen.name} have no zone and are read as UTC; local times must be written with their zone"
        )
    if seen.name in KEYS:
        key = KEYS[seen.name]
        repeats = seen.good.height - seen.good[key].n_unique()
        if repeats:
            found.warning(
                f"{repeats:,} of {seen.good.height:,} rows of {seen.name} repeat an earlier {key}; of rows with the "
                f"same {key} only the first counts"
            )


def _check_rejects(recipe: Recipe, seen: Seen, found: Findings) -> None:
    bad, rows = seen.bad, seen.sample.frame.height
    if not bad.height:
        return
    reasons = (
        bad.group_by("reason", maintain_order=True)
        .agg(pl.len().alias("n"), pl.col("cell").drop_nulls().first())
        .sort("n", "reason", descending=[True, False])
    )
    told = [
        f"{r['n']:,} × {r['reason']}" + (f" (such as {r['cell'][:60]!r})" if r["cell"] is not None else "")
        for r in reasons.head(SHOWN).to_dicts()
    ]
    sampled = "" if seen.sample.whole else "sampled "
    text = f"{bad.height:,} of {rows:,} {sampled}rows of {seen.name} ({bad.height / rows:.1%}) cannot be used"
    allowed = recipe.convert.max_reject_rate
    unit = _likely_unit(seen) if reasons["reason"][0].startswith("time is not") else None
    hint = f"its times look like {parsing.UNITS[unit]}: --set convert.{seen.name}.time_unit={unit}" if unit else ""
    if bad.height > allowed * rows:
        hint = hint or (
            f"mend the rows, name the right columns in [convert.{seen.name}], or raise convert.max_reject_rate"
        )
        found.error(f"{text}, more than convert.max_reject_rate = {allowed:g} allows: {'; '.join(told)}; {hint}")
    elif bad.height == rows and seen.name == "impressions":
        found.error(none_left(seen.name, f"{rows:,} {sampled}".strip(), "; ".join(told), hint))
    else:
        found.warning(f"{text} and will be dropped: {'; '.join(told)}")


def _check_times(seen: Seen, found: Findings) -> None:
    times = seen.good["time"]
    first, middle, last = (_date(t) for t in (times.min(), times.median(), times.max()))
    if 2 * int(_is_likely(times).sum()) < times.len():
        unit = _likely_unit(seen)
        hint = (
            f"as {parsing.UNITS[unit]} they would be of our days: --set convert.{seen.name}.time_unit={unit}"
            if unit
            else f"is `{seen.sample.table.names['time']}` the right column?"
        )
        found.error(
            f"the times of {seen.name}, read as {parsing.UNITS[seen.sample.table.time_unit]}, are of about {middle}; "
            f"{hint}"
        )
        return
    low, high = times.quantile(0.01, "nearest"), times.quantile(0.99, "nearest")
    assert low is not None
    assert high is not None
    stray = int((~times.is_between(int(low) - YEAR_MS, int(high) + YEAR_MS)).sum())
    if stray:
        found.warning(
            f"{stray:,} of {times.len():,} rows of {seen.name} lie more than a year from all others (they range from "
            f"{first} to {last}); they count as days of their own. Leave them out with convert.{seen.name}.where"
        )
    soon = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=2)
    if last > soon:
        found.warning(f"{seen.name} has times in the future, up to {last}")


def _date(milliseconds: object) -> datetime.date:
    assert isinstance(milliseconds, int | float)
    return datetime.datetime.fromtimestamp(milliseconds / 1000, datetime.UTC).date()


def _is_likely(times: pl.Series) -> pl.Series:
    return times.is_between(*LIKELY_MS)


def _likely_unit(seen: Seen) -> str | None:
    """Return the unit, other than the recipe's, in which most times would be of our days."""
    frame = seen.sample.frame
    for unit in parsing.UNITS:
        if unit != seen.sample.table.time_unit:
            times = frame.select(as_time(frame.schema["time"], "time", unit).alias("time")).to_series()
            if int(_is_likely(times).sum()) > 0.9 * times.len():
                return unit
    return None


# --- labels ------------------------------------------------------------------------------------------------------


def _check_click_labels(recipe: Recipe, inputs: Inputs, found: Findings) -> None:
    shown = inputs.seen.get("impressions")
    if shown is None or not shown.good.height:
        return
    if "click" in shown.good.columns:
        clicks = int(shown.good["click"].sum())
        if clicks in (0, shown.good.height):
            found.error(
                f"convert.label = {recipe.convert.label!r} is {'always' if clicks else 'never'} true, in "
                f"{shown.good.height:,} {'' if shown.sample.whole else 'sampled '}impressions: nothing can be learned"
            )
    clicked = inputs.seen.get("clicks")
    if clicked is None or not clicked.good.height:
        return
    if "clicks" in inputs.ids:
        own = clicked.good.filter(pl.col("id").is_first_distinct())
        matched = own.join(shown.good, on="id", how="semi").height
        why = f"no id of clicks is an id of impressions (such as {own['id'][0]!r} and {shown.good['id'][0]!r})"
    else:
        own = clicked.good.filter(pl.struct("user", "ad", "time").is_first_distinct())
        matched, why = _match_by_time(recipe, shown.good, own)
    lost = own.height - matched
    expected = own.height * shown.sample.share
    if not matched and (shown.sample.whole or expected >= SURE):
        found.error(f"no click matches an impression: {why}")
    elif not matched:
        found.warning(
            f"no click of the sample matches an impression of the sample; {expected:.1f} are to be expected by chance, "
            f"so this says little"
        )
    elif shown.sample.whole and lost:
        found.warning(
            f"{lost:,} of {own.height:,} {'' if clicked.sample.whole else 'sampled '}clicks ({lost / own.height:.1%}) "
            f"have no impression and will not count"
        )


def _match_by_time(recipe: Recipe, shown: pl.DataFrame, clicked: pl.DataFrame) -> tuple[int, str]:
    """Return how many clicks have an impression, and if none has, why."""
    both = pl.concat([shown.select("user", "ad", "time"), clicked.select("user", "ad", "time")])
    user, ad = (both[c].rank("dense").to_numpy() for c in ("user", "ad"))
    n, time = shown.height, both["time"].to_numpy()
    window = recipe.convert.attribution_window
    hit, _ = labels.nearest_impression((user[:n], ad[:n], time[:n]), (user[n:], ad[n:], time[n:]), round(window * 1000))
    matched = int((hit >= 0).sum())
    for keys, what in ((["user"], "user"), (["ad"], "ad"), (["user", "ad"], "user and ad")):
        if not clicked.join(shown, on=keys, how="semi").height:
            example = f"such as {clicked[keys[-1]][0]!r} and {shown[keys[-1]][0]!r}"
            return matched, f"no {what} of clicks {'is' if len(keys) == 1 else 'are'} among impressions ({example})"
    return matched, (
        f"users and ads agree, but no click is within convert.attribution_window = {window:g} seconds after its "
        f"impression (impressions from {_moment(shown['time'].min())} to {_moment(shown['time'].max())}, clicks from "
        f"{_moment(clicked['time'].min())} to {_moment(clicked['time'].max())}, UTC)"
    )


def _moment(milliseconds: object) -> str:
    assert isinstance(milliseconds, int)
    return f"{datetime.datetime.fromtimestamp(milliseconds // 1000, datetime.UTC):%Y-%m-%d %H:%M:%S}"


# --- tables of users, ads and goods ------------------------------------------------------------------------------


def _check_keys(inputs: Inputs, found: Findings) -> None:
    """Check that what the logs name has a row in the tables that features look in."""
    used = {
        (one.log, table, one.keys) for one in inputs.plan.values() for table, _ in one.pairs if table in inputs.seen
    }
    for log, table, keys in sorted(used):
        key = KEYS.get(table)
        rows = inputs.seen.get(log)
        if key is None or rows is None or not rows.good.height:
            continue
        named = rows.good
        through = ""
        if key not in named.columns:
            if keys != ("ad",) or "ads" not in inputs.seen or key not in inputs.seen["ads"].good.columns:
                continue
            ads = inputs.seen["ads"].good.select("ad", key).unique("ad", keep="first")
            named, through = named.join(ads, on="ad", how="inner"), "ads of "
        named = named.filter(pl.col(key).is_not_null())
        there = inputs.seen[table]
        lost = named.join(there.good, on=key, how="anti", maintain_order="left")
        if not named.height or not lost.height or not there.good.height:
            continue
        share = lost.height / named.height
        what = f"{share:.1%} of the {'' if rows.sample.whole else 'sampled '}rows of {through}{log}"
        example = f"such as {lost[key][0]!r}"
        if lost.height == named.height and (there.sample.whole or named[key].n_unique() * there.sample.share >= SURE):
            found.error(
                f"no {key} of {through}{log} has a row in [convert.{table}] ({example}; {table} has such as "
                f"{there.good[key][0]!r}): their ids do not agree"
            )
        elif there.sample.whole:
            found.warning(
                f"{what} name a {key} without a row in [convert.{table}] ({example}); its features are missing"
            )


# --- days and behaviours -----------------------------------------------------------------------------------------


def local_days(recipe: Recipe, times: pl.Series) -> pl.Series:
    """Return the days of times in the recipe's zone."""
    return pl.DataFrame({"time": times}).select(days.day_of("time", recipe.convert.time_zone)).to_series()


def days_of(recipe: Recipe, seen: Seen) -> list[datetime.date]:
    """Return the days of a log: those seen, or where the log is not read whole all from the first to the last."""
    there: list[datetime.date] = local_days(recipe, seen.good["time"]).unique().sort().to_list()
    if seen.sample.whole or not there:
        return there
    return [there[0] + datetime.timedelta(days=n) for n in range((there[-1] - there[0]).days + 1)]


def _check_days(recipe: Recipe, inputs: Inputs, found: Findings) -> None:
    shown = inputs.seen.get("impressions")
    if shown is None or not shown.good.height:
        return
    times = shown.good["time"]
    with found.catching():
        first, last = times.min(), times.max()
        assert isinstance(first, int)
        assert isinstance(last, int)
        inputs.split = days.split_days(days_of(recipe, shown), first, last, recipe.split, recipe.convert.time_zone)
        if not inputs.split["test"]:
            found.warning("[split] leaves no test day (split.test = 0): nothing can be measured")


def _check_behaviours(recipe: Recipe, inputs: Inputs, found: Findings) -> None:
    shown, done = inputs.seen.get("impressions"), inputs.seen.get("behaviours")
    if shown is None or done is None or not shown.good.height or not done.good.height:
        return
    first, *_, last = [*(served := days_of(recipe, shown)), served[-1]]
    there = days_of(recipe, done)
    window = recipe.select_clicks.window_days
    if there[0] >= last:
        found.error(
            f"behaviours begin on {there[0]} and samples end on {last}: no sample has a history, since only "
            f"behaviours of earlier days count"
        )
    elif window is not None and there[-1] < first - datetime.timedelta(days=window):
        found.error(
            f"behaviours end on {there[-1]}, more than select-clicks.window_days = {window} days before the first "
            f"sample on {first}: no sample has a history. Do their times have the same unit and zone?"
        )
    elif there[-1] < first:
        found.warning(
            f"behaviours end on {there[-1]}, before the first sample on {first}: histories fade with the days"
        )
    elif there[0] >= first:
        found.warning(
            f"behaviours begin on {there[0]}, and samples on {first}: the first day's samples have no history"
        )
    users = shown.good["user"].unique()
    known = int(users.is_in(done.good["user"].unique().implode()).sum())
    whole = done.sample.whole
    if not known and (whole or users.len() * min(shown.sample.share, done.sample.share) >= SURE):
        found.error(
            f"no user of the impressions has behaviours (such as {shown.good['user'][0]!r} and {done.good['user'][0]!r}"
            f"): their ids do not agree"
        )
    elif whole and known < 0.5 * users.len():
        found.warning(f"only {known:,} of {users.len():,} users of the impressions have behaviours")


def _check_visits(recipe: Recipe, done: Seen, found: Findings) -> None:
    """Check that [select-clicks] leaves some behaviours."""
    options = recipe.select_clicks
    there = done.good["type"].drop_nulls().unique().sort().to_list() if "type" in done.good.columns else []
    for key, wanted in (("types", options.types), ("type_weights", options.type_weights)):
        for name in wanted:
            if name in there or not there:
                continue
            text = f"select-clicks.{key} names {name!r}, which no behaviour is{nearest(name, there)}"
            if key == "types" and not set(wanted) & set(there):
                found.error(text)
            else:
                seen = "no behaviour is" if done.sample.whole else "no behaviour of the sample is"
                found.warning(text.replace("no behaviour is", seen))
    if options.min_dwell > 0 and "dwell" in done.good.columns:
        dwell = done.good["dwell"]
        if dwell.len() and bool((dwell < options.min_dwell * 1000).fill_null(False).all()):
            found.error(f"every behaviour is shorter than select-clicks.min_dwell = {options.min_dwell:g} seconds")


# --- features, from the rows that convert made of the sample -----------------------------------------------------


def check_features(recipe: Recipe, encoded: Mapping[str, pl.DataFrame], found: Findings) -> None:
    """Check that features tell something.

    encoded: `impressions`, `behaviours`: what convert made of the sample's rows, a column a feature.
    """
    for name, feature in recipe.features.items():
        frame = encoded.get("behaviours" if feature.of == "behaviour" else "impressions")
        if frame is None or name not in frame.columns or not frame.height:
            continue
        index = frame[name]
        if isinstance(index.dtype, pl.List):
            index = index.filter(index.list.len() > 0).explode()
        known = index.filter(index >= 2)
        rows = f"{frame.height:,} rows of {'behaviours' if feature.of == 'behaviour' else 'impressions'}"
        if not known.len():
            rare = " or rarer than its min_count" if feature.min_count > 1 else ""
            found.warning(f"[features.{name}] is missing{rare} in all {rows}: is {feature.column!r} the right column?")
        elif index.n_unique() == 1 and frame.height > 1:
            found.warning(f"[features.{name}] has the same value in all {rows}: it tells nothing")
        elif feature.kind == "id" and known.len() >= 1000 and known.n_unique() >= 0.9 * known.len():
            found.warning(
                f"[features.{name}] has a value of its own in nearly each of {rows}: what is learned of one "
                f"serves no other"
            )


def check_counts(counts: Mapping[str, int], inputs: Inputs, found: Findings) -> None:
    """Tell what convert dropped of the sample."""
    shown = inputs.seen["impressions"]
    least = "" if shown.sample.whole else "at least "
    duplicates, read = counts["duplicate impressions dropped"], shown.good.height
    if duplicates:
        by = "id" if inputs.ids else "user, ad and time"
        found.warning(
            f"{least}{duplicates:,} of {read:,} impressions ({duplicates / read:.1%}) repeat the {by} of an earlier "
            f"one and will be dropped"
        )
    again = counts.get("repeated clicks", 0)
    if again:
        found.warning(f"{least}{again:,} of the clicks repeat an earlier one and will be dropped")
    dropped = counts.get("dropped negatives", 0)
    if dropped:
        found.warning(f"convert.negative_rate drops {dropped / read:.1%} of the training impressions, as asked")


# --- pictures ----------------------------------------------------------------------------------------------------


def width_of_vectors(recipe: Recipe, raw: Path) -> int:
    """Open the files of `[import-features]`; return how many numbers a vector has. Raises UserError."""
    from ctrkit import vector_files

    settings = recipe.import_features
    names = [[n] if isinstance(n, str) else n for n in (settings.files, settings.ids)]
    vectors, ids = ([raw / name for name in some] for some in names)
    opened = [
        vector_files.open_file(path, beside, settings.format, settings.id, settings.vector)
        for path, beside in vector_files.with_ids(vectors, ids, settings.format)
    ]
    return max((file.width for file in opened), default=0)


def check_pictures(recipe: Recipe, raw: Path, images: Sequence[str], found: Findings) -> float:
    """Look for some of the pictures that the sample names, decode a few; return the seconds that decoding one takes."""
    settings = recipe.extract_images
    source = picture_sources.open_source(raw / settings.folder, settings)
    some = [images[round(i)] for i in np.linspace(0, len(images) - 1, min(len(images), LOOKED_FOR))]
    there: list[str] = []
    lost: list[str] = []
    for image in some:
        (there if source.has(image) else lost).append(image)
    broken, begun = [], time.perf_counter()
    decoded = there[:: max(1, len(there) // DECODED)][:DECODED]
    with pictures.quiet():
        for image in decoded:
            try:
                pictures.decode(pictures.read(source.place(image)), settings.size, settings.crop)
            except BadPicture as bad:
                broken.append(f"{image}: {bad}")
    seconds = (time.perf_counter() - begun) / max(len(decoded), 1)
    unreadable = len(there) * len(broken) / max(len(decoded), 1)
    rate = (len(lost) + unreadable) / len(some)
    if rate:
        told = [f"{len(lost):,} of {len(some):,} are missing (such as {', '.join(lost[:SHOWN])})"] if lost else []
        told += [f"{len(broken)} of {len(decoded)} cannot be decoded ({'; '.join(broken[:SHOWN])})"] if broken else []
        text = f"of the pictures that the sample names, {' and '.join(told)}"
        if rate > settings.max_bad_rate:
            found.error(
                f"{text}: {rate:.1%}, more than extract-images.max_bad_rate = {settings.max_bad_rate:g} allows. Check "
                f"extract-images.folder and template, or raise max_bad_rate"
            )
        else:
            found.warning(f"{text}; these have no vector")
    return seconds
