import datetime
import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from ctrkit.stages.group import _size, command

from ctrkit.cli import COMMANDS
from tests.shop import RECIPE, at, ctrkit, random_rows, run, run_all, write

EPOCH = datetime.date(1970, 1, 1)


def test_help_is_the_line_in_the_list_of_commands() -> None:
    assert command.get_short_help_str(200) == COMMANDS["group"][1]


def test_the_three_stages_in_turn_and_the_same_again(tmp_path: Path) -> None:
    contents = []
    for name in ("a", "b"):
        write(tmp_path / name, **random_rows(9))
        run_all(tmp_path / name)
        contents.append(json.loads((tmp_path / name / "groups.json").read_text())["content"])
    assert contents[0] == contents[1]
    out = tmp_path / "a" / "groups"
    assert sorted(p.name for p in out.iterdir()) == ["counts", "schema.json", "test", "train", "valid"]
    counts = json.loads((tmp_path / "a" / "groups.json").read_text())["counts"]
    assert sum(counts[f"{part} samples"] for part in ("train", "valid", "test")) == 300


def test_a_later_click_does_not_reach_an_earlier_sample(tmp_path: Path) -> None:
    """The leak test through all three stages: what a sample's row holds does not depend on what came after it."""
    impressions = [f"i{n},{at(n)},u1,a1,0" for n in range(5)]
    rows = {}
    for name, hour in (("before", 23.0), ("after", 25.0)):
        behaviours = [f"u1,g3,{at(0)},click,9", f"u1,g1,{at(1, hour)},click,9"]
        write(tmp_path / name, impressions=impressions, clicks=["i0,0"], behaviours=behaviours)
        run_all(tmp_path / name)
        groups = pl.read_parquet(tmp_path / name / "groups" / "train" / "*.parquet")
        rows[name] = dict(groups.select(pl.col("day").dt.day(), pl.col("goods").list.len()).iter_rows())
    assert rows["before"] == {1: 0, 2: 1, 3: 2}
    assert rows["after"] == {1: 0, 2: 1, 3: 1}


def test_a_recipe_without_behaviours(tmp_path: Path) -> None:
    kept = [line for line in RECIPE.splitlines() if 'of = "behaviour"' not in line]
    write(tmp_path, "\n".join(kept), **random_rows(2))
    assert run(tmp_path, "convert").exit_code == 0
    words = ["--recipe", tmp_path / "recipe.toml", "--convert", tmp_path / "convert", "--out", tmp_path / "groups"]
    result = ctrkit("group", *words)
    assert result.exit_code == 0, result.output
    refused = run(tmp_path, "select-clicks")
    assert refused.exit_code == 2
    assert "no behaviour features" in refused.output


def test_no_behaviours_given_or_there(tmp_path: Path) -> None:
    write(tmp_path, **random_rows(2))
    assert run(tmp_path, "convert").exit_code == 0
    result = run(tmp_path, "group")
    assert result.exit_code == 1
    assert "make it with ctrkit select-clicks" in result.output
    assert not (tmp_path / "groups").exists()


def test_behaviours_of_another_vocabulary_are_refused(tmp_path: Path) -> None:
    write(tmp_path, **random_rows(2))
    run_all(tmp_path)
    users = tmp_path / "raw" / "users.csv"
    users.write_text(users.read_text() + "u99,x\n")
    impressions = tmp_path / "raw" / "impressions.csv"
    impressions.write_text(impressions.read_text() + f"i999,{at(0)},u99,a1,0\n")
    assert run(tmp_path, "convert").exit_code == 0
    result = run(tmp_path, "group")
    assert result.exit_code == 1
    assert "so its indexes may mean something else; run ctrkit select-clicks again" in result.output


def refused(folder: Path, sets: dict[str, object] | None = None) -> str:
    """Return what group says; it must stop with an error and write nothing."""
    shutil.rmtree(folder / "groups", ignore_errors=True)
    result = run(folder, "group", sets)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert not (folder / "groups").exists()
    return result.output


def test_folders_that_are_not_whole(tmp_path: Path) -> None:
    """What lacks a file is not what was written, and would give fewer samples or histories."""
    write(tmp_path, **random_rows(2))
    run_all(tmp_path, {"convert.partitions": 2, "workers": 1})
    for folder, stage, day, ending in (
        ("convert", "convert", "samples/day=2024-03-02", "parquet"),
        ("behaviours", "select-clicks", "day=2024-03-05", "arrow"),
    ):
        part = tmp_path / folder / day / f"part-0001.{ending}"
        content = part.read_bytes()
        part.unlink()
        said = f"{folder} is not what ctrkit {stage} wrote: {day} has 1 instead of 2 files; run ctrkit {stage} again"
        assert said in refused(tmp_path, {"workers": 1})
        part.write_bytes(content[:-9])
        assert f"{folder} is not what ctrkit {stage} wrote: {day} has changed" in refused(tmp_path, {"workers": 1})
        part.write_bytes(content)
    assert run(tmp_path, "group", {"workers": 1}).exit_code == 0
    for name in ("convert.json", "behaviours.json"):  # as if others had made them
        (tmp_path / name).unlink()
    for name in ("behaviours/day=2024-03-05/part-0000.arrow", "convert/vocab/hour.parquet"):
        part = tmp_path / name
        content = part.read_bytes()
        part.write_bytes(content[:-9])
        assert f"{part} is damaged" in refused(tmp_path, {"workers": 1})
        part.write_bytes(content)
    assert run(tmp_path, "group", {"workers": 1}).exit_code == 0
    for of, whose in (("scene", "samples"), ("behaviour", "behaviours")):
        recipe = RECIPE.replace("[select-clicks]", f'extra = {{ of = "{of}", vocab = "hour" }}\n[select-clicks]')
        (tmp_path / "recipe.toml").write_text(recipe)
        assert f"the {whose} have no feature 'extra'; they are of another recipe" in refused(tmp_path, {"workers": 1})


