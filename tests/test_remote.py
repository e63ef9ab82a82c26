"""Logs in object storage, read from a local S3 server, give what the same logs on disk give."""

import contextlib
import gzip
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
import polars as pl
import pytest
import zstandard

from tests import shop

BUCKET = "shop"
Upload = Callable[[Path, str], None]
RECIPE = (
    shop.RECIPE.replace('files = "impressions.csv"', 'files = "impressions.csv"\nwhere = "position >= 1"')
    .replace('hour = { of = "scene" }', 'hour = { of = "scene" }\nshard = { of = "scene" }')
    .replace("[convert]\n", "[convert]\nmax_reject_rate = 0.1\n")
)


@pytest.fixture(scope="module")
def upload() -> Iterator[Upload]:
    """An S3 server that the environment names; returns what copies a folder's files into the bucket below a prefix."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}"
    words = [Path(sys.executable).with_name("moto_server"), "-H", "127.0.0.1", "-p", url.rpartition(":")[2]]
    server = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", url)
        patch.setenv("AWS_ALLOW_HTTP", "true")
        patch.setenv("AWS_REGION", "us-east-1")
        patch.setenv("AWS_ACCESS_KEY_ID", "id")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        client: Any = boto3.client("s3", endpoint_url=url, region_name="us-east-1")
        _wait_for(url, server)
        client.create_bucket(Bucket=BUCKET)

        def copy(folder: Path, prefix: str) -> None:
            for path in sorted(p for p in folder.rglob("*") if p.is_file()):
                name = f"{prefix}/{path.relative_to(folder).as_posix()}"
                client.put_object(Bucket=BUCKET, Key=name, Body=path.read_bytes())

        yield copy
        client.close()
    server.terminate()
    server.wait()


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    host, _, port = url.removeprefix("http://").partition(":")
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            return
        assert server.poll() is None, "the S3 server did not start"
        time.sleep(0.05)
    raise TimeoutError(url)


def rows() -> list[str]:
    """Return impressions, some of them bad: a time that is none, a line that ends early, a cell too many."""
    good = shop.random_rows(5, users=20)["impressions"]
    return [*good[:50], "x1,noon,u1,a1,1", *good[50:120], "x2,170", *good[120:], f"x3,{shop.at(1)},u1,a1,1,too,many"]


def texts(folder: Path, compress: Callable[[bytes], bytes], ending: str) -> str:
    """Write the impressions as text, two files in folders that give the column `shard`."""
    lines = rows()
    for i, part in enumerate((lines[:100], lines[100:])):
        path = folder / f"shard={i}" / f"log.{ending}"
        path.parent.mkdir(parents=True)
        header = shop.HEADERS["impressions"]
        text = "\n".join([header, *part]) + "\n" * (i == 0)
        path.write_bytes(compress((text.replace(",", "\t") if ending.startswith("tsv") else text).encode()))
    return f"shard=*/*.{ending}"


def parquets(folder: Path) -> str:
    for i in range(2):
        path = folder / f"shard={i}" / "log.parquet"
        path.parent.mkdir(parents=True)
        lines = shop.random_rows(5 + i, users=20)["impressions"]
        table = pl.DataFrame(
            [line.split(",") for line in lines], schema=shop.HEADERS["impressions"].split(","), orient="row"
        )
        table = table.with_columns(pl.col("time", "position").cast(pl.Int64), impression=pl.col("impression") + f"-{i}")
        table.write_parquet(path, row_group_size=50)
    return "shard=*/log.parquet"


def objects(folder: Path, compress: Callable[[bytes], bytes], ending: str) -> str:
    for i in range(2):
        path = folder / f"shard={i}" / f"log.{ending}"
        path.parent.mkdir(parents=True)
        lines = shop.random_rows(5 + i, users=20)["impressions"]
        table = pl.DataFrame(
            [line.split(",") for line in lines], schema=shop.HEADERS["impressions"].split(","), orient="row"
        )
        table = table.with_columns(pl.col("time", "position").cast(pl.Int64), impression=pl.col("impression") + f"-{i}")
        text = table.write_ndjson() + '{"impression": "x", "time": "no object"\n'
        path.write_bytes(compress(text.encode()))
    return f"shard=*/log.{ending}"


def plain(data: bytes) -> bytes:
    return data


LAYOUTS: dict[str, Callable[[Path], str]] = {
    "csv": lambda folder: texts(folder, plain, "csv"),
    "csv.gz": lambda folder: texts(folder, gzip.compress, "csv.gz"),
    "csv.zst": lambda folder: texts(folder, zstandard.compress, "csv.zst"),
    "tsv": lambda folder: texts(folder, plain, "tsv"),
    "jsonl": lambda folder: objects(folder, plain, "jsonl"),
    "jsonl.gz": lambda folder: objects(folder, gzip.compress, "jsonl.gz"),
    "parquet": parquets,
    "folder": lambda folder: texts(folder, plain, "csv").partition("shard")[0],
}


def made(folder: Path) -> dict[str, bytes]:
    """Return the content of what convert made, but the rejects, which name their files."""
    files = [p for p in (folder / "convert").rglob("*") if p.is_file() and p.name != "rejects.parquet"]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logs_behind_urls_are_read_as_those_on_disk(upload: Upload, tmp_path: Path, layout: str) -> None:
    names = {}
    for place in ("disk", "bucket"):
        folder = tmp_path / place
        raw, _ = shop.write(folder, RECIPE, clicks=["i3,0", "i3-1,0", "i7-0,0"])
        pattern = LAYOUTS[layout](raw / "log")
        names["disk"] = f"log/{pattern}".rstrip("/")
        names["bucket"] = f"s3://{BUCKET}/{layout}/{pattern}"
    upload(tmp_path / "bucket" / "raw" / "log", layout)
    (tmp_path / "bucket" / "raw" / "impressions.csv").unlink()
    rejects = {}
    for place, files in names.items():
        result = shop.run(
            tmp_path / place, "convert", {"convert.impressions.files": files, "workers": 1, "convert.partitions": 1}
        )
        assert result.exit_code == 0, result.output
        rejects[place] = pl.read_parquet(tmp_path / place / "convert" / "rejects.parquet")
    assert made(tmp_path / "bucket") == made(tmp_path / "disk")
    assert pl.read_parquet(tmp_path / "bucket/convert/vocab/shard.parquet")["value"].sort().to_list() == ["0", "1"]
    there = rejects["bucket"].with_columns(pl.col("file").str.replace(f"s3://{BUCKET}/{layout}/", "log/", literal=True))
    assert there.rows() == rejects["disk"].rows()
    assert layout == "parquet" or rejects["disk"].height > 0


def test_a_whole_shop_in_a_bucket(upload: Upload, tmp_path: Path) -> None:
    raw, _ = shop.write(tmp_path / "disk", **shop.random_rows(2))
    upload(raw, "whole")
    recipe = shop.RECIPE.replace('files = "', f'files = "s3://{BUCKET}/whole/')
    shop.write(tmp_path / "bucket", recipe)
    for path in (tmp_path / "bucket" / "raw").iterdir():
        path.unlink()
    for place in ("disk", "bucket"):
        shop.run_all(tmp_path / place, {"workers": 1, "convert.partitions": 1})
    assert made(tmp_path / "bucket") == made(tmp_path / "disk")
    for part in ("behaviours", "groups"):
        two = [{p.relative_to(f): p.read_bytes() for p in (f / part).rglob("*.parquet")} for f in tmp_path.iterdir()]
        assert two[0] == two[1]


def test_an_empty_value_text_of_several_characters_and_no_header(upload: Upload, tmp_path: Path) -> None:
    """A table by position, with a separator of several characters, behind a URL."""
    raw, _ = shop.write(tmp_path, impressions=[f"i{n},{shop.at(n)},u{n % 3},a1,{n}" for n in range(6)], clicks=["i1,0"])
    (raw / "users.csv").unlink()
    (tmp_path / "users").mkdir()
    (tmp_path / "users" / "users.dat").write_text("u0::f\nu1::\nu2::\\N\n")
    upload(tmp_path / "users", "dat")
    users = f"""files = "s3://{BUCKET}/dat/users.dat"
        header = false
        separator = "::"
        format = "csv"
        null_values = ["\\\\N"]
        columns = {{ user = 1, gender = 2 }}"""
    (tmp_path / "recipe.toml").write_text(shop.RECIPE.replace('files = "users.csv"', users))
    result = shop.run(tmp_path, "convert", {"workers": 1, "convert.partitions": 1})
    assert result.exit_code == 0, result.output
    assert pl.read_parquet(tmp_path / "convert/vocab/gender.parquet")["value"].to_list() == ["f"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (f"s3://{BUCKET}/no/impressions.csv", f"s3://{BUCKET}/no/impressions.csv is not there"),
        (f"s3://{BUCKET}/no/impressions.parquet", f"s3://{BUCKET}/no/impressions.parquet is not there"),
        (f"s3://{BUCKET}/no/*.csv", f"no file matches s3://{BUCKET}/no/*.csv"),
        (f"s3://{BUCKET}/no/", f"no file matches s3://{BUCKET}/no/"),
        ("s3://nobody/*.parquet", "s3://nobody/*.parquet cannot be read: there is no bucket of this name"),
        ("s3://nobody/log.jsonl", "s3://nobody/log.jsonl cannot be read: there is no bucket of this name"),
        (f"s3://{BUCKET}/bad/log.parquet", f"s3://{BUCKET}/bad/log.parquet cannot be read"),
        (f"s3://{BUCKET}/bad/log.csv.gz", f"s3://{BUCKET}/bad/log.csv.gz cannot be read"),
        (f"s3://{BUCKET}/bad/log.csv", f"s3://{BUCKET}/bad/log.csv is not text in UTF-8"),
        (f"s3://{BUCKET}/bad/empty.csv", f"s3://{BUCKET}/bad/empty.csv is empty"),
        (f"s3://{BUCKET}/bad/log.txt", f"cannot tell the format of s3://{BUCKET}/bad/log.txt"),
    ],
)
def test_what_is_not_there_or_broken_is_said_in_a_paragraph(
    upload: Upload, tmp_path: Path, files: str, message: str
) -> None:
    shop.write(tmp_path)
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "log.parquet").write_bytes(b"PAR1 but not much more")
    (bad / "log.csv.gz").write_bytes(gzip.compress(("impression,time,user,ad,position\n" * 9999).encode())[:-30])
    (bad / "log.csv").write_bytes(b"impression,time,user,ad,position\ni1,1709265600,\xff,a1,1\n")
    (bad / "empty.csv").write_bytes(b"")
    (bad / "log.txt").write_bytes(b"?")
    upload(bad, "bad")
    result = shop.run(tmp_path, "convert", {"convert.impressions.files": files, "workers": 1, "convert.partitions": 1})
    assert result.exit_code == 1, result.output
    assert message in result.output
    assert "Traceback" not in result.output
    assert len(result.output.strip().splitlines()) == 1
    assert not (tmp_path / "convert").exists()


def test_a_server_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    shop.write(tmp_path)
    result = shop.run(
        tmp_path,
        "convert",
        {"convert.impressions.files": "s3://elsewhere/*.csv", "workers": 1, "convert.partitions": 1},
    )
    assert result.exit_code == 1, result.output
    assert "s3://elsewhere/*.csv cannot be read" in result.output
    assert "can its server be reached" in result.output
