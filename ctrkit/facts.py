"""What `split.json` says of a conversion. It imports little, so that stages know it at once."""

from pathlib import Path
from typing import Any

from ctrkit import files
from ctrkit.errors import UserError


def read_facts(convert_folder: Path) -> dict[str, Any]:
    """Return what `split.json` says: days, number of partitions, rate of negatives."""
    if not (convert_folder / "split.json").is_file():
        raise UserError(f"{convert_folder} has no samples; run ctrkit convert with this recipe first")
    facts = files.read_json(convert_folder / "split.json")
    assert isinstance(facts, dict)
    return facts


def partitions_of(convert_folder: Path) -> int:
    """Return the number of partitions of what may be a folder of `convert`; 0 if it is none."""
    try:
        return int(read_facts(convert_folder)["partitions"])
    except (UserError, ValueError, KeyError, TypeError):
        return 0
