"""What a request to a model may say: field names, kinds and limits, from the model's own features."""

import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import pydantic
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    WithJsonSchema,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypedDict

from ctrkit.recipe import Feature

LONGEST = 2_000
"""Characters of a text."""
MOST_VALUES = 1_000
"""Values of a multi-hot feature."""
MOST_BEHAVIOURS = 100_000
MOST_ADS = 10_000
LARGEST = 65_504.0
"""Of the numbers of a picture vector: features.h5 holds float16."""
SMALLEST_WHOLE, BEYOND_WHOLE = -(2**63), 2**64

Text = Annotated[StrictStr, Field(max_length=LONGEST)]
Whole = Annotated[StrictInt, Field(ge=SMALLEST_WHOLE, lt=BEYOND_WHOLE)]


def _whole(value: Any) -> Any:
    if type(value) is float and value.is_integer() and SMALLEST_WHOLE < value < BEYOND_WHOLE:
        return value
    raise PydanticCustomError("int_type", "Input should be a whole number")


WholeFloat = Annotated[
    StrictFloat,
    BeforeValidator(_whole),
    WithJsonSchema({"type": "integer", "minimum": SMALLEST_WHOLE, "exclusiveMaximum": BEYOND_WHOLE}),
]
"""1.0, which is a whole number to JSON schema and to who sends it."""
Name = Text | Whole | WholeFloat | None
"""Of a picture."""
Value = Annotated[Text | Whole | StrictFloat | StrictBool | None, Field(union_mode="left_to_right")]
"""None of the kinds takes a value of another, so the first that does is the one: half of the time of looking at all."""
Number = Whole | StrictFloat | Text | None
OF_TABLES = ConfigDict(extra="forbid", allow_inf_nan=False)
OWNERS = {"user": ("user",), "scene": ("scene",), "behaviours": ("behaviour",), "ads": ("ad", "scene")}
"""Part of a request → whose features it has."""


