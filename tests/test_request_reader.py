"""msgspec reads requests only where it understands them as pydantic does."""

import json
from typing import Any

import jsonschema_rs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ctrkit.recipe import Feature
from ctrkit.request_model import request_model
from ctrkit.request_reader import RequestReader
from ctrkit.service_model import limited
from ctrkit.service_requests import Limits, Refusal

FEATURES = {
    "gender": Feature(of="user", column="gender"),
    "tags": Feature(of="user", column="tags", multi_hot=True),
    "hour": Feature(of="scene", column="hour"),
    "goods": Feature(of="behaviour", column="goods"),
    "seen": Feature(of="behaviour", column="seen", kind="image"),
    "ad_id": Feature(of="ad", column="ad_id"),
    "price": Feature(of="ad", column="price", kind="number", edges=[1.0]),
    "image": Feature(of="ad", column="image", kind="image"),
    "old": Feature(of="ad", column="old", kind="image"),
}
READ = ["gender", "tags", "hour", "goods", "seen", "ad_id", "price", "image"]
OWNERS = {"user": ["user"], "scene": ["scene"], "behaviours": ["behaviour"], "ads": ["ad", "scene"]}
FIELDS = {key: [name for name, f in FEATURES.items() if f.of in of] for key, of in OWNERS.items()}


class Watched(RequestReader):
    """Counts what goes to pydantic."""

    slow = 0

    def _by_pydantic(self, body: bytes) -> Any:
        self.slow += 1
        return super()._by_pydantic(body)


def reader(names: bool = True) -> Watched:
    request = limited(request_model(FEATURES, READ, 2, names=names), Limits(ads=3, behaviours=3))
    return Watched(request, FEATURES, READ, names=names, ads=3, behaviours=3)


def parts(request: Any) -> Any:
    return [request.ads, request.user, request.scene, request.behaviours]


def outcome(read: Any, body: bytes) -> Any:
    try:
        return json.dumps(parts(read(body)), sort_keys=True)  # which tells 1 from 1.0 and true
    except ValidationError as e:
        return e.errors(include_url=False)
    except Refusal as e:
        return e.message


TEXTS = st.text(alphabet=st.sampled_from('aé:\\"\n\x00 1.-😀'), max_size=5) | st.sampled_from(["x" * 2000, "x" * 2001])
NUMBERS = st.integers(-(2**66), 2**66) | st.sampled_from([2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1])
WHOLE = st.integers(-(2**66), 2**66).map(float) | st.sampled_from([1.0, -0.0, 2.0**63, 2.0**64, -(2.0**63)])
SCALARS = TEXTS | NUMBERS | WHOLE | st.floats(allow_nan=False) | st.booleans() | st.none()
OF_VECTORS = st.floats(-7e4, 7e4) | st.integers(-70_000, 70_000) | st.sampled_from(["1", True])
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.lists(OF_VECTORS, min_size=2, max_size=2)


def row(key: str) -> st.SearchStrategy[dict[str, Any]]:
    names = st.sampled_from([*FIELDS[key], *FIELDS[key], "nobody"])
    return st.dictionaries(names, VALUES, max_size=3)


def rows(key: str) -> st.SearchStrategy[list[Any]]:
    return st.lists(row(key), max_size=4)


REQUESTS = st.fixed_dictionaries(
    {"ads": rows("ads")},
    optional={"user": row("user"), "scene": row("scene"), "behaviours": rows("behaviours"), "nobody": VALUES},
)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=REQUESTS, ascii=st.booleans(), names=st.booleans())
def test_understands_what_pydantic_does(request: dict[str, Any], ascii: bool, names: bool) -> None:
    one = READERS[names]
    try:
        body = json.dumps(request, ensure_ascii=ascii).encode()
    except UnicodeEncodeError:
        return
    assert outcome(one.read, body) == outcome(lambda b: RequestReader._by_pydantic(one, b), body)


@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(request=REQUESTS, names=st.booleans())
def test_the_schema_says_what_is_taken(request: dict[str, Any], names: bool) -> None:
    """All of it, and nothing else; numbers that JSON does not have aside."""
    try:
        body = json.dumps(request, allow_nan=False).encode()
    except ValueError:
        return
    assert isinstance(outcome(READERS[names].read, body), str) == PAGES[names].is_valid(request)


