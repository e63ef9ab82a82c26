"""Train DICM, DIN, base or LR on grouped samples.

Reads groups/, and for models that look at pictures features.h5 and convert/. Writes a model folder.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ctrkit import launch, provenance
from ctrkit.errors import UsageError
from ctrkit.options import mlflow_option, path_option, rank_options, recipe_options
from ctrkit.progress import console, say
from ctrkit.ranks import Ranks
from ctrkit.recipe import RANKS, Recipe
from ctrkit.watching import Looking, Watch, nobody, several

if TYPE_CHECKING:
    from ctrkit.mlflow_records import Run

SMALLER = "Make [train] batch smaller, or extractor, tower, attention, or the features' width"


@click.command("train")
@recipe_options
@path_option("--groups", "Folder that `ctrkit group` wrote.")
@path_option("--features", "features.h5, for models that look at pictures.", required=False)
@path_option("--convert", "Folder that `ctrkit convert` wrote, for models that look at pictures.", required=False)
@path_option("--warm-start", "Model folder to start from, as train.warm_start says.", required=False)
@path_option("--warm-convert", "Folder of `ctrkit convert` with that model's vocabulary, if another.", required=False)
@path_option("--tensorboard", "Folder for TensorBoard scalars, written while training goes on.", required=False)
@mlflow_option
@rank_options
@path_option("--out", "Model folder to write.")
def command(
    recipe: Recipe,
    groups: Path,
    features: Path | None,
    convert: Path | None,
    warm_start: Path | None,
    warm_convert: Path | None,
    tensorboard: Path | None,
    mlflow: str | None,
    nproc: int | None,
    max_restarts: int,
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

    Several processes train one model on the same batches as one would: with --nproc on this machine (one a GPU, or
    train.threads cores each), under torchrun on several, with paths that all of them see. Large ID tables and the
    pictures' extraction are spread over them (train.placement, train.picture_placement).

    Features of pictures may be larger than memory: as many as fit into train.device_cache_gib of each GPU and
    train.host_cache_gib of the machine are held, the others read ahead of time; a table says at the end how often
    each was asked and how long training waited. The model is the same whatever is held.

    With --mlflow the settings, the metrics by step and the model folder are recorded there too (docs/tuning.md); a
    server that does not answer stops nothing.

    \b
    ctrkit train --recipe demo --variant din --groups runs/demo/groups --out runs/demo/din/model
    ctrkit train --recipe demo --variant din --groups runs/demo/groups --out runs/demo/din/model --nproc 2
    torchrun --nnodes 4 --nproc-per-node 8 … -m ctrkit train --recipe shop --groups groups --out model
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
    if launch.wanted(nproc or config.processes):
        raise click.exceptions.Exit(launch.launch(nproc or config.processes, max_restarts))
    bad_batch = out.with_name(f"{out.name}.bad-batch.parquet")
    looking = click.get_current_context().find_object(Looking)
    watch = looking.watch if looking else nobody
    job = Job(recipe, groups, features, convert, warm_start, vocabularies, tensorboard, out, bad_batch, mlflow, watch)
    ranks = Ranks.of_environment()
    with ranks.joined(ranks.started("train", recipe.tables("train", "features"), inputs)):
        if ranks.rank > 0:
            if ranks.follow():
                _train(job, ranks, None, lambda: None)
            return
        with (
            ranks.leading() as leader,
            provenance.output("train", recipe, inputs, out) as work,
            _recorded(job, work) as (record, watch),
        ):
            told = _train(replace(job, watch=watch), ranks, work, leader.start)
            if record is not None:
                record.end(artefacts=[(work.path, "model")])
                work.counts["mlflow run"] = record.run_id
    from ctrkit import checkpoints

    checkpoints.remove(out)
    bad_batch.unlink(missing_ok=True)
    say(f"train: {out}: {told}")


@dataclass(frozen=True)
class Job:
    """What is asked of a training."""

    recipe: Recipe
    groups: Path
    features: Path | None
    convert: Path | None
    warm_start: Path | None
    vocabularies: tuple[Path | None, Path | None]
    """Of the warm start's source, and of these groups."""
    tensorboard: Path | None
    out: Path
    bad_batch: Path
    mlflow: str | None
    watch: Watch


@contextlib.contextmanager
def _recorded(job: Job, work: provenance.Work) -> "Iterator[tuple[Run | None, Watch]]":
    """Yield the run at MLflow, where one is asked for, and who is to look on."""
    if job.mlflow is None:
        yield None, job.watch
        return
    from ctrkit import mlflow_records

    store = mlflow_records.Store(job.mlflow, job.recipe.name, "train")
    tags = {"ctrkit.stage": "train", "ctrkit.output": str(job.out)}
    with mlflow_records.Run(store, job.out.parent.name, mlflow_records.params_of(job.recipe), tags) as record:
        yield record, several(record.watch, job.watch)


