"""Requests of raw values to scores."""

import concurrent.futures
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pydantic
import pytest

from ctrkit import exporting, scoring
from ctrkit.errors import UserError
from ctrkit.request_model import complaint
from ctrkit.row_indexer import Columns
from ctrkit.scorer import Answer, Scorer
from tests import requests_of
from tests.tiny_run import TinyRun

SETTINGS = {"user_ids": True, "learning_rate": 0.02}
"""Attention, ids and pictures."""


@pytest.fixture(scope="module")
def model(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.train(tmp_path_factory.mktemp("model") / "model", *requests_of.sets(SETTINGS))


@pytest.fixture(scope="module")
def folder(tiny_run: TinyRun, model: Path) -> Path:
    return requests_of.export(tiny_run, model, model.parent / "exported")


@pytest.fixture(scope="module")
def scorer(folder: Path, tiny_run: TinyRun) -> Scorer:
    return Scorer(folder, tiny_run.features)


@pytest.fixture
def request_(tiny_run: TinyRun) -> dict[str, Any]:
    """A request with three ads and eight behaviours."""
    found = [r for _, r in requests_of.samples(tiny_run.groups, tiny_run.convert) if len(r["behaviours"]) > 7]
    ads = {json.dumps(r["ads"][0]): r["ads"][0] for r in found if requests_of.NOBODY not in r["ads"][0].values()}
    out: dict[str, Any] = json.loads(json.dumps({**found[0], "ads": list(ads.values())[:3]}))
    out["behaviours"] = out["behaviours"][:8]
    return out


def ask(scorer: Scorer, request: dict[str, Any], attention: bool = False) -> Answer:
    return scorer.score(scorer.request.model_validate_json(json.dumps(request)), attention)


def changed(request: dict[str, Any], change: Callable[[dict[str, Any]], Any]) -> dict[str, Any]:
    out: dict[str, Any] = json.loads(json.dumps(request))
    change(out)
    return out


ROWS: list[list[dict[str, Any]]] = [
    [],
    [{}],
    [{"a": 1}],
    [{"a": 1, "b": 2}, {"b": 4, "a": 3}],
    [{"a": 1, "b": 2}, {"a": 3, "c": 4}],  # as many keys, but others
    [{"a": 1, "b": 2}, {"a": 3}, {}],
    [{"a": 1}, {"a": 3, "b": None}],
]


@pytest.mark.parametrize("rows", ROWS)
def test_rows_as_columns(rows: list[dict[str, Any]]) -> None:
    columns = Columns.of(rows)
    assert columns.rows == len(rows)
    assert set(columns.own) == {name for row in rows for name in row}
    for name in "abcd":
        assert list(columns.column(name)) == [row.get(name) for row in rows]


def test_every_ad_is_scored_by_itself(scorer: Scorer, request_: dict[str, Any]) -> None:
    """In any company, also where there are so many that they are scored in parts."""
    whole = ask(scorer, request_).scores_A
    assert whole.dtype == np.float32
    assert len(set(whole.tolist())) == 3
    for i, ad in enumerate(request_["ads"]):
        np.testing.assert_allclose(ask(scorer, {**request_, "ads": [ad]}).scores_A, whole[i], atol=1e-6)
    many = ask(scorer, {**request_, "ads": request_["ads"] * 3000}).scores_A
    np.testing.assert_allclose(many, np.tile(whole, 3000), atol=1e-6)


def test_the_newest_behaviours_count(scorer: Scorer, request_: dict[str, Any]) -> None:
    """As many as [select-clicks] max_behaviours = 10 says; a history may be empty or long."""
    b = request_["behaviours"]
    history = [*b, *b[:4]]
    expected = ask(scorer, {**request_, "behaviours": history[-10:]}, attention=True)
    for longer in (history, [*b * 600, *history]):
        found = ask(scorer, {**request_, "behaviours": longer}, attention=True)
        np.testing.assert_array_equal(found.scores_A, expected.scores_A)
        assert found.attention_AL is not None
        assert found.attention_AL.shape == (3, 10)
    assert not np.array_equal(ask(scorer, {**request_, "behaviours": history[:10]}).scores_A, expected.scores_A)
    none = ask(scorer, {**request_, "behaviours": []}, attention=True)
    assert none.attention_AL is not None
    assert none.attention_AL.shape == (3, 0)
    without = {key: value for key, value in request_.items() if key != "behaviours"}
    np.testing.assert_array_equal(ask(scorer, without).scores_A, none.scores_A)
    assert np.isfinite(none.scores_A).all()
    one = ask(scorer, {**request_, "behaviours": b[:1]}, attention=True)
    assert one.attention_AL is not None
    np.testing.assert_allclose(one.attention_AL, np.ones((3, 1)))


def test_a_history_of_5000(tiny_run: TinyRun, model: Path, request_: dict[str, Any], tmp_path: Path) -> None:
    """Where the recipe allows so many: all count. Softmax over copies of a history is that over the history."""
    words = ["--set", "select-clicks.max_behaviours=5000"]
    long = Scorer(requests_of.export(tiny_run, model, tmp_path / "long", *words), tiny_run.features)
    found = ask(long, {**request_, "behaviours": request_["behaviours"] * 625}, attention=True)
    short = ask(long, request_, attention=True)
    assert found.attention_AL is not None
    assert short.attention_AL is not None
    assert found.attention_AL.shape == (3, 5000)
    np.testing.assert_allclose(found.attention_AL.reshape(3, 625, 8).sum(1), short.attention_AL, atol=1e-4)
    assert np.isfinite(found.scores_A).all()


def test_attention_is_that_of_the_trained_model(tiny_run: TinyRun, model: Path, scorer: Scorer) -> None:
    asked = [(i, r) for i, r in requests_of.samples(tiny_run.groups, tiny_run.convert) if r["behaviours"]][:20]
    table = scoring.attention_weights(
        *[model, tiny_run.groups, tiny_run.features, tiny_run.convert], "test", [i for i, _ in asked]
    )
    for sample_id, request in asked:
        answer = ask(scorer, request, attention=True)
        expected = table.filter(table["sample_id"] == sample_id)["weight"].to_numpy()
        assert answer.attention_AL is not None
        np.testing.assert_allclose(answer.attention_AL[0], expected, atol=1e-5)
        assert ask(scorer, request).attention_AL is None


def test_missing_and_unknown_values(scorer: Scorer, request_: dict[str, Any]) -> None:
    """A key that is left out, null and "" are a missing value; others that training did not see are one unknown value.
    Both are told."""
    whole = ask(scorer, request_)

    def without(ad: dict[str, Any], how: Any) -> Answer:
        return ask(scorer, {**request_, "ads": [ad if how == "left out" else {**ad, "ad_id": how}]})

    ad = {key: value for key, value in request_["ads"][0].items() if key != "ad_id"}
    missing = [without(ad, how) for how in ("left out", None, "")]
    unknown = [without(ad, how) for how in ("nobody's", 123456, True, 1.5, 10**40)]
    for answers, kind in ((missing, "missing"), (unknown, "unknown")):
        for answer in answers:
            np.testing.assert_array_equal(answer.scores_A, answers[0].scores_A)
            assert answer.unknown["ad_id"] == {kind: 1}
    assert len({whole.scores_A[0], missing[0].scores_A[0], unknown[0].scores_A[0]}) == 3
    nothing = ask(scorer, {"ads": [{}, {}]})
    assert nothing.scores_A[0] == nothing.scores_A[1]
    assert nothing.unknown["ad_image"] == {"missing": 2}
    assert nothing.unknown["gender"] == {"missing": 1}
    told = ask(scorer, changed(request_, lambda r: r["behaviours"][0].update(goods="x", image="y"))).unknown
    assert told["goods"]["unknown"] == whole.unknown.get("goods", {}).get("unknown", 0) + 1
    assert told["image"]["unknown"] == 1


def test_a_scene_in_an_ad_wins(scorer: Scorer, request_: dict[str, Any]) -> None:
    positions = ["0", "1", None]
    by_scene = [ask(scorer, {**request_, "scene": {"position": p}}).scores_A[i] for i, p in enumerate(positions)]
    in_ads = [{**ad, "position": p} for ad, p in zip(request_["ads"], positions, strict=True)]
    found = ask(scorer, {**request_, "scene": {"position": "2"}, "ads": in_ads}).scores_A
    np.testing.assert_allclose(found, by_scene, atol=1e-7)
    other = ask(scorer, {**request_, "scene": {"position": "1"}}).scores_A
    assert other[0] != by_scene[0]


def test_pictures_by_name_and_as_vectors(
    scorer: Scorer, folder: Path, tiny_run: TinyRun, request_: dict[str, Any]
) -> None:
    """The vector of features.h5 itself gives the score of its name; also among names, and without features.h5."""
    with h5py.File(tiny_run.features) as h5:
        names, rows = h5["image"].asstr()[:], h5["row"][:]
        vector = {
            name: h5["features"][row].astype(float).tolist() for name, row in zip(names, rows, strict=True) if row >= 0
        }
    by_name = ask(scorer, request_).scores_A
    some = changed(request_, lambda r: r["ads"][1].update(ad_image=vector[r["ads"][1]["ad_image"]]))
    np.testing.assert_allclose(ask(scorer, some).scores_A, by_name, atol=1e-6)
    alone = Scorer(folder)

    def all_vectors(request: dict[str, Any]) -> None:
        for row, name in [(ad, "ad_image") for ad in request["ads"]] + [(b, "image") for b in request["behaviours"]]:
            row[name] = vector[row[name]]

    np.testing.assert_allclose(ask(alone, changed(request_, all_vectors)).scores_A, by_name, atol=1e-6)
    with pytest.raises(pydantic.ValidationError):
        ask(alone, request_)
    missing = ask(scorer, changed(request_, lambda r: r["ads"][1].update(ad_image=None)))
    nowhere = ask(scorer, changed(request_, lambda r: r["ads"][1].update(ad_image="nowhere.jpg")))
    assert missing.scores_A[1] == nowhere.scores_A[1] != by_name[1]
    assert (missing.unknown["ad_image"], nowhere.unknown["ad_image"]) == ({"missing": 1}, {"unknown": 1})


WRONG: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no ads": (lambda r: r.pop("ads"), "ads: field required"),
    "none": (lambda r: r.update(ads=[]), "ads: list should have at least 1 item"),
    "extra": (lambda r: r.update(use={}), "use: there is no such field in this model's requests"),
    "feature": (lambda r: r["user"].update(gendr="f"), "user.gendr: there is no such field in this model's requests"),
    "kind": (lambda r: r["ads"][2].update(ad_id=["a"]), "ads.2.ad_id: has to be text, a number, true, false or null"),
    "object": (lambda r: r["user"].update(gender={}), "user.gender: has to be text, a number, true, false or null"),
    "narrow": (
        lambda r: r["ads"][0].update(ad_image=[1.0, 2.0]),
        "ads.0.ad_image: list should have at least 512 ",
    ),
    "wide": (lambda r: r["ads"][0].update(ad_image=[0.5] * 513), "ads.0.ad_image: list should have at most 512 items"),
    "large": (lambda r: r["ads"][0].update(ad_image=[1e9] * 512), "ads.0.ad_image: input should be less than"),
    "no picture": (
        lambda r: r["behaviours"][1].update(image={}),
        "behaviours.1.image: has to be a picture's name, a list",
    ),
    "not a list": (lambda r: r.update(behaviours={}), "behaviours: input should be a valid "),
    "not a row": (lambda r: r.update(behaviours=["g1"]), "behaviours.0: input should be"),
    "long": (lambda r: r["user"].update(gender="x" * 2001), "user.gender: string should have at most 2000 characters"),
    "two": (lambda r: r["ads"][0].update(a=1, b=2), "(and 1 more)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_request(name: str, scorer: Scorer, request_: dict[str, Any]) -> None:
    change, message = WRONG[name]
    with pytest.raises(pydantic.ValidationError) as caught:
        ask(scorer, changed(request_, change))
    told = complaint(caught.value, scorer.schema.features, scorer.picture_width)
    assert message in told
    assert "\n" not in told
    for text in (b"{", b"[]", b"", b"\xff", b'{"ads": [{"ad_id": NaN}]}', b'{"ads": [{"ad_id": 1e999}]}'):
        with pytest.raises(pydantic.ValidationError):
            scorer.request.model_validate_json(text)


def test_the_schema_of_requests(scorer: Scorer) -> None:
    """OpenAPI's: each owner's features, of scene also in ads, and nothing else."""
    found = scorer.request.model_json_schema()
    parts = {name.lower(): set(part["properties"]) for name, part in found["$defs"].items()}
    assert parts["user"] == {"gender", "age"}
    assert parts["ads"] == {"ad_id", "ad_category", "ad_shop", "ad_image", "position"}
    assert parts["behaviours"] == {"goods", "category", "shop", "image"}
    assert all(part["additionalProperties"] is False for part in found["$defs"].values())
    assert found["required"] == ["ads"]


def test_threads_share_a_scorer(folder: Path, tiny_run: TinyRun, request_: dict[str, Any]) -> None:
    fresh = Scorer(folder, tiny_run.features)
    asked = [*(r for _, r in requests_of.samples(tiny_run.groups, tiny_run.convert)[:64]), request_]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda r: ask(fresh, r).scores_A, asked))
    for scores, r in zip(found, asked, strict=True):
        np.testing.assert_array_equal(scores, ask(fresh, r).scores_A)


