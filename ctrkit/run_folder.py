"""A variant's files in the folder of a run, told by what its model's sidecar says it was made from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ctrkit import files, provenance
from ctrkit.errors import UsageError, UserError, nearest
from ctrkit.recipe import ExtractImages


@dataclass(frozen=True, kw_only=True)
class VariantFiles:
    """What a trained variant reads. None: it does not, or the run has none."""

    model: Path
    groups: Path
    convert: Path
    features: Path | None
    pictures: Path | None


def find(run: Path, variant: str | None) -> VariantFiles:
    """Return the files of a run's variant, which `ctrkit run` or make wrote.

    A variant has its own groups or shares those of another, so the folders are found by the content that they had when
    the model was trained. Raises UsageError where it is open which variant is meant, UserError where files are gone or
    were made again since.
    """
    model = _model(run, variant)
    made_from = provenance.read_sidecar(model).get("inputs", {})
    if "groups" not in made_from:
        raise UserError(
            f"{model} has no sidecar that says what it was trained on; give --model, --groups, --convert and, if it "
            "looks at pictures, --features in place of --run"
        )
    groups = _made(run, "groups", made_from["groups"], model)
    convert = _made(run, "convert", provenance.read_sidecar(groups)["inputs"]["convert"], groups)
    features = _made(run, "features.h5", made_from["features"], model) if "features" in made_from else None
    pictures = run / "raw" / (picture_settings(features) if features else ExtractImages()).folder
    return VariantFiles(
        model=model,
        groups=groups,
        convert=convert,
        features=features,
        pictures=pictures if pictures.exists() else None,
    )


def of_model(model: Path) -> VariantFiles:
    """Return the files of a model in the folder of a run, as `find` does."""
    run, variant = _run_of(model)
    return find(run, variant)


def max_behaviours(model: Path) -> int:
    """Return how many behaviours a history had at most, in the run that trained a model."""
    run, _ = _run_of(model)
    groups = of_model(model).groups
    behaviours = _made(run, "behaviours", provenance.read_sidecar(groups)["inputs"]["behaviours"], groups)
    return int(provenance.read_sidecar(behaviours)["config"]["select-clicks"]["max_behaviours"])


def _run_of(model: Path) -> tuple[Path, str | None]:
    """Return the run and the variant of a model that lies in RUN/VARIANT/model, or in RUN/model."""
    folder = model.absolute().parent
    if (folder / "convert").is_dir() and (folder / "groups").is_dir():
        return folder, None
    if not (folder.parent / "convert").is_dir():
        raise UsageError(
            f"{model} does not lie in the folder of a run, RUN/VARIANT/model, that says what it was made from: give "
            "--recipe and --convert"
        )
    return folder.parent, folder.name


def picture_settings(features: Path) -> ExtractImages:
    """Return how the ids in a features.h5 name pictures, as its sidecar has it; the defaults where it does not say."""
    told: Mapping[str, Any] = provenance.read_sidecar(features).get("config", {}).get("extract-images", {})
    return ExtractImages(**{key: value for key, value in told.items() if key in ExtractImages.model_fields})


def _model(run: Path, variant: str | None) -> Path:
    """Return the folder of a variant's model; that of the only one where none is named."""
    models = {path.parent.name: path for path in sorted(run.glob("*/model")) if (path / "model.pt").is_file()}
    if (run / "model" / "model.pt").is_file():
        models[""] = run / "model"
    if not models:
        raise UserError(f"{run} is not the folder of a run: it has no trained model. `ctrkit run RECIPE` makes one.")
    if variant is None and len(models) > 1:
        raise UsageError(f"{run} has {len(models)} models; say whose with --variant{nearest('', models)}")
    name = next(iter(models)) if variant is None else variant
    if name not in models:
        raise UsageError(f"{run} has no model of a variant {name!r}{nearest(name, models)}")
    return models[name]


def _made(run: Path, name: str, digest: str, reader: Path) -> Path:
    """Return the run's folder or file of this name that has this content."""
    found = [path for path in (run / name, *sorted(run.glob(f"*/{name}"))) if path.exists()]
    for path in found:
        if provenance.read_sidecar(path).get("content") == digest:
            return path
    for path in found:
        if not provenance.read_sidecar(path):
            raise UserError(
                f"{path} has no sidecar ({files.sidecar_path(path).name}) that says whether {reader} was made from it: "
                f"run make again, or give --{name.removesuffix('.h5')}"
            )
    raise UserError(
        f"{run} no longer has the {name} that {reader} was made from: it was made again since. Run make again, or give "
        f"--{name.removesuffix('.h5')}."
    )
