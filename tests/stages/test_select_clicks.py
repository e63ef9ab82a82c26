import json
import shutil
from pathlib import Path

import polars as pl
import pytest
from ctrkit.stages.select_clicks import command

from ctrkit.cli import COMMANDS
from tests.shop import FIRST_DAY, RECIPE, at, random_rows, run, write

# A sample of u1 on each of days 0 to 9; training is days 0 to 7.
IMPRESSIONS = [f"i{n},{at(n)},u1,a1,0" for n in range(10)]


def histories(folder: Path, rows: list[str], sets: dict[str, object] | None = None) -> dict[int, list[str]]:
    """Return day number → the goods of u1's history, for these behaviours."""
    write(folder, impressions=IMPRESSIONS, clicks=["i0,0"], behaviours=rows)
    for stage in ("convert", "select-clicks"):
        result = run(folder, stage, sets)
        assert result.exit_code == 0, result.output
    return histories_there(folder)


def histories_there(folder: Path) -> dict[int, list[str]]:
    """Return day number → the goods of u1's history, as they lie in the folder."""
    words = dict(pl.read_parquet(folder / "convert" / "vocab" / "goods.parquet").select("index", "value").iter_rows())
    found = {}
    for path in (folder / "behaviours").glob("day=*/part-0000.arrow"):
        row = pl.read_ipc(path).row(0, named=True)
        lengths = {len(v) for k, v in row.items() if k != "user"}
        assert len(lengths) == 1
        found[int(path.parent.name[-2:]) - FIRST_DAY.day] = [words.get(i, "?") for i in row["goods"]]
    return dict(sorted(found.items()))


def test_help_is_the_line_in_the_list_of_commands() -> None:
    assert command.get_short_help_str(200) == COMMANDS["select-clicks"][1]


def test_a_click_serves_only_days_that_begin_after_it(tmp_path: Path) -> None:
    """The leak test: a click that moves past a day's midnight leaves that day's history."""
    early = [f"u1,g1,{at(2)},click,9", f"u1,g2,{at(3, 23.9997)},click,9"]
    assert histories(tmp_path / "before", early) == {3: ["g1"], 4: ["g1", "g2"], 5: ["g1", "g2"], 6: ["g2"]}
    late = [early[0], f"u1,g2,{at(4, 0)},click,9"]
    assert histories(tmp_path / "after", late) == {3: ["g1"], 4: ["g1"], 5: ["g1", "g2"], 6: ["g2"], 7: ["g2"]}
    # Even a click earlier on the impression's own day is not seen.
    same_day = [early[0], f"u1,g2,{at(4, 1)},click,9"]
    assert histories(tmp_path / "same", same_day)[4] == ["g1"]


def test_the_window_opens_at_a_midnight_of_the_zone(tmp_path: Path) -> None:
    just_in = [f"u1,g1,{at(2, 0)},click,9"]
    assert list(histories(tmp_path / "in", just_in)) == [3, 4, 5]
    just_out = [f"u1,g1,{at(2, 0) - 1},click,9"]
    assert list(histories(tmp_path / "out", just_out)) == [2, 3, 4]
    # In UTC, eight hours later, the same second belongs to the day before.
    utc = histories(tmp_path / "utc", just_in, {"convert.time_zone": "UTC"})
    assert list(utc) == [2, 3, 4]


def test_all_earlier_days(tmp_path: Path) -> None:
    rows = [f"u1,g1,{at(-300)},click,9", f"u1,g2,{at(7)},click,9"]
    found = histories(tmp_path, rows, {"select-clicks.window_days": '"all"'})
    assert found == {n: ["g1"] if n < 8 else ["g1", "g2"] for n in range(10)}


def test_dwell_and_types(tmp_path: Path) -> None:
    rows = [
        f"u1,g1,{at(6)},click,4.999",
        f"u1,g2,{at(6)},click,5",
        f"u1,g3,{at(6, 13)},cart,",
        f"u1,g9,{at(6, 14)},view,99",
    ]
    assert histories(tmp_path / "a", rows)[7] == ["g2", "g3", "g9"]
    assert histories(tmp_path / "b", rows, {"select-clicks.types": '["cart", "click"]'})[7] == ["g2", "g3"]
    result = run(tmp_path / "b", "select-clicks", {"select-clicks.types": '["cilck"]'})
    assert result.exit_code == 2
    assert "did you mean 'click'" in result.output
    assert "so no behaviour would be left" in result.output
    result = run(tmp_path / "b", "select-clicks", {"select-clicks.types": '["fav", "cart", "click"]'})
    assert result.exit_code == 0  # a rare type may not come up in a day's window
    assert "note: select-clicks.types names 'fav', which no behaviour is" in result.output
    assert histories_there(tmp_path / "b")[7] == ["g2", "g3"]


