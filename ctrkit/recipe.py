"""Recipes: one TOML file that holds every setting of a run, one table a stage, checked when it is loaded.

`load` reads `data/NAME/recipe.toml` (or any path), lays a variant's overrides and `--set table.key=value` over
it, and returns a frozen `Recipe`. An unknown key is an error that names the nearest right one.
"""

import datetime
import functools
import json
import re
import tomllib
import typing
import zoneinfo
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
    model_validator,
)

from ctrkit.errors import UsageError, nearest

Fraction = Annotated[float, Field(gt=0.0, lt=1.0)]
Rate = Annotated[float, Field(ge=0.0, le=1.0)]


def _needs(form: str) -> WrapValidator:
    """Say in one sentence what a value that may have several forms has to be."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            given = str(value) if isinstance(value, datetime.date) else repr(value)
            raise ValueError(f"has to be {form} (given: {given})") from None

    return WrapValidator(check)


# Days by number from the end (1 = the last day present), a share of the time range, or dates.
Days = Annotated[
    Annotated[int, Field(ge=0, strict=True)] | Annotated[Fraction, Field(strict=True)] | tuple[datetime.date, ...],
    _needs("a number of days, a share between 0 and 1, or a list of dates, such as [2024-03-20]"),
]
Names = Annotated[str | tuple[str, ...], _needs("a name or a list of names")]
Width = Annotated[int, Field(ge=1, le=1_000_000)]
Widths = tuple[Width, ...]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
Threads = Annotated[int, Field(ge=0, le=1024)]
Factor = Annotated[float, Field(ge=0, le=1e30)]
Gib = Annotated[float, Field(ge=0, le=1e6)]
"""What numbers of float32 may be multiplied by."""
SomeWidths = Annotated[Widths, Field(min_length=1)]
UserIds = Annotated[bool | Literal["din"], _needs('true, false or "din"')]
UserImages = Annotated[
    bool | Literal["simtier", "simtier+pooled"], _needs('true, false, "simtier" or "simtier+pooled"')
]
Column = Annotated[str | Annotated[int, Field(ge=1)], _needs("a column's name, or its position from 1")]
VariantName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._+-]*$")]
MOST_DAYS = 100_000
"""Of a window; `"all"` is more."""


def _zone(name: str) -> str:
    if name not in zoneinfo.available_timezones():
        raise ValueError(f"no time zone {name!r}{nearest(name, zoneinfo.available_timezones())}")
    return name


Zone = Annotated[str, AfterValidator(_zone)]


def _train_day(day: int | datetime.date) -> int | datetime.date:
    if day == 0:
        raise ValueError("has to be a date, or the number of a training day: 1 is the first, -1 the last (given: 0)")
    return day


TrainDay = Annotated[
    Annotated[int, Field(strict=True)] | datetime.date,
    AfterValidator(_train_day),
    _needs("a date, or the number of a training day: 1 is the first, -1 the last"),
]


def _encoding(name: str) -> str:
    try:
        plain = '\n\r\t,|;:"0123456789'.encode(name) == b'\n\r\t,|;:"0123456789'
    except (LookupError, UnicodeError):
        plain = False
    if not plain:
        raise ValueError(f"encoding {name!r} is unknown or not an extension of ASCII; convert the files to UTF-8 first")
    return name


Encoding = Annotated[str, AfterValidator(_encoding)]


def _id_template(text: str) -> str:
    if text.count("{id}") != 1:
        raise ValueError(f'template has to have {{id}} once, such as "{{id}}.jpg" (given: {text!r})')
    return text


class Table(BaseModel):
    """A recipe table: frozen, numbers finite, and an unknown key is an error. No text or truth value passes for a
    number, and no number or text for a truth value."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        for one in [] if Any in kinds or kinds == {"text"} else _values(value):
            if type(one) in KIND and KIND[type(one)] not in kinds:
                raise ValueError(f"has to be {' or '.join(sorted(kinds))} (given: {json.dumps(one)})")
        return value


KIND = {bool: "true or false", int: "a number", float: "a number", str: "text"}


def _kinds(annotation: Any) -> frozenset[Any]:
    """Return what a key of this type takes: values of `KIND`; Any where that is not looked at."""
    if annotation in KIND:
        return frozenset([KIND[annotation]])
    if annotation is datetime.date:  # in JSON it is text
        return frozenset(["text"])
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Literal:
        return frozenset(KIND[type(value)] for value in args)
    if origin is Annotated or origin is dict:
        args = args[:1] if origin is Annotated else args[1:]
    elif annotation in (None, type(None), Ellipsis):
        return frozenset()
    elif not args:
        return frozenset([Any])
    return frozenset().union(*map(_kinds, args))


def _values(value: Any) -> Iterator[Any]:
    """Yield the values in nested lists and tables, keys left out."""
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for one in value:
            yield from _values(one)
    else:
        yield value


class Simulate(Table):
    """`[simulate]`: the demo shop. Everything in it is simulated, and said to be."""

    seed: Seed = 1
    users: Annotated[int, Field(ge=1)] = 3000
    goods: Annotated[int, Field(ge=1)] = 1500
    days: Annotated[int, Field(ge=2)] = 8
    """Days of impressions; behaviours begin `history_days` earlier."""
    history_days: Annotated[int, Field(ge=0)] = 14
    first_day: datetime.date = datetime.date(2024, 3, 1)
    impressions_per_user_day: Annotated[float, Field(gt=0)] = 12.0
    active_share: Rate = 0.5
    """Share of users who visit on a given day."""
    clicks_per_user_day: Annotated[float, Field(ge=0)] = 1.6
    """Organic goods clicks of a user per day, in expectation, tastes and accidents together."""
    accidental_share: Rate = 0.4
    """Share of organic clicks that follow no taste; they are short."""
    categories: Annotated[int, Field(ge=2)] = 24
    shops: Annotated[int, Field(ge=1)] = 200
    tastes: Annotated[int, Field(ge=1)] = 3
    """A user has 1 to `tastes` tastes, each over a category and a look."""
    ads: Annotated[int, Field(ge=1)] = 400
    """Ads alive on a day."""
    new_ads_per_day: Annotated[int, Field(ge=0)] = 60
    picture_signal: Annotated[float, Field(ge=0)] = 1.0
    """How much the look decides a click; 0 makes pictures carry nothing."""
    category_signal: Annotated[float, Field(ge=0)] = 1.0
    picture_size: Annotated[int, Field(ge=16, le=1024)] = 64


