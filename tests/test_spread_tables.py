"""Tables that are spread over ranks, on disk: written by 2 and by 4 real processes, read as any number would.

And a training that goes on from such checkpoints with other numbers of ranks.
"""

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ctrkit import row_exchange, spread_tables, training
from ctrkit.checkpoints import Checkpoints
from ctrkit.data_parallel import DataParallel
from ctrkit.embedding import Table
from ctrkit.errors import Resumable, UserError
from ctrkit.feature_service import FeatureService
from ctrkit.ranks import ALONE, Ranks, ToldByFirst
from ctrkit.recipe import Train
from ctrkit.spread_tables import Matrices
from tests.ranks import on_ranks
from tests.test_feature_service import CASES, SMALL, trainer, write
from tests.test_full_disk import largest_file

SIZES = {3: 30, 5: 8}
"""Width → indexes of the table's one vocabulary; the table has a row more."""
LARGE = 40_000
"""Bytes that a file of a share does not have."""


def tables(rank: int, count: int) -> dict[int, Table]:
    counts = {"a": np.ones(max(SIZES.values()))}
    return {
        width: Table({"a": size}, width, counts, torch.Generator(), dtype=torch.float64, share=(rank, count))
        for width, size in SIZES.items()
    }


def matrices(of: dict[int, Table]) -> Matrices:
    return {f"table.{w}{end}": (t, m) for w, t in of.items() for end, m in (("", "weight_VD"), (".m", "m_VD"))}


def known(width: int, matrix: str) -> torch.Tensor:
    """What the whole matrix is; row 0 is padding."""
    n = (SIZES[width] + 1) * width
    whole = torch.arange(n, dtype=torch.float64).view(-1, width) + (1000.0 if matrix == "m_VD" else 0.0)
    whole[0] = 0.0
    return whole


def written(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """Write known tables; then where a file may not get large. Return the files, the error of that, and the tables as
    rank 0 puts them together."""
    mine = tables(ranks.rank, ranks.count)
    for table, matrix in matrices(mine).values():
        table.take_over(matrix, known(table.width, matrix))
    kept = Checkpoints(folder / f"by-{ranks.count}")
    save(ranks, kept, 1, matrices(mine))
    large = {"table.3": (tables(ranks.rank, ranks.count)[3], "weight_VD")}
    large["table.3"][0].weight_VD = torch.zeros(LARGE, 1)
    limit = LARGE if ranks.rank == 1 else 10 * LARGE
    with largest_file(limit), pytest.raises((Resumable, ToldByFirst)) as error:
        save(ranks, kept, 2, large)
    ranks.tell()  # rank 0 has tidied up
    row_exchange.ROWS_AT_ONCE = 3
    service = FeatureService(DataParallel(ranks, "cpu"), mine, scratch=folder)
    whole = {(t.width, matrix): service.whole(t.width, matrix).numpy() for t, matrix in matrices(mine).values()}
    return {"files": sorted(p.name for p in kept.folder.rglob("*")), "error": error.value.message, "whole": whole}


def save(ranks: Ranks, kept: Checkpoints, step: int, of: Matrices) -> None:
    if ranks.rank == 0:
        kept.save(step, {}, {}, None, lambda tmp: spread_tables.write(ranks, of, tmp))
    else:
        spread_tables.write(ranks, of)
    ranks.tell()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, list[Any]]]:
    folder = tmp_path_factory.mktemp("tables")
    return folder, on_ranks(written, [2, 4], folder)


@pytest.mark.parametrize("by", [2, 4])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_number_of_ranks_reads_them(
    by: int, count: int, found: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spread_tables, "ROWS_AT_ONCE", 4)
    kept = Checkpoints(found[0] / f"by-{by}")
    last = kept.latest()
    assert last is not None
    assert last.step == 1
    for rank in range(count):
        mine = tables(rank, count)
        spread_tables.read(kept.tables(1), matrices(mine))
        for width, table in mine.items():
            rows = torch.arange(1, SIZES[width] + 1)
            rows = rows[table.is_here(rows)]
            for matrix in ("weight_VD", "m_VD"):
                assert torch.equal(getattr(table, matrix)[table.local(rows)], known(width, matrix)[rows])
            assert not table.weight_VD[table.local_padding].any()
            assert not table.v_VD.any()


def test_each_rank_writes_its_share(found: tuple[Path, dict[int, list[Any]]]) -> None:
    """A full disk of any rank is one error, and leaves what was there."""
    for count, ranks in found[1].items():
        first, *others = (rank["error"] for rank in ranks)
        files = [".metadata", *(f"__{rank}_0.distcp" for rank in range(count))]
        for rank in ranks:
            assert rank["files"] == sorted(
                [*files, "step-0000000001.json", "step-0000000001.pt", "step-0000000001.tables"]
            )
        assert "step-0000000002.tables: a file would become larger than is allowed" in first
        assert others == ["rank 0 says what is wrong"] * (count - 1)


