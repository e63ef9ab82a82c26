"""One user and many ads, as raw values, to click probabilities: an exported model in use.

Letters as in `ctrkit.serving_network`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrkit.batches import Schema
from ctrkit.errors import UserError
from ctrkit.features import FeatureStore, check_made_alike
from ctrkit.programs import Programs, lists_side_by_side
from ctrkit.raw_values import Indexer
from ctrkit.request_model import Request, request_model
from ctrkit.serving_pictures import Names, Pictures
from ctrkit.vocabulary import MISSING, UNKNOWN

Given = dict[str, npt.NDArray[Any]]


@dataclass
class Answer:
    """Scores of one request."""

    scores_A: npt.NDArray[np.float32]
    """Click probabilities, in the order of the ads."""
    attention_AL: npt.NDArray[np.float32] | None = None
    """Where asked for and the model has one: each ad's weights of the behaviours that counted, oldest first."""
    unknown: dict[str, dict[str, int]] = field(default_factory=dict)
    """Feature → how many of its values were `missing`, and how many `unknown`: not seen in training, or a picture that
    features.h5 does not have."""


class Scorer:
    """An exported model, ready for requests. Threads may share it.

    Parameters
    ----------
    folder: what `ctrkit export` wrote.
    features: features.h5, where requests give pictures by name.
    threads: CPU threads of one call.
    """

    request: type[Request]
    """The type of its requests: `request.model_validate(…)`, or `model_validate_json`."""

    def __init__(self, folder: Path, features: Path | None = None, threads: int = 1) -> None:
        self.programs = Programs(folder, threads)
        settings = self.settings = self.programs.settings
        try:
            self.schema = Schema.from_json(settings["schema"])
            self._reads, self._most = settings["reads"], int(settings["max_behaviours"])
            self.picture_width = int(settings["picture_width"])
        except (KeyError, TypeError, ValueError, AssertionError) as e:
            raise UserError(
                f"{folder / 'settings.json'} is not of this version of ctrkit ({str(e).splitlines()[0]}). Export the "
                "model again."
            ) from None
        images = [self._reads[key] for key in ("ad_pictures", "user_pictures") if self._reads[key]]
        ids = [n for key in ("user_ids", "user", "behaviour_ids", "ad_ids", "ad") for n in self._reads[key]]
        self.read = [*ids, *images]
        """Features that the model reads."""
        names = self._open(folder, features) if images and features is not None else None
        self._pictures = {
            key: Pictures(self.programs, key, names, self.picture_width)
            for key in ("ad_pictures", "user_pictures")
            if self._reads[key]
        }
        self._indexer = {name: Indexer(self.schema.features[name], folder / "vocab") for name in ids}
        self.request = request_model(self.schema.features, self.read, self.picture_width, names=names is not None)

    def _open(self, folder: Path, features: Path) -> Names:
        store = FeatureStore(features, shuffle_seed=self.settings["shuffle_seed"])
        check_made_alike(store, self.settings["pictures"], self.picture_width, folder)
        return Names(store)

    def score(self, request: Request, attention: bool = False) -> Answer:
        """Return the click probability of each ad of a request, which is one of `self.request`."""
        reads, answer = self._reads, Answer(np.zeros(0, np.float32))
        behaviours = request.behaviours[-self._most :] if self._reads_behaviours else []
        given: Given = {}
        self._ids(given, "user_ids", [request.user], answer)
        for name in reads["user"]:
            given[f"user.{name}"] = self._lists(name, [request.user.get(name)], answer)[0]
        if behaviours or self._reads_behaviours:
            self._ids(given, "behaviour_ids", behaviours, answer)
            self._look_at(given, "user_pictures", behaviours, "behaviour", answer)
        if "user_ids" in given:
            given["user_ids"] = given["user_ids"][0]
        state = self.programs.user(given, len(behaviours))
        ads = [{**request.scene, **ad} for ad in request.ads] if request.scene else request.ads
        given = {}
        self._ids(given, "ad_ids", ads, answer)
        for name in reads["ad"]:
            given[f"ad.{name}"] = self._lists(name, [ad.get(name) for ad in ads], answer)
        self._look_at(given, "ad_pictures", ads, "ad", answer)
        answer.scores_A, weights_AL = self.programs.score(state, given, len(ads), len(behaviours))
        answer.attention_AL = weights_AL if attention else None
        return answer

    @property
    def _reads_behaviours(self) -> bool:
        return bool(self._reads["behaviour_ids"] or self._reads["user_pictures"])

    def _ids(self, given: Given, key: str, rows: Sequence[Mapping[str, Any]], answer: Answer) -> None:
        """Set `given[key]` to [rows, features] indexes, where the model reads such features."""
        names = self._reads[key]
        if not names:
            return
        out = np.empty((len(rows), len(names)), np.int64)
        for i, name in enumerate(names):
            column = self._indexer[name].one([row.get(name) for row in rows])
            out[:, i] = column
            _count(answer, name, column.count(MISSING), column.count(UNKNOWN))
        given[key] = out

    def _lists(self, name: str, values: Sequence[Any], answer: Answer) -> npt.NDArray[np.int64]:
        """Return [values, V] indexes of a multi-hot feature, filled up with 0."""
        lists = [self._indexer[name].many(value) for value in values]
        _count(answer, name, lists.count([]), sum(some.count(UNKNOWN) for some in lists))
        return lists_side_by_side(lists)

    def _look_at(self, given: Given, key: str, rows: Sequence[Mapping[str, Any]], owner: str, answer: Answer) -> None:
        """Set what the model makes of the rows' pictures, where it looks at them."""
        name = self._reads[key]
        if not name:
            return
        found, missing, unknown = self._pictures[key].of_request([row.get(name) for row in rows])
        _count(answer, name, missing, unknown)
        given |= as_inputs(found, owner)


def as_inputs(found: Mapping[str, npt.NDArray[Any]], owner: str) -> Given:
    """Return what a program of pictures gave, by the names that the programs of users and ads know it under."""
    names = {"extracted": f"{owner}_pictures", "centred": f"{owner}_vectors"}
    return {names[key]: value for key, value in found.items()}


def _count(answer: Answer, name: str, missing: int, unknown: int) -> None:
    found = {kind: n for kind, n in (("missing", missing), ("unknown", unknown)) if n}
    if found:
        answer.unknown[name] = found
