import datetime
import json
from pathlib import Path

import polars as pl
from ctrkit.stages.group import command

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
    assert run(tmp_path, "convert", {"features.goods.min_count": 25, "features.ad_goods.min_count": 25}).exit_code == 0
    result = run(tmp_path, "group")
    assert result.exit_code == 1
    assert "run ctrkit select-clicks again" in result.output


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
