"""Take one prediction apart: what it is without each of its inputs.

Reads a model, groups/, convert/ and, for models that look at pictures, features.h5; pictures to show. Prints tables;
writes HTML and JSON if asked.
"""

import datetime
from pathlib import Path

import click

from ctrkit.errors import UsageError
from ctrkit.options import DAY, path_option
from ctrkit.progress import console, say


@click.command("explain")
@path_option("--run", "Folder of a run, in place of the next five.", required=False)
@click.option("--variant", metavar="NAME", help="Whose model of the run; may be left out where there is one.")
@path_option("--model", "Folder that `ctrkit train` wrote.", required=False)
@path_option("--groups", "Folder that `ctrkit group` wrote.", required=False)
@path_option("--convert", "Folder that `ctrkit convert` wrote.", required=False)
@path_option("--features", "features.h5, for models that look at pictures.", required=False)
@path_option("--pictures", "Where pictures are, as for extract-images, to be shown in the page.", required=False)
@click.option("--recipe", metavar="NAME|FILE", help="How ids name pictures, where features.h5's sidecar has it not.")
@click.option("--user", required=True, help="The user, as in the logs.")
@click.option("--day", required=True, type=DAY, help="The day, such as 2024-03-08.")
@click.option("--ad", required=True, help="The ad, as in the logs.")
@click.option(
    "--number",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Which of the day's impressions of the ad.",
)
@path_option("--html", "Write a page with the pictures here.", required=False)
@path_option("--json", "Write all numbers here.", required=False)
def command(
    run: Path | None,
    variant: str | None,
    model: Path | None,
    groups: Path | None,
    convert: Path | None,
    features: Path | None,
    pictures: Path | None,
    recipe: str | None,
    user: str,
    day: datetime.datetime,
    ad: str,
    number: int,
    html: Path | None,
    json: Path | None,
) -> None:
    """Take one prediction apart: what it is without each of its inputs.

    Reads a run's folder, or a model, groups/, convert/ and, where the model looks at pictures, features.h5. Prints the
    score, what it would be without each group of inputs (the ad's id, its picture, …) and without each behaviour of
    the user, and the attention weights. Writes one HTML page with the pictures with --html, all numbers with --json.

    An ad that the user did not see that day is scored as if it had been the user's first impression of the day, with
    the ad's features from an impression of somebody else.

    \b
    ctrkit explain --run runs/demo --variant din --user u17 --day 2024-03-08 --ad a42 --html explain.html
    ctrkit explain --model runs/demo/lr/model --groups runs/demo/groups --convert runs/demo/convert \\
        --user u17 --day 2024-03-08 --ad a42
    """
    from ctrkit import files, provenance, run_folder
    from ctrkit.recipe import load

    if run is not None:
        found = run_folder.find(run, variant)
        model, groups = model or found.model, groups or found.groups
        convert, features, pictures = convert or found.convert, features or found.features, pictures or found.pictures
    elif variant is not None:
        raise UsageError("--variant says whose model of a run, so it goes with --run")
    missing = [name for name, path in {"--model": model, "--groups": groups, "--convert": convert}.items() if not path]
    if model is None or groups is None or convert is None:
        raise UsageError(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; or give --run")
    inputs = {"model": model, "groups": groups, "convert": convert, "features": features, "pictures": pictures}
    provenance.guard_plain(inputs, {"--html": html, "--json": json})
    if recipe is not None:
        settings = load(recipe, variant).extract_images
    else:
        settings = run_folder.picture_settings(features or Path("features.h5"))

    import torch

    from ctrkit import explanation, explanation_page, impressions, modelfile
    from ctrkit.gallery import Thumbnails

    trained = modelfile.load(model, groups, features, convert)
    torch.set_num_threads(trained.plan.train.threads)
    made = explanation.explain(trained, impressions.find(groups, user, day.date(), ad, number), convert)
    if html is not None:
        files.write_text(html, explanation_page.page(made, Thumbnails(pictures, settings)))
    if json is not None:
        files.write_json(json, explanation_page.as_json(made))
    explanation_page.show(made, console())
    for path in (html, json):
        if path is not None:
            say(f"explain: {path}")
