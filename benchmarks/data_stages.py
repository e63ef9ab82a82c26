"""The data stages, one after the other, as commands."""

from collections.abc import Sequence
from pathlib import Path

import measure
from logs import Logs
from measure import Measured

OUTPUTS = {"convert": "convert", "select-clicks": "behaviours", "group": "groups"}
"""Stage → the name of its output."""
SPLITS = ("train", "valid", "test")


def run(logs: Logs, work: Path, sets: Sequence[str] = ()) -> dict[str, Measured]:
    """Run convert, select-clicks and group on the logs, outputs into the folder `work`."""
    inputs: dict[str, list[str | Path]] = {
        "convert": ["--raw", logs.raw],
        "select-clicks": ["--convert", work / "convert"],
        "group": ["--convert", work / "convert", "--behaviours", work / "behaviours"],
    }
    options = [word for text in sets for word in ("--set", text)]
    return {
        stage: measure.ctrkit(stage, "--recipe", logs.recipe, *options, *inputs[stage], "--out", work / name)
        for stage, name in OUTPUTS.items()
    }
