"""Where a model errs: the impressions that surprised it most, and the ads on which it is worst calibrated."""

from dataclasses import dataclass
from pathlib import Path

import polars as pl

from ctrkit.predictions import first_rows

FEWEST_IMPRESSIONS = 20
"""An ad of fewer is not said to be badly calibrated."""
LOOKED_AT = 50
"""Impressions that are looked at for each one shown, so that an ad and a user come once."""
SMALLEST = 1e-7
"""Probabilities are clipped to [SMALLEST, 1 − SMALLEST] before a logarithm is taken, as in eval."""
UNLIKELY, LIKELY = "clicked, thought unlikely", "not clicked, thought likely"
TOO_HIGH, TOO_LOW = "predicted too high", "predicted too low"


@dataclass(frozen=True, kw_only=True)
class Surprises:
    """Where the model of a variant errs."""

    variant: str
    impressions: pl.DataFrame
    """`kind`, `sample_id`, `user`, `ad`, `day`, `click`, `score`, `loss` (in nats); the most surprising first."""
    ads: pl.DataFrame
    """`kind`, `ad`, `impressions`, `clicks`, `predicted` (Σ scores), `deviations` (see `calibration_by_ad`)."""


def find(variant: str, predictions: Path, wanted: int) -> Surprises | None:
    """Find `wanted` impressions and ads of each kind; None where a score is no probability."""
    ends = pl.scan_parquet(predictions, glob=False).select(low=pl.col("score").min(), high=pl.col("score").max())
    low, high = ends.collect(engine="streaming").row(0)
    if low is None or low < 0 or high > 1:
        return None
    return Surprises(
        variant=variant,
        impressions=surprising(predictions, wanted),
        ads=calibration_by_ad(predictions, wanted),
    )


def surprising(predictions: Path, wanted: int) -> pl.DataFrame:
    """Return the impressions of the largest log loss: clicked ones of low scores, others of high ones, `wanted` each.

    Of an ad, and of a user, one of each kind. All rows are looked at, in memory that does not grow with them.
    """
    rows = pl.scan_parquet(predictions, glob=False).select("sample_id", "user", "ad", "day", "click", "score")
    found = []
    for kind, click, high in ((UNLIKELY, 1, False), (LIKELY, 0, True)):
        of_kind = rows.filter(pl.col("click") == click)
        by = ["score", "sample_id"]
        top = of_kind.top_k(wanted * LOOKED_AT, by=by, reverse=[not high, True]).collect(engine="streaming")
        top = top.sort(by, descending=[high, False])
        for key in ("ad", "user"):
            top = top.unique(key, keep="first", maintain_order=True)
        found.append(top.head(wanted).with_columns(kind=pl.lit(kind)))
    p = pl.col("score").cast(pl.Float64).clip(SMALLEST, 1 - SMALLEST)
    loss = -pl.when(pl.col("click") == 1).then(p).otherwise(1 - p).log()
    return pl.concat(found).select("kind", "sample_id", "user", "ad", "day", "click", "score", loss=loss)


def calibration_by_ad(predictions: Path, wanted: int) -> pl.DataFrame:
    """Return the ads whose clicks lie farthest from their predicted sum, `wanted` above and as many below.

    `deviations`: (predicted − clicks) / √Σ p(1 − p), so by how many standard deviations the scores, were they the
    clicks' probabilities, would miss. Of the first `ctrkit.predictions.FIRST_ROWS` rows, ads of at least
    `FEWEST_IMPRESSIONS`.
    """
    p = pl.col("score").cast(pl.Float64)
    by_ad = (
        first_rows(predictions)
        .group_by("ad")
        .agg(
            impressions=pl.len(),
            clicks=pl.col("click").cast(pl.Int64).sum(),
            predicted=p.sum(),
            variance=(p * (1 - p)).sum(),
        )
        .filter((pl.col("impressions") >= FEWEST_IMPRESSIONS) & (pl.col("variance") > 0))
        .collect(engine="streaming")
        .with_columns(deviations=(pl.col("predicted") - pl.col("clicks")) / pl.col("variance").sqrt())
        .sort(["deviations", "ad"], descending=[True, False])
    )
    over = by_ad.filter(pl.col("deviations") > 0).head(wanted).with_columns(kind=pl.lit(TOO_HIGH))
    under = by_ad.filter(pl.col("deviations") < 0).tail(wanted).reverse().with_columns(kind=pl.lit(TOO_LOW))
    return pl.concat([over, under]).select("kind", "ad", "impressions", "clicks", "predicted", "deviations")