class Source(Table):
    """One input table: which files, what its columns are called, which of its rows count."""

    files: Names
    """Names, globs or folders, relative to the raw folder, or URLs such as s3://…: CSV, TSV, JSONL or Parquet, each
    also .gz or .zst. A folder stands for all data files below it; `day=2024-03-01` in a path is a column `day`.
    `{today}` is the day of `--today`, such as 2024-03-01, and any text where that is not given."""
    columns: dict[str, Column] = {}
    """Our name → the file's column name, or its position from 1 where there is no header. Columns not named keep
    their own names (without a header: column_1, column_2, …)."""
    format: Literal["", "csv", "tsv", "jsonl", "parquet"] = ""
    """Default: by the name's ending."""
    header: bool = True
    """Whether the first line of a CSV or TSV file names the columns."""
    separator: str = ""
    """Between the cells of a CSV or TSV file, one or more characters. Default: a comma or a tab."""
    encoding: Encoding = "utf-8"
    """Of CSV, TSV and JSONL: utf-8, gbk, latin-1, …."""
    null_values: tuple[str, ...] = ()
    """Texts that mean that a cell is missing, besides the empty one."""
    where: str = ""
    """SQL condition over the file's columns; rows where it does not hold are not read."""
    time_unit: Literal["", "s", "ms", "iso"] = ""
    """Of the column `time`. Default: that of [convert]."""

    @model_validator(mode="after")
    def _positions(self) -> "Source":
        by_position = [c for c in self.columns.values() if isinstance(c, int)]
        if by_position and self.header:
            raise ValueError(f"column {by_position[0]} is given by position, which needs header = false")
        return self


class Convert(Table):
    """`[convert]`: raw logs to samples."""

    impressions: Source | None = None
    """Needs columns `user`, `ad`, `time`; `id` to join clicks by."""
    label: str = ""
    """SQL expression over an impression's columns that is true for a click. Else clicks are joined."""
    clicks: Source | None = None
    """Joined by `id` where both logs have it, else by `user`, `ad` and `time`."""
    attribution_window: Annotated[float, Field(ge=0, le=1e9)] = 3600.0
    """Seconds after an impression in which a click of the same user and ad is its click."""
    drop_repeats: bool | None = None
    """Whether impressions of the same user, ad and time are duplicates. Default: where clicks are joined by them."""
    users: Source | None = None
    """One row a user, key `user`."""
    ads: Source | None = None
    """One row an ad, key `ad`; may name the ad's `goods`."""
    goods: Source | None = None
    """One row a goods, key `goods`."""
    behaviours: Source | None = None
    """Needs columns `user`, `time`; `goods`, `type` and `dwell` (seconds) where known."""
    time_unit: Literal["s", "ms", "iso"] = "s"
    """What the time columns hold: epoch seconds, epoch milliseconds or ISO-8601 text with zone."""
    time_zone: Zone = "UTC"
    """Where midnight is: the zone of the day boundary."""
    negative_rate: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training impressions without a click that is kept; `predict` undoes it in its scores."""
    sampled_negatives: Annotated[int, Field(ge=0)] = 0
    """For logs of positives only: so many other ads at the same time, without a click, for each impression."""
    seed: Seed = 0
    """Of `negative_rate` and `sampled_negatives`."""
    max_reject_rate: Rate = 0.01
    """Share of a table's rows that may be bad."""
    partitions: Annotated[int, Field(ge=0, le=4096)] = 0
    """Parts that users are dealt to by a hash of their id; 0: by the size of the input."""


class Split(Table):
    """`[split]`: which days train, validate and test. Test days come last, validation days just before them.

    A number is that many of the last days that have samples; a share, such as 0.1, is the days that begin in that
    last share of the time from first to last impression; dates are those days. Training days are all before.
    """

    test: Days = 1
    valid: Days = 1

    @model_validator(mode="after")
    def _in_order(self) -> "Split":
        if isinstance(self.valid, tuple) and isinstance(self.test, tuple):  # noqa: SIM102
            if self.valid and self.test and max(self.valid) >= min(self.test):
                raise ValueError("the validation days must come before the test days")
        return self


class Feature(Table):
    """`[features.NAME]`: one input of the model."""

    of: Literal["user", "ad", "scene", "behaviour"]
    column: str = ""
    """Column of the joined tables, or a template such as "{goods}.jpg". Default: the feature's name.
    Scene features may use `hour` and `weekday`, taken from the time."""
    kind: Literal["id", "image", "number"] = "id"
    vocab: str = ""
    """Features of one vocabulary share one table. Default: the feature's name; `image` for pictures."""
    multi_hot: bool = False
    """A list column, or text split at `separator`."""
    separator: str = "|"
    min_count: Annotated[int, Field(ge=1)] = 1
    """Values seen less often in training become unknown (index 1)."""
    top: Annotated[int, Field(ge=0)] = 0
    """Only so many values, the most frequent; 0: all."""
    hash_buckets: Annotated[int, Field(ge=0)] = 0
    """No vocabulary, but the index 2 + xxhash64(value) mod so many; 0: a vocabulary."""
    edges: tuple[float, ...] = ()
    """Of a number: bucket i holds edges[i - 1] ≤ x < edges[i]."""
    quantiles: Annotated[int, Field(ge=0)] = 0
    """Of a number: that many buckets with edges from the training samples' values."""
    width: Width = 12
    """Embedding width (DICM section IV: 12)."""
    switch: Literal["", "ad_id", "user_ids"] = ""
    """DICM uses the feature only when this switch of `[train]` is on. Default: always, and `user_ids` for
    behaviour ids."""

    @model_validator(mode="after")
    def _one_value(self) -> "Feature":
        if self.multi_hot and (self.of == "behaviour" or self.kind != "id"):
            raise ValueError("multi_hot is for ids of user, ad or scene; a behaviour, picture or number has one value")
        if (self.kind == "number") != (bool(self.edges) or self.quantiles > 0) or (self.edges and self.quantiles):
            raise ValueError('kind = "number" and either edges or quantiles go together')
        if list(self.edges) != sorted(set(self.edges)):
            raise ValueError(f"edges must rise: {list(self.edges)}")
        if (self.kind != "id" and (self.top or self.hash_buckets or self.min_count > 1)) or (
            self.hash_buckets and (self.top or self.min_count > 1)
        ):
            raise ValueError("min_count and top are for ids with a vocabulary, hash_buckets for ids without")
        return self


