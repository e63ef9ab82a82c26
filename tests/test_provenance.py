"""Keys, freshness and sidecars."""

import ast
import contextlib
import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import click
import pytest

from ctrkit import provenance
from ctrkit.digests import Digests
from ctrkit.errors import Resumable, UsageError, UserError
from ctrkit.recipe import Recipe

CHECKOUT = Path(__file__).parent.parent
RECIPE = Recipe.model_validate({"name": "r", "group": {"seed": 3}})


def make(target: Path, source: Path, text: str = "made", recipe: Recipe = RECIPE) -> None:
    with provenance.output("group", recipe, {"source": source, "none": None}, target) as work:
        work.path.write_text(text)
        work.counts["rows"] = 1


def fail(target: Path, source: Path) -> None:
    with provenance.output("group", RECIPE, {"source": source}, target) as work:
        work.path.write_text("half")
        raise ZeroDivisionError


def key(source: Path, recipe: Recipe = RECIPE, stage: str = "group", name: str = "source") -> str:
    return provenance.provenance(stage, recipe, {name: source}, Digests()).key


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source"
    path.write_text("source")
    return path


def test_the_sidecar_says_what_it_was_made_from(tmp_path: Path, source: Path) -> None:
    make(tmp_path / "out", source)
    sidecar = json.loads((tmp_path / "out.json").read_text())
    assert sidecar["stage"] == "group"
    assert sidecar["config"]["group"]["seed"] == 3
    assert set(sidecar["config"]) == set(provenance.TABLES["group"])
    assert sidecar["inputs"] == {"source": Digests().of(source)}
    assert sidecar["content"] == Digests().of(tmp_path / "out")
    assert "contents" not in sidecar  # of folders only
    assert sidecar["counts"] == {"rows": 1}
    assert sidecar["key"] == key(source)
    assert {"python", "ctrkit", "torch"} <= set(sidecar["versions"])
    assert str(tmp_path) not in json.dumps(sidecar)


def test_what_the_key_depends_on(tmp_path: Path, source: Path) -> None:
    first = key(source)
    assert key(source) == first
    other = RECIPE.model_copy(update={"about": "something else", "eval": RECIPE.eval.model_copy(update={"seed": 7})})
    assert key(source, other) == first  # group reads neither
    assert key(source, RECIPE.model_copy(update={"group": RECIPE.group.model_copy(update={"seed": 4})})) != first
    assert key(source, stage="eval") != first
    assert key(source, name="other") != first
    shutil.copy(source, tmp_path / "copy")
    assert key(tmp_path / "copy") == first
    source.write_text("changed")
    assert key(source) != first