def test_onnx_needs_no_torch(folder: Path, tiny_run: TinyRun, request_: dict[str, Any]) -> None:
    code = "import sys, json\nfrom pathlib import Path\nfrom ctrkit.scorer import Scorer\n"
    code += "s = Scorer(Path(sys.argv[1]), Path(sys.argv[2]))\n"
    code += "print(s.score(s.request.model_validate_json(sys.argv[3])).scores_A.tolist(), 'torch' in sys.modules)"
    words = [sys.executable, "-c", code, str(folder), str(tiny_run.features), json.dumps(request_)]
    printed = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert printed.endswith("] False\n")


def test_tables_too_large_for_one_file(
    folder: Path, model: Path, tiny_run: TinyRun, request_: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They lie beside the program, belong to it, and move with it."""
    monkeypatch.setattr(exporting, "EXTERNAL", 1_000)
    large = requests_of.export(tiny_run, model, model.parent / "large")
    beside = sorted(path.name for path in large.glob("*.onnx.data"))
    assert "ads.onnx.data" in beside
    assert set(beside) <= set(json.loads((large / "settings.json").read_text())["files"])
    moved = large.rename(model.parent / "elsewhere")
    expected = ask(Scorer(folder, tiny_run.features), request_)
    np.testing.assert_array_equal(ask(Scorer(moved, tiny_run.features), request_).scores_A, expected.scores_A)
    cut(moved, "ads.onnx.data")
    with pytest.raises(UserError, match=r"ads.onnx.data has changed since it was written"):
        Scorer(moved, tiny_run.features)


def cut(folder: Path, name: str = "ads.onnx") -> None:
    path = folder / name
    path.write_bytes(path.read_bytes()[:-100])


def flip(folder: Path) -> None:
    data = bytearray((folder / "user.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "user.onnx").write_bytes(data)


def forget(key: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        settings = json.loads((folder / "settings.json").read_text())
        del settings[key]
        (folder / "settings.json").write_text(json.dumps(settings))

    return change


def edit(folder: Path) -> None:
    settings = json.loads((folder / "settings.json").read_text())
    (folder / "settings.json").write_text(json.dumps({**settings, "max_behaviours": 7}))


DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "cut": (cut, r"ads.onnx has changed since it was written: the exported model is damaged. Export it again"),
    "a bit": (flip, r"user.onnx has changed since it was written"),
    "vocabulary": (lambda f: (f / "vocab" / "goods.parquet").unlink(), r"goods.parquet is not there: the exported mod"),
    "settings": (lambda f: (f / "settings.json").write_text("{"), r"settings.json .*JSON"),
    "no settings": (lambda f: (f / "settings.json").unlink(), r"is not an exported model: it has no settings.json"),
    "gone": (shutil.rmtree, r"is not an exported model: it is not there"),
    "another's": (
        lambda f: (f / "settings.json").write_text("[]"),
        r"is not an exported model: settings.json names no",
    ),
    "no programs": (forget("programs"), r"not what this version of ctrkit writes \(programs is missing"),
    "edited": (edit, r"settings.json has changed since it was written: the exported model is damaged"),
    "schema": (lambda f: forget("schema")(f), r"not what this version of ctrkit writes \(schema is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_folder(name: str, folder: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    DAMAGE[name][0](copy)
    with pytest.raises(UserError, match=DAMAGE[name][1]):
        Scorer(copy, tiny_run.features)


def test_other_features_are_refused(folder: Path, tiny_run: TinyRun, tmp_path: Path) -> None:
    """Vectors of another width or network would mean other things."""
    other = Path(shutil.copy(tiny_run.features, tmp_path / "features.h5"))
    with h5py.File(other, "a") as h5:
        h5.attrs["backbone"] = "another"
    with pytest.raises(UserError, match="was trained on picture vectors with backbone = "):
        Scorer(folder, other)
    with h5py.File(other, "a") as h5:
        narrow = h5["features"][:, :7]
        del h5["features"]
        h5["features"] = narrow
    with pytest.raises(UserError, match=r"was trained on picture vectors of width 512, but .* has width 7"):
        Scorer(folder, other)
    with pytest.raises(UserError, match="is not there"):
        Scorer(folder, tmp_path / "nothing.h5")