def test_folders_of_another_stage_or_recipe(tmp_path: Path) -> None:
    write(tmp_path, **random_rows(2))
    run_all(tmp_path)
    words = ["--recipe", tmp_path / "recipe.toml", "--convert", tmp_path / "convert", "--out", tmp_path / "other"]
    result = ctrkit("group", *words, "--behaviours", tmp_path / "convert")
    assert result.exit_code == 1
    assert "convert is what ctrkit convert wrote; give the folder that ctrkit select-clicks wrote" in result.output
    told = "was made with features.category.column = 'category', and the recipe says 'goods': run ctrkit select-clicks"
    assert told in refused(tmp_path, {"features.category.column": "goods"})
    told = "was made with features.position.min_count = 1, and the recipe says 2: run ctrkit convert again"
    assert told in refused(tmp_path, {"features.position.min_count": 2})


@pytest.mark.parametrize(("ratio", "told"), [(2.52, "2.5 times smaller"), (0.8, "1.2 times larger")])
def test_what_grouping_costs_is_not_called_smaller(ratio: float, told: str) -> None:
    assert _size(ratio) == told


@pytest.mark.parametrize("out", ["recipe.toml", "."])
def test_an_output_that_cannot_be_is_told_before_the_work(
    tmp_path: Path, out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw, recipe = write(tmp_path, **random_rows(2))
    monkeypatch.chdir(tmp_path)
    run_all(tmp_path)
    text = recipe.read_text()
    for stage, inputs in (
        ("convert", ["--raw", raw]),
        ("select-clicks", ["--convert", "convert"]),
        ("group", ["--convert", "convert", "--behaviours", "behaviours"]),
    ):
        result = ctrkit(stage, "--recipe", "recipe.toml", *inputs, "--out", out)
        assert result.exit_code == 2, result.output
        assert ("has no name of its own" if out == "." else "recipe.toml is a file") in result.output
        assert "tasks" not in result.output
    assert recipe.read_text() == text


def test_the_movielens_recipe(tmp_path: Path) -> None:
    """Ratings of 4 or more of strictly earlier days are the history, however long ago."""
    raw = tmp_path / "raw"
    raw.mkdir()
    films = [
        "movieId,title,genres",
        '1,"One, The (1995)",Comedy|Drama',
        "2,Two (1996),Drama",
        "3,Three,(no genres listed)",
    ]
    (raw / "movies.csv").write_text("\n".join(films) + "\n")
    day = 86_400
    ratings = [("7", "1", "4.0", 0), ("7", "2", "3.5", 1), ("7", "3", "5.0", 850 * day), ("7", "1", "1.0", 950 * day)]
    ratings += [("7", "2", "4.5", 1000 * day), ("8", "1", "4.0", 1000 * day)]
    lines = ["userId,movieId,rating,timestamp", *(f"{u},{m},{r},{t}" for u, m, r, t in ratings)]
    (raw / "ratings.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "recipe.toml").write_bytes(
        (Path(__file__).parents[2] / "data" / "movielens" / "recipe.toml").read_bytes()
    )
    run_all(tmp_path, {"features.film.min_count": 1, "features.liked.min_count": 1})
    parts = [pl.read_parquet(tmp_path / "groups" / part / "*.parquet") for part in ("train", "valid", "test")]
    names = pl.read_parquet(tmp_path / "convert" / "vocab" / "image.parquet").select("index", "value").rows()
    pictures = dict(names)
    found = [
        (row["user"], day.days, row["click"], [pictures[i] for i in row["liked_poster"]])
        for row in pl.concat(parts).sort("day", "user").to_dicts()
        for day in [row["day"] - EPOCH]
    ]
    assert found == [
        ("7", 0, [1, 0], []),
        ("7", 850, [1], ["1.jpg"]),
        ("7", 950, [0], ["1.jpg", "3.jpg"]),
        ("7", 1000, [1], ["1.jpg", "3.jpg"]),
        ("8", 1000, [1], []),
    ]
    assert [part.height for part in parts] == [1, 1, 3]
