"""Answer requests, JSON lines from standard input, with the scores of an exported model.

Reads an export folder and, for pictures by name, features.h5. Writes JSON lines to standard output.
"""

import codecs
import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import click

from ctrkit.errors import UserError
from ctrkit.files import no_room
from ctrkit.options import path_option

OF_ONE_LINE = re.compile(r" at line 1 column (?=\d+$)")
"""Where JSON is wrong, in the parser's words; which line of the input it is, only we know."""


@click.command("score")
@path_option("--model", "Folder that `ctrkit export` wrote.")
@path_option("--features", "features.h5, where requests give pictures by name.", required=False)
@click.option(
    "--attention", is_flag=True, help="Also give each ad's weights of the behaviours, where the model has one."
)
@click.option("--threads", type=click.IntRange(1, 1024), default=1, show_default=True, help="CPU threads.")
def command(model: Path, features: Path | None, attention: bool, threads: int) -> None:
    """Answer requests, JSON lines, with an exported model.

    Reads an export folder, and a request a line from standard input: one user, one scene, behaviours (oldest first),
    ads, each by the names of the recipe's [features], raw values as in the logs (docs/serving.md). Writes an answer a
    line to standard output, in the same order: `scores`, a click probability an ad; `unknown`, by feature how many
    values were missing or unknown. A line that is no request is answered by `error` and `line`, its number from 1; then
    the command ends with exit code 1, after the last line. Blank lines are skipped.

    \b
    ctrkit score --model exported/din --features runs/demo/features.h5 < requests.jsonl > answers.jsonl
    """
    import pydantic

    from ctrkit.request_model import KeyTwiceError, complaint, from_json
    from ctrkit.scorer import Scorer

    scorer = Scorer(model, features, threads)
    bad = 0
    for number, line in enumerate(sys.stdin.buffer, 1):
        text = (line.removeprefix(codecs.BOM_UTF8) if number == 1 else line).strip()
        if not text:
            continue
        answer: dict[str, Any]
        try:
            answer = scorer.score(from_json(scorer.request, text), attention).to_json()
        except pydantic.ValidationError as e:
            error = complaint(e, scorer.schema.features, scorer.picture_width)
            answer = {"error": OF_ONE_LINE.sub(" at column ", error), "line": number}
        except KeyTwiceError as e:
            answer = {"error": f"the request: {e}", "line": number}
        bad += "error" in answer
        _write(json.dumps(answer, ensure_ascii=False))
    if bad:
        click.echo(f"score: {bad:,} lines were no requests; each is answered by what is wrong with it", err=True)
        raise click.exceptions.Exit(1)


def _write(answer: str) -> None:
    """Write a line to standard output. Raises UserError if there is no room for it."""
    try:
        click.echo(answer)
    except OSError as e:
        if e.errno != errno.EPIPE:  # which ends the command quietly
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python would write at the end
            raise UserError(f"cannot write to standard output: {no_room(e) or e.strerror}") from None
        raise