class Daily(Table):
    """`[daily]`: `make TODAY=…`, which converts one day at a time."""

    window_days: Annotated[int, Field(ge=2, le=MOST_DAYS)] = 15
    """Days of samples kept, today's included."""
    behaviour_days: Annotated[int, Field(ge=1, le=MOST_DAYS)] = 30
    """Days of behaviours kept, today's included."""
    variants: tuple[str, ...] = ()
    """Of the stage `daily`: the variants that are trained day by day. Default: all that are not `extra`."""
    scratch: bool = False
    """Of `daily`: train each from scratch too, on the whole window, for comparison."""
    train: dict[str, Any] = {}
    """Of `daily`: keys of [train] for the days that start from the day before's model, such as { epochs = 1 }."""

    @model_validator(mode="after")
    def _days_of_its_own(self) -> "Daily":
        for key in ("first_day", "last_day", "warm_start", "warm_from"):
            if key in self.train:
                raise ValueError(
                    f"train has {key}, which day after day decides: the last training day, all of the model of the day "
                    "before; leave it out"
                )
        return self


class SelectClicks(Table):
    """`[select-clicks]`: the typical clicks before each day (DICM section VI)."""

    window_days: Annotated[int, Field(ge=1, le=MOST_DAYS)] | None = 14
    """Days before the served day's midnight that count; leave out (or `"all"` in TOML) for all earlier days."""
    min_dwell: Annotated[float, Field(ge=0)] = 0.0
    """Seconds; shorter visits are accidents. Clicks without a dwell time pass."""
    max_behaviours: Annotated[int, Field(ge=1)] = 50
    types: tuple[str, ...] = ()
    """Behaviour types that count; empty: all."""
    type_weights: dict[str, Annotated[float, Field(ge=0, le=1000)]] = {}
    """How many visits one of this type counts for in the score. Default: 1."""
    dwell_scale: Annotated[float, Field(gt=0)] = 30.0
    """Seconds of dwell that count as much as one visit more, in the score."""
    half_life_days: Annotated[float, Field(gt=0)] = 7.0
    """Days after which a behaviour's score halves."""

    @model_validator(mode="before")
    @classmethod
    def _all(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("window_days") == "all":
            return {**data, "window_days": None}
        return data


class ExtractImages(Table):
    """`[extract-images]`: the fixed part of the extractor, once per distinct picture (DICM section IV-A)."""

    backbone: str = "vgg16:fc6"
    """torchvision model and layer."""
    weights: str = "published"
    """`published` (torchvision's own, downloaded), `random` (seeded) or the path of a state dict; in a run also
    `tuned`, what `tune-backbone` makes first."""
    seed: Seed = 0
    size: Annotated[int, Field(ge=32)] = 224
    """Side of the square the network sees, in pixels."""
    crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Share of a picture's shorter side that the square keeps, around the centre: 224 of 256, as torchvision's own. 1
    for pictures that have no margin to spare, or that are of that size already."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    batch: Annotated[int, Field(ge=1)] = 32
    device: str = "auto"
    threads: Threads = 0
    """CPU threads of the network; 0: all cores. Set it where other stages run side by side."""
    workers: Annotated[int, Field(ge=0, le=512)] = 0
    """Processes that read and decode; 0: threads beside a network on the CPU, a process a core beside one on a GPU."""
    folder: str = "pictures"
    """Where the raw folder has its pictures: a folder; a tar, zip or Parquet file; a folder or a glob of such."""
    template: str = "{image}"
    """Path of a picture below the pictures folder, or in the archive."""
    index: str | None = None
    """A table (CSV, TSV or Parquet) that names each picture's path, instead of the template. Where the table lies is
    relative to the pictures folder, or to the folder of the archives."""
    id_column: str = "image"
    """The picture's id, in the index or in Parquet files of pictures; `a.b` is the field b of the struct a."""
    path_column: str = "path"
    """In the index: the path below the pictures folder, or in the archive."""
    bytes_column: str = "bytes"
    """In Parquet files of pictures: the picture's file."""
    max_bad_rate: Rate = 0.05
    """Share of referred pictures that may be missing or unreadable."""


class ImportFeatures(Table):
    """`[import-features]`: picture vectors that were made elsewhere, in the place of extract-images."""

    files: Names = ()
    """For `ctrkit run` and make: the files of vectors below the raw folder, in one format; names, folders or globs.
    Where it is given, no pictures are extracted."""
    ids: Names = ()
    """Likewise, of NPY files: the files of ids, as many and in the same order."""
    format: Literal["", "parquet", "npy", "hdf5", "amazon"] = ""
    """Default: by the name's ending. `amazon`: image_features_*.b of the Amazon product data."""
    id: str = ""
    """The ids' column (Parquet) or data set (HDF5). Default: the only one it may be."""
    vector: str = ""
    """The vectors' column of lists, or data set [rows, width]. Default: the only one it may be."""
    template: Annotated[str, AfterValidator(_id_template)] = "{id}"
    """The id in the recipe's vocabulary of pictures, from the one beside the vector: "{id}.jpg"."""
    made_by: str = ""
    """The network and layer that made the vectors, in words, for the report."""
    max_bad_rate: Rate = 0.05
    """Share of the vocabulary's pictures that may lack a usable vector; with --all, of vectors that may be unusable."""


class TuneBackbone(Table):
    """`[tune-backbone]`: a network fine-tuned on pictures labelled by category (VGG16_tuning of DICM's Table II).

    Where the pictures lie is what `[extract-images]` says.
    """

    model: str = "vgg16"
    """A torchvision classification model."""
    weights: str = "published"
    """Where it starts: `published` (torchvision's own, downloaded), `random` (seeded) or the path of a state dict."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the split, the order, the augmentation, dropout, the new layer and random weights."""
    table: Literal["goods", "ads"] = "goods"
    """The table of [convert] that says the category of a picture, where no `--labels` are given."""
    image: str = "image"
    """Its column of picture ids, or a template such as "{goods}.jpg"."""
    category: str = "category"
    """Its column of categories."""
    separator: str = ""
    """What is between the categories of a cell that holds several; the first counts."""
    min_count: Annotated[int, Field(ge=2)] = 20
    """Categories with fewer distinct usable pictures are left out."""
    valid_share: Fraction = 0.1
    """Share of each category's pictures that validates."""
    max_bad_rate: Rate = 0.05
    """Share of the labelled pictures that may be missing or unreadable."""
    size: Annotated[int, Field(ge=32)] = 224
    """Side of the square the network sees, in pixels: as in [extract-images]."""
    crop: Annotated[float, Field(gt=0, le=1)] = 0.875
    """Share of a picture's shorter side that is seen: as in [extract-images]."""
    smallest_crop: Annotated[float, Field(gt=0, le=1)] = 0.5
    """Training sees random crops of so much of a picture's area, at least; 1: no crops."""
    flip: bool = True
    """Mirror half of the pictures, at random."""
    freeze: str = ""
    """The last layer that is left as it is, such as "conv5"; those before it are as well. Default: none."""
    epochs: Annotated[int, Field(ge=1)] = 10
    batch: Annotated[int, Field(ge=2)] = 32
    optimiser: Literal["sgd", "adamw"] = "sgd"
    learning_rate: Annotated[float, Field(gt=0)] = 0.001
    """At its highest: it rises over the first steps and falls to 0 along a cosine."""
    head_rate: Annotated[float, Field(gt=0)] = 10.0
    """The new last layer learns so many times faster."""
    warm_up: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of all steps over which the learning rate rises."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Of SGD."""
    weight_decay: Factor = 0.0001
    """On weights, not on biases and norms."""
    patience: Annotated[int, Field(ge=0)] = 3
    """Epochs without a better validation accuracy before training stops; 0: never early. The best epoch is kept."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    """A run that is killed loses at most so much; the end of an epoch is always kept."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision, with float32 weights."""
    device: str = "auto"
    threads: Threads = 0
    """CPU threads of the network; 0: all cores. The last bits of its weights depend on it."""


class Group(Table):
    """`[group]`: common features once per (user, day)."""

    seed: Seed = 0
    """Of the shuffle of training groups."""
    block_groups: Annotated[int, Field(ge=1)] = 2000
    """Groups in a Parquet row group, the shuffle block."""
    max_samples: Annotated[int, Field(ge=1)] = 1000
    """A group with more samples is split into several rows, which share its features."""


class Train(Table):
    """`[train]`: model, switches and training rules."""

    model: Literal["dicm", "din", "base", "lr"] = "dicm"
    # What DICM looks at (its Table I).
    ad_id: bool = True
    ad_image: bool = True
    user_ids: UserIds = False
    """Ids of the behaviours: true sums them, `din` weighs them by DIN's activation unit."""
    user_images: UserImages = True
    """Pictures of the behaviours: true is Usernet, `simtier` counts of similarities to the ad's picture (SimTier),
    `simtier+pooled` both."""
    pooling: Literal["attentive", "sum", "max", "din"] = "attentive"
    """The aggregator of Usernet; `din` is DIN's activation unit between the ad's picture and the behaviour's."""
    tiers: Annotated[int, Field(ge=1, le=1000)] = 20
    """Of SimTier: equal tiers of the cosine's range [-1, 1]."""
    extractor: SomeWidths = (256, 64, 12)
    """Layer widths of the trainable part (DICM Table III)."""
    extractor_activation: Literal["prelu", "dice"] = "prelu"
    """Between the layers of the extractors."""
    share_extractors: bool = False
    """One extractor for Adnet and Usernet instead of two."""
    has_picture: bool = False
    """Give the extractors one more number beside a picture's vector: 1 where there is a picture, 0 where not."""
    tower: Widths = (200, 80)
    """Hidden widths of the discriminator, before the two outputs."""
    attention: SomeWidths = (80, 40)
    """Hidden widths of DICM's attention network."""
    din: Literal["din-v1", "din-code"] = "din-code"
    """`din-v1`: g over [V_i; V_a; V_i-V_a], weights not normalised. `din-code`: as in the authors' code."""
    din_activation: Literal["sigmoid", "prelu", "dice"] = "sigmoid"
    """Between the layers of `din-code`'s unit; `din-v1`'s has `activation`."""
    activation: Literal["prelu", "dice"] = "prelu"
    batch_norm: bool = True
    # How it learns.
    seed: Seed = 1
    epochs: Annotated[int, Field(ge=1)] = 2
    batch: Annotated[int, Field(ge=1)] = 3000
    """Samples a step, over all ranks."""
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] = 0.001
    decay: Annotated[float, Field(gt=0, le=1)] = 0.9
    decay_steps: Annotated[int, Field(ge=1)] = 24000
    """The learning rate is multiplied by `decay` every `decay_steps` steps (DICM section VI)."""
    regularisation: Literal["adaptive", "difacto", "l2", "dropout", "filter", "none"] = "adaptive"
    """Of ids: DIN eq. 9, eq. 10, plain L2 on the batch's rows, a random part of each sample's behaviours, only the
    most frequent ids of the behaviours' vocabularies (DIN section 6.2), or nothing."""
    regularisation_strength: Factor = 0.01
    """λ of adaptive, difacto and l2."""
    dropout_rate: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Of dropout: the share of its behaviours' ids that a training sample does not see."""
    filter_top: Annotated[int, Field(ge=1)] = 20_000_000
    """Of filter: so many ids are kept of each vocabulary that behaviours have; the others are unknown."""
    weight_decay: Factor = 0.0
    """L2 on the weight matrices of the dense layers."""
    unknown_rate: Rate = 0.01
    """Chance that a frequent id is trained as unknown: r; that of one seen n times is r + (1/2 − r)/n."""
    evaluate_every: Annotated[int, Field(ge=0)] = 0
    """Steps between validations; 0: at the end of each epoch."""
    patience: Annotated[int, Field(ge=0)] = 3
    """Validations without a better GAUC before training stops; 0: never stop early. The best is kept."""
    clip_norm: Factor = 0.0
    """Largest norm of a step's gradient, over dense parameters and table rows together; 0: no limit."""
    precision: Literal["float32", "bfloat16", "float64"] = "float32"
    """bfloat16: mixed precision in training (autocast), with float32 weights. float64: everything, for proofs."""
    compile: bool = False
    """Train through torch.compile, where there is a compiler."""
    # Which days it learns from, and where it starts.
    first_day: TrainDay = 1
    """Train from this training day on: 1 is the first, -1 the last; or a date."""
    last_day: TrainDay = -1
    """Train up to this training day, itself included."""
    validation: bool = True
    """Keep the model of the best validation; else the last one, which has seen no later day than it trained on."""
    warm_start: Literal["", "extractors", "full"] = ""
    """Start from a trained model: its extractors (DICM section VI-A), or all of it, ids by their values."""
    warm_from: VariantName | Literal[""] = ""
    """In a run: the variant whose model it starts from."""
    warm_optimiser: bool = False
    """With `full`: take over the optimiser's state too, of a model trained with `save_optimiser`."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads. Fixed, since sums depend on it in the last bits."""
    device: str = "cpu"
    """`cpu`, `cuda` or `auto`, of train and predict. Bit-identical reruns are promised on the CPU only."""
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes that train together here, each with a GPU or `threads` cores; under torchrun as many as it starts."""
    placement: Literal["auto", "replicate", "shard"] = "auto"
    """Of ID tables, where several processes train: a copy in each, or rows spread over them; auto: by size."""
    picture_placement: Literal["auto", "replicate", "shard"] = "auto"
    """Of pictures: each process extracts those of its samples, or those that lie on it, for all; auto: the second, but
    not with SimTier."""
    exchange_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which extracted picture vectors and their gradients go from process to process."""
    device_cache_gib: Gib = 2.0
    """GiB of each GPU for the features of the pictures that are used most."""
    host_cache_gib: Gib = 4.0
    """GiB of a machine's memory, shared by its processes, for those of the next ones. The others are read from the disk
    for each batch, ahead of time. The model is the same to the bit, whatever is held."""
    # What it writes.
    log_every: Annotated[int, Field(ge=0)] = 100
    """Steps between lines of metrics.jsonl and points of TensorBoard, besides those of the validations; 0: none."""
    checkpoint_minutes: Annotated[float, Field(gt=0)] = 10.0
    """A run that is killed loses at most so much; the end of an epoch and the best so far are always kept."""
    save_optimiser: bool = False
    """Write optimiser.pt, Adam's moments, into the model folder, for a full warm start."""
    shuffle_pictures: bool = False
    """A control: give each picture another picture's vector. Nothing visual can be learned then."""

    @model_validator(mode="after")
    def _warm(self) -> "Train":
        if self.warm_from and not self.warm_start:
            raise ValueError('warm_from needs warm_start = "extractors" or "full"')
        if self.warm_optimiser and self.warm_start != "full":
            raise ValueError('warm_optimiser needs warm_start = "full"')
        return self

    @property
    def looks_at_pictures(self) -> bool:
        """Whether the model needs `features.h5`."""
        return self.model == "dicm" and (self.ad_image or bool(self.user_images))

    @property
    def pools_pictures(self) -> bool:
        """Whether the model has Usernet: pictures of the behaviours, extracted and pooled."""
        return self.model == "dicm" and self.user_images in (True, "simtier+pooled")

    @property
    def counts_tiers(self) -> bool:
        """Whether the model has SimTier."""
        return self.model == "dicm" and self.user_images in ("simtier", "simtier+pooled")


