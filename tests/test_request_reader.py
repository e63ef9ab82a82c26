"""msgspec reads requests only where it understands them as pydantic does."""

import json
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from ctrkit.recipe import Feature
from ctrkit.request_model import request_model
from ctrkit.request_reader import Asked, RequestReader
from ctrkit.row_indexer import IndexedRows, Rows
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


def reader(names: bool = True, memory: int = 1 << 20) -> Watched:
    request = limited(request_model(FEATURES, READ, 2, names=names), Limits(ads=3, behaviours=3))
    limits = {"ads": 3, "behaviours": 3, "most_bytes": memory}
    return Watched(request, FEATURES, READ, WRITTEN, WRITTEN, names=names, **limits)


class Written:
    """Stands in the place of a RowIndexer: the index of a row is that of its JSON among all."""

    columns, lists = 1, 0

    def __init__(self) -> None:
        self.texts: list[str] = []

    def index(self, rows: Rows) -> IndexedRows:
        begin = len(self.texts)
        self.texts += [json.dumps(row) for row in rows]
        return IndexedRows(np.arange(begin, len(self.texts))[:, None])


WRITTEN: Any = Written()


def parts(asked: Asked) -> Any:
    ads, behaviours = (
        [json.loads(WRITTEN.texts[i]) for i in rows.index_NC[:, 0]] for rows in (asked.ads, asked.behaviours)
    )
    return [ads, asked.user, asked.scene, behaviours]


def by_pydantic(one: RequestReader, body: bytes) -> Asked:
    request = RequestReader._by_pydantic(one, body)
    return Asked(request.user, request.scene, WRITTEN.index(request.behaviours), WRITTEN.index(request.ads))


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
@given(request=REQUESTS, ascii=st.booleans(), names=st.booleans(), memory=st.sampled_from([0, 2000, 1 << 30]))
def test_understands_what_pydantic_does(request: dict[str, Any], ascii: bool, names: bool, memory: int) -> None:
    """Whether rows were asked for before or not."""
    one = WITH_MEMORY[names, memory]
    try:
        body = json.dumps(request, ensure_ascii=ascii).encode()
    except UnicodeEncodeError:
        return
    expected = outcome(lambda b: by_pydantic(one, b), body)
    assert outcome(one.read, body) == expected
    assert outcome(one.read, body) == expected


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
        assert parts(one.read(json.dumps({"ads": [{"image": vector}]}).encode()))[0] == [{"image": vector}]


@pytest.mark.parametrize("name", [7, 7.0, 1e16, "7"])
def test_a_name_may_be_a_whole_number(name: Any) -> None:
    body = json.dumps({"ads": [{"image": name, "old": name}]}).encode()
    assert parts(READERS[True].read(body))[0] == [{"image": name, "old": name}]
    with pytest.raises(ValidationError):
        READERS[False].read(body)


READERS = {names: reader(names) for names in (True, False)}
WITH_MEMORY = {(names, memory): reader(names, memory) for names in (True, False) for memory in (0, 2000, 1 << 30)}
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
    assert one.slow == 0
    assert parts(one.read(b'{"ads":[{"ad_id":"a"}],"user":{"gender":":"}}'))[1] == {"gender": ":"}
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


KEY_TWICE = b'{"ad_id":"a","ad_id":"a"}'


def test_rows_that_were_asked_for_before_are_known() -> None:
    """By their JSON to the byte; a row that is refused is not kept."""
    one = reader()
    body = json.dumps(USUAL).encode()
    assert [one.read(body).known_ads for _ in range(3)] == [0, 2, 2]
    again, new = b'{"ads":[%s]}' % json.dumps(USUAL["ads"][0]).encode(), b'{"ads":[{"ad_id":8,"price":"2","old":null}]}'
    assert one.read(again).known_ads == 1
    assert one.read(new).known_ads == 0
    assert parts(one.read(new))[0] == parts(one.read(body))[0][1:]
    assert reader(memory=0).read(body).known_ads == 0
    for wrong in (KEY_TWICE, b'{"nobody":1}', b'{"ad_id":{}}', b'{"ad_id":"\xff"}', b'{"ad_id":"\\ud800"}'):
        for _ in range(2):
            with pytest.raises((Refusal, ValidationError)):
                one.read(b'{"ads":[%s]}' % wrong)
    slow = one.slow
    for _ in range(2):
        with pytest.raises(ValidationError):
            one.read(body[:-1] + b',"nobody":1}')
    assert one.slow == slow + 2


def test_behaviours_that_do_not_count_are_read_all_the_same() -> None:
    rows = [{"goods": f"g{i}"} for i in range(3)]
    body = json.dumps({"ads": [{}], "behaviours": rows}).encode()
    for memory in (0, 1 << 20):
        newest = {"names": True, "newest": 2, "most_bytes": memory}
        one = Watched(READERS[True].request, FEATURES, READ, WRITTEN, WRITTEN, **newest)
        for _ in range(2):
            assert parts(one.read(body))[3] == rows[1:]
        assert one.slow == 0
        wrong = body.replace(b'"goods": "g0"', b'"nobody": "g0"')
        with pytest.raises(ValidationError):
            one.read(wrong)
        nothing = Watched(READERS[True].request, FEATURES, READ, WRITTEN, WRITTEN, **{**newest, "newest": 0})
        assert parts(nothing.read(body))[3] == []
        with pytest.raises(ValidationError):
            nothing.read(wrong)
