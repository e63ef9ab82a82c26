"""Requests as JSON to what the scorer takes: by msgspec where they are as they should be, which most are.

What msgspec refuses, or may have understood otherwise, is read again by pydantic, whose word counts and which says what
is wrong where. So msgspec has to take nothing that pydantic would not, and has to find the same in it; it may take
less.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import UNSET, Meta, UnsetType

from ctrkit.known_rows import KnownRows, NewRows, UnsureError
from ctrkit.recipe import Feature
from ctrkit.request_model import (
    LONGEST,
    MOST_ADS,
    MOST_BEHAVIOURS,
    MOST_VALUES,
    OWNERS,
    KeyTwiceError,
    Request,
    from_json,
)
from ctrkit.row_indexer import IndexedRows, RowIndexer, Rows
from ctrkit.service_requests import Refusal

Text = Annotated[str, Meta(max_length=LONGEST)]
Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Name = Text | Whole | None
Number = Text | Whole | float | None
Value = Text | Whole | float | bool | None
Values = Annotated[list[Value], Meta(max_length=MOST_VALUES)] | Value


NOT_UNDERSTOOD = msgspec.MsgspecError, UnicodeDecodeError, RecursionError, UnsureError


@dataclass(frozen=True, slots=True)
class Asked:
    """A request: values of user and scene; behaviours that count, and ads, as the model reads them."""

    user: Mapping[str, Any]
    scene: Mapping[str, Any]
    behaviours: IndexedRows
    ads: IndexedRows
    known_ads: int = 0
    """Of the ads, those that were asked for lately."""


class RequestReader:
    """Reads the requests of one model. Threads may share it.

    Parameters
    ----------
    request: pydantic's type of them.
    features: all of the recipe's, by name.
    read: those that the model reads.
    of_behaviours, of_ads: rows to what the model reads of them.
    names: whether pictures may be given by name.
    ads, behaviours: how many a request may have.
    newest: how many behaviours count.
    most_bytes: memory for ads asked for lately; 0: none is kept.
    """

    def __init__(
        self,
        request: type[Request],
        features: Mapping[str, Feature],
        read: Sequence[str],
        of_behaviours: RowIndexer,
        of_ads: RowIndexer,
        *,
        names: bool,
        ads: int = MOST_ADS,
        behaviours: int = MOST_BEHAVIOURS,
        newest: int = MOST_BEHAVIOURS,
        most_bytes: int = 0,
    ) -> None:
        self.request = request
        self._newest = newest

        def kind(name: str, feature: Feature) -> Any:
            if feature.kind == "image":  # vectors are long: pydantic's
                return Name if names or name not in read else None
            return Values if feature.multi_hot else Number if feature.kind == "number" else Value

        def row(owner: str) -> Any:
            make: Any = TypedDict
            fields = {name: kind(name, feature) for name, feature in features.items() if feature.of in OWNERS[owner]}
            return make(owner, fields, total=False)

        def rows(kind: Any, least: int, most: int) -> Any:
            list_of: Any = list
            return Annotated[list_of[kind], Meta(min_length=least, max_length=most)]

        self._of_behaviours, self._of_ads = of_behaviours, of_ads
        self._ads: Any = KnownRows(row("ads"), of_ads, most_bytes) if most_bytes else NewRows(row("ads"), of_ads)
        fields: list[Any] = [
            ("ads", rows(self._ads.kind, 1, ads)),
            ("user", row("user") | UnsetType, UNSET),
            ("scene", row("scene") | UnsetType, UNSET),
            ("behaviours", rows(row("behaviours"), 0, behaviours) | UnsetType, UNSET),
        ]
        self._decode = msgspec.json.Decoder(msgspec.defstruct("Quick", fields)).decode

    def read(self, body: bytes) -> Asked:
        """Return a request.

        Raises pydantic.ValidationError if it is not one of the model, Refusal if an object has a key twice.
        """
        try:
            asked = self._quickly(body)
        except NOT_UNDERSTOOD:
            asked = None
        if asked is not None:
            return asked
        request = self._by_pydantic(body)
        return Asked(request.user, request.scene, self._newest_of(request.behaviours), self._of_ads.index(request.ads))

    def _quickly(self, body: bytes) -> Asked | None:
        """Return a request, or None where pydantic may understand it otherwise. Raises `NOT_UNDERSTOOD` if it is not
        one of the model."""
        quick: Any = self._decode(body)
        user, scene, behaviours = quick.user, quick.scene, quick.behaviours
        parts = 1 + (user is not UNSET) + (scene is not UNSET) + (behaviours is not UNSET)
        user, scene, behaviours = user or {}, scene or {}, behaviours or []
        keys = parts + len(user) + len(scene) + sum(map(len, behaviours))
        of_ads, ads, known = self._ads.read(quick.ads)
        # A colon for each key, and perhaps others in texts. As many as were found: no key is there twice, and none that
        # the model does not know.
        if body.count(b":") != keys + of_ads:
            return None
        return Asked(user, scene, self._newest_of(behaviours), ads, known)

    def _newest_of(self, behaviours: Rows) -> IndexedRows:
        return self._of_behaviours.index(behaviours[max(0, len(behaviours) - self._newest) :])

    def _by_pydantic(self, body: bytes) -> Request:
        try:
            return from_json(self.request, body)
        except KeyTwiceError as e:
            raise Refusal(400, str(e)) from None
