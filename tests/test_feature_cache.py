"""The cache of features: the same numbers whatever is held, and counts that say where they came from."""

import tempfile
import threading
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ctrkit.feature_cache import FeatureCache, Use, Uses
from ctrkit.features import FeatureStore

WIDTH = 4
ROW_BYTES = 2 * WIDTH


def write(path: Path, rows: int, **how: object) -> np.ndarray:
    features = np.random.default_rng(rows).normal(size=(rows, WIDTH)).astype(np.float16)
    with h5py.File(path, "w") as h5:
        h5.create_dataset("features", data=features, **how)
        h5.create_dataset("image", data=np.array([], object), dtype=h5py.string_dtype())
        h5.create_dataset("row", data=np.array([], np.int64))
    return features


@settings(deadline=None, max_examples=80)
@given(st.data())
def test_the_same_numbers_whatever_is_held(data: st.DataObject) -> None:
    """Plain indexing is the reference. The device is the CPU too: what is on it is gathered as on a GPU."""
    rows = data.draw(st.integers(0, 40))
    step = data.draw(st.integers(1, 4))
    first = data.draw(st.integers(0, step - 1))
    own = list(range(first, rows, step))
    asked = np.array(sorted(data.draw(st.sets(st.sampled_from([-1, *own])))), np.int64)
    sizes = {name: data.draw(st.integers(0, rows + 2)) for name in ("device", "host")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "f.h5")
        how = data.draw(st.sampled_from([{}, {"chunks": (1, WIDTH)}])) if rows else {}
        features = write(path, rows, **how)
        cache = FeatureCache(
            FeatureStore(path),
            host_bytes=sizes["host"] * ROW_BYTES + data.draw(st.integers(0, ROW_BYTES - 1)),
            device_bytes=sizes["device"] * ROW_BYTES,
            share=(first, step),
        )
        wanted = np.concatenate([features, np.zeros((1, WIDTH), np.float16)])[asked]
        for _ in range(2):
            cache.prefetch(asked)
            found = cache.read(asked)
            assert found.dtype == torch.float32
            np.testing.assert_array_equal(found.numpy(), wanted)
    on_device, on_device_or_host = (own[: sizes["device"]], own[: sizes["device"] + sizes["host"]])
    real = asked[asked >= 0].tolist()
    misses = [row for row in real if row not in on_device]
    beyond = [row for row in real if row not in on_device_or_host]

    def use(held: int, asked: int, found: int) -> Use:
        return Use(held, 2 * asked, 2 * found, 2 * found * ROW_BYTES)

    held = len(on_device_or_host)
    assert cache.uses().levels == {
        "device": use(len(on_device), len(real), len(real) - len(misses)),
        "host": use(held - len(on_device), len(misses), len(misses) - len(beyond)),
        "disk": use(len(own) - held, len(beyond), len(beyond)),
    }
    assert (cache.uses().rows, cache.uses().from_disk) == (2 * len(real), 2 * len(beyond))


def test_rows_of_another_process_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "f.h5", 9)
    cache = FeatureCache(FeatureStore(tmp_path / "f.h5"), share=(1, 3))
    assert cache.read(np.array([-1, 1, 4])).shape == (3, WIDTH)
    with pytest.raises(ValueError, match="only every 3th, from 1 on"):
        cache.read(np.array([1, 3]))


def test_threads_share_a_cache(tmp_path: Path) -> None:
    features = write(tmp_path / "f.h5", 2000)
    cache = FeatureCache(FeatureStore(tmp_path / "f.h5"), host_bytes=700 * ROW_BYTES, device_bytes=300 * ROW_BYTES)
    wrong = []

    def work(seed: int) -> None:
        random = np.random.default_rng(seed)
        for _ in range(20):
            asked = np.unique(random.integers(0, 2000, 300))
            if not np.array_equal(cache.read(asked).numpy(), features[asked].astype(np.float32)):
                wrong.append(seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert [use.rows_held for use in cache.uses().levels.values()] == [300, 700, 1000]


def test_training_waits_for_what_it_shares_with_reading(tmp_path: Path) -> None:
    write(tmp_path / "f.h5", 3)
    cache = FeatureCache(FeatureStore(tmp_path / "f.h5"))
    cache._read.extend([(10.0, 12.0), (13.0, 14.0)])
    cache.waited(11.0, 13.5)
    assert cache.uses().seconds_waited == pytest.approx(1.5)
    cache.waited(11.0, 13.5)  # those that were read for this wait are told of once
    assert cache.uses().seconds_waited == pytest.approx(1.5)
    cache._read.append((20.0, 21.0))
    cache.waited(22.0, 30.0)
    assert cache.uses().seconds_waited == pytest.approx(1.5)


def test_uses_of_ranks_are_sums_and_the_longest_wait() -> None:
    ranks = [Uses({"host": Use(1, 2, 3, 4), "disk": Use(5, 6, 7, 8)}, seconds, 3.0 - seconds) for seconds in (1.0, 2.5)]
    both = Uses.of_ranks(ranks)
    assert both == Uses({"host": Use(2, 4, 6, 8), "disk": Use(10, 12, 14, 16)}, 2.5, 2.0)
    assert both.counts()["disk"] == {"rows held": 10, "rows asked": 12, "rows found": 14, "bytes read": 16}
