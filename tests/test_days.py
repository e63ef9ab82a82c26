import datetime

import polars as pl
import pytest

from ctrkit.days import day_of, midnight, split_days
from ctrkit.errors import UsageError
from ctrkit.recipe import Split

HOUR = 3_600_000
DAY = 24 * HOUR
DAYS = [datetime.date(2024, 1, 1) + datetime.timedelta(days=n) for n in range(10)]


def split(test: object, valid: object, days: list[datetime.date] = DAYS) -> dict[str, list[datetime.date]]:
    chosen = Split.model_validate({"test": test, "valid": valid})
    return split_days(days, midnight(days[0], "UTC"), midnight(days[-1], "UTC") + DAY, chosen, "UTC")


def test_midnight_follows_the_zone_and_its_clock_changes() -> None:
    assert midnight(datetime.date(1970, 1, 1), "UTC") == 0
    assert midnight(datetime.date(1970, 1, 1), "Asia/Shanghai") == -8 * HOUR
    spring = datetime.date(2024, 3, 31)
    assert (
        midnight(spring + datetime.timedelta(days=1), "Europe/Berlin") - midnight(spring, "Europe/Berlin") == 23 * HOUR
    )
    # The clock went from 00:00 to 01:00: the day began an hour "late", at 03:00 UTC.
    assert midnight(datetime.date(2018, 11, 4), "America/Sao_Paulo") == 1541300400000


@pytest.mark.parametrize("zone", ["UTC", "Asia/Shanghai", "Europe/Berlin", "America/Sao_Paulo"])
def test_midnight_is_the_first_moment_of_its_day(zone: str) -> None:
    for day in (datetime.date(2018, 11, 4), datetime.date(2024, 3, 31), datetime.date(2024, 10, 27)):
        m = midnight(day, zone)
        found = pl.DataFrame({"t": [m - 1, m]}).select(day_of("t", zone)).to_series().to_list()
        assert found == [day - datetime.timedelta(days=1), day]


def test_numbers_take_the_last_days_present() -> None:
    gaps = [DAYS[0], DAYS[3], DAYS[4], DAYS[9]]
    assert split(1, 2, gaps) == {"train": gaps[:1], "valid": gaps[1:3], "test": gaps[3:]}
    assert split(0, 0) == {"train": DAYS, "valid": [], "test": []}


def test_shares_are_cut_at_day_boundaries() -> None:
    assert split(0.2, 0.1) == {"train": DAYS[:7], "valid": DAYS[7:8], "test": DAYS[8:]}
    assert split(0.25, 0.2) == {"train": DAYS[:6], "valid": DAYS[6:8], "test": DAYS[8:]}
    assert split(0.01, 1)["test"] == DAYS[-1:]


def test_dates_leave_out_days_that_are_in_no_split() -> None:
    got = split(["2024-01-06"], ["2024-01-04"])
    assert got == {"train": DAYS[:3], "valid": [DAYS[3]], "test": [DAYS[5]]}


def test_a_date_without_samples_is_an_error_that_says_which_days_there_are() -> None:
    with pytest.raises(
        UsageError, match=r"split.test names 2024-02-01, which has no samples; days there are: 2024-01-01, "
    ):
        split(["2024-02-01"], 1)
    with pytest.raises(UsageError, match=r"split.valid names 2024-01-09.*before the test days"):
        split(2, ["2024-01-09"])


def test_no_training_day_is_an_error() -> None:
    with pytest.raises(UsageError, match="no day to train on"):
        split(5, 5)