class Request(BaseModel):
    """One user, one scene, any number of candidate ads; raw values, as in the logs."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)

    user: Any
    scene: Any
    behaviours: list[Any]
    ads: list[Any]


def request_model(
    features: Mapping[str, Feature], read: Sequence[str], picture_width: int, *, names: bool
) -> type[Request]:
    """Return the type of a model's requests.

    Parameters
    ----------
    features: all of the recipe's, by name.
    read: those that the model reads; others may be given, and are not looked at.
    picture_width: numbers of a picture vector, W.
    names: whether pictures may be given by name.
    """

    def field(name: str) -> Any:
        feature = features[name]
        if feature.kind == "image":
            vector = Annotated[
                list[Annotated[StrictFloat, Field(ge=-LARGEST, le=LARGEST)]],
                Field(min_length=picture_width, max_length=picture_width),
            ]
            # The vector first: what takes it is asked no further.
            kind: Any = Name if name not in read else vector | Name if names else vector | None
        elif feature.multi_hot:
            kind = Annotated[list[Value], Field(max_length=MOST_VALUES)] | Value
        else:
            kind = Number if feature.kind == "number" else Value
        return Annotated[kind, Field(description=_description(feature, name in read, names))]

    def part(key: str) -> Any:
        fields = {name: field(name) for name, feature in features.items() if feature.of in OWNERS[key]}
        make: Any = TypedDict
        return pydantic.with_config(OF_TABLES)(make(key.title(), fields, total=False))

    def parts(key: str, text: str, **limits: Any) -> Any:
        kind: Any = list
        return Annotated[kind[part(key)], Field(description=text, **limits)]

    fields: dict[str, Any] = {"user": (part("user"), {}), "scene": (part("scene"), {})}
    history = parts("behaviours", "The user's history, oldest first.", max_length=MOST_BEHAVIOURS)
    fields["behaviours"] = (history, [])
    fields["ads"] = (parts("ads", "Candidates, in any order.", min_length=1, max_length=MOST_ADS), ...)
    return pydantic.create_model("Request", __base__=Request, **fields)


class KeyTwiceError(ValueError):
    """An object of a request has a key twice, so that nobody knows what was meant."""


def from_json(request: type[Request], text: bytes) -> Request:
    """Return a request of a model's type from JSON.

    Raises pydantic.ValidationError if it is not one, and KeyTwiceError if an object has a key twice.
    """
    read = request.__pydantic_validator__.validate_json(text)
    # A colon for each key, and perhaps others in texts. As many as keys that were found: none is there twice.
    if text.count(b":") != keys(read) + len(read.model_fields_set):
        json.loads(text, object_pairs_hook=_distinct)
    assert isinstance(read, Request)
    return read


def keys(request: Any) -> int:
    """Return how many keys the parts of a request have, their own names not counted."""
    rows = [request.user, request.scene, *request.ads, *request.behaviours]
    return sum(map(len, rows))


def _distinct(pairs: list[tuple[str, Any]]) -> None:
    seen = set()
    for key, _ in pairs:
        if key in seen:
            raise KeyTwiceError(f"an object has the key {key[:100]!r} twice: leave one of them out")
        seen.add(key)


def _description(feature: Feature, is_read: bool, names: bool) -> str:
    if not is_read:
        return "Not read by this model."
    if feature.kind == "image":
        by_name = "A picture's name in features.h5, or its" if names else "A picture's"
        return f"{by_name} vector as `ctrkit extract-images` gives it; null: no picture."
    if feature.multi_hot:
        return f"A list of values, or text split at {feature.separator!r}."
    if feature.kind == "number":
        return "A number; null: missing."
    return "A value as in the logs; null: missing."


Place = tuple[int | str, ...]


def faults(
    error: pydantic.ValidationError, features: Mapping[str, Feature], picture_width: int
) -> list[tuple[Place, str]]:
    """Return where each fault of a request is, such as ("ads", 3, "ad_id"), and what is wrong there."""
    by_place: dict[Place, list[Any]] = {}
    for one in error.errors(include_url=False, include_context=False, include_input=False):
        by_place.setdefault(_place(one["loc"], features), []).append(one)
    names = {place: next((str(p) for p in reversed(place) if p in features), "") for place in by_place}
    return [(place, _fault(of, features.get(names[place]), picture_width)) for place, of in by_place.items()]


def complaint(error: pydantic.ValidationError, features: Mapping[str, Feature], picture_width: int) -> str:
    """Return what is wrong with a request, in a sentence: the first fault, where it is, and how many more there are."""
    (place, first), *others = faults(error, features, picture_width)
    more = f" (and {len(others)} more)" if others else ""
    where = ".".join(map(str, place)) or "the request"
    return f"{where}: {first}{more}"


def _place(loc: Place, features: Mapping[str, Feature]) -> Place:
    """Return where a fault is, without what pydantic adds of the kinds that a value may have."""
    keep = 3 if loc[:1] in (("ads",), ("behaviours",)) else 2
    return loc[:keep]


def _fault(errors: Sequence[Any], feature: Feature | None, picture_width: int) -> str:
    first = errors[0]
    kinds = [e["type"] for e in errors]
    if "extra_forbidden" in kinds:
        return "there is no such field in this model's requests"
    if feature is None or (len(errors) == 1 and not kinds[0].endswith("_type")):
        return _lower(first["msg"])
    for one in errors:
        if one["type"] in ("string_too_long", "too_long", "too_short", "less_than_equal", "greater_than_equal"):
            return _lower(one["msg"])
    if feature.kind == "image":
        return f"has to be a picture's name, a list of {picture_width} numbers, or null"
    if feature.multi_hot:
        return "has to be a list of texts or numbers, or null"
    if feature.kind == "number":
        return "has to be a number, or null"
    return "has to be text, a number, true, false or null"


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]
