"""A tiny shop taken through the real stages, once a session."""

from collections.abc import Callable
from pathlib import Path

from click.testing import Result

from tests.shop import TABLES, ctrkit

RECIPE = """
about = "A tiny simulated shop."

[simulate]
users = 60
goods = 40
ads = 30
new_ads_per_day = 4
days = 4
history_days = 5
shops = 8
categories = 5
picture_size = 32
active_share = 0.7
"""
RECIPE += TABLES
RECIPE += """
[features]
gender = { of = "user" }
age = { of = "user" }
ad_id = { of = "ad", column = "ad", switch = "ad_id" }
ad_category = { of = "ad", column = "category", vocab = "category" }
ad_shop = { of = "ad", column = "shop", vocab = "shop" }
position = { of = "scene" }
ad_image = { of = "ad", kind = "image", column = "image" }
goods = { of = "behaviour" }
category = { of = "behaviour" }
shop = { of = "behaviour" }
image = { of = "behaviour", kind = "image" }

[select-clicks]
max_behaviours = 10

[extract-images]
backbone = "squeezenet1_1:features"
weights = "random"
size = 32

[group]
block_groups = 20

[train]
batch = 64
epochs = 1
extractor = [16, 6]
tower = [12]
attention = [8]

[variants.lr.train]
model = "lr"
[variants.base.train]
model = "base"
[variants.din.train]
model = "din"
[variants.sum.train]
pooling = "sum"
"""


class TinyRun:
    """The outputs of convert to group in one folder, and the stages that come after them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.toml"
        self.groups, self.convert, self.features = folder / "groups", folder / "convert", folder / "features.h5"

    def build(self, rewrite: Callable[[Path], None] | None = None) -> "TinyRun":
        """Run the data stages. `rewrite` may change the raw folder first."""
        self.recipe.write_text(RECIPE, encoding="utf-8")
        raw, behaviours = self.folder / "raw", self.folder / "behaviours"
        self.must("simulate", "--out", raw)
        if rewrite is not None:
            rewrite(raw)
        self.must("convert", "--raw", raw, "--out", self.convert)
        self.must("select-clicks", "--convert", self.convert, "--out", behaviours)
        images = ["--pictures", raw / "pictures", "--convert", self.convert, "--out", self.features]
        self.must("extract-images", *images)
        self.must("group", "--convert", self.convert, "--behaviours", behaviours, "--out", self.groups)
        return self

    def call(self, stage: str, *words: object) -> Result:
        """Run a stage with this run's recipe."""
        return ctrkit(stage, "--recipe", self.recipe, *words)

    def must(self, stage: str, *words: object) -> Result:
        """Run a stage that must succeed."""
        result = self.call(stage, *words)
        assert result.exit_code == 0, (stage, result.output, result.exception)
        return result

    def reads(self) -> list[object]:
        """Return the options that name this run's groups, features and vocabulary."""
        return ["--groups", self.groups, "--features", self.features, "--convert", self.convert]

    def train(self, model: Path, *words: object) -> Path:
        """Train a model, which must succeed; return its folder."""
        self.must("train", *self.reads(), "--out", model, *words)
        return model