CACHES = frozenset(["device_cache_gib", "host_cache_gib"])
"""Keys of [train] that say what is held in memory."""
RANKS = frozenset(["processes", "placement", "picture_placement"]) | CACHES
"""Keys of [train] that say how processes share the work, and what they hold in memory. They change the last bits of
what comes out at most, and so do not make an output stale."""
NOT_THE_MODEL = RANKS | {"device", "threads", "log_every", "checkpoint_minutes", "save_optimiser", "exchange_dtype"}
"""Keys of [train] that say where a model is trained and what is written besides, not what model it is."""


class Predict(Table):
    """`[predict]`."""

    split: Literal["train", "valid", "test"] = "test"
    batch: Annotated[int, Field(ge=1)] = 4096
    processes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Processes that score together here, as `train.processes`."""


class Export(Table):
    """`[export]`: models as programs that serve them."""

    format: Literal["onnx", "pt2"] = "onnx"
    """ONNX, for onnxruntime and others, or torch.export's."""


class Eval(Table):
    """`[eval]`."""

    weight: Literal["impressions", "clicks", "users"] = "impressions"
    """What a user's AUC counts with; "users": each the same."""
    compat: tuple[Literal["fuxictr", "torcheasyrec", "recbole", "torchrec"], ...] = ()
    """Programs whose GAUC is given too (docs/gauc.md)."""
    baseline: str = ""
    """Variant that R-GAUC and gains are against."""
    compare: tuple[tuple[str, str], ...] = ()
    """Pairs of variants (better, worse) to compare by paired bootstrap."""
    bootstrap: Annotated[int, Field(ge=0)] = 1000
    """Resamples of users, at least 2; 0: no intervals."""
    seed: Seed = 0

    @field_validator("bootstrap")
    @classmethod
    def _has_spread(cls, resamples: int) -> int:
        if resamples == 1:
            raise ValueError("one resample has no spread; give at least 2, or 0 for no intervals")
        return resamples


