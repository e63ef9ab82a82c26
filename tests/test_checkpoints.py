"""Checkpoints: which are kept, what a damaged one or a full disk does; tests/test_kill_train.py kills."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import Result

from ctrkit import checkpoints, training
from ctrkit.checkpoints import Checkpoints
from ctrkit.errors import Resumable
from tests.shop import ctrkit
from tests.test_full_disk import largest_file
from tests.test_tensorboard import points
from tests.tiny_run import TinyRun

SETS = ["--variant", "din", "--set", "train.epochs=6", "--set", "train.evaluate_every=7", "--set", "train.log_every=0"]
SETS += ["--set", "train.patience=0", "--set", "train.learning_rate=0.01", "--set", "train.activation=dice"]


def tensors(n: int) -> dict[str, torch.Tensor]:
    return {"a": torch.full((50, 3), float(n)), "step": torch.tensor(n)}


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_there_and_back(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path / "kept")
    assert kept.latest() is None
    wide = torch.arange(12.0).view(4, 3)
    state = {"column": wide[:, 1], "half": wide.half(), "none": torch.zeros(0, 3), "long": torch.tensor(2**40)}
    progress = {"loss": 0.1 + 0.2, "b": None, "a": [1, "ä"], "records": [{"z": 1, "a": 2.5}]}
    kept.save(7, state, progress, 7)
    last = kept.latest()
    assert last is not None
    assert (last.step, last.best, last.progress) == (7, 7, progress)
    assert list(last.progress["records"][0]) == ["z", "a"]
    back = kept.read(7)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[n], t) and back[n].dtype == t.dtype for n, t in state.items())
    with pytest.raises(ValueError, match="Out of range float"):
        kept.save(8, state, {"loss": float("nan")})
    assert kept.latest() == last


def test_the_last_three_and_the_best_are_kept(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    best = None
    for step in range(10, 90, 10):
        best = step if step in (20, 40) else best
        kept.save(step, tensors(step), {}, best)
    assert kept.steps() == [40, 60, 70, 80]
    assert len(names(tmp_path)) == 8
    kept.save(90, tensors(90), {}, 90)
    assert kept.steps() == [40, 70, 80, 90]  # 70 and 80 may still be gone back to
    for step in (100, 110):
        kept.save(step, tensors(step), {}, 90)
    assert kept.steps() == [90, 100, 110]


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 4
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path, Path], Any]] = {
    "a bit of the tensors": lambda pt, record: flip(pt, 0.4),
    "cut tensors": lambda pt, record: pt.write_bytes(pt.read_bytes()[:-9]),
    "no tensors": lambda pt, record: pt.unlink(),
    "a bit of the record": lambda pt, record: flip(record, 0.5),
    "cut record": lambda pt, record: record.write_bytes(record.read_bytes()[:30]),
    "empty record": lambda pt, record: record.write_bytes(b""),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_passed_over(damage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Checkpoints(tmp_path)
    for step in (1, 2, 3):
        kept.save(step, tensors(step), {"n": step}, 1)
    DAMAGE[damage](tmp_path / "step-0000000003.pt", tmp_path / "step-0000000003.json")
    last = kept.latest()
    assert last is not None
    assert last.progress == {"n": 2}
    assert kept.read(2)["a"][0, 0] == 2
    assert (
        capsys.readouterr().err
        == f"train: {tmp_path / 'step-0000000003.pt'} is damaged; going on from the one before it\n"
    )
    assert kept.steps() == [1, 2]
    flip(tmp_path / "step-0000000001.pt", 0.5)  # the best of all that are left
    assert kept.latest() is None
    told = capsys.readouterr().err
    assert "the best model of step 2 is damaged; going on from the one before it" in told
    assert "step-0000000001.pt is damaged; going on from the beginning, for there is no other checkpoint" in told
    assert names(tmp_path) == []


def test_every_bit_counts(tmp_path: Path) -> None:
    """A flip anywhere in either file is noticed, also one that leaves a number a number."""
    kept = Checkpoints(tmp_path)
    kept.save(1, tensors(1), {"loss": 0.123456789, "samples": 1234, "records": [{"step": 1}]}, 1)
    whole = {p: p.read_bytes() for p in tmp_path.iterdir()}
    for path, data in whole.items():
        for place in range(0, len(data), 1 if path.suffix == ".json" else 37):
            path.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
            assert kept._whole(1) is None, (path.suffix, place)
        path.write_bytes(data)
    assert kept._whole(1) is not None


def test_what_a_killed_writer_left_goes(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, tensors(1), {})
    for name in ("step-0000000002.pt", ".step-0000000003.pt.tmp-77", ".step-0000000002.json.tmp-77"):
        (tmp_path / name).write_bytes(b"half")
    last = kept.latest()
    assert last is not None
    assert last.step == 1
    assert names(tmp_path) == ["step-0000000001.json", "step-0000000001.pt"]


def test_only_tensors_are_read(tmp_path: Path) -> None:
    """A file with anything that would run is refused, whatever its digest."""
    kept = Checkpoints(tmp_path)
    kept.save(1, tensors(1), {})
    torch.save({"a": Path("x")}, tmp_path / "step-0000000001.pt")
    with pytest.raises(Exception, match="is not a state dict that torch can load: it holds other objects than tensors"):
        kept.read(1)


def test_a_full_disk_leaves_those_before(tmp_path: Path) -> None:
    kept = Checkpoints(tmp_path)
    kept.save(1, tensors(1), {"n": 1}, 1)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    for size in (0, 300, 1000):
        with largest_file(size), pytest.raises(Resumable, match=r"cannot write .* Make room there and run the same"):
            kept.save(2, tensors(2), {"n": 2}, 2)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    large = {"text": "x" * 5000}
    with largest_file(4000), pytest.raises(Resumable, match=r"cannot write .*step-0000000002\.json"):
        kept.save(2, tensors(2), large, 2)
    last = kept.latest()
    assert last is not None
    assert last.progress == {"n": 1}


def test_of_other_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It stays until there is a checkpoint of this work."""
    target = tmp_path / "model"
    one = checkpoints.of_output(target, {"a": 1})
    one.save(1, tensors(1), {})
    assert checkpoints.of_output(target, {"a": 1}).folder == one.folder
    checkpoints.of_output(tmp_path / "model.2", {"a": 1}).save(1, tensors(1), {})
    assert capsys.readouterr().err == ""
    other = checkpoints.of_output(target, {"a": 2})
    assert other.folder != one.folder
    assert f"{one.folder} has checkpoints of other settings, data or versions" in capsys.readouterr().err
    assert one.latest() is not None
    other.save(1, tensors(1), {})
    assert not one.folder.exists()
    assert "is removed" in capsys.readouterr().err
    assert len(names(tmp_path)) == 2


