"""The model that a service answers with, and how another takes its place."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import annotated_types
import numpy as np
from pydantic import ValidationError, create_model
from pydantic_core import to_json

from ctrkit.digests import Digests
from ctrkit.errors import UserError
from ctrkit.request_model import Request
from ctrkit.request_reader import RequestReader
from ctrkit.scorer import Scorer
from ctrkit.service_requests import Limits, Refusal, refusal_of

CHANGED = "export elsewhere and rename the folder, or let a link point to it"


@dataclass(frozen=True)
class Scored:
    """An answer as JSON, and what is to be counted of it: ads, of these those that were asked for lately, and by
    feature what was `missing` and `unknown`."""

    body: bytes
    ads: int
    known_ads: int
    unknown: dict[str, dict[str, int]]


class ServedModel:
    """An exported model, loaded and tried.

    Parameters
    ----------
    folder: what `ctrkit export` wrote.
    features: features.h5, for pictures by name.
    threads: CPU threads of one scoring.

    Raises UserError if it cannot be loaded, changes while it is, or has scores that are not finite.
    """

    def __init__(self, folder: Path, features: Path | None, threads: int, limits: Limits) -> None:
        begun = _stamps(folder)
        self.digest = Digests().of(folder / "settings.json")[:16]  # which has the digests of the others
        self.scorer = Scorer(folder, features, threads)
        if _stamps(folder) != begun:
            raise UserError(f"{folder} changed while it was read: {CHANGED}")
        self.request = limited(self.scorer.request, limits)
        scorer = self.scorer
        self._reader = RequestReader(
            *(self.request, scorer.schema.features, scorer.read, scorer.behaviours, scorer.ads),
            names=scorer.takes_names,
            ads=limits.ads,
            behaviours=limits.behaviours,
            newest=scorer.most_behaviours,
            most_bytes=limits.cache_bytes,
        )
        try:
            self.answer(b'{"ads":[{}]}', attention=False)
        except Refusal as e:
            raise UserError(f"{folder}: scoring an ad without any values failed: {e.message}") from None

    def answer(self, body: bytes, *, attention: bool) -> Scored:
        """Score one request, given as JSON. Raises Refusal if it is not one that this model takes."""
        try:
            asked = self._reader.read(body)
        except ValidationError as e:
            raise refusal_of(e, self.scorer.schema.features, self.scorer.picture_width) from None
        answer = self.scorer.score_rows(asked.user, asked.scene, asked.behaviours, asked.ads, attention)
        if not np.isfinite(answer.scores_A).all():
            place = int(np.flatnonzero(~np.isfinite(answer.scores_A))[0])
            raise Refusal(422, f"the score of ads[{place}] is not a finite number: look at the sizes of its numbers")
        content: dict[str, Any] = {"model": self.digest, "scores": answer.scores_A.tolist()}
        if attention:
            weights_AL = answer.attention_AL
            content["attention"] = None if weights_AL is None else weights_AL.tolist()
        content["unknown"] = answer.unknown
        return Scored(to_json(content), len(answer.scores_A), asked.known_ads, answer.unknown)


class Current:
    """The model in use, and the one that is about to take its place."""

    def __init__(self, model: ServedModel) -> None:
        self.model = model
        self.loaded = time.time()
        self._next: ServedModel | None = None

    def prepare(self, folder: Path, features: Path | None, threads: int, limits: Limits) -> str:
        """Load what is in a folder beside the model in use. Return its digest. Raises UserError."""
        self._next = None
        self._next = ServedModel(folder, features, threads, limits)
        return self._next.digest

    def commit(self) -> None:
        """Use what `prepare` loaded from now on; requests that have begun end with the model that they began with."""
        if self._next is not None:
            self.model, self._next = self._next, None
            self.loaded = time.time()

    def drop(self) -> None:
        """Forget what `prepare` loaded."""
        self._next = None


def limited(request: type[Request], limits: Limits) -> type[Request]:
    """Return the model's class of requests, with no more ads and behaviours than the limits allow."""
    fields: dict[str, Any] = {}
    for name, most in (("ads", limits.ads), ("behaviours", limits.behaviours)):
        field = request.model_fields.get(name)
        if field is not None:
            fields[name] = (Annotated[field.annotation, annotated_types.MaxLen(most)], field)
    limited: type[Request] = create_model(request.__name__, __base__=request, **fields)
    return limited


def _stamps(folder: Path) -> list[tuple[str, int, int, int]]:
    """Return what tells whether a folder's files are still the same."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [(str(path), (s := path.stat()).st_ino, s.st_size, s.st_mtime_ns) for path in files]