def test_rank_0_puts_them_together(found: tuple[Path, dict[int, list[Any]]]) -> None:
    for first, *others in found[1].values():
        for (width, matrix), whole in first["whole"].items():
            np.testing.assert_array_equal(whole, known(width, matrix))
        for rank in others:
            assert [len(nothing) for nothing in rank["whole"].values()] == [0] * len(first["whole"])
    assert sorted(p.name for p in found[0].iterdir() if p.is_dir()) == ["by-2", "by-4"]


@pytest.fixture
def copy(found: tuple[Path, Any], tmp_path: Path) -> Checkpoints:
    shutil.copytree(found[0] / "by-2", tmp_path / "by-2")
    return Checkpoints(tmp_path / "by-2")


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "__1_0.distcp"])
def test_a_damaged_one_is_passed_over(name: str, copy: Checkpoints, capsys: pytest.CaptureFixture[str]) -> None:
    path = copy.tables(1) / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert copy.latest() is None
    assert "is damaged; going on from the beginning" in capsys.readouterr().err
    assert list(copy.folder.iterdir()) == []


def test_what_a_killed_writer_left_goes(copy: Checkpoints) -> None:
    shutil.copytree(copy.tables(1), copy.tables(2))
    shutil.copytree(copy.tables(1), copy.folder / ".step-0000000003.tables.tmp-77")
    last = copy.latest()
    assert last is not None
    assert last.step == 1
    assert sorted(p.name[-7:] for p in copy.folder.iterdir()) == [".tables", "0001.pt", "01.json"]


class Harm:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.mark),)


def test_metadata_cannot_run_anything(copy: Checkpoints, tmp_path: Path) -> None:
    path = copy.tables(1) / ".metadata"
    for data in (pickle.dumps(Harm(tmp_path / "harm")), pickle.dumps({"a": 1}), b"", path.read_bytes()[:50]):
        path.write_bytes(data)
        with pytest.raises(UserError, match=r"\.metadata is not what torch\.distributed\.checkpoint wrote"):
            spread_tables.read(copy.tables(1), matrices(tables(0, 1)))
    assert not (tmp_path / "harm").exists()


def test_a_matrix_that_is_not_there(copy: Checkpoints) -> None:
    table = tables(0, 1)[3]
    with pytest.raises(UserError, match=r"step-0000000001\.tables has 0 of the 31 rows of 'table\.7'"):
        spread_tables.read(copy.tables(1), {"table.7": (table, "weight_VD")})


# Training that goes on.

CHAIN = [2, 4, 2]
"""Ranks that go on one after the other, an epoch each; before them one process, and after them too."""
CONFIG = Train(**{**SMALL, **CASES["dicm"], "batch": 33, "log_every": 3})


def an_epoch_more(ranks: Ranks, folder: Path) -> list[dict[str, Any]]:
    """Go on from the last checkpoint to the end of the next epoch; return the records."""
    kept = Checkpoints(folder / "model-1")
    last = ranks.tell(kept.latest() if ranks.rank == 0 else None)
    done = 0 if last is None else last.progress["epoch"]
    return to_epoch(done + 1, ranks, folder, kept).records


def to_epoch(epochs: int, ranks: Ranks, folder: Path, kept: Checkpoints) -> training.Trainer:
    made = trainer(CONFIG.model_copy(update={"epochs": epochs}), ranks, folder)
    made.checkpoints = kept
    if (last := ranks.tell(kept.latest() if ranks.rank == 0 else None)) is not None:
        made.resume(last)
    made.run()
    return made


def test_training_goes_on_with_another_number_of_ranks(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write(tmp_path)
    an_epoch_more(ALONE, tmp_path)
    by_ranks = on_ranks(an_epoch_more, CHAIN, tmp_path)
    kept = Checkpoints(tmp_path / "model-1")
    assert [kept.tables(step).exists() for step in kept.steps()[-3:]] == [True, True, True]
    records = an_epoch_more(ALONE, tmp_path)
    for count, end in ((4, 3), (2, 4)):
        of_epochs = [record for record in records if record["epoch"] <= end]
        for of_rank in by_ranks[count]:
            assert of_rank == of_epochs
    whole = to_epoch(len(CHAIN) + 2, ALONE, tmp_path, Checkpoints(tmp_path / "whole-1"))
    assert len(records) == len(whole.records)
    for ours, plain in zip(records, whole.records, strict=True):
        assert ours == pytest.approx(plain, rel=1e-9)
    assert whole.checkpoints is not None
    step = kept.steps()[-1]
    assert not kept.tables(step).exists()
    states = kept.read(step), whole.checkpoints.read(step)
    assert states[0].keys() == states[1].keys()
    for name, wanted in states[1].items():
        ours, plain = (t[1:] if name.endswith((".m", ".v")) else t for t in (states[0][name], wanted))
        np.testing.assert_allclose(ours, plain, rtol=1e-7, atol=1e-9, err_msg=name)