class Range(Table):
    """A range of numbers in `[tune.space]`; of whole numbers where `low`, `high` and `step` are."""

    low: int | float
    high: int | float
    step: int | float | None = None
    """Between the values. Default: 1 of whole numbers, none of others."""
    log: bool = False
    """Draw evenly by the logarithm."""

    @model_validator(mode="after")
    def _can_be_drawn_from(self) -> "Range":
        if self.low >= self.high:
            raise ValueError(f"low has to be below high (given: {self.low} and {self.high})")
        if self.log and self.low <= 0:
            raise ValueError(f"log = true needs a low above 0 (given: {self.low})")
        if self.step is not None and (self.log or not 0 < self.step <= self.high - self.low):
            raise ValueError(f"step has to lie between 0 and high - low, and does not go with log (given: {self.step})")
        return self


class Tune(Table):
    """`[tune]`: the search of `ctrkit tune`."""

    trials: Annotated[int, Field(ge=1, le=100_000)] = 20
    """In all, of all processes; those that are pruned or fail count."""
    timeout_minutes: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """After so many minutes of a command no trial is begun; 0: no limit."""
    seed: Seed = 0
    """Of the sampler."""
    sampler: Literal["tpe", "random"] = "tpe"
    pruner: Literal["median", "halving", "none"] = "median"
    """Who stops a trial early: `median`, where its validation GAUC is below the median of the earlier trials at the
    same validation; `halving`, where it is not among the best quarter (asynchronous successive halving)."""
    startup_trials: Annotated[int, Field(ge=1)] = 5
    """Trials drawn at random, and never pruned by the median, before the others learn from them."""
    warm_up: Annotated[int, Field(ge=0)] = 0
    """Of the median: validations of a trial before it may be pruned."""
    space: dict[str, Any] = {}
    """Key, as `--set` takes it → a range, such as { low = 1e-4, high = 1e-2, log = true }, or a list of choices."""

    @field_validator("space")
    @classmethod
    def _dimensions(cls, space: dict[str, Any]) -> dict[str, Any]:
        for key, asked in space.items():
            if isinstance(asked, Mapping):
                _check_range(key, asked)
            elif not isinstance(asked, list) or len(asked) < 2:
                raise ValueError(
                    f"{key!r} has to be a range, such as {{ low = 1e-4, high = 1e-2, log = true }}, or a list of at "
                    f"least two choices (given: {json.dumps(asked, default=str)})"
                )
            elif twice := [one for n, one in enumerate(asked) if one in asked[:n]]:
                raise ValueError(f"{key!r} has the choice {json.dumps(twice[0], default=str)} twice")
        return space


