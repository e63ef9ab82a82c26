"""The benchmarks at tiny sizes: their logs are what they say, memory is seen wherever it is, results are complete."""

import csv
import datetime
import importlib.util
import json
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "benchmarks"
DAY = 86_400


def script(name: str, *words: object) -> subprocess.CompletedProcess[str]:
    """Run a benchmark from the repository's root."""
    command = [sys.executable, SCRIPTS / f"{name}.py", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def last_line(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert isinstance(found, dict)
    return found


def rows_by_day(raw: Path, kind: str) -> dict[int, list[dict[str, str]]]:
    """Read a log with the csv module: epoch day, as the file's name has it → its rows."""
    found = {}
    for path in sorted(raw.glob(f"{kind}-*.csv")):
        date = datetime.date.fromisoformat(path.stem.removeprefix(f"{kind}-"))
        with path.open(newline="") as file:
            found[date.toordinal() - datetime.date(1970, 1, 1).toordinal()] = list(csv.DictReader(file))
    return found


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The raw folder of logs of 12,000 impressions."""
    data = tmp_path_factory.mktemp("data")
    return Path(last_line(script("logs", "--impressions", 12_000, "--data", data))["raw"])


@pytest.fixture(scope="module")
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure", SCRIPTS / "measure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["measure"] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


def test_the_logs_have_the_rows_columns_and_days_they_should(logs: Path) -> None:
    impressions, behaviours = rows_by_day(logs, "impressions"), rows_by_day(logs, "behaviours")
    assert [len(rows) for rows in impressions.values()] == [1500] * 8
    assert sum(len(rows) for rows in behaviours.values()) == 36_000
    assert sorted(behaviours)[-8:] == sorted(impressions)
    assert len(behaviours) == 14 + 8
    ids = [int(row["impression"]) for rows in impressions.values() for row in rows]
    assert ids == list(range(12_000))
    assert len(impressions[min(impressions)][0]) == 5 + 27
    for day, rows in [*impressions.items(), *behaviours.items()]:
        times = [int(row["time"]) for row in rows]
        assert times == sorted(times)
        assert {t // DAY for t in times} == {day}


def test_the_logs_are_shaped_as_they_say(logs: Path) -> None:
    impressions = rows_by_day(logs, "impressions")
    rows = [row for of_day in impressions.values() for row in of_day]
    groups = Counter((day, row["user"]) for day, of_day in impressions.items() for row in of_day)
    assert sum(groups.values()) / len(groups) == 12
    assert max(groups.values()) > 24  # not all alike
    assert 0.04 < sum(row["click"] == "1" for row in rows) / len(rows) < 0.06
    for key, column in (("user", "city"), ("user", "member_level"), ("ad", "goods"), ("goods", "category")):
        values = defaultdict(set)
        for row in rows:
            values[row[key]].add(row[column])
        assert {len(of_key) for of_key in values.values()} == {1}, column
    shares = Counter(row["query"] for row in rows)
    assert len(shares) > 5000  # most are rare
    assert shares.most_common(1)[0][1] > 200  # and some are not


def test_histories_are_as_long_as_they_say(logs: Path) -> None:
    """Distinct goods of the 14 days before, visits of 2 seconds or more, at most 50: 32.6 on average."""
    impressions, behaviours = rows_by_day(logs, "impressions"), rows_by_day(logs, "behaviours")
    lengths = []
    for day, rows in impressions.items():
        seen = defaultdict(set)
        for before in range(day - 14, day):
            for row in behaviours[before]:
                if not row["dwell"] or float(row["dwell"]) >= 2.0:
                    seen[row["user"]].add(row["goods"])
        lengths += [min(50, len(seen[user])) for user in {row["user"] for row in rows}]
    assert len(lengths) == 1000
    assert 30.6 < sum(lengths) / len(lengths) < 34.6


def test_the_same_settings_give_the_same_logs_and_make_them_once(logs: Path, tmp_path: Path) -> None:
    def contents(raw: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in raw.iterdir()}

    def made(*words: object) -> Path:
        return Path(last_line(script("logs", "--data", tmp_path, *words))["raw"])

    again = made("--impressions", 12_000)
    assert contents(again) == contents(logs)
    other = made("--impressions", 12_000, "--seed", 2)
    assert other != again
    assert contents(other) != contents(logs)
    (again / "impressions-2024-03-01.csv").write_text("kept")
    assert made("--impressions", 12_000) == again
    assert (again / "impressions-2024-03-01.csv").read_text() == "kept"
    assert sorted(p.parent.name for p in (again, other)) == sorted(p.name for p in tmp_path.iterdir())


def test_memory_is_seen_in_descendants_whose_parent_has_gone(measure: ModuleType) -> None:
    hungry = "import time; time.sleep(0.9); held = bytearray(b'x') * 150_000_000; time.sleep(0.5)"
    shell = f'{sys.executable} -c "{hungry}" & sleep 0.6'
    command = f"import subprocess, time; subprocess.run(['sh', '-c', {shell!r}]); time.sleep(1.5); print('done')"
    measured = measure.run([sys.executable, "-c", command])
    assert measured.output == "done\n"
    assert 150_000_000 < measured.peak_bytes < 250_000_000
    assert measured.seconds > 2.1
    assert measured.cpu_seconds < measured.seconds


def test_a_command_that_fails_ends_the_benchmark(measure: ModuleType) -> None:
    with pytest.raises(SystemExit, match=r"(?s)no such thing.*exit status 3"):
        measure.run([sys.executable, "-c", "import sys; print('no such thing'); sys.exit(3)"])


@pytest.mark.long
def test_the_benchmark_of_the_data_stages(tmp_path: Path) -> None:
    sizes = ("--impressions", 2400, "--rounds", 1, "--data", tmp_path)
    done = script("convert", *sizes, "--twice", "--profile")
    found = last_line(done)
    assert found["name"] == "convert"
    assert (found["impressions"], found["behaviours"]) == (2400, 7200)
    assert found["ours"] == pytest.approx(sum(found["stages"].values()), abs=0.01)
    assert found["ratio"] == pytest.approx(found["ours"] / found["reference"], rel=0.05)
    assert found["peak_growth"] == pytest.approx(found["peak_bytes_twice"] / found["peak_bytes"], abs=0.01)
    assert found["peak_bytes"] > 30_000_000  # Python and polars alone
    assert "200 groups of 12.00 impressions and" in done.stdout
    assert done.stdout.count("4,800 impressions, 14,400 behaviours") == 2
    table = [line.split() for line in done.stdout.splitlines() if line.startswith(("these rows", "twice, of"))]
    assert [line[-3] for line in table] == ["88", "88", "176"]
    growths = [1.0, found["peak_growth"], found["peak_growth_twice_the_users"]]
    assert [float(line[-1]) for line in table] == growths
    assert done.stdout.count("outside the work") == 3 * 3
    assert not list(tmp_path.glob("outputs-*"))


def test_a_lost_impression_ends_the_benchmark(tmp_path: Path) -> None:
    words = ("--impressions", 2400, "--rounds", 1, "--data", tmp_path)
    done = script("convert", *words, "--set", "convert.impressions.where=\"gender <> 'sex_1'\"")
    assert done.returncode == 1
    assert "2,400 impressions became" in done.stderr


@pytest.mark.long
def test_the_benchmark_of_grouped_files(tmp_path: Path) -> None:
    done = script("grouped_size", "--impressions", 2400, "--data", tmp_path)
    found = last_line(done)
    assert found["name"] == "group-size"
    assert found["ratio"] == pytest.approx(found["reference"] / found["ours"], abs=0.001)
    assert found["all_features"]["grouped"] == found["ours"]
    assert found["all_features"]["shuffled"] == found["reference"]
    for columns in ("all_features", "few_features"):
        assert found[columns]["shuffled"] > found[columns]["grouped"]
    assert found["few_features"]["grouped"] < found["all_features"]["grouped"]
    assert "150 training groups of 12.00 impressions and" in done.stdout
    assert not list(tmp_path.glob("outputs-*"))


def test_the_benchmark_of_training() -> None:
    """Ours alone: the peers are not installed for a test."""
    small = ("--impressions", 600, "--batch", 60, "--steps", 2, "--warm", 1, "--threads", 1, "--peers", "")
    done = script("train", *small, "--settings", "200,000 goods, PReLU", "--pictures", 30)
    found = last_line(done)
    assert (found["name"], found["unit"], found["ratio"], found["reference"]) == ("train", "samples/s", None, None)
    (rates,) = found["din"].values()
    assert found["ours"] == rates["ours"] > 0 < rates["ungrouped"]
    assert found["dicm"]["rate"] > 0 < found["dicm"]["share"] < 1
    assert "times as fast as ungrouped" in done.stdout


@pytest.mark.long
def test_the_benchmark_of_what_is_held(tmp_path: Path) -> None:
    small = ("--impressions", 600, "--batch", 60, "--steps", 2, "--warm", 1, "--threads", 1, "--data", tmp_path)
    found = last_line(script("train", *small, "--held", "0.5", "--pictures", 300))["dicm"]["0.5"]
    assert 0.3 < found["hit_rate"] < 1
    assert found["rate"] > 0 <= found["waited"]


@pytest.mark.long
def test_the_benchmark_of_the_feature_service() -> None:
    small = ("--ranks", 2, "--impressions", 600, "--batch", 60, "--steps", 2, "--warm", 1, "--pictures", 30)
    found = last_line(script("service", *small, "--count-steps", 1, "--rounds", 1))
    assert (found["name"], found["unit"]) == ("service", "bytes a sample")
    wires = found["traffic"]["2"]
    full, half = wires["float32"], wires["bfloat16"]
    assert found["ratio"] == pytest.approx(full["ratio"], abs=0.1)
    # Ids are the same; 12 numbers there and back, of 4 bytes or of 2, stand where 4,096 of 2 are shipped.
    rows = (full["pictures"] - half["pictures"]) / 48
    assert rows > 0
    # Nearly: of the batch after the last the service has asked for already.
    assert full["shipped"] == pytest.approx(full["pictures"] + (8192 - 96) * rows, rel=1e-3)
    assert half["shipped"] == full["shipped"] > full["shipped once"]
    assert 0 < full["extracted"] < full["named"]
    assert {n: [share] for n, share in found["speed"].items()} == found["speed_by_round"]
    assert found["speed"].keys() == {"2"}
    assert all(rate > 0 for rate in found["rates"].values())


def test_the_data_of_the_benchmark_of_training(tmp_path: Path) -> None:
    """The groups folder and the peers' padded rows hold the same samples."""
    code = f"""
import sys; sys.path.insert(0, {str(SCRIPTS)!r})
import numpy as np, train_data as t
from pathlib import Path
from ctrkit.batches import GroupedData
data = t.world(240, 1000)
t.write_groups(data, Path("groups")); t.write_groups(data, Path("alone"), ungrouped=True)
rows = t.rows(data, 240)
def key(columns, history): return tuple(int(c) for c in columns), tuple(history)
names = [n for of in t.ONE_HOT.values() for n in of] + ["ad_goods", "ad_category", "click"]
padded = sorted(key([rows[n][i] for n in names], rows["hist_goods"][i][: rows["length"][i]]) for i in range(240))
for folder, n in (("groups", 20), ("alone", 240)):
    grouped = GroupedData(Path(folder), "train", [*names[:-1], "goods", "category"])
    found = []
    for block in grouped.epoch(7, (1, 0)):
        for g in range(block.n_groups):
            history = block.behaviour["goods"][block.behaviour_offsets[g]:block.behaviour_offsets[g + 1]].tolist()
            for s in range(block.sample_offsets[g], block.sample_offsets[g + 1]):
                row = [block.group[n][g] if n in block.group else block.sample[n][s] for n in names]
                found.append(key(row, history))
    assert sorted(found) == padded
assert (rows["hist_goods"] > 0).sum(1).tolist() == rows["length"].tolist()
assert 30 < rows["length"].mean() < 35 and rows["length"].max() <= 64
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("target", ["logs", "convert", "group-size", "train", "service"])
def test_make_has_a_target_for_each(target: str, tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(f"READY :=\ninclude {SCRIPTS}/bench.mk\n")
    words = ["make", "--dry-run", f"bench-{target}", "N=7", "BENCH=--seed 2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    name = {"group-size": "grouped_size"}.get(target, target)
    assert done.stdout.splitlines()[-1] == f".venv/bin/python benchmarks/{name}.py --impressions 7 --seed 2"
    assert (SCRIPTS / f"{name}.py").is_file()


@pytest.mark.long
def test_the_benchmark_of_extraction(tmp_path: Path) -> None:
    small = ("--pictures", 6, "--batch", 4, "--size", 32, "--picture-size", "60x40", "--data", tmp_path)
    done = script("extract", *small, "--backbone", "squeezenet1_1:features.3", "--seconds", 0.1)
    found = last_line(done)
    assert (found["name"], found["unit"], found["pictures"]) == ("extract", "pictures/s", 6)
    assert found["ratio"] == pytest.approx(found["ours"] / found["reference"], rel=0.02, abs=5e-4)
    assert found["reference"] == found["bare"] > 0 < found["decode"]
    assert "6 JPEG files of 60x40" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["pictures-60x40-1"]
    drift = last_line(script("extract", *small, "--backbone", "squeezenet1_1:features.3", "--drift"))
    assert 0 < drift["float16"]["median"] < drift["bfloat16"]["median"] < 0.05


def test_make_has_a_target_for_extraction(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(f"READY :=\ninclude {SCRIPTS}/bench.mk\n")
    words = ["make", "--dry-run", "bench-extract", "N=7", "BENCH=--batch 2"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ".venv/bin/python benchmarks/extract.py --pictures 7 --batch 2"


@pytest.mark.long
def test_the_benchmark_of_gauc(tmp_path: Path) -> None:
    """Without FuxiCTR, which would be downloaded."""
    small = ("--rows", 3_000, "--day", 4_000, "--peer-rows", 0, "--data", tmp_path)
    done = script("gauc", *small)
    found = last_line(done)
    assert (found["name"], found["unit"], found["rows"], found["day_rows"]) == ("gauc", "rows/s", 3_000, 4_000)
    assert found["ratio"] is found["reference"] is None
    assert len(found["seconds"]) == 4
    assert list(found["day"]) == ["integer users, float32"]
    assert found["largest_difference"] <= 1e-12
    assert list((tmp_path / "gauc").iterdir()) == []


def test_make_has_a_target_for_gauc(tmp_path: Path) -> None:
    (tmp_path / "Makefile").write_text(f"READY :=\ninclude {SCRIPTS}/bench.mk\n")
    words = ["make", "--dry-run", "bench-gauc", "N=7", "BENCH=--day 8"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ".venv/bin/python benchmarks/gauc.py --rows 7 --day 8"


@pytest.mark.long
def test_serving_is_measured_beside_its_model_in_a_loop() -> None:
    words = ("--goods", 300, "--seconds", 0.2, "--rounds", 1, "--workers", 2, "--connections", 2, "--soak", 1)
    words += ("--catalogue", 200, "--requests", 40)
    found = last_line(script("serve", "--only", "dicm", *words))
    assert (found["name"], found["unit"]) == ("serve", "requests/s")
    assert found["ratio"] == pytest.approx(found["ours"] / found["reference"], abs=1e-3)
    assert found["dicm"]["ads_known"] == 1
    assert found["dicm"]["ratio_of_new_ads"] > 0
    assert 0 < found["dicm"]["p50_ms"] <= found["dicm"]["p99_ms"]
    assert found["soak"]["errors"] == 0
    assert found["soak"]["requests"] > 0
    assert found["soak"]["before_mib"] > 0
