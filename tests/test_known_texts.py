"""Texts to numbers: what a dictionary says, of few and of many texts."""

import random
from typing import Any

import pytest

from ctrkit import known_texts
from ctrkit.known_texts import KnownTexts, TwinsError, finder


def texts(n: int) -> list[str | None]:
    return [None, "", *(f"ü{i % 97}-{i}" for i in range(n - 2))]


@pytest.mark.parametrize("n", [2, 3, 500, 40_000])
def test_as_a_dictionary_has_them(n: int) -> None:
    of = texts(n)
    numbers = random.Random(n).sample(range(3 * n), n)
    asked: list[Any] = [*of, *(f"{text}x" for text in of), 0, 1, -1, True, 2.5, 1 << 70, None]
    random.Random(1).shuffle(asked)
    known = dict(zip(of, numbers, strict=True))
    assert KnownTexts(of, numbers, -7).numbers(asked) == [known.get(value, -7) for value in asked]
    for at_once in (True, False):
        find = finder(of, numbers, -7, at_once=at_once)
        assert find.numbers(asked) == [known.get(value, -7) for value in asked]
        assert [find.number(value) for value in asked[:500]] == [known.get(value, -7) for value in asked[:500]]
        assert find.numbers([]) == []
        assert find.numbers(["nobody"]) == [-7]


def test_two_texts_with_one_hash(monkeypatch: pytest.MonkeyPatch) -> None:
    """They cannot be told apart by it: a dictionary tells them."""
    with pytest.raises(TwinsError):
        KnownTexts(["a", "b", "a"], [1, 2, 3], 0)
    monkeypatch.setattr(known_texts, "LARGE", 1)
    assert finder(["a", "b", "a"], [1, 2, 3], 0).numbers(["b", "c", "a"]) == [2, 0, 3]


def test_texts_whose_hashes_lie_close_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_texts, "hash", lambda value: len(value) - 3, raising=False)
    of = ["a" * n for n in range(1000) if n % 3]
    numbers = list(range(len(of)))
    known = dict(zip(of, numbers, strict=True))
    asked = ["a" * n for n in range(1200) if n != 2]  # whose hash would be -1
    one = KnownTexts([t for t in of if len(t) != 2], [known[t] for t in of if len(t) != 2], -7)
    assert one.numbers(asked) == [one.number(text) for text in asked] == [known.get(text, -7) for text in asked]


def test_the_last_place_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hashes at the end of their range, one after the other, run on behind it."""
    monkeypatch.setattr(known_texts, "hash", lambda value: -2 - value, raising=False)
    of: list[Any] = list(range(100))
    one = KnownTexts(of, of, -7)
    assert one.numbers(range(200)) == [one.number(i) for i in range(200)] == [*of, *([-7] * 100)]
