"""One user and many ads, as raw values, to click probabilities: an exported model in use.

Letters as in `ctrkit.serving_network`.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrkit import vocabulary
from ctrkit.batches import Block, Column, Ragged, Schema
from ctrkit.features import FeatureStore, check_made_alike
from ctrkit.programs import Programs, as_inputs, lists_side_by_side, of_another_version
from ctrkit.raw_values import Indexer, Shared
from ctrkit.request_model import Request, request_model
from ctrkit.row_indexer import Counts, IndexedRows, Inputs, RowIndexer, count
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
    unknown: Counts = field(default_factory=dict)
    """Feature → how many of its values were `missing`, and how many `unknown`: not seen in training, or a picture that
    features.h5 does not have."""

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values; `attention` only where there is one."""
        out: dict[str, Any] = {"scores": self.scores_A.tolist(), "unknown": self.unknown}
        return out if self.attention_AL is None else {**out, "attention": self.attention_AL.tolist()}


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
    behaviours: RowIndexer
    ads: RowIndexer
    most_behaviours: int
    """How many of a request count, the newest; 0 where the model reads none."""

    def __init__(self, folder: Path, features: Path | None = None, threads: int = 1) -> None:
        self.programs = Programs(folder, threads)
        settings = self.settings = self.programs.settings
        try:
            self.schema = Schema.from_json(settings["schema"])
        except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as e:
            raise of_another_version(folder, e) from None
        reads = self._reads = settings["reads"]
        self.picture_width = int(settings["picture_width"])
        images = [reads[key] for key in ("ad_pictures", "user_pictures") if reads[key]]
        ids = [n for key in ("user_ids", "user", "behaviour_ids", "ad_ids", "ad") for n in reads[key]]
        self.read = [*ids, *images]
        """Features that the model reads."""
        self._names = names = self._open(folder, features) if images and features is not None else None
        self._pictures = {
            key: Pictures(self.programs, key, names, self.picture_width)
            for key in ("ad_pictures", "user_pictures")
            if reads[key]
        }
        of, shared = self.schema.features, Shared()
        indexers = self._indexer = {name: Indexer(of[name], folder / "vocab", shared) for name in ids}

        def rows(ids: str, lists: str, image: str) -> RowIndexer:
            names = reads[ids], reads.get(lists, ()), reads[image] or ""
            return RowIndexer(of, *names, indexers, self._pictures.get(image))

        self.behaviours, self.ads = rows("behaviour_ids", "", "user_pictures"), rows("ad_ids", "ad", "ad_pictures")
        self.most_behaviours = int(settings["max_behaviours"]) if self.behaviours.reads else 0
        self.takes_names = names is not None
        """Whether requests may give pictures by name."""
        self.request = request_model(of, self.read, self.picture_width, names=self.takes_names)

    def _open(self, folder: Path, features: Path) -> Names:
        store = FeatureStore(features, shuffle_seed=self.settings["shuffle_seed"])
        check_made_alike(store, self.settings["pictures"], self.picture_width, folder)
        return Names(store)

    def score(self, request: Request, attention: bool = False) -> Answer:
        """Return the click probability of each ad of a request, which is one of `self.request`."""
        newest = request.behaviours[max(0, len(request.behaviours) - self.most_behaviours) :]
        behaviours, ads = self.behaviours.index(newest), self.ads.index(request.ads)
        return self.score_rows(request.user, request.scene, behaviours, ads, attention)

    def score_rows(
        self,
        user: Mapping[str, Any],
        scene: Mapping[str, Any],
        behaviours: IndexedRows,
        ads: IndexedRows,
        attention: bool = False,
    ) -> Answer:
        """Return the click probability of each ad. behaviours: what `self.behaviours` made of them, at most
        `most_behaviours`; ads: what `self.ads` made of them."""
        answer = Answer(np.zeros(0, np.float32))
        given = self._of_user(user, answer.unknown)
        of_behaviours, of_ads = self.behaviours.inputs(behaviours), self.ads.inputs(ads, scene)
        given |= self._given(of_behaviours, "behaviour_ids", "user_pictures")
        state = self.programs.user(given, len(behaviours))
        given = self._given(of_ads, "ad_ids", "ad_pictures")
        given |= {f"ad.{name}": index_AV for name, index_AV in of_ads.lists.items()}
        answer.unknown |= of_behaviours.unknown | of_ads.unknown
        answer.scores_A, weights_AL = self.programs.score(state, given, len(ads), len(behaviours))
        answer.attention_AL = weights_AL if attention else None
        return answer

    def _of_user(self, user: Mapping[str, Any], unknown: Counts) -> Given:
        """Return indexes of the user's features by the input's name: [features], and [V] of each multi-hot one."""
        given, reads = Given(), self._reads
        if names := reads["user_ids"]:
            index = [self._indexer[name].index(user.get(name)) for name in names]
            given["user_ids"] = np.array(index, np.int64)
            for name, i in zip(names, index, strict=True):
                count(unknown, name, i == MISSING, i == UNKNOWN)
        for name in reads["user"]:
            some = self._indexer[name].many(user.get(name))
            count(unknown, name, not some, some.count(UNKNOWN))
            given[f"user.{name}"] = lists_side_by_side([some])[0]
        return given

    def _given(self, rows: Inputs, ids: str, pictures: str) -> Given:
        """Return ids and pictures of rows by the inputs' names, where the model reads them."""
        given = {ids: rows.ids_NF} if self._reads[ids] else {}
        if self._reads[pictures]:
            given |= as_inputs(self._pictures[pictures].of(rows.picture_N, rows.vectors), pictures)
        return given

    def score_block(self, block: Block, row_V: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Return the click probability of each sample of a block of groups [S], from indexes.

        row_V: the row of features.h5 of each index of the vocabulary `image`; −1: none.
        """
        reads = self._reads
        users, behaviours, ads = (
            {key: _columns(block, reads[key])} if reads[key] else {} for key in ("user_ids", "behaviour_ids", "ad_ids")
        )
        for key, given in (("user_pictures", behaviours), ("ad_pictures", ads)):
            if reads[key]:
                index = _column(block, reads[key])
                assert isinstance(index, np.ndarray)
                given |= as_inputs(self._pictures[key].of_rows(row_V[index]), key)
        scores, most = [], int(self.settings["max_behaviours"])
        begins = zip(block.sample_offsets.tolist(), block.behaviour_offsets.tolist(), strict=True)
        for g, ((s0, b0), (s1, b1)) in enumerate(itertools.pairwise(begins)):
            b0 = max(b0, b1 - most)
            given = {name: array[g] for name, array in users.items()}
            given |= {f"user.{name}": _lists(block, name, g, g + 1)[0] for name in reads["user"]}
            given |= {name: array[b0:b1] for name, array in behaviours.items()}
            state = self.programs.user(given, b1 - b0)
            given = {name: array[s0:s1] for name, array in ads.items()}
            given |= {f"ad.{name}": _lists(block, name, s0, s1) for name in reads["ad"]}
            scores.append(self.programs.score(state, given, s1 - s0, b1 - b0)[0])
        return np.concatenate(scores) if scores else np.zeros(0, np.float32)

    def rows_of(self, convert: Path) -> npt.NDArray[np.int64]:
        """Return the row of features.h5 of each index of a conversion's vocabulary `image` [V]; −1: none."""
        if self._names is None:
            return np.zeros(0, np.int64)
        table = vocabulary.read(convert / "vocab", "image")
        row_V = np.full(vocabulary.size(table), -1, np.int64)
        row_V[table["index"].to_numpy()] = self._names.store.row_of(table["value"])
        return row_V


def _column(block: Block, name: str) -> Column:
    return next(columns[name] for columns in (block.group, block.sample, block.behaviour) if name in columns)


def _columns(block: Block, names: Sequence[str]) -> npt.NDArray[np.int64]:
    """Return [rows, features], columns of one owner side by side."""
    return np.stack([column for name in names if isinstance(column := _column(block, name), np.ndarray)], 1)


def _lists(block: Block, name: str, start: int, stop: int) -> npt.NDArray[np.int64]:
    """Return [stop − start, V], a multi-hot feature of some rows, filled up with 0."""
    column = _column(block, name)
    assert isinstance(column, Ragged)
    some = column.slice(start, stop)
    return lists_side_by_side([values.tolist() for values in np.split(some.values, some.offsets[1:-1])])