def test_files_that_are_none_of_this_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Another name is removed with a word; a checkpoint of other work is as good as a damaged one."""
    kept, other = Checkpoints(tmp_path / "model-1"), Checkpoints(tmp_path / "model-2")
    kept.save(1, tensors(1), {"n": 1})
    other.save(2, tensors(2), {"n": 2})
    for path in other.folder.iterdir():
        shutil.copy(path, kept.folder)
    for path in kept.folder.glob("step-0000000001.*"):
        shutil.copy(path, path.with_stem("step-0000000003"))
    (kept.folder / "step-abc.json").write_text("{}")
    assert kept.steps() == [1, 2, 3]
    last = kept.latest()
    assert last is not None
    assert last.progress == {"n": 1}
    told = capsys.readouterr().err
    assert f"{kept.folder / 'step-abc.json'} is no checkpoint, and is removed" in told
    assert names(kept.folder) == ["step-0000000001.json", "step-0000000001.pt"]


# Through the command line.


def stopped(tiny_run: TinyRun, out: Path, monkeypatch: pytest.MonkeyPatch, step: int, *words: object) -> Result:
    """Train until a step at which somebody presses Ctrl-C."""
    take = training.Trainer.step

    def take_or_stop(trainer: training.Trainer, batch: Any) -> Any:
        if trainer.steps == step:
            raise KeyboardInterrupt
        return take(trainer, batch)

    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "step", take_or_stop)
        result = tiny_run.call("train", *SETS, *words, "--groups", tiny_run.groups, "--out", out)
    assert result.exit_code == 1
    assert not out.exists()
    return result


def hidden(out: Path) -> Path:
    (found,) = out.parent.glob(f".{out.name}.checkpoints-*")
    return found


@pytest.fixture(scope="module")
def whole(tiny_run: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "model"
    tiny_run.must("train", *SETS, "--groups", tiny_run.groups, "--out", out)
    return out


def contents(model: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in model.iterdir()}


def test_stopped_and_gone_on(tiny_run: TinyRun, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "model"
    board = ["--set", "train.log_every=10", "--tensorboard", tmp_path / "board"]
    result = stopped(tiny_run, out, monkeypatch, 61, *board, "--set", "train.checkpoint_minutes=1e-9")
    assert [step for step, _ in points(tmp_path / "board", "train/loss")] == [10, 20, 30, 40, 50, 60]
    assert "train: stopped; run the same command again, and it goes on from what was done" in result.output
    kept = Checkpoints(hidden(out))
    assert kept.steps()[-3:] == [59, 60, 61]
    shown = " ".join(ctrkit("inspect", hidden(out)).output.split())
    best = kept.describe(61)
    assert best is not None
    assert f"checkpoints: {len(kept.steps())}" in shown
    assert re.search(rf"│ {best.best} │ \d+ │ [\d,]+ │ [\d,]+ │ 0\.\d+ best │", shown)
    flip(hidden(out) / "step-0000000061.pt", 0.7)
    reads: list[int] = []
    read = Checkpoints.read
    monkeypatch.setattr(Checkpoints, "read", lambda self, step: reads.append(step) or read(self, step))
    result = tiny_run.must("train", *SETS, *board, "--groups", tiny_run.groups, "--out", out)
    assert "step-0000000061.pt is damaged; going on from the one before it" in result.output
    assert "train: going on after step 60, in epoch " in result.output
    assert reads[0] == 60
    found = {
        name: points(tmp_path / "board", name) for name in ("train/loss", "train/samples_per_second", "valid/gauc")
    }
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    told = [(r["step"], r["loss"]) for r in records if "valid_gauc" not in r]
    assert found["train/loss"] == [(step, pytest.approx(loss)) for step, loss in told]
    assert [step for step, _ in found["train/samples_per_second"]] == [step for step, _ in told]
    judged = [(r["step"], r["valid_gauc"]) for r in records if "valid_gauc" in r]
    assert found["valid/gauc"] == [(step, pytest.approx(value)) for step, value in judged]
    assert [r for r in records if "valid_gauc" in r] == [
        json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()
    ]
    assert (out / "model.pt").read_bytes() == (whole / "model.pt").read_bytes()
    assert not list(tmp_path.glob(".*"))


def test_other_settings_begin_anew(tiny_run: TinyRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other data as well; where and how often it is kept does not count."""
    out = tmp_path / "model"
    groups = ["--groups", tiny_run.groups, "--out", out]
    other = tmp_path / "groups"
    shutil.copytree(tiny_run.groups, other)
    schema = json.loads((other / "schema.json").read_text())
    (other / "schema.json").write_text(json.dumps({**schema, "negative_rate": 0.5}))
    for words in (["--set", "train.learning_rate=0.02"], ["--set", "train.clip_norm=1"], ["--groups", other]):
        stopped(tiny_run, out, monkeypatch, 30)
        old = hidden(out)
        result = tiny_run.must("train", *SETS, *groups, *words)
        assert f"{old} has checkpoints of other settings, data or versions, so training begins anew" in result.output
        assert not old.exists()
        assert "going on" not in result.output
        shutil.rmtree(out)
    stopped(tiny_run, out, monkeypatch, 30)
    free = ["--set", "train.checkpoint_minutes=7", "--set", "train.save_optimiser=true"]
    assert "going on after step" in tiny_run.must("train", *SETS, *groups, *free).output
    assert (out / "optimiser.pt").is_file()


