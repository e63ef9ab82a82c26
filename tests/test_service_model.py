"""A served model answers the same whether it was asked for an ad, or a behaviour, lately or not."""

import json
import random
from pathlib import Path

import pytest

from ctrkit.service_model import ServedModel
from ctrkit.service_requests import Limits
from tests import requests_of
from tests.serving import exported
from tests.tiny_run import TinyRun


@pytest.fixture(scope="module")
def folder(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return exported(tiny_run, tmp_path_factory.mktemp("dicm"))


def test_with_memory_and_without(folder: Path, tiny_run: TinyRun) -> None:
    """Ads in scenes of which each has its own position, or an ad its own."""
    samples = [request for _, request in requests_of.samples(tiny_run.groups, tiny_run.convert)]
    ads = [request["ads"][0] for request in samples[:20]]
    rng = random.Random(1)
    bodies = []
    for request in samples[:60]:
        some = [
            {**ad, "position": rng.choice([0, 3, None])} if rng.random() < 0.3 else ad for ad in rng.choices(ads, k=8)
        ]
        scene = {"position": rng.choice([0, 1, 2])} if rng.random() < 0.8 else {}
        bodies.append(json.dumps({**request, "scene": scene, "ads": some}).encode())
    models = [ServedModel(folder, tiny_run.features, 1, Limits(cache_bytes=size)) for size in (0, 1000, 1 << 24)]
    none, little, much = ([m.answer(body, attention=True) for _ in range(2) for body in bodies] for m in models)
    assert [a.body for a in little] == [a.body for a in none]
    assert [a.body for a in much] == [a.body for a in none]
    assert sum(a.known_ads for a in none) == 0
    assert all(a.known_ads == a.ads for a in much[len(bodies) :])
    assert 0 < sum(a.known_ads for a in little) < sum(a.known_ads for a in much)
    assert len({tuple(json.loads(a.body)["scores"]) for a in none}) > 40