def test_types_weigh_what_the_recipe_says(tmp_path: Path) -> None:
    """Two clicks against one cart: which goods is left when one is picked."""
    rows = [f"u1,g2,{at(6, 12)},click,", f"u1,g2,{at(6, 13)},click,", f"u1,g3,{at(6, 12)},cart,"]
    rows += [f"u1,g1,{at(6, 14)},,"]
    one = {"select-clicks.max_behaviours": 1}
    assert histories(tmp_path, rows, one)[7] == ["g2"]
    for weights, left in (
        ("{ cart = 2.5 }", "g3"),
        ("{ cart = 2.5, click = 2 }", "g2"),
        ("{ click = 0, cart = 0.5 }", "g1"),
    ):
        assert run(tmp_path, "select-clicks", {**one, "select-clicks.type_weights": weights}).exit_code == 0
        assert histories_there(tmp_path)[7] == [left]
    result = run(tmp_path, "select-clicks", {"select-clicks.type_weights": "{ crat = 3 }"})
    assert result.exit_code == 0
    assert "note: select-clicks.type_weights names 'crat', which no behaviour is; did you mean 'cart'" in result.output


def test_types_need_a_column_of_types(tmp_path: Path) -> None:
    raw, _ = write(tmp_path, impressions=IMPRESSIONS, clicks=["i0,0"])
    (raw / "behaviours.csv").write_text(f"user,goods,time\nu1,g1,{at(0)}\n")
    assert run(tmp_path, "convert").exit_code == 0
    assert run(tmp_path, "select-clicks").exit_code == 0
    for sets in ({"select-clicks.type_weights": "{ cart = 3 }"}, {"select-clicks.types": '["cart"]'}):
        result = run(tmp_path, "select-clicks", sets)
        assert result.exit_code == 2
        assert "has no column `type`" in result.output


def test_lists_are_oldest_first_with_what_selection_used(tmp_path: Path) -> None:
    rows = [
        f"u1,g3,{at(6, 3)},click,10.5",
        f"u1,g1,{at(5, 1)},click,",
        f"u1,g1,{at(6, 2)},click,7",
        f"u2,g1,{at(6, 2)},click,7",
        f"u1,g2,{at(5, 9)},click,6",
    ]
    histories(tmp_path, rows)
    frame = pl.read_ipc(tmp_path / "behaviours" / "day=2024-03-08" / "part-0000.arrow")
    assert frame.schema == {
        "user": pl.String,
        "goods": pl.List(pl.UInt32),
        "category": pl.List(pl.UInt32),
        "image": pl.List(pl.UInt32),
        "visits": pl.List(pl.UInt32),
        "dwell": pl.List(pl.Float32),
        "last_time": pl.List(pl.Int64),
    }
    words = pl.read_parquet(tmp_path / "convert" / "vocab" / "category.parquet")
    shoes, hats = (words.filter(pl.col("value") == v)["index"].item() for v in ("shoes", "hats"))
    row = frame.row(0, named=True)
    assert row["user"] == "u1"
    assert row["category"] == [hats, shoes, shoes]
    assert row["visits"] == [1, 2, 1]
    assert row["dwell"] == [6, 7, 10.5]
    assert row["last_time"] == [1000 * at(5, 9), 1000 * at(6, 2), 1000 * at(6, 3)]
    assert json.loads((tmp_path / "behaviours.json").read_text())["counts"]["goods picked"] == sum(
        pl.read_ipc(p)["goods"].list.len().sum() for p in (tmp_path / "behaviours").glob("*/*")
    )


def test_goods_that_training_does_not_know_are_unknown(tmp_path: Path) -> None:
    found = histories(tmp_path, [f"u1,g1,{at(6)},click,9", f"u1,g2,{at(8, 1)},click,9"])
    assert found[9] == ["g1", "?"]


