"""ctrkit: click-through-rate models that look at the pictures."""

__version__ = "0.1.0"
