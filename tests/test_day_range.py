"""Days one after the other, each trained from the model of the day before: `make daily`, and what may not leak."""

import csv
import datetime
import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
import torch

from ctrkit import day_table
from ctrkit.cli import main
from ctrkit.day_table import FROM_SCRATCH
from ctrkit.errors import UsageError
from ctrkit.gauc import gauc
from ctrkit.pipeline import Graph, Setting, make_rules
from tests import tiny_world
from tests.tiny_world import CHECKOUT

RECIPE = tiny_world.RECIPE.replace("days = 4", "days = 6", 1)
RECIPE += """
[variants.din.train]
model = "din"

[daily]
window_days = 4
behaviour_days = 9
scratch = true
train = { epochs = 2 }
"""


def day(number: int) -> datetime.date:
    return datetime.date(2024, 3, number)


class Days:
    """A folder with tiny.toml, and ranges of its days made by the stages in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, raw: Path | None = None) -> None:
        self.folder, self.raw, self.patch = folder, raw, monkeypatch
        folder.mkdir(exist_ok=True)
        (folder / "tiny.toml").write_text(RECIPE)
        self.home = folder / "runs" / "tiny"

    def graph(self, since: int, until: int, sets: tuple[str, ...] = ()) -> Graph:
        recipe, out = str(self.folder / "tiny.toml"), self.folder / "runs"
        return Graph(Setting(recipe, self.raw, None, sets, out, since=day(since), until=day(until)))

    def make(self, since: int, until: int, sets: tuple[str, ...] = ()) -> list[str]:
        """Make what the table of these days needs and is stale; return which outputs, below the run's folder."""
        graph = self.graph(since, until, sets)
        wanted, waiting = set(), [step for step in graph.steps if step.stage == "daily"]
        while waiting:
            step = waiting.pop()
            wanted.add(step.output)
            waiting += step.needs
        stale = [step for step in graph.stale() if step.output in wanted]
        for step in stale:
            main.main(graph.arguments(step), standalone_mode=False)
        return [str(step.output.relative_to(self.home)) for step in stale]

    def model(self, number: int, variant: str = "din") -> Path:
        return self.home / "by-day" / str(day(number)) / variant / "model"

    def predictions(self, number: int, variant: str = "din") -> pl.DataFrame:
        return pl.read_parquet(self.home / "by-day" / str(day(number)) / variant / "predictions.parquet")

    def table(self) -> dict[str, list[dict[str, object]]]:
        found: dict[str, list[dict[str, object]]] = json.loads((self.home / "daily" / "daily.json").read_text())
        return found


@pytest.fixture(scope="module")
def days(tmp_path_factory: pytest.TempPathFactory) -> Days:
    """The days 4 to 6 of a tiny shop: the first from scratch, the others from the day before. Not to be changed."""
    made = Days(tmp_path_factory.mktemp("days") / "here", pytest.MonkeyPatch())
    made.make(4, 6)
    return made


def settings(model: Path) -> dict[str, dict[str, object]]:
    found: dict[str, dict[str, object]] = json.loads((model / "settings.json").read_text())
    return found


def test_each_day_trains_on_the_day_before_it_from_that_days_model(days: Days) -> None:
    for variant in ("pictures", "din"):
        first = settings(days.model(4, variant))
        assert first["train"]["warm_start"] == ""
        assert first["days"].keys() == {"train"}
        span = first["days"]["train"]
        assert isinstance(span, dict)
        assert (span["first"], span["last"]) == ("2024-03-01", "2024-03-03")
        for number in (5, 6):
            later = settings(days.model(number, variant))
            span = later["days"]["train"]
            assert isinstance(span, dict)
            assert span["first"] == span["last"] == str(day(number - 1))
            assert later["train"]["epochs"] == 2
            sidecar = json.loads((days.model(number, variant).parent / "model.json").read_text())
            before = json.loads((days.model(number - 1, variant).parent / "model.json").read_text())
            assert sidecar["inputs"]["warm start"] == before["content"]
            scratch = settings(days.model(number, variant).parent / "scratch" / "model")
            assert scratch["train"]["warm_start"] == ""
            assert scratch["days"]["train"]["first"] == str(day(number - 3))  # type: ignore[index]
            tested = days.predictions(number, variant)
            assert tested["day"].unique().to_list() == [day(number)]