def _check_range(key: str, asked: Mapping[str, Any]) -> None:
    known = list(Range.model_fields)
    for name, value in asked.items():
        if name not in known and isinstance(value, Mapping | list):
            raise ValueError(f'{key!r} is a table: write the whole name in quotes, "{key}.{name}" = …')
        if name not in known:
            raise ValueError(f"the range of {key!r} has no key {name!r}{nearest(name, known)}")
    try:
        Range.model_validate(asked)
    except ValidationError as e:
        raise ValueError(f"the range of {key!r}: {_explain(e).removesuffix('.')}") from None


class Report(Table):
    """`[report]`."""

    title: str = ""
    gallery_variant: str = ""
    """Whose attention is shown. Default: the first variant with attention over pictures."""
    gallery_cases: Annotated[int, Field(ge=0)] = 12
    gallery_pictures: Annotated[int, Field(ge=1)] = 6
    """Pictures in each of the two rows, highest and lowest weight."""
    category: str = ""
    """The ad's feature that stands for its category. Default: the one whose column is called category, genre or the
    like, else the one of the fewest values."""
    activation_variant: str = ""
    """Whose activation of behaviours is shown. Default: the first DIN."""
    activation_cases: Annotated[int, Field(ge=0)] = 4
    map_variant: str = ""
    """Whose ads are mapped. Default: the first DIN, else the first that is not logistic regression."""
    map_ads: Annotated[int, Field(ge=0, le=2000)] = 800
    """Ads on the map, those shown most; 0: no map."""
    map_users: Annotated[int, Field(ge=1, le=10)] = 3
    """Users whose click probabilities the map shows."""
    surprises: Annotated[int, Field(ge=0, le=100)] = 8
    """Impressions of each kind that the model was most wrong about, and ads of each that it is worst calibrated on."""
    sheet_queries: Annotated[int, Field(ge=0, le=100)] = 8
    """Pictures on the contact sheet, each with those most like it; 0: no contact sheet."""
    sheet_neighbours: Annotated[int, Field(ge=1, le=100)] = 6
    sheet_seed: Seed = 0
    """Of the draw of the pictures, by how often training shows them."""


class Replay(Table):
    """`[replay]`: the simulated A/B test in the demo world (docs/replay.md)."""

    arms: tuple[str, ...] = ()
    """Variants that `make replay` compares; the first is the control. Empty: none, `make replay` has nothing to do."""
    candidates: Annotated[int, Field(ge=2, le=10_000)] = 50
    """Ads that compete for a page view, drawn from those alive that day as the shop draws what it shows."""
    slots: Annotated[int, Field(ge=1, le=6)] = 1
    """Ads shown on a page view: the best of the candidates, at positions 0, 1, …"""
    price: Literal["second", "first"] = "second"
    """What a click costs: the least bid that would have kept the slot (generalised second price), or the bid."""
    bid_median: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    """Of the log-normal that each ad's bid for a click is drawn from, in units of money."""
    bid_sigma: Annotated[float, Field(ge=0, le=5)] = 0.5
    """Standard deviation of the bid's logarithm; 0: all bid the same."""
    seed: Seed = 0
    """Of candidates, bids, the split of the users and clicks."""
    splits: Annotated[int, Field(ge=0, le=100_000)] = 1000
    """Other splits of the users in which the control is tested against itself."""

    @model_validator(mode="after")
    def _can_compete(self) -> "Replay":
        """Check that somebody loses, and that there is something to compare."""
        if self.candidates <= self.slots:
            raise ValueError(f"candidates has to be more than slots, which is {self.slots} (given: {self.candidates})")
        if len(self.arms) == 1 or len(set(self.arms)) < len(self.arms):
            raise ValueError(f"arms has to name at least two different variants (given: {json.dumps(self.arms)})")
        return self


class TableRow(Table):
    """A row of `[tables.NAME]`: a variant, and what the paper has for it."""

    variant: str
    label: str = ""
    """Default: the variant's name."""
    paper_gauc: Annotated[float, Field(ge=0, le=1)] | None = None
    paper_r_gauc: float | None = None
    """In percent, as printed."""


class PaperTable(Table):
    """`[tables.NAME]`: a table of a paper, for `make tables`; its rows are variants of the recipe."""

    title: str = ""
    baseline: str
    """Variant that gains and R-GAUC are against."""
    r_gauc: bool = True
    """Show R-GAUC, as DICM's tables do; DIN's have the gain alone."""
    rows: tuple[TableRow, ...]
    compare: tuple[tuple[str, str], ...] = ()
    """Pairs of variants, the first of which is better in the paper, to compare by paired bootstrap."""
    note: str = ""

    def contradiction(self, better: str, worse: str) -> str:
        """Say what speaks against a pair of `compare`, in one sentence; "" if nothing does."""
        if better == worse:
            return f"{better!r} is compared with itself"
        of = {row.variant: row for row in self.rows}
        for key in ("paper_gauc", "paper_r_gauc"):
            high, low = getattr(of[better], key), getattr(of[worse], key)
            if high is not None and low is not None and high <= low:
                return (
                    f"{better!r} is said to be better than {worse!r} in the paper, and their {key} are {high:g} and "
                    f"{low:g}; name the better one first"
                )
        return ""


class CurveRow(Table):
    """A line of `[curves.NAME]`."""

    variant: str
    label: str = ""
    """Default: the variant's name."""


NO_CURVE = "train.validation = false, so there is no validation GAUC to draw"


class PaperCurves(Table):
    """`[curves.NAME]`: a figure of a paper, for `make tables`: validation GAUC by step, a line a variant."""

    title: str = ""
    rows: tuple[CurveRow, ...]
    reach: tuple[tuple[str, str], ...] = ()
    """Pairs of variants: the step at which each first reaches the second's best."""
    note: str = ""


RESERVED = frozenset(
    [
        "user",
        "ad",
        "time",
        "day",
        "click",
        "sample_id",
        "unseen_ad",
        "group_id",
        "common",
        "goods_code",
        "user_code",
        "type_code",
        "dwell_ms",
        "visits",
        "dwell",
        "last_time",
        "row",
        "pair",
        "score",
        "loss",
    ]
)