def test_a_full_disk_while_training(tiny_run: TinyRun, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "model"
    words = [*SETS, "--groups", tiny_run.groups, "--out", out]
    size = (whole / "model.pt").stat().st_size
    for room in (size // 2, int(1.5 * size)):  # of the model itself, and of a checkpoint with its moments
        with largest_file(room):
            result = tiny_run.call("train", *words)
        assert result.exit_code == 1
        assert isinstance(result.exception, SystemExit), result.exception
        assert result.output.count("Error: ") == 1
        assert "cannot write" in result.output
        assert "run the same command again: it goes on from what was done" in result.output
        assert not out.exists()
    tiny_run.must("train", *words)
    assert contents(out) == contents(whole)
    assert not list(tmp_path.glob(".*"))


def test_a_mistaken_command_leaves_the_checkpoints(
    tiny_run: TinyRun, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source that is not there or refused, another log_every stopped at once; then the right one goes on."""
    out = tmp_path / "model"
    stopped(tiny_run, out, monkeypatch, 30)
    groups = [*SETS, "--groups", tiny_run.groups, "--out", out]
    warm = ["--set", "train.warm_start=full", "--warm-start"]
    for words in ([*warm, tmp_path / "nowhere"], [*warm, whole], ["--set", "train.first_day=9"]):
        result = tiny_run.call("train", *groups, *words)
        assert result.exit_code == 1, result.output
        assert "Traceback" not in result.output
    stopped(tiny_run, out, monkeypatch, 2, "--set", "train.log_every=1")
    result = tiny_run.must("train", *groups)
    assert "train: going on after step" in result.output
    assert contents(out) == contents(whole)
    assert not list(tmp_path.glob(".*"))
