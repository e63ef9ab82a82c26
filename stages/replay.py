"""Run the simulated A/B test: trained models rank ads in the demo world, which knows the true click probabilities.

Reads the raw folder of a simulated world, convert/, groups/, features.h5 and model folders. Writes a folder:
replay.json, replay.md, replay.html and lift.png.
"""

from pathlib import Path

import click

from ctrkit import provenance
from ctrkit.errors import UsageError
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import console, say
from ctrkit.recipe import Recipe
from ctrkit.sources import raw_inputs


@click.command("replay")
@recipe_options
@path_option("--raw", "Folder that `ctrkit simulate` wrote.")
@path_option("--convert", "Folder that `ctrkit convert` wrote.")
@path_option("--groups", "Folder that `ctrkit group` wrote.")
@path_option("--features", "features.h5, for models that look at pictures.", required=False)
@click.option("--arm", "arms", multiple=True, metavar="NAME=DIR", help="A model folder; the first is the control.")
@path_option("--out", "Folder to write.")
def command(
    recipe: Recipe,
    raw: Path,
    convert: Path,
    groups: Path,
    features: Path | None,
    arms: tuple[str, ...],
    out: Path,
) -> None:
    """Simulate the A/B test of two or more models in the demo world.

    Reads the recipe's [replay] and [simulate] tables, the raw folder of the simulated world, convert/, groups/, model
    folders and, where a model looks at pictures, features.h5. The users of the test days are dealt to the arms; on each
    page view an arm's model ranks candidate ads by bid × predicted click probability, and the world clicks with its
    true one. Writes a folder with the click-through rates, the revenue per thousand impressions and their relative
    differences, each with a 95% interval: replay.json, replay.md, replay.html, lift.png. All of it is simulated.

    \b
    ctrkit replay --recipe demo --raw runs/demo/raw --convert runs/demo/convert --groups runs/demo/groups \\
        --features runs/demo/features.h5 --arm "ids=runs/demo/basic+ad_id/model" \\
        --arm "dicm=runs/demo/basic+ad_id+ad_image+user_images/model" --out runs/demo/replay
    """
    models = named(arms)
    inputs: dict[str, Path | None] = {f"model {name}": path for name, path in models.items()}
    inputs |= {**raw_inputs(recipe, raw, "impressions", "users", "ads", "goods"), "truth": raw / "truth.parquet"}
    inputs |= {"convert": convert, "groups": groups, "features": features}
    with provenance.output("replay", recipe, inputs, out, {"arms": " ".join(models)}) as work:
        from ctrkit import files, replay_page
        from ctrkit.replay import replay

        scratch = work.parts / "candidates"
        files.remove(scratch)
        found = replay(recipe, raw, convert, groups, features, models, scratch)
        work.path.mkdir()
        files.write_json(work.path / "replay.json", found)
        replay_page.draw(found, work.path / "lift.png")
        (work.path / "replay.md").write_text(replay_page.markdown(found), encoding="utf-8")
        (work.path / "replay.html").write_text(replay_page.html(found, work.path), encoding="utf-8")
        work.counts.update({key.replace("_", " "): found[key] for key in ("users", "page_views")})
    replay_page.show(found, console())
    say(f"replay: a simulated A/B test of {len(models)} arms -> {out / 'replay.html'}")


def named(arguments: tuple[str, ...]) -> dict[str, Path]:
    """Return name → path for arguments NAME=DIR, two at least."""
    out: dict[str, Path] = {}
    for argument in arguments:
        name, equals, path = argument.partition("=")
        if not equals or not name or not path:
            raise UsageError(f"--arm {argument!r} is not of the form NAME=DIR")
        if name in out:
            raise UsageError(f"--arm names {name!r} twice")
        out[name] = Path(path)
    if len(out) < 2:
        raise UsageError("a test needs two arms: give --arm NAME=DIR twice, the control first")
    return out
