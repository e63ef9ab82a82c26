"""Days: where midnight is in the recipe's time zone, and which days train, validate and test."""

import datetime
import zoneinfo
from collections.abc import Sequence

import polars as pl

from ctrkit.errors import UsageError
from ctrkit.recipe import Days, Split

DAY_MS = 86_400_000


def day_of(time: str, zone: str) -> pl.Expr:
    """Return the expression of the day (Date in `zone`) of a column of epoch milliseconds."""
    return local(time, zone).dt.date()


def local(time: str, zone: str) -> pl.Expr:
    """Return the expression of the local time (Datetime in `zone`) of a column of epoch milliseconds."""
    return pl.col(time).cast(pl.Datetime("ms")).dt.replace_time_zone("UTC").dt.convert_time_zone(zone)


def zone_info(zone: str) -> zoneinfo.ZoneInfo:
    """Return a time zone by its name."""
    return zoneinfo.ZoneInfo(zone)


def midnight(day: datetime.date, zone: str) -> int:
    """Return the epoch milliseconds at which `day` begins in `zone`, changes of the clock included."""
    begin = datetime.datetime(day.year, day.month, day.day, tzinfo=zone_info(zone))
    return round(begin.timestamp()) * 1000


def split_days(
    days: Sequence[datetime.date], first: int, last: int, split: Split, zone: str
) -> dict[str, list[datetime.date]]:
    """Deal the days that have samples to `train`, `valid` and `test`.

    Parameters
    ----------
    days: the days that have samples.
    first, last: epoch milliseconds of the first and the last impression.

    A number takes that many of the last days left; a share takes the days that begin within that last share of
    the time from first to last impression (at least one day); dates take themselves. Days after the first
    validation or test day that are in neither are in no list.
    """
    days = sorted(days)
    span = last - first
    test = _last(days, split.test, last, span, zone, "test")
    before = [d for d in days if d < test[0]] if test else days
    end: float = midnight(test[0], zone) if test else last
    if isinstance(split.test, float):
        end = last - split.test * span
    valid = _last(before, split.valid, end, span, zone, "valid")
    held_out = valid + test
    train = [d for d in days if d < held_out[0]] if held_out else days
    if not train:
        raise UsageError(
            f"[split] leaves no day to train on: {_show(days)} have samples, and valid = {_given(split.valid)} and "
            f"test = {_given(split.test)} take all from the first on; set split.valid or split.test lower"
        )
    return {"train": train, "valid": valid, "test": test}


def _last(
    days: Sequence[datetime.date], wanted: Days, end: float, span: int, zone: str, key: str
) -> list[datetime.date]:
    if isinstance(wanted, tuple):
        missing = sorted(set(wanted) - set(days))
        if missing:
            raise UsageError(
                f"split.{key} names {', '.join(map(str, missing))}, "
                f"{'which has' if len(missing) == 1 else 'which have'} no samples"
                f"{' before the test days' if key == 'valid' else ''}; days there are: {_show(days)}"
            )
        return sorted(set(wanted))
    if isinstance(wanted, float):
        taken = [d for d in days if midnight(d, zone) >= end - wanted * span]
        return taken or list(days[-1:])
    return list(days[len(days) - wanted :]) if wanted < len(days) else list(days)


def _show(days: Sequence[datetime.date]) -> str:
    if len(days) <= 10:
        return ", ".join(map(str, days))
    return f"{len(days)} days from {days[0]} to {days[-1]}"


def _given(wanted: Days) -> str:
    return ", ".join(map(str, wanted)) if isinstance(wanted, tuple) else str(wanted)
