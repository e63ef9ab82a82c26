"""Train DICM, DIN, base or LR on grouped samples.

Reads groups/, and for models that look at pictures features.h5 and convert/. Writes a model folder.
"""

from pathlib import Path

import click

from ctrkit import provenance
from ctrkit.options import path_option, recipe_options
from ctrkit.progress import say
from ctrkit.recipe import Recipe


@click.command("train")
@recipe_options
@path_option("--groups", "Folder that `ctrkit group` wrote.")
@path_option("--features", "features.h5, for models that look at pictures.", required=False)
@path_option("--convert", "Folder that `ctrkit convert` wrote, for models that look at pictures.", required=False)
@path_option("--tensorboard", "Folder for TensorBoard scalars, written while training goes on.", required=False)
@path_option("--out", "Model folder to write.")
def command(
    recipe: Recipe,
    groups: Path,
    features: Path | None,
    convert: Path | None,
    tensorboard: Path | None,
    out: Path,
) -> None:
    """Train DICM, DIN, base or LR.

    Reads groups/ (train and valid), and features.h5 and convert/vocab/image.parquet where the model looks at
    pictures. Writes a model folder: model.pt (tensors), settings.json, metrics.jsonl, and with train.save_optimiser
    optimiser.pt. The model that is kept is the one with the best validation GAUC. A run that was killed goes on from
    its last checkpoint (train.checkpoint_minutes, each epoch, each best model) when the same command is run again.

    \b
    ctrkit train --recipe demo --variant din --groups runs/demo/groups --out runs/demo/din/model
    """
    config = recipe.train
    if not config.looks_at_pictures:
        features = convert = None
    inputs = {
        "groups": groups,
        "features": features,
        "image vocabulary": convert / "vocab" / "image.parquet" if convert else None,
    }
    bad_batch = out.with_name(f"{out.name}.bad-batch.parquet")
    with provenance.output("train", recipe, inputs, out) as work:
        import time

        import torch

        from ctrkit import checkpoints, devices, modelfile, training
        from ctrkit.batches import GroupedData, Schema

        device = devices.resolve(config.device, "train.device")
        devices.set_up(device, config.threads)
        schema = Schema.read(groups)
        pictures = modelfile.open_pictures(config, features, convert)
        counts = modelfile.read_counts(groups, schema)
        model = modelfile.build(config, schema, counts, pictures).to(device)
        decides = [
            config.model_dump(mode="json", exclude={"checkpoint_minutes", "save_optimiser", "device"}),
            [torch.device(device).type, work.inputs, recipe.tables("features")],
            [provenance.code_digest("train"), provenance.versions()],
        ]
        kept = checkpoints.Checkpoints(checkpoints.folder(out, decides))
        last = kept.latest()
        if pictures is not None and last is None:
            pictures.fit()
        train = GroupedData(groups, "train", model.plan.features)
        valid = GroupedData(groups, "valid", model.plan.features) if any((groups / "valid").glob("part-*")) else None
        users = training.sample_users(valid) if valid else None
        with devices.lock(device):
            trainer = training.Trainer(model, counts, train, valid, users, kept, tensorboard, bad_batch)
            if last is not None:
                trainer.resume(last)
            begun, samples = time.monotonic(), trainer.samples
            trainer.run()
            rate = (trainer.samples - samples) / (time.monotonic() - begun)
        work.path.mkdir()
        backbone = pictures.store.attributes if pictures else None
        modelfile.save(model, work.path, {"pictures": backbone})
        if config.save_optimiser:
            modelfile.save_optimiser(trainer.optimiser_state(), work.path)
        (work.path / "metrics.jsonl").write_text(training.metrics_lines(trainer.records), encoding="utf-8")
        judged = [r for r in trainer.history if r["valid_gauc"] is not None]
        best = max(judged, key=lambda r: r["valid_gauc"], default=None)
        work.counts.update(samples=len(train), steps=trainer.steps, best=best)
        work.counts["samples a second"] = round(rate, 1)
        if pictures is not None:
            work.counts["pictures without a vector"] = pictures.missing
            if pictures.missing:
                say(f"train: {pictures.missing:,} pictures have no vector in {features} and count as missing")
    checkpoints.remove(out)
    bad_batch.unlink(missing_ok=True)
    if best is not None:
        say(f"train: {out}: validation GAUC {best['valid_gauc']:.4f} at step {best['step']} of {trainer.steps}")
    else:
        why = "there is no validation split" if valid is None else "no validation user has both clicks and non-clicks"
        say(f"train: {out}: {why}, so the model of the last step ({trainer.steps}) is kept")
