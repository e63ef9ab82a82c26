import json
import re
from pathlib import Path

import polars as pl
import pytest
from ctrkit.stages.convert import command

from ctrkit.cli import COMMANDS
from tests.shop import FIRST_DAY, at, random_rows, run, write

LOGS = ("impressions", "clicks", "behaviours")
ROWS = [f"i{n},{at(n)},u1,a1,0" for n in range(3)]


def test_help_is_the_line_in_the_list_of_commands() -> None:
    assert command.get_short_help_str(200) == COMMANDS["convert"][1]


def test_it_writes_what_it_says_and_the_same_again(tmp_path: Path) -> None:
    write(tmp_path, **random_rows(1))
    result = run(tmp_path, "convert")
    assert result.exit_code == 0, result.output
    assert "300 samples + 0 rejects + 0 duplicates" in result.output
    out = tmp_path / "convert"
    assert sorted(p.name for p in out.iterdir()) == [
        "behaviours",
        "goods.parquet",
        "rejects.parquet",
        "samples",
        "split.json",
        "types.parquet",
        "users",
        "vocab",
    ]
    sidecar = json.loads((tmp_path / "convert.json").read_text())
    assert sidecar["counts"]["samples"] == 300
    names = ["ads", "behaviours", "clicks", "goods", "impressions", "users"]
    assert sorted(sidecar["inputs"]) == [f"raw/{n}.csv" for n in names]
    assert run(tmp_path, "convert").exit_code == 0
    again = json.loads((tmp_path / "convert.json").read_text())
    assert (again["key"], again["content"]) == (sidecar["key"], sidecar["content"])


def test_samples_are_in_order_of_time_within_the_days_of_the_zone(tmp_path: Path) -> None:
    rows = [f"i0,{at(1, 0)},u1,a1,0", f"i1,{at(0, 23.999)},u1,a1,0", f"i2,{at(2, 8)},u1,a1,0", f"i3,{at(1, 7)},u1,a1,0"]
    write(tmp_path, impressions=rows, clicks=["i1,0"])
    result = run(tmp_path, "convert")
    assert result.exit_code == 0, result.output
    found = {p.parent.name: pl.read_parquet(p) for p in (tmp_path / "convert").glob("samples/*/*.parquet")}
    assert {day: frame["sample_id"].to_list() for day, frame in found.items()} == {
        "day=2024-03-01": [0],
        "day=2024-03-02": [1, 2],
        "day=2024-03-03": [3],
    }
    assert found["day=2024-03-01"]["click"].to_list() == [1]
    assert "day" not in found["day=2024-03-01"].columns


@pytest.mark.parametrize(
    ("sets", "code", "message"),
    [
        ({"convert.goods.columns.goods": "good"}, 1, "has no column 'good', which [convert.goods] calls 'goods'; did"),
        ({"convert.impressions.files": "impression.csv"}, 1, "did you mean 'impressions.csv' or "),
        ({"convert.behaviours.files": "broken.parquet"}, 1, "broken.parquet is not a whole Parquet file"),
        ({"convert.impressions.files": "empty.csv"}, 1, "empty.csv ([convert.impressions]) has no rows"),
        ({"split.test": '["2024-03-09"]'}, 2, "days there are: 2024-03-01, 2024-03-02, 2024-03-03"),
        ({"split.test": 3}, 2, "no day to train on"),
        ({"convert.impressions.where": "position >"}, 2, "is not an SQL expression"),
        ({"convert.time_unit": "iso"}, 1, "3 of 3 rows of impressions (100%)"),
        ({"features.hour.column": "hours"}, 1, "did you mean 'hour'?"),
        ({"convert.timezone": "UTC"}, 2, "did you mean 'time_zone'"),
    ],
)
def test_a_mistake_is_explained_and_nothing_is_written(
    tmp_path: Path, sets: dict[str, object], code: int, message: str
) -> None:
    raw, _ = write(tmp_path, impressions=ROWS, clicks=["i0,0"])
    (raw / "broken.parquet").write_text("PAR1")
    (raw / "empty.csv").write_text("impression,time,user,ad,position\n")
    result = run(tmp_path, "convert", sets)
    assert result.exit_code == code, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["raw", "recipe.toml"]


def test_a_failure_leaves_the_old_output_whole(tmp_path: Path) -> None:
    write(tmp_path, impressions=ROWS, clicks=["i0,0"])
    assert run(tmp_path, "convert").exit_code == 0
    before = {p: p.read_bytes() for p in (tmp_path / "convert").rglob("*") if p.is_file()}
    assert run(tmp_path, "convert", {"split.test": 3}).exit_code == 2
    assert {p: p.read_bytes() for p in (tmp_path / "convert").rglob("*") if p.is_file()} == before
    assert (tmp_path / "convert.json").is_file()


def test_iso_times_and_milliseconds_give_the_same_samples(tmp_path: Path) -> None:
    texts = {
        "s": [str(at(n)) for n in range(3)],
        "ms": [str(1000 * at(n)) for n in range(3)],
        "iso": [f"2024-03-0{n + 1}T12:00:00+08:00" for n in range(3)],
    }
    assert FIRST_DAY.isoformat() == "2024-03-01"
    found = []
    for unit, times in texts.items():
        folder = tmp_path / unit
        rows = [f"i{n},{time},u1,a1,0" for n, time in enumerate(times)]
        write(folder, impressions=rows, clicks=["i0,0"], behaviours=[f"u1,g1,{times[0]},click,1"])
        result = run(folder, "convert", {"convert.time_unit": unit})
        assert result.exit_code == 0, result.output
        found.append(json.loads((folder / "convert.json").read_text())["content"])
    assert len(set(found)) == 1


@pytest.mark.parametrize("odd", ["", "007", "+7"])
def test_whole_numbers_are_their_texts(tmp_path: Path, odd: str) -> None:
    rows = {n: [re.sub(r"\b[iuag](?=\d)", "", line) for line in lines] for n, lines in random_rows(4).items()}
    if odd:  # 7 and 007 are two users
        rows["behaviours"].append(f"{odd},3,{at(2)},click,9")
        rows["impressions"].append(f"99999,{at(2)},{odd},5,1")
    outputs = []
    for name, sets in (("numbers", {}), ("texts", {f"convert.{t}.null_values": '["none"]' for t in LOGS})):
        write(tmp_path / name, **rows)
        result = run(tmp_path / name, "convert", sets)
        assert result.exit_code == 0, result.output
        out = tmp_path / name / "convert"
        outputs.append({p.relative_to(out): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()})
    assert outputs[0] == outputs[1]
    users = pl.read_parquet(tmp_path / "numbers" / "convert" / "samples" / "*" / "*.parquet")["user"]
    assert not odd or {odd, "7"} <= set(users)
