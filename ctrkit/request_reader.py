"""Requests as JSON to what the scorer takes: by msgspec where they are as they should be, which most are.

What msgspec refuses, or may have understood otherwise, is read again by pydantic, whose word counts and which says what
is wrong where. So msgspec has to take nothing that pydantic would not, and has to find the same in it; it may take
less.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypedDict

import msgspec
from msgspec import UNSET, Meta, UnsetType

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
    keys,
)
from ctrkit.service_requests import Refusal

Text = Annotated[str, Meta(max_length=LONGEST)]
Whole = Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)]
Name = Text | Whole | None
Number = Text | Whole | float | None
Value = Text | Whole | float | bool | None
EMPTY: Mapping[str, Any] = {"user": {}, "scene": {}, "behaviours": []}
Values = Annotated[list[Value], Meta(max_length=MOST_VALUES)] | Value


class RequestReader:
    """Reads the requests of one model.

    Parameters
    ----------
    request: pydantic's type of them.
    features: all of the recipe's, by name.
    read: those that the model reads.
    names: whether pictures may be given by name.
    ads, behaviours: how many a request may have.
    """

    def __init__(
        self,
        request: type[Request],
        features: Mapping[str, Feature],
        read: Sequence[str],
        *,
        names: bool,
        ads: int = MOST_ADS,
        behaviours: int = MOST_BEHAVIOURS,
    ) -> None:
        self.request = request

        def kind(name: str, feature: Feature) -> Any:
            if feature.kind == "image":  # vectors are long: pydantic's
                return Name if names or name not in read else None
            return Values if feature.multi_hot else Number if feature.kind == "number" else Value

        def row(owner: str) -> Any:
            make: Any = TypedDict
            fields = {name: kind(name, feature) for name, feature in features.items() if feature.of in OWNERS[owner]}
            return make(owner, fields, total=False)

        def rows(owner: str, least: int, most: int) -> Any:
            kind: Any = list
            return Annotated[kind[row(owner)], Meta(min_length=least, max_length=most)]

        fields: list[Any] = [
            ("ads", rows("ads", 1, ads)),
            ("user", row("user") | UnsetType, UNSET),
            ("scene", row("scene") | UnsetType, UNSET),
            ("behaviours", rows("behaviours", 0, behaviours) | UnsetType, UNSET),
        ]
        self._decode = msgspec.json.Decoder(msgspec.defstruct("Quick", fields)).decode

    def read(self, body: bytes) -> Any:
        """Return a request: `ads`, `user`, `scene`, `behaviours`, as `Request` has them.

        Raises pydantic.ValidationError if it is not one of the model, Refusal if an object has a key twice.
        """
        try:
            quick = self._decode(body)
        except (ValueError, RecursionError):
            return self._by_pydantic(body)
        parts = 4
        for name, empty in EMPTY.items():
            if getattr(quick, name) is UNSET:
                parts -= 1
                setattr(quick, name, empty)
        # A colon for each key, and perhaps others in texts. As many as values that were found: no key is there twice,
        # and none that the model does not know.
        return quick if body.count(b":") == keys(quick) + parts else self._by_pydantic(body)

    def _by_pydantic(self, body: bytes) -> Request:
        try:
            return from_json(self.request, body)
        except KeyTwiceError as e:
            raise Refusal(400, str(e)) from None