class Recipe(Table):
    """A whole recipe."""

    name: VariantName
    about: str = ""
    engine: Literal["local", "ray"] = "local"
    """Who runs the tasks of the data stages: processes here, or a Ray cluster. The bytes are the same."""
    workers: Annotated[int, Field(ge=0, le=512)] = 0
    """Tasks at a time; 0: as many as there are cores."""
    simulate: Simulate | None = None
    convert: Convert = Convert()
    split: Split = Split()
    daily: Daily = Daily()
    features: dict[str, Feature] = {}
    select_clicks: SelectClicks = Field(default=SelectClicks(), alias="select-clicks")
    extract_images: ExtractImages = Field(default=ExtractImages(), alias="extract-images")
    tune_backbone: TuneBackbone = Field(default=TuneBackbone(), alias="tune-backbone")
    import_features: ImportFeatures = Field(default=ImportFeatures(), alias="import-features")
    group: Group = Group()
    train: Train = Train()
    predict: Predict = Predict()
    export: Export = Export()
    eval: Eval = Eval()
    report: Report = Report()
    tune: Tune = Tune()
    replay: Replay = Replay()
    variants: dict[VariantName, dict[str, dict[str, Any] | bool | str]] = {}
    """Overrides, table by table, on top of those of the variant that `like` names. With `extra = true`, its own or that
    one's, a variant that only `make tables` makes."""
    paper_tables: dict[VariantName, PaperTable] = Field(default={}, alias="tables")
    curves: dict[VariantName, PaperCurves] = {}

    @model_validator(mode="before")
    @classmethod
    def _fill_features(cls, data: Any) -> Any:
        """Write the defaults that depend on the feature's name or kind."""
        features = data.get("features") if isinstance(data, dict) else None
        if not isinstance(features, dict) or not all(isinstance(f, dict) for f in features.values()):
            return data
        filled = {}
        for name, feature in features.items():
            feature = dict(feature)
            feature.setdefault("column", name)
            feature.setdefault("vocab", "image" if feature.get("kind") == "image" else name)
            if feature.get("of") == "behaviour" and feature.get("kind") != "image":
                feature.setdefault("switch", "user_ids")
            filled[name] = feature
        return {**data, "features": filled}

    @model_validator(mode="after")
    def _own_names(self) -> "Recipe":
        """Check that no feature has the name of a column that the stages write, the bad-batch file included."""
        for name in self.features:
            if name in RESERVED or name.startswith("__"):
                raise ValueError(
                    f"a feature cannot be called {name!r}, as a column of samples and groups is; call it otherwise, "
                    f"and keep its column: [features.{name}_id] with column = {name!r}"
                )
        return self

    @model_validator(mode="after")
    def _shared_vocabularies(self) -> "Recipe":
        """Check that features of one vocabulary agree on what it is."""
        first: dict[str, str] = {}
        for name, feature in self.features.items():
            other = first.setdefault(feature.vocab, name)
            for key in ("kind", "width", "min_count", "top", "hash_buckets", "edges", "quantiles"):
                a, b = getattr(self.features[other], key), getattr(feature, key)
                if a != b:
                    raise ValueError(
                        f"features {other!r} and {name!r} share the vocabulary {feature.vocab!r} but differ in {key}: "
                        f"{a!r} and {b!r}"
                    )
        return self

    @model_validator(mode="after")
    def _known_variants(self) -> "Recipe":
        """Check that what names a variant names one that there is."""
        named = [("daily.variants", v) for v in self.daily.variants]
        named += [("replay.arms", v) for v in self.replay.arms]
        if self.replay.arms and self.simulate is None:
            raise ValueError("replay.arms needs [simulate]: only a simulated world knows the true click probabilities")
        for name, table in self.paper_tables.items():
            rows = [row.variant for row in table.rows]
            named += [(f"tables.{name}", v) for v in rows]
            _once(f"tables.{name}", rows)
            for v in (table.baseline, *(v for pair in table.compare for v in pair)):
                if v not in rows:
                    raise ValueError(f"tables.{name}: {v!r} is none of its rows{nearest(v, rows)}")
        for name, curves in self.curves.items():
            rows = [row.variant for row in curves.rows]
            named += [(f"curves.{name}", v) for v in rows]
            if unjudged := [
                v for v in rows if v in self.variants and self.overrides(v, "train", "validation") is False
            ]:
                raise ValueError(f"curves.{name}: variant {unjudged[0]!r} has {NO_CURVE}")
            _once(f"curves.{name}", rows)
            for v in (v for pair in curves.reach for v in pair):
                if v not in rows:
                    raise ValueError(f"curves.{name}: {v!r} is none of its rows{nearest(v, rows)}")
        for where, v in named:
            if v not in self.variants:
                raise ValueError(f"{where}: there is no variant {v!r}{nearest(v, self.variants)}")
        for name, table in self.paper_tables.items():
            for pair in table.compare:
                if fault := table.contradiction(*pair):
                    raise ValueError(f"tables.{name}.compare: {fault}")
        return self

    def overrides(self, variant: str, table: str, key: str) -> Any:
        """Return what a variant, or else the one that it is like, sets a key to; None if neither does."""
        seen: set[str] = set()
        while variant in self.variants and variant not in seen:
            seen.add(variant)
            own = self.variants[variant].get(table)
            if isinstance(own, Mapping) and key in own:
                return own[key]
            variant = str(self.variants[variant].get("like"))
        return None

    def is_extra(self, variant: str) -> bool:
        """Say whether a variant is made for tables only."""
        like = self.variants[variant].get("like")
        extra = self.variants[variant].get("extra", self.is_extra(like) if isinstance(like, str) else False)
        return extra is True

    def select(self, *, of: str, kind: str = "id") -> dict[str, Feature]:
        """Return the features of one owner and kind, in the recipe's order. A number's bucket is an id."""
        return {n: f for n, f in self.features.items() if f.of == of and (f.kind == "image") == (kind == "image")}

    def tables(self, *names: str) -> dict[str, Any]:
        """Return the named tables, or keys of them (`extract-images.template`), as plain JSON values, for sidecars and
        digests."""
        plain = self.model_dump(mode="json", by_alias=True)
        return {name: functools.reduce(lambda table, key: table[key], name.split("."), plain) for name in names}


def _once(where: str, variants: Sequence[str]) -> None:
    for n, variant in enumerate(variants):
        if variant in variants[:n]:
            raise ValueError(f"{where}: variant {variant!r} has two rows")


def find(recipe: str | Path) -> Path:
    """Return the file of a recipe given as a path or as the name of one that ships with ctrkit."""
    path = Path(recipe)
    if path.suffix == ".toml" and path.is_file():
        return path
    if (path / "recipe.toml").is_file():
        return path / "recipe.toml"
    package = Path(__file__).parent
    homes = [package.parent / "data", package / "recipes"]
    for home in homes:
        if (home / recipe / "recipe.toml").is_file():
            return home / recipe / "recipe.toml"
    known = {p.parent.name for home in homes for p in home.glob("*/recipe.toml")}
    if (file := path.with_name(f"{path.name}.toml") if path.name else path).is_file():
        raise UsageError(f"no recipe {str(recipe)!r}; did you mean '{file}'?")
    raise UsageError(f"no recipe {str(recipe)!r}: neither a file nor a shipped recipe{nearest(str(recipe), known)}")