def test_the_table_of_days(days: Days) -> None:
    table = days.table()
    labels = [(row["day"], row["variant"]) for row in table["rows"]]
    both = [v + end for v in ("pictures", "din") for end in ("", FROM_SCRATCH)]
    expected = [(str(day(4)), v) for v in ("pictures", "din")] + [(str(day(n)), v) for n in (5, 6) for v in both]
    assert labels == expected
    for row in table["rows"]:
        number, name = int(str(row["day"])[-2:]), str(row["variant"])
        variant, scratch = name.removesuffix(FROM_SCRATCH), name.endswith(FROM_SCRATCH)
        tested = days.predictions(number, f"{variant}/scratch" if scratch else variant)
        assert row["impressions"] == tested.height
        users = tested["user"].rank("dense").to_numpy()
        assert row["gauc"] == gauc(users, tested["click"].to_numpy(), tested["score"].to_numpy()).value
        assert row["unseen_ads"] == pytest.approx(tested["unseen_ad"].mean())
        assert row["started_from"] == ("scratch" if scratch or number == 4 else "the day before")
        if number == 4:
            assert row["new_ids"] is None
    vocabs = ["gender", "ad_id", "category", "position", "goods"]
    for number in (5, 6):
        values = [
            {
                (v, word)
                for v in vocabs
                for word in pl.read_parquet(days.home / f"by-day/{day(n)}/convert/vocab/{v}.parquet")["value"]
            }
            for n in (number - 1, number)
        ]
        news = {row["new_ids"] for row in table["rows"] if row["day"] == str(day(number))}
        assert news == {len(values[1] - values[0])}
    assert [(d["day"], d["variant"]) for d in table["differences"]] == [
        (str(day(n)), v) for n in (5, 6) for v in ("pictures", "din")
    ]
    text = (days.home / "daily" / "daily.md").read_text()
    assert text.count("| the day before |") == 4
    assert text.count("from the day before less from scratch: GAUC ") == 4


def test_nothing_is_made_again(days: Days) -> None:
    assert days.make(4, 6) == []
    assert days.graph(4, 6).stale() == []


