"""TOML that is written is read back as what it was."""

import datetime
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ctrkit.toml_text import dump
from tests.tiny_world import CHECKOUT

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
PLAIN = (
    TEXT
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.dates(datetime.date(1000, 1, 1))
)
VALUES = st.recursive(PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3))


@given(st.dictionaries(TEXT, VALUES, max_size=4))
def test_any_tables(tables: dict[str, Any]) -> None:
    assert tomllib.loads(dump(tables)) == tables


@pytest.mark.parametrize("name", ["demo", "paper-dicm"])
def test_shipped_recipes(name: str) -> None:
    tables = tomllib.loads((CHECKOUT / "data" / name / "recipe.toml").read_text(encoding="utf-8"))
    assert tomllib.loads(dump(tables)) == tables


def test_what_it_looks_like() -> None:
    tables = {"name": "a b", "t": {"x": 1e-05, "deep": {"y": [1, {"k": True}], "α.b": {}}}}
    assert dump(tables) == ('name = "a b"\n\n[t]\nx = 1e-05\n\n[t.deep]\ny = [1, { k = true }]\n\n[t.deep."α.b"]\n')