def load(recipe: str | Path, variant: str | None = None, sets: Sequence[str] = ()) -> Recipe:
    """Read a recipe, lay `variant`'s overrides and then `sets` (each `table.key=value`) over it.

    Raises UsageError for a file that is not TOML, an unknown key, a wrong value or an unknown variant.
    """
    where = f"{find(recipe)}{f', variant {variant!r}' if variant else ''}"
    return _validate(read(recipe, variant, sets), " ".join([where, *(f"--set {one}" for one in sets)]))


def read(recipe: str | Path, variant: str | None = None, sets: Sequence[str] = ()) -> dict[str, Any]:
    """Return the plain tables of a recipe, as they stand in the file, with all that `load` lays over them."""
    path = find(recipe)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise UsageError(f"{path} is not a TOML file: {e}") from None
    data.setdefault("name", path.resolve().parent.name if path.name == "recipe.toml" else path.stem)
    # As they stand in the file: what `--set` lays over one variant need not suit the others.
    _check_variants(data, str(path))
    overrides = [parse_set(text) for text in sets]
    for override in overrides:
        data = merge(data, override)
    if variant is not None:
        variants = data.get("variants", {})
        if variant not in variants:
            raise UsageError(f"{path} has no variant {variant!r}{nearest(variant, variants)}")
        data = merge(data, _overrides(variants, variant, str(path)))
        for override in overrides:
            data = merge(data, override)
    return data


def check_alone(data: Mapping[str, Any], where: str) -> Recipe:
    """Check a recipe's plain tables without those that name variants."""
    return _validate({k: v for k, v in data.items() if k not in NAMING_VARIANTS}, where)


def _validate(data: dict[str, Any], where: str) -> Recipe:
    try:
        return Recipe.model_validate(data)
    except ValidationError as e:
        raise UsageError(f"{where}: {_explain(e)}") from None


_checked: set[str] = set()
"""Recipes whose variants have been validated; a process that loads each variant need not do it again."""


def _check_variants(data: dict[str, Any], where: str) -> None:
    """Validate a recipe with each of its variants."""
    key = json.dumps(data, default=str)
    if key in _checked:
        return
    base = {k: v for k, v in data.items() if k not in NAMING_VARIANTS}
    variants = _validate(data, where).variants
    for name in variants:
        try:
            Recipe.model_validate(merge(base, _overrides(variants, name, where)))
        except ValidationError as e:
            raise UsageError(f"{where}, variant {name!r}: {_explain(e)}") from None
    _checked.add(key)


def _overrides(variants: Mapping[str, Any], name: str, where: str) -> dict[str, Any]:
    """Return a variant's overrides, on top of those of the variant that it is like."""
    chain = [name]
    while (like := variants[chain[-1]].get("like")) is not None:
        if like in chain or like not in variants:
            fault = "is like itself" if like in chain else f"is like {like!r}, which is none{nearest(like, variants)}"
            raise UsageError(f"{where}: variant {name!r} {fault}")
        chain.append(like)
    out: dict[str, Any] = {}
    for one in reversed(chain):
        out = merge(out, {k: v for k, v in variants[one].items() if k not in ("extra", "like")})
    return out


class Instead(dict[str, Any]):
    """A table that takes the place of another, where others are laid over it."""


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Return tables with others laid over them, key by key."""
    out = dict(base)
    for key, value in over.items():
        old = out.get(key)
        laid_over = isinstance(old, Mapping) and isinstance(value, Mapping) and not isinstance(value, Instead)
        out[key] = merge(old, value) if laid_over else value  # type: ignore[arg-type]
    return out


NAMING_VARIANTS = ("variants", "tables", "curves", "daily", "replay")
"""Tables that name variants, and are not looked at where a single one is checked."""
TOP_LEVEL = ("engine", "workers")


def parse_set(text: str) -> dict[str, Any]:
    """Return `table.key=value` as nested tables. A value that is itself a table takes the place of what was there."""
    key, equals, value = text.partition("=")
    parts = re.findall(r'"([^"]*)"|([^."]+)', key.strip())
    names = [quoted or bare for quoted, bare in parts]
    if not equals or not names or (len(names) < 2 and parts[0][1] not in TOP_LEVEL):
        raise UsageError(f"--set {text!r} is not of the form table.key=value, such as train.epochs=3")
    try:
        parsed: Any = tomllib.loads(f"v = {value}")["v"]
    except tomllib.TOMLDecodeError:
        parsed = value.strip()
    if isinstance(parsed, dict):
        parsed = Instead(parsed)
    for name in reversed(names):
        parsed = {name: parsed}
    assert isinstance(parsed, dict)
    return parsed


def _explain(error: ValidationError) -> str:
    """Say each fault of a recipe in one sentence, with the nearest known key for an unknown one."""
    sentences = []
    for fault in error.errors():
        loc = [str(part) for part in fault["loc"]]
        where = ".".join(loc)
        if fault["type"] == "extra_forbidden":
            table = _model_at(loc[:-1])
            known = [f.alias or n for n, f in table.model_fields.items()] if table else []
            place = f"table [{'.'.join(loc[:-1])}]" if loc[:-1] else "the recipe"
            sentences.append(f"{place} has no key {loc[-1]!r}{nearest(loc[-1], known)}")
        elif fault["type"] == "value_error":  # raised by a validator of ours, which says what was given
            sentences.append(f"{where}: {fault['ctx']['error']}" if where else str(fault["ctx"]["error"]))
        else:
            given = "" if fault["type"] == "missing" else f" (given: {fault['input']!r})"
            sentences.append(f"{where}: {fault['msg'][0].lower()}{fault['msg'][1:]}{given}")
    return " ".join(s if s.endswith("?") else s + "." for s in dict.fromkeys(sentences))


def _model_at(loc: Sequence[str]) -> type[Table] | None:
    """Return the table class at a place in the recipe, e.g. ["features", "age"] → Feature."""
    if not loc:
        return Recipe
    tables: dict[str, type[Table]] = {
        "simulate": Simulate,
        "convert": Convert,
        "split": Split,
        "daily": Daily,
        "features": Feature,
        "select-clicks": SelectClicks,
        "extract-images": ExtractImages,
        "import-features": ImportFeatures,
        "tune-backbone": TuneBackbone,
        "group": Group,
        "train": Train,
        "predict": Predict,
        "export": Export,
        "eval": Eval,
        "report": Report,
        "tune": Tune,
        "replay": Replay,
    }
    if loc[0] == "convert" and len(loc) > 1:
        return Source
    if loc[0] in ("tables", "curves"):
        kinds = (PaperTable, TableRow) if loc[0] == "tables" else (PaperCurves, CurveRow)
        return kinds["rows" in loc]
    return tables.get(loc[0])
