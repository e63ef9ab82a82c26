"""The demo world behaves as its description says. Behaviour, not constants: these may be tuned."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import polars as pl
import pytest
from PIL import Image

from ctrkit.recipe import Simulate
from ctrkit.world import SHAPES, TEXTURES, draw, look_match, simulate

SMALL = Simulate(users=400, goods=150, days=4, history_days=6, ads=120, new_ads_per_day=20, picture_size=16)
Floats = npt.NDArray[np.float64]


class World:
    """The raw logs of a simulated shop, read back."""

    def __init__(self, folder: Path, config: Simulate) -> None:
        self.folder, self.config = folder, config
        self.counts = simulate(config, folder)
        for name in ("impressions", "clicks", "behaviours", "users", "ads", "goods"):
            setattr(self, name, pl.read_csv(folder / f"{name}.csv"))
        self.looks = pl.read_parquet(folder / "looks.parquet")
        self.truth = pl.read_parquet(folder / "truth.parquet")

    impressions: pl.DataFrame
    clicks: pl.DataFrame
    behaviours: pl.DataFrame
    users: pl.DataFrame
    ads: pl.DataFrame
    goods: pl.DataFrame

    def samples(self) -> pl.DataFrame:
        """Return one row an impression: true probability, click, user, ad and its look, day from 0."""
        day = (
            pl.col("time") - pl.lit(self.config.first_day).cast(pl.Datetime("ms")).dt.timestamp("ms") // 1000
        ) // 86400
        return (
            self.impressions.join(self.truth, on="impression", maintain_order="left")
            .join(self.ads, on="ad", maintain_order="left")
            .join(self.looks, on="image", maintain_order="left")
            .with_columns(click=pl.col("impression").is_in(self.clicks["impression"].implode()), day=day)
        )

    def file(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., World]:
    """Return a function that simulates SMALL with some settings changed, once for each."""
    made: dict[str, World] = {}

    def world(**changed: object) -> World:
        name = repr(sorted(changed.items()))
        if name not in made:
            config = SMALL.model_copy(update=changed)
            made[name] = World(tmp_path_factory.mktemp("world") / "raw", config)
        return made[name]

    return world


def test_counts_are_of_what_was_written(worlds: Callable[..., World]) -> None:
    world = worlds()
    for name in ("impressions", "clicks", "behaviours", "users", "ads", "goods"):
        assert world.counts[name] == getattr(world, name).height > 0
    assert world.counts["users"] == 400
    assert world.counts["goods"] == 150
    assert world.counts["ads"] == 120 + 3 * 20
    pictures = {p.name for p in (world.folder / "pictures").iterdir()}
    assert pictures == {*world.ads["image"], *world.goods["image"]}
    assert world.counts["pictures"] == len(pictures) == 150 + 180


def test_keys_refer_to_rows_that_are_there(worlds: Callable[..., World]) -> None:
    world = worlds()
    for table, key in (
        (world.users, "user"),
        (world.ads, "ad"),
        (world.goods, "goods"),
        (world.impressions, "impression"),
    ):
        assert table[key].n_unique() == table.height
    assert world.impressions["ad"].is_in(world.ads["ad"].implode()).all()
    assert world.impressions["user"].is_in(world.users["user"].implode()).all()
    assert world.clicks["impression"].n_unique() == world.clicks.height
    assert world.clicks["impression"].is_in(world.impressions["impression"].implode()).all()
    assert world.behaviours["goods"].is_in(world.goods["goods"].implode()).all()
    sold = world.ads.join(world.goods, on="goods", suffix="_goods")
    assert (sold["category"] == sold["category_goods"]).all()
    late = world.clicks.join(world.impressions, on="impression", suffix="_shown")
    assert (late["time"] > late["time_shown"]).all()


def test_clicks_follow_the_truth(worlds: Callable[..., World]) -> None:
    samples = worlds().samples().sort("probability")
    assert samples["probability"].is_between(0, 1).all()
    for tenth in np.array_split(np.arange(samples.height), 10):
        p, clicked = samples["probability"].gather(tenth), samples["click"].gather(tenth)
        spread = np.sqrt((p * (1 - p)).sum()) / len(tenth)
        assert abs(clicked.mean() - p.mean()) < 4 * spread


def test_new_ads_appear_each_day_and_old_ones_go(worlds: Callable[..., World]) -> None:
    samples = worlds().samples()
    number = samples["ad"].str.slice(1).cast(pl.Int64)
    assert sorted(samples["day"].unique()) == [0, 1, 2, 3]
    assert number.is_between(20 * samples["day"], 20 * samples["day"] + 119).all()
    assert samples.filter(pl.col("day") == 3)["ad"].str.slice(1).cast(pl.Int64).max() > 160


def test_behaviours_span_history_and_impressions(worlds: Callable[..., World]) -> None:
    world = worlds()
    first = int(world.samples()["time"].min() // 86400 - 6) * 86400  # type: ignore[operator]
    time = world.behaviours["time"]
    assert time.is_sorted()
    assert time.is_between(first, first + 10 * 86400 - 1).all()
    assert ((time - first) // 86400).n_unique() == 10


def test_a_few_ads_get_most_impressions(worlds: Callable[..., World]) -> None:
    shown = worlds().samples().filter(pl.col("day") == 0)["ad"].value_counts(sort=True)["count"]
    assert shown.head(len(shown) // 10).sum() > 0.25 * shown.sum()


def test_accidents_are_short(worlds: Callable[..., World]) -> None:
    short = {share: (worlds(accidental_share=share).behaviours["dwell"] < 10).mean() for share in (0.0, 0.4, 1.0)}
    assert short[0.0] < 0.05
    assert 0.3 < short[0.4] < 0.5
    assert short[1.0] > 0.85


def taste_for_hue(world: World) -> float:
    """Return how much nearer in hue two goods that one user looked at for long are than two of two users (cosine)."""
    seen = world.behaviours.filter(pl.col("dwell") > 10).join(world.goods, on="goods").join(world.looks, on="image")
    return nearness(seen.select("user", "hue", item="goods"), of_one_user=True) - nearness(
        seen.select("user", "hue", item="goods"), of_one_user=False
    )


def taste_for_clicks(world: World) -> float:
    """The same of the ads that a user clicked on."""
    seen = world.samples().filter("click").select("user", "hue", item="ad")
    return nearness(seen, of_one_user=True) - nearness(seen, of_one_user=False)


def nearness(seen: pl.DataFrame, of_one_user: bool) -> float:
    """Return the mean cosine of the hues of two different items, both of one user or not."""
    a, b = (seen.sample(300_000, with_replacement=True, seed=seed) for seed in (1, 2))
    if of_one_user:
        pairs = seen.join(seen, on="user", suffix="_b").rename({"hue": "x", "hue_b": "y"})
    else:
        pairs = pl.DataFrame({"x": a["hue"], "y": b["hue"], "item": a["item"], "item_b": b["item"]})
    pairs = pairs.filter(pl.col("item") != pl.col("item_b"))
    return float((pairs["x"] - pairs["y"]).cos().mean())  # type: ignore[arg-type]


def test_looks_decide_clicks_unless_the_signal_is_zero(worlds: Callable[..., World]) -> None:
    with_signal, without = worlds(), worlds(picture_signal=0.0)
    assert taste_for_hue(with_signal) > 0.2
    assert abs(taste_for_hue(without)) < 0.06
    assert taste_for_clicks(with_signal) > 0.05
    assert abs(taste_for_clicks(without)) < 0.03


def test_a_setting_changes_only_what_it_is_about(worlds: Callable[..., World]) -> None:
    world = worlds()
    blind = worlds(picture_signal=0.0)
    for name in ("users.csv", "goods.csv", "ads.csv", "looks.parquet", "pictures/g7.jpg"):
        assert blind.file(name) == world.file(name)
    assert blind.file("clicks.csv") != world.file("clicks.csv")
    assert len(list((blind.folder / "pictures").iterdir())) == len(list((world.folder / "pictures").iterdir()))
    busy = worlds(impressions_per_user_day=5.0)
    assert busy.impressions.height < 0.6 * world.impressions.height
    for name in ("behaviours.csv", "users.csv", "ads.csv", "pictures/a7.jpg"):
        assert busy.file(name) == world.file(name)
    large = worlds(picture_size=32)
    for name in ("impressions.csv", "clicks.csv", "behaviours.csv", "truth.parquet"):
        assert large.file(name) == world.file(name)
    with Image.open(large.folder / "pictures/a7.jpg") as picture:
        assert picture.size == (32, 32)
    assert worlds(seed=2).file("impressions.csv") != world.file("impressions.csv")


def test_the_match_of_looks() -> None:
    hue = np.linspace(0, 2 * np.pi, 50)
    one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
    match = look_match(hue[:, None], zero, hue[None], zero)
    assert match.shape == (50, 50)
    np.testing.assert_allclose(match, match.T)
    np.testing.assert_allclose(np.diag(match), 1.0)
    assert match.min() >= 0
    assert match.max() <= 1 + 1e-12
    assert match[0, 5] > match[0, 10] > match[0, 24]
    assert look_match(hue[:1], zero, hue[:1], one) < 1


@pytest.mark.parametrize("texture", range(len(TEXTURES)))
@pytest.mark.parametrize("shape", range(len(SHAPES)))
def test_pictures_show_the_look(shape: int, texture: int) -> None:
    """The hue is that of the coloured pixels, whatever the jitter; no two drawings are the same."""
    rng = np.random.default_rng(3)
    for hue in (0.0, 1.0, 2.5, 4.0):
        first, second = (np.asarray(draw(rng, hue, shape, texture, 48), np.float64) for _ in range(2))
        assert first.shape == (48, 48, 3)
        assert (first != second).any()
        for pixels in (first.reshape(-1, 3), second.reshape(-1, 3)):
            colour = (pixels - pixels.min(axis=1, keepdims=True)).sum(axis=0)
            angles = 2 * np.pi / 3 * np.arange(3)
            seen = np.angle((colour * np.exp(1j * angles)).sum())
            assert np.cos(seen - hue) > 0.9


def test_shapes_and_textures_look_different() -> None:
    pictures = [
        np.asarray(draw(np.random.default_rng(0), 1.0, shape, texture, 32), np.float64)
        for shape in range(len(SHAPES))
        for texture in range(len(TEXTURES))
    ]
    for i, a in enumerate(pictures):
        for b in pictures[:i]:
            assert np.abs(a - b).mean() > 1