def test_freshness(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"

    def is_fresh() -> bool:
        return provenance.is_fresh(out, key(source), Digests())

    assert not is_fresh()
    make(out, source)
    assert is_fresh()
    out.write_text("spoiled")
    assert not is_fresh()
    out.write_text("made")
    assert is_fresh()
    source.write_text("changed")
    assert not is_fresh()
    make(out, source)
    (tmp_path / "out.json").write_text("[")
    assert not is_fresh()


def test_a_fresh_output_is_left_alone_where_that_is_wanted(
    tmp_path: Path, source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make(out, source)
    before = out.stat().st_ino
    make(out, source)
    assert out.stat().st_ino != before
    monkeypatch.setenv("CTRKIT_UNLESS_FRESH", "1")
    before = out.stat().st_ino
    with pytest.raises(click.exceptions.Exit) as ended:
        make(out, source)
    assert ended.value.exit_code == 0
    assert out.stat().st_ino == before
    assert f"group: {out} is what it would be made again" in capsys.readouterr().err
    source.write_text("changed")
    make(out, source, text="anew")
    assert out.read_text() == "anew"


def test_asking_makes_nothing(tmp_path: Path, source: Path) -> None:
    for wanted in (False, True):
        with provenance.checking(), pytest.raises(provenance.Checked) as asked:
            make(tmp_path / "out", source)
        assert asked.value.fresh is wanted
        if not wanted:
            assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
            make(tmp_path / "out", source)


def test_an_error_leaves_output_and_sidecar(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    make(out, source)
    before = (tmp_path / "out.json").read_bytes()
    with pytest.raises(ZeroDivisionError):
        fail(out, source)
    assert out.read_text() == "made"
    assert (tmp_path / "out.json").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.json", "source"]


def build(target: Path, source: Path, *names: str, error: Exception | None = None) -> list[str]:
    """Build a folder of these files among the parts; return those that were there before."""
    with provenance.output("group", RECIPE, {"source": source}, target) as work:
        out = work.begin()
        before = sorted(p.name for p in out.iterdir())
        for name in names:
            (out / name).write_text(name)
        if error is not None:
            raise error
        work.end()
    return before


@pytest.mark.parametrize(
    "error", [Resumable("a worker died"), OSError(28, "no space"), ZeroDivisionError("a fault"), KeyboardInterrupt()]
)
def test_what_can_go_on_is_kept_and_goes_on(tmp_path: Path, source: Path, error: Exception) -> None:
    out = tmp_path / "out"
    with pytest.raises(Resumable if isinstance(error, OSError) else type(error)):
        build(out, source, "a", ".a.123", error=error)
    assert not out.exists()
    [parts] = tmp_path.glob(".out.parts-*")
    assert (parts / "out" / "a").is_file()
    assert build(out, source, "b") == [".a.123", "a"]
    assert sorted(p.name for p in out.iterdir()) == ["a", "b"]  # what was half written is gone
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.json", "source"]


def test_who_stops_a_stage_is_told_that_it_can_go_on(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "out", source, "a", error=KeyboardInterrupt())
    assert "group: stopped; run the same command again, and it goes on" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt), provenance.output("eval", None, {"source": source}, tmp_path / "x"):
        raise KeyboardInterrupt
    assert capsys.readouterr().err == ""  # it has no parts


def test_parts_of_work_that_cannot_go_on_are_removed(tmp_path: Path, source: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match="mend it"):
        build(out, source, "a", error=UserError("mend it"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]
    with pytest.raises(Resumable):
        build(out, source, "a", error=Resumable("go on"))
    source.write_text("changed")
    assert build(out, source, "b") == []
    assert sorted(p.name for p in out.iterdir()) == ["b"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.json", "source"]


@pytest.mark.parametrize("name", [".", "/", "..", ""])
def test_an_output_needs_a_name(source: Path, name: str) -> None:
    for asking in (contextlib.nullcontext(), provenance.checking()):
        with asking, pytest.raises(UsageError, match="has no name of its own"):
            make(Path(name), source)


def test_a_folder_does_not_replace_a_file(tmp_path: Path, source: Path) -> None:
    (tmp_path / "out").write_text("keep")
    with pytest.raises(UsageError, match="out is a file, and a folder is to be written"):
        build(tmp_path / "out", source, "a")
    assert (tmp_path / "out").read_text() == "keep"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def converted(folder: Path, recipe: Recipe = RECIPE) -> Path:
    """Write a small folder as convert's; return it."""
    with provenance.output("convert", recipe, {}, folder) as work:
        for name in ("split.json", "samples/day=1/part-0", "samples/day=1/part-1", "samples/day=2/part-0"):
            (work.path / name).parent.mkdir(parents=True, exist_ok=True)
            (work.path / name).write_text(name)
    return folder


def use(convert: Path) -> None:
    """Make a file from a folder of convert's."""
    with provenance.output("select-clicks", RECIPE, {"convert": convert}, convert.with_name("used")) as work:
        work.path.write_text("used")


def change(path: Path) -> None:
    path.write_text("other")


@pytest.mark.parametrize(
    ("damage", "name", "told"),
    [
        (Path.unlink, "samples/day=1/part-1", "samples/day=1 has 1 instead of 2 files;"),
        (Path.unlink, "samples/day=2/part-0", "samples/day=2 is missing;"),
        (change, "samples/day=2/part-0", "samples/day=2 has changed;"),
        (change, "more.json", "more.json was not there;"),
        (change, "split.json", "split.json has changed;"),
        (shutil.rmtree, "samples", "samples/day=1 is missing, and so for 1 more;"),
    ],
)
def test_an_input_that_is_not_as_its_stage_left_it(
    tmp_path: Path, damage: Callable[[Path], None], name: str, told: str
) -> None:
    convert = converted(tmp_path / "convert")
    use(convert)
    damage(convert / name)
    with pytest.raises(UserError) as error:
        use(convert)
    assert f"{convert} is not what ctrkit convert wrote: {told} run ctrkit convert again" in error.value.message
    (tmp_path / "convert.json").unlink()  # then it is the user's
    use(convert)


def test_sidecars_without_a_list_of_contents(tmp_path: Path) -> None:
    convert = converted(tmp_path / "convert")
    sidecar = json.loads((tmp_path / "convert.json").read_text())
    del sidecar["contents"]
    (tmp_path / "convert.json").write_text(json.dumps(sidecar))
    use(convert)
    change(convert / "split.json")
    with pytest.raises(UserError, match="wrote: its content has changed since; run ctrkit convert again"):
        use(convert)


def test_an_input_that_another_stage_wrote(tmp_path: Path) -> None:
    convert = converted(tmp_path / "convert")
    for _ in range(2):  # with its sidecar and without
        with (
            pytest.raises(UserError, match="is what ctrkit convert wrote; give the folder that ctrkit select-clicks"),
            provenance.output("group", RECIPE, {"behaviours": convert}, tmp_path / "out"),
        ):
            raise AssertionError
        (tmp_path / "convert.json").unlink(missing_ok=True)


def test_features_must_mean_the_same(tmp_path: Path) -> None:
    def recipe(**features: object) -> Recipe:
        return Recipe.model_validate({"name": "r", "features": features})

    one = {"of": "ad", "column": "shop"}
    convert = converted(tmp_path / "convert", recipe(shop=one, hour={"of": "scene"}))
    provenance.check_features(recipe(shop={**one, "width": 3, "switch": "ad_id"}), ["shop"], convert)
    other = recipe(shop={**one, "min_count": 3})
    with pytest.raises(UserError, match=r"was made with features.shop.min_count = 1, and the recipe says 3: run ctrk"):
        provenance.check_features(other, ["shop"], convert)
    with pytest.raises(UserError, match="has no feature 'brand'; it is of another recipe: run ctrkit convert again"):
        provenance.check_features(recipe(brand=one), ["brand"], convert)
    (tmp_path / "convert.json").unlink()
    provenance.check_features(other, ["shop"], convert)


def test_options_of_the_command_count(source: Path) -> None:
    keys = {
        provenance.provenance("convert", RECIPE, {"source": source}, Digests(), options).key
        for options in (None, {"today": "2024-03-01"}, {"today": "2024-03-02"})
    }
    assert len(keys) == 3


def test_who_runs_the_tasks_does_not_count(source: Path) -> None:
    """Bytes do not depend on them, so a run may go on with fewer workers."""
    first = key(source)
    for change in ({"workers": 3}, {"engine": "ray"}):
        assert key(source, RECIPE.model_copy(update=change)) == first


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the package as it is installed, to be edited, which the digests are taken of."""
    shutil.copytree(CHECKOUT / "ctrkit", tmp_path / "ctrkit")
    shutil.copytree(CHECKOUT / "stages", tmp_path / "ctrkit" / "stages")
    with monkeypatch.context() as patch:
        patch.setattr(provenance, "__file__", str(tmp_path / "ctrkit" / "provenance.py"))
        yield tmp_path / "ctrkit"
    provenance.code_digest.cache_clear()


def code_digests() -> dict[str, str]:
    provenance.code_digest.cache_clear()
    provenance._read_source.cache_clear()
    return {stage: provenance.code_digest(stage) for stage in provenance.TABLES}


def test_a_checkout_and_an_installed_package_have_the_same_digests(package: Path) -> None:
    installed = code_digests()
    provenance.__file__ = str(CHECKOUT / "ctrkit" / "provenance.py")
    assert code_digests() == installed


def test_the_names_in_a_module_are_those_of_its_syntax_tree() -> None:
    paths = [*(CHECKOUT / "ctrkit").rglob("*.py"), *(CHECKOUT / "stages").glob("*.py")]
    for path in paths:
        text = path.read_text()
        imports, words = set(), set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                imports |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imports |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                words.add(node.value)
        ours = {name for name in imports | words if name and re.fullmatch(r"ctrkit(\.\w+)*", name)} - {"ctrkit"}
        found_imports, found_words = provenance._names(text)
        assert set(found_imports) - {"", "ctrkit"} == ours | {name.rpartition(".")[0] for name in ours} - {"ctrkit"}, (
            path
        )
        names = {word for word in words if re.fullmatch(r"[\w-][\w.-]*", word)}
        assert data_files(found_words) == data_files(names), path
    assert len(paths) > 100


def data_files(names: Iterable[str]) -> set[Path]:
    return {file for name in names for file in provenance._data_files(name)}


def test_code_counts_as_far_as_it_is_imported(package: Path) -> None:
    before = code_digests()

    def changed(name: str, text: str = "\nx = 1\n") -> set[str]:
        old = (package / name).read_text()
        (package / name).write_text(old + text)
        now = code_digests()
        (package / name).write_text(old)
        return {stage for stage in now if now[stage] != before[stage]}

    assert changed("stages/group.py") == {"group"}
    assert changed("clicks.py") == {"select-clicks"}
    assert changed("world.py") == {"simulate", "replay"}
    assert changed("extraction.py") == {"extract-images"}
    assert changed("files.py") == set(provenance.TABLES)
    for model in ("models/dicm.py", "models/__init__.py"):
        assert {"train", "predict"} <= changed(model) <= {"train", "predict", "export", "report", "replay"}
    assert changed("templates/report.html.j2", "<p>") == {"report", "tables", "replay"}
    assert changed("pipeline.py") == changed("stages/rules.py") == set()
    assert code_digests() == before


def test_a_folder_of_somebody_else_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("keep")
    with pytest.raises(UserError, match="ctrkit did not write"), provenance.output("eval", None, {}, tmp_path / "own"):
        raise AssertionError
    assert (tmp_path / "own" / "thesis.txt").read_text() == "keep"


def test_an_input_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "scores.csv").write_text("u,y,s\n")
    given = {"scores": tmp_path / "scores.csv"}
    with pytest.raises(UserError, match="is an input"), provenance.output("eval", None, given, tmp_path / "scores.csv"):
        raise AssertionError
    assert (tmp_path / "scores.csv").read_text() == "u,y,s\n"