def _train(job: Job, ranks: Ranks, work: provenance.Work | None, start: Callable[[], None]) -> str:
    """Train as one of the ranks; the first, which has the `work`, writes the model. Return what is to be said of it.

    start: is called when nothing can be wrong any more with what the user gave.
    """
    import time

    import torch

    from ctrkit import (
        checkpoints,
        devices,
        feature_cache,
        feature_service,
        modelfile,
        placement,
        training,
        training_days,
        vocabulary,
    )
    from ctrkit import warm_start as warming
    from ctrkit.batches import GroupedData, Schema
    from ctrkit.data_parallel import DataParallel

    config, groups, out = job.recipe.train, job.groups, job.out
    device = devices.of_rank(config.device, "train.device", ranks)
    devices.set_up(device, config.threads)
    if config.compile and ranks.count > 1:
        raise UsageError("train.compile = true is for one process; leave it out, or train without --nproc and torchrun")
    schema = Schema.read(groups).of_recipe(job.recipe.features, groups)
    vocabulary.require_of_groups(job.convert, schema.vocab_digest, groups)
    pictures = modelfile.open_pictures(config, job.features, job.convert, ranks)
    days = training_days.days_of(groups, "train")
    span = training_days.choose(config, days)
    whole = span == (days[0], days[-1])
    counts = modelfile.read_counts(groups, schema) if whole else training_days.read_counts(groups, schema, span)
    with devices.memory_told(SMALLER):
        model = modelfile.build(config, schema, counts, pictures, ranks=ranks)
    spread = placement.spreads_pictures(model.plan, ranks.count)
    backbone = pictures.store.attributes if pictures else None
    train = GroupedData(groups, "train", model.plan.features, None if whole else span)
    seen = {"train": span}
    valid = None
    if config.validation and (held_out := training_days.days_of(groups, "valid")):
        valid = GroupedData(groups, "valid", model.plan.features)
        seen["valid"] = held_out[0], held_out[-1]
    kept, last = None, None
    if work is not None:
        decides = [
            config.model_dump(mode="json", exclude={"checkpoint_minutes", "save_optimiser", "device"} | RANKS),
            [torch.device(device).type, work.inputs, job.recipe.tables("features")],
            [provenance.code_digest("train"), provenance.versions()],
        ]
        kept = checkpoints.of_output(out, decides)
        last = kept.latest()
    warmed = source = None
    if job.warm_start is not None:
        source = warming.Source.read(job.warm_start)
    start()
    kept, last = ranks.tell((kept, last))
    service = None
    if ranks.count > 1:
        service = feature_service.FeatureService(
            DataParallel(ranks, device),
            model.tables,
            pictures,
            spread_pictures=spread,
            exchange_dtype=config.exchange_dtype,
            scratch=out.parent,
        )
    fit = None if whole else counts.get("image")
    if pictures is not None and last is None and service is not None:
        service.fit_pictures(fit)
    elif pictures is not None and last is None:
        pictures.fit(fit)
    if source is not None:
        warmed = warming.warm_start(model, source, span[0], backbone, job.vocabularies)
    model.to(device)
    model.service = service
    users = training.sample_users(valid) if valid and ranks.rank == 0 else None
    with devices.lock(device), devices.memory_told(SMALLER):
        trainer = training.Trainer(model, counts, train, valid, users, kept, job.tensorboard, job.bad_batch)
        trainer.output = out
        trainer.watch = job.watch
        if last is not None:
            trainer.resume(last)
        elif source is not None and config.warm_optimiser:
            warming.optimiser_state(model, trainer.adam, source, job.vocabularies)
        begun, samples = time.monotonic(), trainer.samples
        trainer.run()
        rate = (trainer.samples - samples) / (time.monotonic() - begun)
    traffic = service.traffic() if service else None
    uses = feature_cache.Uses.of_ranks(ranks.gather(pictures.cache.uses())) if pictures else None
    if work is None:  # of spread tables the first rank gets all
        model.tensors()
        if config.save_optimiser:
            trainer.optimiser_state()
        return ""
    work.path.mkdir()
    days_seen: dict[str, dict[str, object]] = {
        split: {"first": str(first), "last": str(last_day)} for split, (first, last_day) in seen.items()
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
    if traffic is not None:
        work.counts["ranks"] = {"ranks": ranks.count, **traffic}
        say(f"train: {ranks.count} processes sent each other {feature_service.told(traffic)}")
    if uses is not None:
        work.counts["picture features"] = uses.counts()
        console().print(uses.table())
        say(f"train: {uses.told()}")
    if warmed is not None:
        work.counts["warm start"] = warmed.counts()
        say(f"train: {out}: started from {warmed}")
    if pictures is not None:
        work.counts["pictures without a vector"] = pictures.missing
        if pictures.missing:
            say(f"train: {pictures.missing:,} pictures have no vector in {job.features} and count as missing")
    if best is not None:
        return f"validation GAUC {best['valid_gauc']:.4f} at step {best['step']} of {trainer.steps}"
    why = "without validation" if not config.validation else "there is no validation split"
    why = why if valid is None else "no validation user has both clicks and non-clicks"
    return f"{why}, so the model of the last step ({trainer.steps}) is kept"
