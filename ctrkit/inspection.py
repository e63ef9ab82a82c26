"""What is in a file or a folder that ctrkit wrote, as tables for people."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ctrkit import files
from ctrkit.errors import UserError
from ctrkit.features import FeatureStore
from ctrkit.parquet_footer import row_groups
from ctrkit.partitions import ARROW
from ctrkit.programs import FORMATS, read_settings

FIRST_ROWS = 5
SAMPLE_ROWS = 1000
"""Vectors whose norms are shown."""


def show(path: Path, console: Console) -> None:
    """Print what `path` is and holds, then what it was made from.

    Raises UserError for what is not there or not of ctrkit's making.
    """
    if not path.exists():
        raise UserError(f"{path} is not there")
    describe = _describer(path)
    if describe is None:
        raise UserError(
            f"{path} is nothing that ctrkit writes. It shows Parquet files, features.h5, the folders of convert, "
            "select-clicks, group, train and export, metrics.json, and anything with a sidecar NAME.json beside it."
        )
    console.rule(f"[bold]{escape(str(path))}", align="left")
    describe(path, console)
    if describe != _show_sidecar:
        # A part of an output, such as vocab/image.parquet, is described by the whole's sidecar.
        whole = path.absolute()
        sidecars = [files.sidecar_path(p) for p in (whole, *whole.parents[:3]) if p.name]
        for sidecar in [s for s in sidecars if s.is_file() and _is_sidecar(s)][:1]:
            _show_sidecar(sidecar, console)


def _describer(path: Path) -> Callable[[Path, Console], None] | None:
    """Return what shows a thing of this kind, or None for a kind that is unknown."""
    if path.is_dir():
        if (path / "model.pt").is_file():
            return _show_model
        if any((path / f"ads.{format}").is_file() for format in FORMATS):
            return _show_export
        if (path / "schema.json").is_file() and (path / "train").is_dir():
            return _show_groups
        if (path / "samples").is_dir() and (path / "vocab").is_dir():
            return _show_convert
        if any(path.glob("day=*/part-*")):
            return _show_days
        if any(path.glob("step-*.json")):
            return _show_checkpoints
        inner = list(path.iterdir())
        if inner and all(p.suffix == ".parquet" for p in inner):
            return _show_parquet_folder
    elif path.suffix == ".parquet":
        return _show_parquet
    elif path.suffix == ARROW:
        return _show_arrow
    elif path.suffix in (".h5", ".hdf5"):
        return _show_features
    elif path.suffix in (".pt", ".pth"):
        return _show_tensors
    elif path.suffix == ".json" and _is_sidecar(path):
        return _show_sidecar
    elif path.suffix == ".json" and files.sidecar_path(path).is_file():
        return _show_json
    elif path.name == "metrics.jsonl":
        return _show_metrics
    return _show_size if files.sidecar_path(path).is_file() else None


def _print(
    console: Console,
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    right: Sequence[str] = (),
) -> None:
    console.print(f"[italic]{escape(title)}")
    table = Table(header_style="bold")
    for column in columns:
        table.add_column(escape(column), justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(escape(f"{cell:,}" if type(cell) is int else str(cell)) for cell in row))
    console.print(table)


def _pairs(console: Console, title: str, pairs: Iterable[tuple[str, object]]) -> None:
    _print(console, title, ["", "value"], pairs)


def _frame(console: Console, title: str, frame: pl.DataFrame) -> None:
    _print(console, title, frame.columns, [[_cell(value) for value in row] for row in frame.rows()])


def _cell(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_cell, value[:3]))}{', …' if len(value) > 3 else ''}] ({len(value):,})"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _show_parquet(path: Path, console: Console) -> None:
    groups = row_groups(path)
    scan = pl.scan_parquet(path)
    schema = [(name, str(dtype)) for name, dtype in scan.collect_schema().items()]
    sizes = f", of {min(groups):,} to {max(groups):,} rows" if groups else ""
    _print(console, f"rows: {sum(groups):,}; row groups: {len(groups):,}{sizes}", ["column", "type"], schema)
    _frame(console, f"first {min(FIRST_ROWS, sum(groups))} rows", scan.head(FIRST_ROWS).collect())


def _show_parquet_folder(path: Path, console: Console) -> None:
    found = sorted(path.glob("*.parquet"))
    rows = [(p.name, sum(row_groups(p)), ", ".join(pl.read_parquet_schema(p))) for p in found]
    _print(console, f"tables: {len(found):,}", ["file", "rows", "columns"], rows, right=["rows"])


def _show_days(path: Path, console: Console) -> None:
    found = sorted(path.glob("day=*"))
    parts = {day.name.removeprefix("day="): sorted(day.glob("part-*")) for day in found}
    rows = [(day, len(inner), sum(map(_rows, inner))) for day, inner in parts.items()]
    total = sum(row[2] for row in rows)
    _print(console, f"days: {len(rows):,}; rows: {total:,}", ["day", "files", "rows"], rows, right=["files", "rows"])
    first = next((inner[0] for inner in parts.values() if inner), None)
    if first is not None:
        (_show_arrow if first.suffix == ARROW else _show_parquet)(first, console)


def _rows(path: Path) -> int:
    if path.suffix == ARROW:
        return int(pl.scan_ipc(path).select(pl.len()).collect().item())
    return sum(row_groups(path))


def _show_arrow(path: Path, console: Console) -> None:
    scan = pl.scan_ipc(path)
    schema = [(name, str(dtype)) for name, dtype in scan.collect_schema().items()]
    rows = _rows(path)
    _print(console, f"rows: {rows:,}", ["column", "type"], schema)
    _frame(console, f"first {min(FIRST_ROWS, rows)} rows", scan.head(FIRST_ROWS).collect())


def _show_convert(path: Path, console: Console) -> None:
    if (path / "split.json").is_file():
        split = files.read_json(path / "split.json")
        shown = {k: ", ".join(v) if isinstance(v, list) else str(v) for k, v in split.items()}
        _pairs(console, "split", list(shown.items()))
    _show_parquet_folder(path / "vocab", console)
    _show_days(path / "samples", console)


def _show_groups(path: Path, console: Console) -> None:
    schema = files.read_json(path / "schema.json")
    lists = [n for n, f in schema.get("features", {}).items() if f.get("of") == "behaviour"]
    rows: list[tuple[object, ...]] = []
    for split in ("train", "valid", "test"):
        parts = sorted((path / split).glob("*.parquet"))
        if not parts:
            rows.append((split, 0, 0, 0, "", ""))
            continue
        samples = pl.col("click").list.len()
        history = pl.col(lists[0]).list.len() if lists else pl.lit(0)
        found = (
            pl.scan_parquet(parts)
            .select(
                pl.len().alias("n"),
                samples.sum().alias("s"),
                samples.mean().alias("m"),
                history.mean().alias("h"),
            )
            .collect()
            .row(0, named=True)
        )
        blocks = sum(len(row_groups(p)) for p in parts)
        rows.append((split, blocks, found["n"], found["s"], _cell(found["m"]), _cell(found["h"])))
    columns = ["split", "row groups", "groups", "samples", "samples a group", "behaviours a group"]
    _print(console, "groups, one a user and day", columns, rows, right=columns[1:])
    features = [(name, *(str(value) for value in f.values())) for name, f in schema.get("features", {}).items()]
    names = list(next(iter(schema.get("features", {}).values()), {}))
    _print(console, "features", ["feature", *names], features)
    _pairs(console, "the rest of schema.json", [(k, _short(v)) for k, v in schema.items() if k != "features"])


def _show_features(path: Path, console: Console) -> None:
    store = FeatureStore(path)
    row = store.pictures["row"].to_numpy()
    sample = store.read(np.unique(np.linspace(0, store.rows - 1, min(store.rows, SAMPLE_ROWS)).astype(np.int64)))
    norms = np.linalg.norm(sample, axis=1)
    facts: list[tuple[str, object]] = [
        ("rows", store.rows),
        ("width", store.width),
        ("pictures", len(row)),
        ("pictures with a row", int((row >= 0).sum())),
        ("pictures without", int((row < 0).sum())),
    ]
    if len(norms):
        spread = ", ".join(f"{q:.4g}" for q in np.quantile(norms, [0, 0.5, 1]))
        facts.append((f"norms of {len(norms):,} rows: least, median, most", spread))
        facts.append(("values that are 0", f"{float((sample == 0).mean()):.1%}"))
    _pairs(console, "picture features", [*facts, *sorted(store.attributes.items())])
    _frame(console, "first pictures", store.pictures.head(FIRST_ROWS))


def _show_export(path: Path, console: Console) -> None:
    settings = read_settings(path)
    told = [(key, settings.get(key)) for key in ("model", "format", "max_behaviours", "picture_width", "days")]
    _pairs(console, "exported model", told)
    rows = [[p["file"], ", ".join(p["inputs"]), ", ".join(p["outputs"])] for p in settings["programs"].values()]
    _print(console, "programs", ["file", "inputs", "outputs"], rows)


def _show_model(path: Path, console: Console) -> None:
    settings = path / "settings.json"
    if settings.is_file():
        _pairs(console, "settings.json", [(k, _short(v)) for k, v in files.read_json(settings).items()])
    for name in ("model.pt", "optimiser.pt"):
        if (path / name).is_file():
            _show_tensors(path / name, console)
    if (path / "metrics.jsonl").is_file():
        _show_metrics(path / "metrics.jsonl", console)


def _show_tensors(path: Path, console: Console) -> None:
    from ctrkit import state_dict

    state = state_dict.read(path)
    rows = [(name, list(t.shape), str(t.dtype).removeprefix("torch."), t.numel()) for name, t in state.items()]
    total = sum(row[3] for row in rows)
    columns = ["tensor", "shape", "type", "numbers"]
    _print(console, f"{path.name}: {total:,} numbers", columns, rows, right=["numbers"])


def _show_metrics(path: Path, console: Console) -> None:
    lines = path.read_text(encoding="utf-8").splitlines()
    if lines:
        last = json.loads(lines[-1])
        _pairs(console, f"last of {len(lines)} records", [(k, _short(v)) for k, v in last.items()])


def _show_checkpoints(path: Path, console: Console) -> None:
    from ctrkit.checkpoints import Checkpoints

    found = Checkpoints(path)
    rows: list[tuple[object, ...]] = []
    described = {step: found.describe(step) for step in found.steps()}
    best = next((one.best for one in reversed(described.values()) if one is not None), None)
    for step, one in described.items():
        if one is None:
            rows.append((step, "damaged", "", "", ""))
            continue
        progress = one.progress
        seen = [record["valid_gauc"] for record in progress["records"] if "valid_gauc" in record]
        last = _cell(seen[-1]) if seen else ""
        rows.append(
            (step, progress["epoch"] + 1, progress["samples"], one.size, f"{last} best" if step == best else last)
        )
    columns = ["step", "in epoch", "samples", "bytes", "last validation GAUC"]
    _print(console, f"checkpoints: {len(rows):,}", columns, rows, right=columns[:-1])


def _show_json(path: Path, console: Console) -> None:
    _pairs(console, path.name, _flat(files.read_json(path)))


def _flat(value: Any, name: str = "", depth: int = 3) -> Iterator[tuple[str, str]]:
    """Yield the values of nested JSON with dotted names, so many levels deep."""
    if isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key, depth - 1)
    else:
        yield name, _short(value)


def _show_size(path: Path, console: Console) -> None:
    inner = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    kinds: dict[str, list[int]] = {}
    for p in inner:
        name = p.name if p.parent in (path, path.parent) else f"{p.parent.relative_to(path)}/*{p.suffix}"
        kinds.setdefault(name, []).append(p.stat().st_size)
    rows = [(name, len(sizes), sum(sizes)) for name, sizes in kinds.items()]
    _print(console, f"files: {len(inner):,}", ["file", "files", "bytes"], rows, right=["files", "bytes"])


def _is_sidecar(path: Path) -> bool:
    try:
        value = files.read_json(path)
    except UserError:
        return False
    return isinstance(value, dict) and {"stage", "key", "inputs"} <= value.keys()


def _show_sidecar(path: Path, console: Console) -> None:
    value = files.read_json(path)
    plain = [(name, value.get(name, "")) for name in ("stage", "key", "content", "code", "started", "seconds")]
    nested = [
        (name, "\n".join(f"{inner} = {_short(of)}" for inner, of in value.get(name, {}).items()))
        for name in ("inputs", "counts", "config")
    ]
    versions = ", ".join(f"{name} {version}" for name, version in value.get("versions", {}).items())
    _pairs(console, f"what made it ({path.name})", [*plain, *nested, ("versions", versions)])


def _short(value: Any) -> str:
    """Return a JSON value on one line, cut where it is long."""
    if isinstance(value, float):
        return f"{value:.6g}"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else text[:400] + " …"
