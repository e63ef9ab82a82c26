"""`ctrkit simulate` through the command line."""

from pathlib import Path

from tests.shop import ctrkit
from tests.tiny_world import RECIPE


def simulate(folder: Path, out: str, *sets: str) -> dict[str, bytes]:
    """Run the stage; return its files, name → bytes."""
    (folder / "tiny.toml").write_text(RECIPE)
    words = [word for text in sets for word in ("--set", text)]
    result = ctrkit("simulate", "--recipe", folder / "tiny.toml", "--out", folder / out, *words)
    assert result.exit_code == 0, result.output
    assert "(simulated data)" in result.output
    return {str(p.relative_to(folder / out)): p.read_bytes() for p in (folder / out).rglob("*") if p.is_file()}


def test_the_same_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    first = simulate(tmp_path, "first")
    assert simulate(tmp_path, "second") == first
    assert sorted(n for n in first if "/" not in n) == [
        "ads.csv",
        "behaviours.csv",
        "clicks.csv",
        "goods.csv",
        "impressions.csv",
        "looks.parquet",
        "truth.parquet",
        "users.csv",
    ]
    other = simulate(tmp_path, "other", "simulate.seed=2")
    assert other.keys() == first.keys()
    assert all(other[name] != first[name] for name in first)


def test_without_a_picture_signal_the_clicks_are_others(tmp_path: Path) -> None:
    first, null = simulate(tmp_path, "first"), simulate(tmp_path, "null", "simulate.picture_signal=0")
    assert null.keys() == first.keys()
    assert null["clicks.csv"] != first["clicks.csv"]
    assert null["pictures/a3.jpg"] == first["pictures/a3.jpg"]


def test_a_recipe_without_the_table(tmp_path: Path) -> None:
    result = ctrkit("simulate", "--recipe", "movielens", "--out", tmp_path / "raw")
    assert result.exit_code == 2
    assert "recipe 'movielens' has no [simulate] table" in result.output
    assert not list(tmp_path.iterdir())
