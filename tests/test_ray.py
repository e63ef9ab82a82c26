"""The data stages on a Ray cluster of two nodes here, one of which is killed in the middle of the work."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ctrkit.engine import Place
from ctrkit.errors import UserError
from tests import shop

RAY = Path(sys.executable).with_name("ray")
PARTITIONS = 24
ATTEMPTS = 5
WORKING = "ray::far_task"
"""Title of a worker's process while it does a task."""
RECIPE = shop.RECIPE.replace("[convert]\n", f"[convert]\npartitions = {PARTITIONS}\n", 1).replace(
    'files = "impressions.csv"', 'files = "impressions-*.csv"'
)
needs_ray = pytest.mark.skipif(not RAY.is_file(), reason="Ray is not installed: pip install 'ctrkit[ray]'")


class Cluster:
    """Nodes of a Ray cluster, each the processes of one `ray start`."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ray-"))  # short: sockets lie in it
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.address = f"127.0.0.1:{s.getsockname()[1]}"
        home = {"HOME": str(self.folder), "RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0"}
        self.environment = os.environ | home | {"RAY_ADDRESS": self.address}
        self.nodes: list[subprocess.Popen[bytes]] = []

    def start(self, cpus: int) -> subprocess.Popen[bytes]:
        """Start a node; the first is the head."""
        port = self.address.split(":")[1]
        place = (
            [f"--address={self.address}"]
            if self.nodes
            else ["--head", f"--port={port}", f"--temp-dir={self.folder}", "--include-dashboard=false"]
        )
        ready = self.folder / f"node-{len(self.nodes)}.log"
        environment = {k: v for k, v in self.environment.items() if k != "RAY_ADDRESS"}
        with open(ready, "wb") as log:
            words = [RAY, "start", *place, f"--num-cpus={cpus}", f"--object-store-memory={80 << 20}", "--block"]
            node = subprocess.Popen(words, env=environment, stdout=log, stderr=log, start_new_session=True)
        self.nodes.append(node)
        deadline = time.monotonic() + 60
        while b"Ray runtime started" not in ready.read_bytes():
            assert node.poll() is None, ready.read_text()
            assert time.monotonic() < deadline, ready.read_text()
            time.sleep(0.05)
        return node

    def stop(self) -> None:
        for node in self.nodes:
            for pid in family(node.pid):
                send(pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def parents() -> dict[int, int]:
    """Return each process's parent."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            found[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    return found


def family(pid: int) -> list[int]:
    """Return a process and all that it and its children started."""
    parent = parents()
    found = [pid]
    for one in found:
        found += [child for child, its in parent.items() if its == one]
    return found