def test_later_labels_change_no_model(days: Days, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turn around which impressions of day 5 were clicked: day 5's models stay, day 6's, trained on day 5, do not."""
    raw = tmp_path / "raw"
    raw.mkdir()
    for path in (days.home / "raw").iterdir():
        (raw / path.name).symlink_to(path)
    with open(raw / "impressions.csv", newline="") as f:
        shown = [(row["impression"], int(row["time"])) for row in csv.DictReader(f)]
    since = datetime.datetime(2024, 3, 5, tzinfo=datetime.UTC).timestamp()
    of_day = {i: time for i, time in shown if since <= time < since + 86400}
    with open(raw / "clicks.csv", newline="") as f:
        clicks = list(csv.DictReader(f))
    clicked = {row["impression"] for row in clicks}
    kept = [row for row in clicks if row["impression"] not in of_day]
    turned = [{"impression": i, "time": str(time + 5)} for i, time in of_day.items() if i not in clicked]
    (raw / "clicks.csv").unlink()
    with open(raw / "clicks.csv", "w", newline="") as f:
        writer = csv.DictWriter(f, ["impression", "time"])
        writer.writeheader()
        writer.writerows([*kept, *turned])
    other = Days(tmp_path / "other", monkeypatch, raw)
    other.make(4, 6)
    for number, same in ((4, True), (5, True), (6, False)):
        for variant in ("pictures", "din", "din/scratch"):
            if number == 4 and "/" in variant:
                continue
            a, b = (d.model(number, variant) / "model.pt" for d in (days, other))
            assert (a.read_bytes() == b.read_bytes()) == same, (number, variant)
    a, b = days.predictions(5), other.predictions(5)
    assert a["score"].equals(b["score"])
    assert (a["click"] == 1 - b["click"]).all()


def test_a_day_at_a_time_is_the_same_as_the_range(days: Days, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each day finds on the disk what the day before left; a lost model is made again, and what follows from it."""
    single = Days(tmp_path / "single", monkeypatch, days.home / "raw")
    for number in (4, 5):
        single.make(number, number)
    for variant in ("pictures", "din", "din/scratch"):
        a, b = (d.model(5, variant) / "model.pt" for d in (days, single))
        assert a.read_bytes() == b.read_bytes()
    assert [row["day"] for row in single.table()["rows"]] == [str(day(5))] * 4
    (single.model(5) / "model.pt").unlink()
    again = f"by-day/{day(5)}/din/"
    assert single.make(5, 5) == [again + "model", again + "predictions.parquet", "daily"]
    assert (single.model(5) / "model.pt").read_bytes() == (days.model(5) / "model.pt").read_bytes()


def test_new_ids_start_fresh_and_old_ones_go_on(days: Days) -> None:
    """The rows of ids that the day before knew are the day before's, but for what one day's training moved."""
    state = [torch.load(days.model(n) / "model.pt", weights_only=True)["table.12"] for n in (4, 5)]
    assert state[1].shape[0] > state[0].shape[0]
    counts = json.loads((days.model(5).parent / "model.json").read_text())["counts"]["warm start"]
    assert sum(one["fresh"] for one in counts["ids"].values()) > 0
    assert counts["seen until"] == "2024-03-03"


def test_what_a_model_started_from(tmp_path: Path) -> None:
    """The model of the day before has seen no day from yesterday on; after a gap it is told how far it went."""
    span = {"first": "2024-03-04", "last": "2024-03-04", "samples": 7}
    for last, warm, expected in (
        ("2024-03-03", "full", "the day before"),
        ("2024-03-02", "full", "a model of days up to 2024-03-02"),
        (None, "", "scratch"),
    ):
        days_seen = {"train": span, **({"before": {"last": last}} if last else {})}
        settings = {"days": days_seen, "train": {"warm_start": warm}}
        (tmp_path / "settings.json").write_text(json.dumps(settings))
        assert day_table.training(tmp_path, "2024-03-05")["started_from"] == expected


def test_ranges_that_cannot_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = Days(tmp_path / "some", monkeypatch)
    with pytest.raises(UsageError, match="FROM comes after TO"):
        some.graph(5, 4)
    with pytest.raises(UsageError, match="begin where"):
        Graph(Setting(str(tmp_path / "some/tiny.toml"), None, None, (), tmp_path, until=day(4)))
    with pytest.raises(UsageError, match="one or the other"):
        Graph(Setting(str(tmp_path / "some/tiny.toml"), None, None, (), tmp_path, day(4), since=day(4)))
    with pytest.raises(UsageError, match="table \\[train\\] has no key 'epoch'; did you mean 'epochs'"):
        some.graph(4, 5, ("daily.train.epoch=2",))
    with pytest.raises(UsageError, match=r"daily.variants: there is no variant 'dim'; did you mean 'din'"):
        some.graph(4, 5, ("daily.variants=['dim']",))


def test_a_variant_that_starts_from_another_starts_from_the_day_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    some = Days(tmp_path / "some", monkeypatch)
    sets = ("variants.din.train.warm_start=full", "variants.din.train.warm_from=pictures", "daily.variants=['din']")
    trained = [step for step in some.graph(4, 5, sets).steps if step.stage == "train"]
    assert ["--warm-start" in step.options for step in trained] == [False, True, False]
    assert str(some.model(4)) in trained[1].options
    assert all("train.warm_from=" in step.sets for step in trained)


def test_make_names_the_days(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules chain the days; Make refuses to guess which."""
    some = Days(tmp_path / "some", monkeypatch)
    rules = make_rules(some.graph(4, 5), "ctrkit")
    [of_model] = [line for line in rules.splitlines() if "by-day/2024-03-05/din/model.json: FORCE |" in line]
    assert "by-day/2024-03-04/din/model.json" in of_model
    assert "by-day/2024-03-04/convert.json" in of_model
    mk = CHECKOUT / "ctrkit" / "pipeline.mk"
    words = ["make", "-n", "-f", str(mk), f"CTRKIT={sys.executable} -m ctrkit", "DATA=tiny.toml"]
    done = subprocess.run([*words, "daily"], cwd=some.folder, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "which days? make daily FROM=2024-03-06 TO=2024-03-08" in done.stderr
    days_ = ["FROM=2024-03-04", "TO=2024-03-04"]
    done = subprocess.run([*words, *days_, "daily"], cwd=some.folder, capture_output=True, text=True, check=True)
    assert done.stdout.count(" train --recipe tiny.toml") == 2
    assert "--tested 2024-03-04 din runs/tiny/by-day/2024-03-04/din" in done.stdout
