"""Train DICM, DIN, base or LR on grouped samples.

Reads groups/, and for models that look at pictures features.h5 and convert/. Writes a model folder.
"""

from pathlib import Path

import click

from ctrkit import provenance
from ctrkit.errors import UsageError
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import say
from ctrkit.recipe import Recipe

SMALLER = "Make [train] batch smaller, or extractor, tower, attention, or the features' width"


@click.command("train")
@recipe_options
@path_option("--groups", "Folder that `ctrkit group` wrote.")
@path_option("--features", "features.h5, for models that look at pictures.", required=False)
@path_option("--convert", "Folder that `ctrkit convert` wrote, for models that look at pictures.", required=False)
@path_option("--warm-start", "Model folder to start from, as train.warm_start says.", required=False)
@path_option("--warm-convert", "Folder of `ctrkit convert` with that model's vocabulary, if another.", required=False)
@path_option("--tensorboard", "Folder for TensorBoard scalars, written while training goes on.", required=False)
@path_option("--out", "Model folder to write.")
def command(
    recipe: Recipe,
    groups: Path,
    features: Path | None,
    convert: Path | None,
    warm_start: Path | None,
    warm_convert: Path | None,
    tensorboard: Path | None,
    out: Path,
) -> None:
    """Train DICM, DIN, base or LR.

    Reads groups/ (train and valid), and features.h5 and convert/vocab/image.parquet where the model looks at
    pictures. Writes a model folder: model.pt (tensors), settings.json, metrics.jsonl, and with train.save_optimiser
    optimiser.pt. The model that is kept is the one with the best validation GAUC. A run that was killed goes on from
    its last checkpoint (train.checkpoint_minutes, each epoch, each best model) when the same command is run again.

    With --warm-start it starts from a model of strictly earlier days: with train.warm_start = "extractors" from its
    picture extractors, with "full" from all of it, ids found by their values (where the vocabulary is another one,
    --convert and --warm-convert tell both).

    \b
    ctrkit train --recipe demo --variant din --groups runs/demo/groups --out runs/demo/din/model
    ctrkit train --recipe demo --variant din --groups runs/demo/groups --set train.first_day=4 \\
        --set train.warm_start=full --warm-start earlier/model --out later/model
    """
    config = recipe.train
    if config.warm_start and warm_start is None:
        raise UsageError(f"train.warm_start = {config.warm_start!r} needs --warm-start, the folder of a trained model")
    if warm_start is not None and not config.warm_start:
        raise UsageError(
            '--warm-start needs to know what to take over: --set train.warm_start=full, or "extractors" for the '
            "extractors of pictures only"
        )
    if warm_convert is not None and config.warm_start != "full":
        raise UsageError('--warm-convert is for train.warm_start = "full", which finds ids by their values')
    vocabularies = (
        warm_convert / "vocab" if warm_convert else None,
        convert / "vocab" if convert and warm_convert else None,
    )
    if not config.looks_at_pictures:
        features = convert = None
    inputs = {
        "groups": groups,
        "features": features,
        "image vocabulary": convert / "vocab" / "image.parquet" if convert else None,
        "warm start": warm_start,
        "vocabulary of warm start": vocabularies[0],
        "vocabulary": vocabularies[1],
    }
    if tensorboard is not None:
        for name, path in {"--out": out, **{name: path for name, path in inputs.items() if path is not None}}.items():
            if tensorboard.resolve() == path.resolve() or path.resolve() in tensorboard.resolve().parents:
                raise UsageError(f"--tensorboard {tensorboard} lies in {path} ({name}); name a folder elsewhere")
    bad_batch = out.with_name(f"{out.name}.bad-batch.parquet")
    with provenance.output("train", recipe, inputs, out) as work:
        import time

        import torch

        from ctrkit import checkpoints, devices, modelfile, training, training_days
        from ctrkit import warm_start as warming
        from ctrkit.batches import GroupedData, Schema

        device = devices.resolve(config.device, "train.device")
        devices.set_up(device, config.threads)
        schema = Schema.read(groups).of_recipe(recipe.features, groups)
        modelfile.check_conversion(convert, schema, groups)
        pictures = modelfile.open_pictures(config, features, convert)
        days = training_days.days_of(groups, "train")
        span = training_days.choose(config, days)
        whole = span == (days[0], days[-1])
        counts = modelfile.read_counts(groups, schema) if whole else training_days.read_counts(groups, schema, span)
        with devices.memory_told(SMALLER):
            model = modelfile.build(config, schema, counts, pictures)
        decides = [
            config.model_dump(mode="json", exclude={"checkpoint_minutes", "save_optimiser", "device"}),
            [torch.device(device).type, work.inputs, recipe.tables("features")],
            [provenance.code_digest("train"), provenance.versions()],
        ]
        kept = checkpoints.of_output(out, decides)
        last = kept.latest()
        if pictures is not None and last is None:
            pictures.fit(None if whole else counts["image"])
        backbone = pictures.store.attributes if pictures else None
        warmed = source = None
        if warm_start is not None:
            source = warming.Source.read(warm_start)
            warmed = warming.warm_start(model, source, span[0], backbone, vocabularies)
        model.to(device)
        train = GroupedData(groups, "train", model.plan.features, None if whole else span)
        seen = {"train": span}
        valid = None
        if config.validation and (held_out := training_days.days_of(groups, "valid")):
            valid = GroupedData(groups, "valid", model.plan.features)
            seen["valid"] = held_out[0], held_out[-1]
        users = training.sample_users(valid) if valid else None
        with devices.lock(device), devices.memory_told(SMALLER):
            trainer = training.Trainer(model, counts, train, valid, users, kept, tensorboard, bad_batch)
            trainer.output = out
            if last is not None:
                trainer.resume(last)
            elif source is not None and config.warm_optimiser:
                warming.optimiser_state(model, trainer.adam, source, vocabularies)
            begun, samples = time.monotonic(), trainer.samples
            trainer.run()
            rate = (trainer.samples - samples) / (time.monotonic() - begun)
        work.path.mkdir()
        days_seen: dict[str, dict[str, object]] = {
            split: {"first": str(first), "last": str(last)} for split, (first, last) in seen.items()
        }
        days_seen["train"]["samples"] = len(train)
        if warmed is not None:
            days_seen["before"] = {"last": str(warmed.until)}
        modelfile.save(model, work.path, {"pictures": backbone, "days": days_seen})
        if config.save_optimiser:
            modelfile.save_optimiser(trainer.optimiser_state(), work.path)
        (work.path / "metrics.jsonl").write_text(training.metrics_lines(trainer.records), encoding="utf-8")
        judged = [r for r in trainer.history if r["valid_gauc"] is not None]
        best = max(judged, key=lambda r: r["valid_gauc"], default=None)
        work.counts.update(samples=len(train), steps=trainer.steps, best=best)
        work.counts["samples a second"] = round(rate, 1)
        if warmed is not None:
            work.counts["warm start"] = warmed.counts()
            say(f"train: {out}: started from {warmed}")
        if pictures is not None:
            work.counts["pictures without a vector"] = pictures.missing
            if pictures.missing:
                say(f"train: {pictures.missing:,} pictures have no vector in {features} and count as missing")
    checkpoints.remove(out)
    bad_batch.unlink(missing_ok=True)
    if best is not None:
        say(f"train: {out}: validation GAUC {best['valid_gauc']:.4f} at step {best['step']} of {trainer.steps}")
    else:
        why = "without validation" if not config.validation else "there is no validation split"
        why = why if valid is None else "no validation user has both clicks and non-clicks"
        say(f"train: {out}: {why}, so the model of the last step ({trainer.steps}) is kept")
