"""The command line as a whole: fast help, contracts, and mistakes that are told in one paragraph."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import Result

from ctrkit import __version__
from ctrkit.cli import COMMANDS, main
from ctrkit.errors import nearest
from ctrkit.provenance import TABLES
from tests.shop import ctrkit
from tests.tiny_world import CHECKOUT, RECIPE

HEAVY = ("torch", "torchvision", "polars", "numpy", "h5py", "pydantic", "rich", "PIL", "jinja2")
EVERY = pytest.mark.parametrize("name", COMMANDS)


def command(name: str) -> click.Command:
    found: click.Command = importlib.import_module(COMMANDS[name][0]).command
    return found


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["convrt"]])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    code = "import json, sys\nfrom ctrkit.cli import main\nsys.argv = ['ctrkit', *sys.argv[1:]]\n"
    code += "try: main()\nexcept SystemExit: print(); print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=True)
    loaded = json.loads(done.stdout.splitlines()[-1])
    assert "ctrkit.cli" in loaded
    assert [m for m in loaded if m in HEAVY or m.startswith("ctrkit.stages")] == []


def test_planning_imports_no_torch(tmp_path: Path) -> None:
    (tmp_path / "tiny.toml").write_text(RECIPE)
    code = "import sys\nfrom ctrkit.cli import main\n"
    code += "main(['rules', '--recipe', 'tiny.toml', '--out', 'runs'], standalone_mode=False)\n"
    code += "assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_help_lists_every_command_in_the_order_of_the_flow() -> None:
    result = ctrkit("--help")
    assert result.exit_code == 0
    places = [result.output.index(f"\n  {name} ") for name in COMMANDS]
    assert places == sorted(places)
    assert ctrkit("--version").output == f"ctrkit, version {__version__}\n"


def test_commands_are_the_stage_files_and_the_make_targets() -> None:
    files = {p.stem.replace("_", "-") for p in (CHECKOUT / "stages").glob("*.py")} - {"--init--"}
    assert files == set(COMMANDS)
    assert set(TABLES) <= set(COMMANDS)
    makefile = (CHECKOUT / "Makefile").read_text()
    assert re.findall(r"^STAGES := (.*)$", makefile, re.MULTILINE) == [" ".join(TABLES)]
    for name, (module, _) in COMMANDS.items():
        assert module == "ctrkit.stages." + name.replace("-", "_")


@EVERY
def test_the_contract_of_a_command(name: str) -> None:
    """Its summary is the one in the list; it says what it reads and writes, and shows calls that parse."""
    found = command(name)
    assert found.name == name
    assert found.help is not None
    assert found.help.split("\n\n")[0].strip() == COMMANDS[name][1]
    result = ctrkit(name, "--help")
    assert result.exit_code == 0
    text = result.output
    assert COMMANDS[name][1] in " ".join(text.split())
    assert re.search(r"\bReads\b", text), name
    assert re.search(r"\b[Ww]rites\b", text), name
    for parameter in found.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, f"{name} {parameter.opts}"
    examples = re.findall(r"^ +(?:make -f \"\$\()?(ctrkit (?:[^)\n\\]|\\\n)*)", text, re.MULTILINE)
    assert examples
    for example in examples:
        _, stage, *words = shlex.split(example.replace("\\\n", " "))
        assert stage == name
        found.make_parser(found.make_context(name, [], resilient_parsing=True)).parse_args(words)


def message(result: Result) -> str:
    """Return the error that a command ended with; there must be no traceback, and nothing after it."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    error = result.output.partition("Error: ")[2].strip()
    assert "\n" not in error
    return error


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    (tmp_path / "tiny.toml").write_text(RECIPE + "\n[variants.all-clicks.select-clicks]\nmin_dwell = 0.0\n")
    return tmp_path / "tiny.toml"


def test_near_names_of_commands_and_options() -> None:
    assert message(ctrkit("convrt")) == "there is no command 'convrt'; did you mean 'convert' or 'score' or 'report'?"
    assert message(ctrkit("zzz")).startswith("there is no command 'zzz'; known: check, compare, convert, daily, eval")
    assert "'--recipe'" in message(ctrkit("convert", "--recpie", "demo"))
    assert "Missing option '--recipe'" in message(ctrkit("convert", "--raw", "raw"))


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--recipe", "dmeo"], "no recipe 'dmeo': neither a file nor a shipped recipe; did you mean 'demo'?"),
        (["--recipe", "TINY", "--variant", "al-clicks"], "TINY has no variant 'al-clicks'; did you mean 'all-clicks'?"),
        (["--recipe", "TINY", "--set", "train.epoch=3"], "table [train] has no key 'epoch'; did you mean 'epochs'?"),
        (["--recipe", "TINY", "--set", "trian.epochs=3"], "has no key 'trian'; did you mean 'train'"),
        (["--recipe", "TINY", "--set", "train.epochs=three"], 'train.epochs: has to be a number (given: "three")'),
        (["--recipe", "TINY", "--set", "train.epochs=0"], "greater than or equal to 1 (given: 0)"),
        (["--recipe", "TINY", "--set", "epochs"], "--set 'epochs' is not of the form table.key=value"),
    ],
)
def test_mistakes_in_the_recipe(tiny: Path, words: list[str], error: str) -> None:
    result = ctrkit("simulate", *(w.replace("TINY", str(tiny)) for w in words), "--out", tiny.parent / "raw")
    assert error.replace("TINY", str(tiny)) in message(result)
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.toml"]


def test_mistakes_in_a_run(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tiny.parent)
    assert "did you mean 'train'" in message(ctrkit("run", "tiny.toml", "--target", "trian"))
    assert "needs raw data" in message(ctrkit("run", "movielens"))
    assert "cannot work with ' '" in message(ctrkit("run", "tiny.toml", "--out", "my runs"))
    assert "-j" in message(ctrkit("run", "tiny.toml", "-j", "0"))
    monkeypatch.setenv("PATH", "")
    result = ctrkit("run", "tiny.toml")
    assert result.exit_code == 1
    assert "there is no `make` on the PATH" in result.output
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.toml"]


def test_a_bug_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch, tiny: Path) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("ctrkit.stages.simulate.simulate", broken)
    result = ctrkit("simulate", "--recipe", tiny, "--out", tiny.parent / "raw")
    assert isinstance(result.exception, RuntimeError)
    assert [p.name for p in tiny.parent.iterdir()] == ["tiny.toml"]


def test_nearest() -> None:
    assert nearest("epoch", ["epochs", "batch"]) == "; did you mean 'epochs'?"
    assert nearest("x", ["b", "a"]) == "; known: a, b"
    assert nearest("x", []) == ""
    assert nearest("x", [f"name{i:02}" for i in range(30)]).endswith("name19, …")


def test_the_module_is_the_command() -> None:
    done = subprocess.run([sys.executable, "-m", "ctrkit", "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("Usage: ")
    assert main.name == "main"
