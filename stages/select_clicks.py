"""Pick each user's typical clicks before each day."""

from pathlib import Path

import click

from ctrkit import counts, provenance
from ctrkit.engine import engine, start_early
from ctrkit.facts import partitions_of, read_facts
from ctrkit.options import path_option, recipe_options
from ctrkit.recipe import Recipe


@click.command("select-clicks")
@recipe_options
@path_option("--convert", "What ctrkit convert wrote.")
@path_option("--out", "Folder to write.")
def command(recipe: Recipe, convert: Path, out: Path) -> None:
    """Pick each user's typical clicks before each day.

    Reads CONVERT/samples and CONVERT/behaviours. Only behaviours strictly before a day's midnight serve that day's
    samples; [select-clicks] says how far back, how long a visit must be, and how many goods are kept. A goods' score is
    (visits + dwell / dwell_scale) · 0.5^(days since the last visit / half_life_days).

    Writes OUT/day=*/part-*.arrow, one row a user and day: the goods picked, oldest first.

    \b
    ctrkit select-clicks --recipe demo --convert runs/demo/convert --out runs/demo/behaviours
    """
    behaviours = [n for n, f in recipe.features.items() if f.of == "behaviour"]
    provenance.check_features(recipe, behaviours, convert)
    parts = partitions_of(convert) if provenance.will_work() else 0
    modules = ("ctrkit.clicks", "ctrkit.compiled_windows", "ctrkit.compiled_take")
    with start_early(recipe.engine, recipe.workers, parts, modules) as pool:
        from ctrkit.clicks import select_clicks

        with provenance.output("select-clicks", recipe, {"convert": convert}, out) as work:
            small = read_facts(convert)["partitions"] == 1
            with engine(recipe.engine, recipe.workers, work.parts, small=small, pool=pool) as tasks:
                work.counts = select_clicks(recipe, convert, work.begin(), tasks)
            work.end()
    counts.show(f"select-clicks: {recipe.name}", work.counts, _shares(work.counts))


def _shares(found: dict[str, int]) -> dict[str, str]:
    def share(part: str, of: str, what: str) -> str:
        return f"{found[part] / found[of]:.1%} of {what}" if found.get(part) and found.get(of) else ""

    return {
        "behaviours kept": share("behaviours kept", "behaviours read", "those read"),
        "of these with a history": share("of these with a history", "users and days with samples", "them"),
        "goods picked": share("goods picked", "distinct goods in the windows", "those in the windows"),
    }
