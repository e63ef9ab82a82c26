"""One user and many ads, as raw values, to click probabilities: an exported model in use.

Letters as in `ctrkit.serving_network`.
"""

import array
import itertools
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from ctrkit import vocabulary
from ctrkit.batches import Block, Column, Ragged, Schema
from ctrkit.features import FeatureStore, check_made_alike
from ctrkit.programs import Programs, as_inputs, lists_side_by_side, of_another_version
from ctrkit.raw_values import Indexer, Shared
from ctrkit.request_model import Request, request_model
from ctrkit.serving_pictures import Names, Pictures
from ctrkit.vocabulary import FIRST, MISSING, UNKNOWN

Given = dict[str, npt.NDArray[Any]]
Rows = Sequence[Mapping[str, Any]]
NOTHING: Mapping[str, Any] = MappingProxyType({})


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

    def to_json(self) -> dict[str, Any]:
        """Return it as plain values; `attention` only where there is one."""
        out: dict[str, Any] = {"scores": self.scores_A.tolist(), "unknown": self.unknown}
        return out if self.attention_AL is None else {**out, "attention": self.attention_AL.tolist()}


@dataclass(frozen=True)
class Columns:
    """Rows of a request, feature by feature."""

    rows: int
    own: Mapping[str, Sequence[Any]]
    """Feature → the value of each row, or that of `common`, or None; of features that some row has."""
    common: Mapping[str, Any]
    """Values of all rows that do not have their own."""

    @classmethod
    def of(cls, rows: Rows, common: Mapping[str, Any] = NOTHING) -> "Columns":
        """Return rows as columns: in one pass where all have the same keys."""
        first = rows[0] if rows else NOTHING
        if len(first) > 1 and {*map(len, rows)} == {len(first)}:
            try:
                values = zip(*map(operator.itemgetter(*first), rows), strict=True)
                return cls(len(rows), dict(zip(first, values, strict=True)), common)
            except KeyError:
                pass
        names = set().union(*rows)
        return cls(len(rows), {n: [row.get(n, common.get(n)) for row in rows] for n in names}, common)

    def column(self, name: str) -> Sequence[Any]:
        """Return each row's value, or None."""
        return self.own[name] if name in self.own else [self.common.get(name)] * self.rows


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
        except (KeyError, TypeError, ValueError, AssertionError, AttributeError) as e:
            raise of_another_version(folder, e) from None
        self._reads, self._most = settings["reads"], int(settings["max_behaviours"])
        self.picture_width = int(settings["picture_width"])
        images = [self._reads[key] for key in ("ad_pictures", "user_pictures") if self._reads[key]]
        ids = [n for key in ("user_ids", "user", "behaviour_ids", "ad_ids", "ad") for n in self._reads[key]]
        self.read = [*ids, *images]
        """Features that the model reads."""
        self._names = names = self._open(folder, features) if images and features is not None else None
        self._pictures = {
            key: Pictures(self.programs, key, names, self.picture_width)
            for key in ("ad_pictures", "user_pictures")
            if self._reads[key]
        }
        shared: Shared = {}
        self._indexer = {name: Indexer(self.schema.features[name], folder / "vocab", shared) for name in ids}
        self.takes_names = names is not None
        """Whether requests may give pictures by name."""
        self.request = request_model(self.schema.features, self.read, self.picture_width, names=self.takes_names)

    def _open(self, folder: Path, features: Path) -> Names:
        store = FeatureStore(features, shuffle_seed=self.settings["shuffle_seed"])
        check_made_alike(store, self.settings["pictures"], self.picture_width, folder)
        return Names(store)

    def score(self, request: Request, attention: bool = False) -> Answer:
        """Return the click probability of each ad of a request, which is one of `self.request`."""
        reads, answer = self._reads, Answer(np.zeros(0, np.float32))
        user = Columns.of([request.user])
        behaviours = Columns.of(request.behaviours[-self._most :] if self._reads_behaviours else [])
        given = {name: array[0] for name, array in self._ids("user_ids", user, answer).items()}
        given |= {f"user.{name}": self._lists(name, user, answer)[0] for name in reads["user"]}
        given |= self._ids("behaviour_ids", behaviours, answer)
        given |= self._look_at("user_pictures", behaviours, answer)
        state = self.programs.user(given, behaviours.rows)
        ads = Columns.of(request.ads, request.scene)
        given = self._ids("ad_ids", ads, answer) | self._look_at("ad_pictures", ads, answer)
        given |= {f"ad.{name}": self._lists(name, ads, answer) for name in reads["ad"]}
        answer.scores_A, weights_AL = self.programs.score(state, given, ads.rows, behaviours.rows)
        answer.attention_AL = weights_AL if attention else None
        return answer

    @property
    def _reads_behaviours(self) -> bool:
        return bool(self._reads["behaviour_ids"] or self._reads["user_pictures"])

    def _ids(self, key: str, of: "Columns", answer: Answer) -> Given:
        """Return [rows, features] indexes by the input's name, where the model reads such features."""
        names = self._reads[key]
        if not names:
            return {}
        flat: list[int] = []
        for name in names:
            if name in of.own:
                flat += self._indexer[name].one(of.own[name])
            else:
                flat += self._indexer[name].one([of.common.get(name)]) * of.rows
        out_FN = np.asarray(array.array("q", flat)).reshape(len(names), of.rows)
        if out_FN.size and out_FN.min() < FIRST:
            for name, index_N in zip(names, out_FN, strict=True):
                _count(answer, name, int((index_N == MISSING).sum()), int((index_N == UNKNOWN).sum()))
        return {key: np.ascontiguousarray(out_FN.T)}

    def _lists(self, name: str, of: "Columns", answer: Answer) -> npt.NDArray[np.int64]:
        """Return [rows, V] indexes of a multi-hot feature, filled up with 0."""
        lists = [self._indexer[name].many(value) for value in of.column(name)]
        _count(answer, name, lists.count([]), sum(some.count(UNKNOWN) for some in lists))
        return lists_side_by_side(lists)

    def _look_at(self, key: str, of: "Columns", answer: Answer) -> Given:
        """Return what the model makes of the rows' pictures, where it looks at them."""
        if not (name := self._reads[key]):
            return {}
        found, missing, unknown = self._pictures[key].of_request(of.column(name))
        _count(answer, name, missing, unknown)
        return as_inputs(found, key)

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
        scores = []
        begins = zip(block.sample_offsets.tolist(), block.behaviour_offsets.tolist(), strict=True)
        for g, ((s0, b0), (s1, b1)) in enumerate(itertools.pairwise(begins)):
            b0 = max(b0, b1 - self._most)
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


def _count(answer: Answer, name: str, missing: int, unknown: int) -> None:
    found = {kind: n for kind, n in (("missing", missing), ("unknown", unknown)) if n}
    if found:
        answer.unknown[name] = found