def send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def title(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().strip("\0")
    except OSError:
        return ""


def freeze_at_work(node: int) -> list[int]:
    """Stop a node's processes, where one of them is at work on a task; return them."""
    every = family(node)
    for pid in every:
        if title(pid) == WORKING:
            send(pid, signal.SIGSTOP)
            if title(pid) == WORKING:
                for other in every:
                    send(other, signal.SIGSTOP)
                return every
            send(pid, signal.SIGCONT)
    return []


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    cluster = Cluster()
    try:
        cluster.start(cpus=1)
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shop and what the stages make of it in this process. Not to be changed."""
    folder = tmp_path_factory.mktemp("local")
    rows = shop.random_rows(3, users=3000)
    raw, _ = shop.write(folder, RECIPE, **rows)
    (raw / "impressions.csv").unlink()
    for i in range(6):
        lines = [shop.HEADERS["impressions"], *rows["impressions"][4000 * i : 4000 * (i + 1)]]
        (raw / f"impressions-{i}.csv").write_text("\n".join(lines) + "\n")
    shop.run_all(folder, {"workers": 1})
    return folder


def words(stage: str) -> list[str]:
    """Return the command of a stage by Ray, with relative paths, to be run in `folder`."""
    inputs = {
        "convert": ["--raw", "raw"],
        "select-clicks": ["--convert", "convert"],
        "group": ["--convert", "convert", "--behaviours", "behaviours"],
    }
    outputs = ["--recipe", "recipe.toml", "--out", shop.OUTPUTS[stage], "--set", "engine=ray"]
    return [sys.executable, "-m", "ctrkit", stage, *inputs[stage], *outputs]


def content(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def records(folder: Path, stage: str, phase: str) -> set[str]:
    """Return the finished tasks of a phase that is under way."""
    return {p.name for p in folder.glob(f".{shop.OUTPUTS[stage]}.parts-*/{phase}/*.json")}


def copy(local: Path, folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        if (local / name).is_dir():
            shutil.copytree(local / name, folder / name)
        else:
            shutil.copy(local / name, folder / name)
    return folder


def kill_half_way(
    node: int, driver: subprocess.Popen[bytes], folder: Path, stage: str, phases: dict[str, int]
) -> tuple[int, int]:
    """Kill a node in the middle of a phase and of a task; return how many tasks were done by then, of how many.

    phases: those that will do, with their numbers of tasks.
    """
    for phase, tasks in phases.items():
        # Freeze the node at a moment when some tasks of the phase are done and it is at work on another.
        frozen: list[int] = []
        while driver.poll() is None and not frozen and len(records(folder, stage, phase)) < tasks:
            time.sleep(0.002)
            if records(folder, stage, phase):
                frozen = freeze_at_work(node)
        # The other node does what it can; what is left then is what the frozen one was doing.
        done, quiet = -1, time.monotonic()
        while frozen and time.monotonic() < quiet + 1:
            now = len(records(folder, stage, phase))
            done, quiet = (now, time.monotonic()) if now != done else (done, quiet)
            time.sleep(0.05)
        if 0 < done < tasks and driver.poll() is None:
            for pid in frozen:
                send(pid, signal.SIGKILL)
            return done, tasks
        for pid in frozen:  # it had just done its last one
            send(pid, signal.SIGCONT)
    return 0, 0


@needs_ray
@pytest.mark.parametrize(
    ("stage", "phases", "inputs"),
    [
        (
            "convert",
            {"scan": 8}
            | dict.fromkeys(
                ("match", "label impressions", "count", "encode impressions", "encode behaviours"), PARTITIONS
            ),
            ["raw", "recipe.toml"],
        ),
        (
            "group",
            {"group": PARTITIONS, "number": 2 * PARTITIONS},
            ["convert", "convert.json", "behaviours", "behaviours.json", "recipe.toml"],
        ),
    ],
    ids=["convert", "group"],
)
def test_a_node_killed_half_way_changes_no_byte(
    cluster: Cluster, local: Path, tmp_path: Path, stage: str, phases: dict[str, int], inputs: list[str]
) -> None:
    # The moment is drawn; where the phases happened to be over too soon, it is drawn again.
    for attempt in range(ATTEMPTS):
        folder = copy(local, tmp_path / str(attempt), *inputs)
        if converted_without_a_node(cluster, folder, stage, phases):
            break
    else:
        pytest.fail(f"no node was killed in time\n{(folder / 'log').read_text()}")
    name = shop.OUTPUTS[stage]
    assert content(folder / name) == content(local / name)
    assert sorted(p.name for p in folder.iterdir()) == sorted([*inputs, "log", name, f"{name}.json"])


def converted_without_a_node(cluster: Cluster, folder: Path, stage: str, phases: dict[str, int]) -> bool:
    """Run a stage, one of whose nodes is killed on the way. Say whether it was killed in the middle of a phase."""
    doomed = cluster.start(cpus=3)
    log = folder / "log"
    with open(log, "w") as f:
        driver = subprocess.Popen(words(stage), cwd=folder, env=cluster.environment, stdout=f, stderr=f)
    try:
        done, tasks = kill_half_way(doomed.pid, driver, folder, stage, phases)
        assert driver.wait(120) == 0, log.read_text()
    finally:
        for pid in [*family(driver.pid), *family(doomed.pid)]:
            send(pid, signal.SIGKILL)
        driver.wait()
    return 0 < done < tasks


def run(words: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@needs_ray
def test_a_mistake_that_a_task_finds_is_told_in_a_paragraph(cluster: Cluster, local: Path, tmp_path: Path) -> None:
    copy(local, tmp_path, "convert", "convert.json", "behaviours", "behaviours.json")
    (tmp_path / "recipe.toml").write_text(RECIPE.replace('position = { of = "scene" }', 'position = { of = "user" }'))
    result = run(words("group"), tmp_path, cluster.environment)
    assert result.returncode == 1, result.stderr
    assert 'Error: [features.position] is of = "user" but has more than one value within a day' in result.stderr
    assert "Traceback" not in result.stdout + result.stderr
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith((".groups.parts", "groups"))]


@needs_ray
def test_without_an_address_a_cluster_is_started_here(local: Path, tmp_path: Path) -> None:
    copy(local, tmp_path, "convert", "convert.json", "recipe.toml")
    with tempfile.TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as home:  # short: sockets lie in it
        environment = os.environ | {"HOME": home, "RAY_TMPDIR": home, "RAY_ADDRESS": ""}
        result = run([*words("select-clicks"), "--set", "workers=2"], tmp_path, environment)
    assert result.returncode == 0, result.stderr
    assert content(tmp_path / "behaviours") == content(local / "behaviours")
    assert [line for line in result.stderr.splitlines() if "select" not in line] == []


@needs_ray
@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nonsense"])
def test_a_cluster_that_does_not_answer(tmp_path: Path, address: str) -> None:
    shop.write(tmp_path)
    begun = time.monotonic()
    result = run(words("convert"), tmp_path, os.environ | {"RAY_ADDRESS": address})
    assert result.returncode == 1
    assert f"Error: cannot use the Ray cluster at RAY_ADDRESS = {address}: " in result.stderr
    assert "Traceback" not in result.stderr
    assert time.monotonic() - begun < 30


def test_ray_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    shop.write(tmp_path)
    result = shop.run(tmp_path, "convert", {"engine": "ray"})
    assert result.exit_code == 1
    assert 'pip install "ctrkit[ray]"' in result.output


def test_a_machine_that_cannot_do_the_work_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"the machine .* does not see .*not-shared; the raw files and the output"):
        Place.here(tmp_path / "not-shared").enter()
    monkeypatch.chdir(Path(__file__).parent)  # and back, at the end
    here = Place.here(tmp_path)
    monkeypatch.chdir(tmp_path)
    here.enter()
    assert os.getcwd() == here.current
    other = Place(tmp_path, here.current, here.versions | {"polars": "0.1"})
    with pytest.raises(UserError, match=r"has polars .*, and this command 0\.1, .* install the same version"):
        other.enter()
