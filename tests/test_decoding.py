"""Pictures come in order, whole batches, whatever decodes them; bad ones are named by their place."""

import os
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ctrkit.decoding import AHEAD, Decoder, cores
from ctrkit.errors import Resumable
from ctrkit.pictures import BadPicture, Pixels

SIZE = 8


@dataclass(frozen=True)
class Picture:
    """One file, or what happens instead."""

    path: Path
    number: int

    def read(self) -> bytes:
        if self.number % 10 == 3:
            raise BadPicture("is a three")
        if self.number == 666:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.002 * (self.number % 3))
        return (self.path / f"{self.number}.png").read_bytes()


def pixels(number: int) -> Pixels:
    return np.random.default_rng(number).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("pictures")
    for number in range(50):
        Image.fromarray(pixels(number)).save(path / f"{number}.png")
    return path


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_without_the_bad_ones(folder: Path, workers: int) -> None:
    places = [Picture(folder, number) for number in range(50)]
    with Decoder(SIZE, 7, workers, crop=1.0) as decoder:
        batches = [(number * 10, places[7 * number : 7 * number + 7]) for number in range(8)]
        count = 0
        for (number, wanted), found in zip(batches, decoder.decode(batches), strict=True):
            good = [place.number for place in wanted if place.number % 10 != 3]
            assert found.number == number
            assert found.bad == {at: "is a three" for at, place in enumerate(wanted) if place.number % 10 == 3}
            np.testing.assert_array_equal(found.pixels, [pixels(n).transpose(2, 0, 1) for n in good])
            count += len(good)
        assert count == 45


def test_it_decodes_ahead_but_not_without_end(folder: Path) -> None:
    taken = []

    def endless() -> object:
        for number in range(1000):
            taken.append(number)
            yield number, [Picture(folder, 0)]

    with Decoder(SIZE, 1, 0) as decoder:
        found = decoder.decode(endless())  # type: ignore[arg-type]
        assert taken == []
        assert next(found).number == 0
        assert AHEAD <= len(taken) - 1 == decoder.ahead
        assert next(found).number == 1
        assert len(taken) == decoder.ahead + 2
        found.close()


def test_a_process_that_was_killed_is_told(folder: Path) -> None:
    with Decoder(SIZE, 1, 1) as decoder, pytest.raises(Resumable, match="a process that decodes pictures was killed"):
        list(decoder.decode([(0, [Picture(folder, 666)])]))


def test_no_thread_is_left(folder: Path) -> None:
    before = threading.active_count()
    with Decoder(SIZE, 2, 0) as decoder:
        assert len(list(decoder.decode([(0, [Picture(folder, 1)])]))) == 1
    assert threading.active_count() == before


def test_ranks_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    alone = cores()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(alone))
    assert cores() == 1