def test_behaviours_without_goods_are_told_apart_by_their_features(tmp_path: Path) -> None:
    kept = [line for line in RECIPE.splitlines() if not ('of = "behaviour"' in line and "goods" in line)]
    recipe = "\n".join(kept).replace("[select-clicks]", 'brand = { of = "behaviour" }\n[select-clicks]')
    raw, _ = write(tmp_path, recipe, impressions=IMPRESSIONS, clicks=["i0,0"])
    lines = ["user,when,category,brand", *(f"u1,{at(5, n)},{c},{b}" for n, (c, b) in enumerate(["ax", "ay", "ax"]))]
    (raw / "behaviours.csv").write_text("\n".join(lines) + "\n")
    sets = {"convert.behaviours.columns.time": "when"}
    for stage in ("convert", "select-clicks"):
        result = run(tmp_path, stage, sets)
        assert result.exit_code == 0, result.output
    row = pl.read_ipc(tmp_path / "behaviours" / "day=2024-03-07" / "part-0000.arrow").row(0, named=True)
    assert row["visits"] == [1, 2]
    assert row["category"] == [2, 2]
    assert row["brand"] == [3, 2]


@pytest.mark.parametrize("window", [3, '"all"'])
def test_the_same_again_and_whatever_the_order_of_the_log(tmp_path: Path, window: object) -> None:
    rows = random_rows(4)
    contents = []
    for name in ("a", "b"):
        write(tmp_path / name, **rows)
        for stage in ("convert", "select-clicks"):
            assert run(tmp_path / name, stage, {"select-clicks.window_days": window}).exit_code == 0
        contents.append(json.loads((tmp_path / name / "behaviours.json").read_text())["content"])
        rows["behaviours"].reverse()
    assert contents[0] == contents[1]


def test_convert_must_come_first(tmp_path: Path) -> None:
    write(tmp_path, impressions=IMPRESSIONS, clicks=["i0,0"])
    result = run(tmp_path, "select-clicks")
    assert result.exit_code == 1
    assert "run ctrkit convert" in result.output
    assert not (tmp_path / "behaviours").exists()


def refused(folder: Path, sets: dict[str, object] | None = None) -> str:
    """Return what select-clicks says; it must stop with an error and write nothing."""
    result = run(folder, "select-clicks", sets)
    assert result.exit_code == 1, result.output
    assert isinstance(result.exception, SystemExit)
    assert not (folder / "behaviours").exists()
    return result.output


def test_a_conversion_that_is_not_whole(tmp_path: Path) -> None:
    write(tmp_path, **random_rows(4))
    assert run(tmp_path, "convert").exit_code == 0
    part = tmp_path / "convert" / "behaviours" / "day=2024-03-03" / "part-0000.arrow"
    content = part.read_bytes()
    part.unlink()
    said = "is not what ctrkit convert wrote: behaviours/day=2024-03-03 is missing; run ctrkit convert again"
    assert said in refused(tmp_path)
    sidecar = tmp_path / "convert.json"
    sidecar.rename(tmp_path / "aside")
    for size in (0, len(content) // 2, len(content) - 3):
        part.write_bytes(content[:size])
        assert f"{part} is damaged" in refused(tmp_path)
    part.write_bytes(content)
    for name in ("users/part-0000.parquet", "types.parquet", "samples/day=2024-03-02/part-0000.parquet"):
        path = tmp_path / "convert" / name
        whole = path.read_bytes()
        path.write_bytes(whole[:-5])
        assert f"{path} is damaged" in refused(tmp_path)
        path.write_bytes(whole)
    (tmp_path / "aside").rename(sidecar)
    assert run(tmp_path, "select-clicks").exit_code == 0


def test_a_conversion_of_another_recipe(tmp_path: Path) -> None:
    """With its sidecar and without."""
    kept = [line for line in RECIPE.splitlines() if 'of = "behaviour"' not in line]
    _, recipe = write(tmp_path, "\n".join(kept), **random_rows(2))
    assert run(tmp_path, "convert").exit_code == 0
    recipe.write_text(RECIPE)
    assert "convert has no feature 'goods'; it is of another recipe: run ctrkit convert again" in refused(tmp_path)
    (tmp_path / "convert.json").unlink()
    assert "convert has no behaviours; it is of another recipe: run ctrkit convert again" in refused(tmp_path)
    shutil.rmtree(tmp_path / "convert")
    assert run(tmp_path, "convert").exit_code == 0
    told = "was made with features.category.min_count = 1, and the recipe says 2: run ctrkit convert again"
    assert told in refused(tmp_path, {"features.category.min_count": 2})