@pytest.mark.parametrize("vector", [["1", "2"], [True, False], [1, "2"], [1, None], [1, [2]], [1, 65_505]])
def test_a_vector_has_numbers_only(vector: list[Any]) -> None:
    body = json.dumps({"ads": [{"image": vector}]}).encode()
    for one in READERS.values():
        with pytest.raises(ValidationError):
            one.read(body)


@pytest.mark.parametrize("vector", [[1, 2], [1.0, -2.5], [0, -65_504]])
def test_a_vector_may_have_whole_numbers(vector: list[Any]) -> None:
    for one in READERS.values():
        assert one.read(json.dumps({"ads": [{"image": vector}]}).encode()).ads == [{"image": vector}]


@pytest.mark.parametrize("name", [7, 7.0, 1e16, "7"])
def test_a_name_may_be_a_whole_number(name: Any) -> None:
    body = json.dumps({"ads": [{"image": name, "old": name}]}).encode()
    assert READERS[True].read(body).ads == [{"image": name, "old": name}]
    with pytest.raises(ValidationError):
        READERS[False].read(body)


READERS = {names: reader(names) for names in (True, False)}
PAGES = {names: jsonschema_rs.validator_for(one.request.model_json_schema()) for names, one in READERS.items()}
USUAL = {
    "user": {"gender": "f", "tags": ["a", 1]},
    "scene": {"hour": 12},
    "behaviours": [{"goods": "g1", "seen": "1.jpg"}, {"goods": None}],
    "ads": [{"ad_id": "7", "price": 1.5, "image": "2.jpg", "hour": 13}, {"ad_id": 8, "price": "2", "old": None}],
}


def test_the_usual_is_not_read_twice() -> None:
    one = reader()
    assert parts(one.read(json.dumps(USUAL).encode())) == [USUAL[key] for key in ("ads", "user", "scene", "behaviours")]
    assert parts(one.read(b'{"ads":[{}]}')) == [[{}], {}, {}, []]
    assert one.slow == 0
    assert parts(one.read(b'{"ads":[{"ad_id":"a:b"}]}')) == [[{"ad_id": "a:b"}], {}, {}, []]
    assert one.slow == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b'{"ads":[]}',
        b'{"ads":[{},{},{},{}]}',
        b'{"ads":[{}],"behaviours":[{},{},{},{}]}',
        b'{"ads":[{}],"user":null}',
        b'{"ads":[{"ad_id":NaN}]}',
        b'{"ads":[{"price":1e999}]}',
        b'{"ads":[{"price":true}]}',
        b'{"ads":[{"image":1.5}]}',
        b'{"ads":[{"image":1e300}]}',
        b'{"ads":[{"image":true}]}',
        b'{"ads":[{"image":[1,2,3]}]}',
        b'{"ads":[{"old":[1,2]}]}',
        b'{"ads":[{"ad_id":"\xff"}]}',
        b'{"ads":[{"ad_id":"\\ud800"}]}',
        b'{"ads":[{}]} {}',
        b'{"ads":[{}],"nobody":1}',  # as many colons as parts and keys, had all four parts been given
        b'{"ads":[{"nobody":1}],"user":{},"scene":{}}',
        b'{"ads":' + b"[" * 100_000,
    ],
)
def test_what_is_no_request(body: bytes) -> None:
    with pytest.raises(ValidationError):
        READERS[True].read(body)


@pytest.mark.parametrize(
    "body",
    [
        b'{"ads":[{"ad_id":1,"ad_id":1}]}',
        b'{"ads":[{"ad_id":1,"ad_id":1}],"user":{},"scene":{}}',
        b'{"ads":[{}],"ads":[{}],"user":{},"scene":{}}',
        b'{"ads":[{"ad_id":":","ad_id":1}]}',
    ],
)
def test_a_key_twice(body: bytes) -> None:
    with pytest.raises(Refusal, match="twice"):
        READERS[True].read(body)
