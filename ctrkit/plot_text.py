"""Text of any script in the figures that matplotlib draws."""

import contextlib
import warnings
from collections.abc import Iterator

FALLBACK = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Arial Unicode MS",
    "Noto Sans Arabic",
    "Noto Sans Hebrew",
    "Noto Sans Devanagari",
    "Noto Sans Thai",
    "Noto Emoji",
    "Symbola",
)
"""Fonts that are asked, where they are installed, for what matplotlib's own has not."""


@contextlib.contextmanager
def any_script() -> Iterator[None]:
    """Within the block figures take the characters that matplotlib's own font lacks from those of `FALLBACK` that are
    installed; one that none of them has is drawn as a box, without a warning."""
    from matplotlib import font_manager, rc_context

    installed = {font.name for font in font_manager.fontManager.ttflist}
    families = ["sans-serif", *(name for name in FALLBACK if name in installed)]
    with rc_context({"font.family": families}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .*missing from", category=UserWarning)
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support", category=UserWarning)
        yield
