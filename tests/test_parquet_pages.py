"""Values of Parquet pages one at a time, against pyarrow's reading of whole files."""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ctrkit import parquet_pages
from ctrkit.errors import UsageError, UserError
from ctrkit.pictures import BadPicture


def values(count: int, missing: float = 0.0, repeat: int = 10**9) -> list[bytes | None]:
    rng = np.random.default_rng(count)
    out: list[bytes | None] = [rng.bytes(int(rng.integers(0, 900))) for _ in range(min(count, repeat))]
    out = [out[i % len(out)] for i in range(count)]
    return [None if rng.random() < missing else value for value in out]


def read(path: Path, column: str = "bytes") -> list[bytes | None]:
    """Read every value by its own, the last ones first."""
    places = [(page, row) for page in parquet_pages.pages(path, column, "key") for row in range(page.values)]
    found = {place: parquet_pages.Cache().values(place[0])[place[1]] for place in reversed(places[-40:])}
    found |= {place: parquet_pages.cache.values(place[0])[place[1]] for place in places}
    return [None if found[place] is None else bytes(found[place]) for place in places]


@pytest.mark.parametrize("version", ["1.0", "2.0"])
@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "zstd", "brotli", "lz4"])
@pytest.mark.parametrize("dictionary", [True, False])
def test_as_pyarrow_writes(tmp_path: Path, codec: str, version: str, dictionary: bool) -> None:
    wanted = [*values(300), *values(300, missing=0.3), *values(200, missing=0.1, repeat=5), *([None] * 20)]
    pq.write_table(
        pa.table({"bytes": pa.array(wanted, pa.binary())}),
        tmp_path / "a.parquet",
        compression=codec,
        data_page_version=version,
        use_dictionary=dictionary,
        dictionary_pagesize_limit=20_000,
        data_page_size=10_000,
        write_batch_size=16,
        row_group_size=350,
    )
    assert len(list(parquet_pages.pages(tmp_path / "a.parquet", "bytes", "key"))) > 5
    assert read(tmp_path / "a.parquet") == wanted


@pytest.mark.parametrize("codec", ["uncompressed", "snappy", "zstd", "lz4"])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_as_polars_writes(tmp_path: Path, codec: str, missing: float) -> None:
    wanted = values(3000, missing)
    frame = pl.DataFrame({"x": range(3000), "bytes": wanted})
    frame.write_parquet(tmp_path / "a.parquet", compression=codec, row_group_size=1300, data_page_size=50_000)
    assert read(tmp_path / "a.parquet") == wanted


def test_required_column_and_field_of_a_struct(tmp_path: Path) -> None:
    wanted = values(50, missing=0.2)
    required = pa.schema([pa.field("bytes", pa.binary(), nullable=False)])
    pq.write_table(pa.table({"bytes": values(50)}, schema=required), tmp_path / "required.parquet")
    assert read(tmp_path / "required.parquet") == values(50)
    structs = [None if n % 7 == 0 else {"bytes": value, "path": f"p{n}"} for n, value in enumerate(wanted)]
    pq.write_table(pa.table({"image": structs}), tmp_path / "struct.parquet")
    expected = [None if n % 7 == 0 else value for n, value in enumerate(wanted)]
    assert read(tmp_path / "struct.parquet", "image.bytes") == expected
    texts = parquet_pages.texts(tmp_path / "struct.parquet", "image.path", "key")
    assert [text for some in texts for text in some] == [None if n % 7 == 0 else f"p{n}" for n in range(50)]


def test_texts_of_numbers(tmp_path: Path) -> None:
    pl.DataFrame({"id": [7, None, 12]}).write_parquet(tmp_path / "a.parquet")
    assert list(parquet_pages.texts(tmp_path / "a.parquet", "id", "key")) == [["7", None, "12"]]


def test_empty_file(tmp_path: Path) -> None:
    pl.DataFrame({"bytes": []}, schema={"bytes": pl.Binary}).write_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == []


def test_cache_forgets_what_was_read_long_ago(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = pl.DataFrame({"bytes": values(2000)})
    frame.write_parquet(tmp_path / "a.parquet", compression="uncompressed", data_page_size=50_000)
    monkeypatch.setattr(parquet_pages, "CACHE_BYTES", 200_000)
    cache = parquet_pages.Cache()
    for page in parquet_pages.pages(tmp_path / "a.parquet", "bytes", "key"):
        cache.values(page)
        assert sum(kept.held for kept in cache._pages) == cache._bytes <= 200_000


def test_mistakes_are_told(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"bytes": [b"a"], "list": [[b"a"]], "number": [1]}).write_parquet(path)
    with pytest.raises(UsageError, match=r"no column 'byte' \(extract-images.bytes_column\).*did you mean 'bytes'"):
        next(parquet_pages.pages(path, "byte", "extract-images.bytes_column"))
    with pytest.raises(UsageError, match="does not hold one value of bytes a row"):
        next(parquet_pages.pages(path, "number", "key"))
    with pytest.raises(UsageError, match="does not hold one value of bytes a row"):
        next(parquet_pages.pages(path, "list.list.element", "key"))
    pq.write_table(
        pa.table({"bytes": [b"a", b"b"]}),
        path,
        use_dictionary=False,
        column_encoding={"bytes": "DELTA_LENGTH_BYTE_ARRAY"},
    )
    with pytest.raises(UserError, match="encoding"):
        next(parquet_pages.pages(path, "bytes", "key"))


def test_damaged_file(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pl.DataFrame({"bytes": values(100)}).write_parquet(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        next(parquet_pages.pages(path, "bytes", "key"))
    path.write_bytes(whole[:4] + bytes(200) + whole[204:])
    with pytest.raises(UserError, match="cannot be read as Parquet"):
        next(parquet_pages.pages(path, "bytes", "key"))
    path.write_bytes(whole)
    page = next(parquet_pages.pages(path, "bytes", "key"))
    path.write_bytes(whole + b"x")
    with pytest.raises(BadPicture, match="has changed"):
        page.read()
