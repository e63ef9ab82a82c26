"""Errors that are the user's to mend: one paragraph that says what, where and what to do."""

import difflib
from collections.abc import Iterable

import click


class UserError(click.ClickException):
    """A mistake in the input or the call. Printed without a traceback; exit code 1."""

    exit_code = 1


class UsageError(UserError):
    """A mistake in the recipe or the options. Exit code 2."""

    exit_code = 2


class Resumable(UserError):
    """Work that ended before its time, but not for good: the same command goes on where it was."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the known names nearest to `name`, else the known names.

    The result starts with a semicolon, so that it can follow any statement.
    """
    names = sorted(set(known))
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if close:
        return "; did you mean " + " or ".join(repr(c) for c in close) + "?"
    if not names:
        return ""
    shown = ", ".join(names[:20]) + (", …" if len(names) > 20 else "")
    return f"; known: {shown}"
