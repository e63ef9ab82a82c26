"""A tiny simulated shop, from raw logs to report in seconds, by the installed package and real Make."""

import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.shop import TABLES

CHECKOUT = Path(__file__).parent.parent

RECIPE = """
name = "tiny"
about = "A tiny simulated shop for the tests."

[simulate]
users = 60
goods = 40
days = 4
history_days = 5
impressions_per_user_day = 4
active_share = 0.8
categories = 4
shops = 8
ads = 20
new_ads_per_day = 4
picture_size = 32
"""
RECIPE += TABLES
RECIPE += """
[features]
gender = { of = "user" }
ad_id = { of = "ad", column = "ad", switch = "ad_id" }
ad_category = { of = "ad", column = "category", vocab = "category" }
position = { of = "scene" }
ad_image = { of = "ad", kind = "image", column = "image" }
goods = { of = "behaviour" }
category = { of = "behaviour" }
image = { of = "behaviour", kind = "image" }

[select-clicks]
min_dwell = 10.0
max_behaviours = 10

[extract-images]
backbone = "squeezenet1_1:features.5"
weights = "random"
size = 32

[train]
batch = 64
epochs = 1
extractor = [16, 12]
tower = [16]
attention = [8]

[eval]
bootstrap = 50

[variants.pictures.train]
"""
MORE_VARIANTS = """
[variants.basic.train]
ad_image = false
user_images = false

[variants.all-clicks.select-clicks]
min_dwell = 0.0
"""


def build_wheel(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, below a folder."""
    shutil.copytree(CHECKOUT / "stages", folder / "source" / "stages")
    shutil.copytree(CHECKOUT / "ctrkit", folder / "source" / "ctrkit")
    shutil.copytree(CHECKOUT / "data", folder / "source" / "data")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (CHECKOUT / name).is_file():
            shutil.copy(CHECKOUT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--disable-pip-version-check"]
    offline = ["--no-index", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*pip, *offline, str(folder / "source")], check=True, capture_output=True)
    [wheel] = folder.glob("*.whl")
    return wheel


def install(folder: Path) -> Path:
    """Unpack the wheel; return the folder to put on Python's path.

    Its modules are the checkout's, and what Python and Numba have compiled of these serves them: times, which Python
    goes by, become the same.
    """
    site = folder / "site"
    with zipfile.ZipFile(build_wheel(folder)) as wheel:
        wheel.extractall(site)
    for package in ("ctrkit", "ctrkit/models"):
        for source in (CHECKOUT / package).glob("*.py"):
            shutil.copystat(source, site / package / source.name)
        compiled = CHECKOUT / package / "__pycache__"
        compiled.mkdir(exist_ok=True)
        (site / package / "__pycache__").symlink_to(compiled)
    return site


@dataclass(frozen=True)
class Run:
    """A folder with tiny.toml and what Make makes of it, by the package that lies in `site`.

    warm: returns the socket of a server of tests/warm.py, which runs the commands; without, each starts Python anew.
    """

    folder: Path
    site: Path
    warm: Callable[[], Path] | None = None

    @property
    def home(self) -> Path:
        """Where the outputs lie."""
        return self.folder / "runs" / "tiny"

    @property
    def environment(self) -> dict[str, str]:
        """One thread everywhere, and nothing of a Make or ctrkit around the tests."""
        kept = {k: v for k, v in os.environ.items() if not re.match("MAKE|MFLAGS|CTRKIT|GNUMAKEFLAGS", k)}
        return {**kept, "PYTHONPATH": str(self.site), "POLARS_MAX_THREADS": "1", "OMP_NUM_THREADS": "1"}

    def ctrkit(self, *words: str, fails: bool = False) -> str:
        """Run a command of the package in the folder; return what it printed."""
        return self._run([*self.python, *words], fails)

    @property
    def python(self) -> list[str]:
        """The words that stand for `ctrkit`."""
        if self.warm is None:
            return [sys.executable, "-P", "-m", "ctrkit"]
        return [sys.executable, "-IS", str(CHECKOUT / "tests" / "warm.py"), "ask", str(self.warm())]

    def command(self, *words: str, jobs: int = 2) -> list[str]:
        """Return the call of Make."""
        ctrkit = f"CTRKIT={shlex.join(self.python)}"
        return ["make", "-f", str(self.site / "ctrkit" / "pipeline.mk"), f"-j{jobs}", ctrkit, "DATA=tiny.toml", *words]

    def make(self, *words: str, jobs: int = 2, fails: bool = False) -> str:
        """Run Make; return what it printed, standard output and error together."""
        return self._run(self.command(*words, jobs=jobs), fails)

    def _run(self, words: list[str], fails: bool) -> str:
        done = subprocess.run(
            words,
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (done.returncode != 0) == fails, done.stdout
        return done.stdout

    def plan(self, *words: str) -> set[str]:
        """Return the outputs that Make would make, or ask about, now: their paths below `home`."""
        printed = self.make("-n", *words)
        return {re.sub("^runs/tiny/", "", out) for out in re.findall(r"--(?:out|json) (\S+)", printed)}

    def start(self, *words: str, jobs: int = 2) -> subprocess.Popen[bytes]:
        """Start Make in a process group of its own, with processes that can be killed; it prints to make.log."""
        with open(self.folder / "make.log", "ab") as log:
            return subprocess.Popen(
                dataclasses.replace(self, warm=None).command(*words, jobs=jobs),
                cwd=self.folder,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def contents(self) -> dict[str, bytes]:
        """Return every file that must come out the same each time: path → bytes.

        Sidecars and TensorBoard's files hold times; the report, and one of its figures, show how long the stages took.
        """
        found = {str(p.relative_to(self.home)): p for p in sorted(self.home.rglob("*")) if p.is_file()}
        timed = ("report.html", "report-figures/time.csv", "report-figures/time.png")
        skipped = {name for name in found if "tensorboard" in name or name in timed}
        skipped |= {name for name in found if name.endswith(".json") and (self.home / name[:-5]).exists()}
        return {name: path.read_bytes() for name, path in found.items() if name not in skipped and ".lock" not in name}

    def times(self, inner: str = "") -> dict[str, tuple[int, int]]:
        """Return when each file below `home` was written, and which one it is; hidden ones do not count."""
        files = [p for p in (self.home / inner).rglob("*") if p.is_file() and not p.name.startswith(".")]
        return {str(p): (p.stat().st_mtime_ns, p.stat().st_ino) for p in files}

    def leftovers(self) -> list[str]:
        """Return the temporary files, parts and locks."""
        hidden = self.folder.rglob(".*")
        return sorted(str(p) for p in hidden if re.search(r"\.tmp-|\.parts-|\.lock$", p.name))


def descendants(pid: int) -> list[int]:
    """Return a process's children, their children and so on, the deepest last."""
    found = [pid]
    for parent in found:
        try:
            tasks = list(Path(f"/proc/{parent}/task").iterdir())
            found += [int(child) for task in tasks for child in (task / "children").read_text().split()]
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found[1:]


def wait_for(process: subprocess.Popen[bytes], stage: str) -> int:
    """Return the process of a stage, once Make has started it."""
    until = time.monotonic() + 60
    while time.monotonic() < until:
        for pid in descendants(process.pid):
            try:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if stage in words[1:5] and "-c" not in words:
                return pid
        time.sleep(0.02)
    raise AssertionError(f"{stage} did not start")


def kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill Make and all that it started, at once."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
