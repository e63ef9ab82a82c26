"""Where a features.h5 that several ranks wrote keeps its rows: in files of `NAME.shards/`, which its sidecar names."""

from pathlib import Path

from ctrkit import files, provenance


def folder(target: Path) -> Path:
    """Return where the shards of a features.h5 lie."""
    return target.with_name(target.name + ".shards")


def of(target: Path) -> list[Path]:
    """Return the shards of a finished features.h5; none if it is one file."""
    return [target.parent / name for name in provenance.read_sidecar(target).get("counts", {}).get("shards", [])]


def disown_if_incomplete(target: Path) -> None:
    """Make a features.h5 that has lost a shard count as not made."""
    if not all(shard.is_file() for shard in of(target)):
        files.sidecar_path(target).unlink(missing_ok=True)


def remove_others(target: Path) -> None:
    """Remove the shards of earlier features.h5, once this one is finished."""
    used = of(target)
    if not used:
        files.remove(folder(target))
    for old in set(folder(target).glob("*")) - set(used):
        files.remove(old)
