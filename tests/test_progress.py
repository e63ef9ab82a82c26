"""Lines of progress where there is no terminal: what is done, how fast, how long it will take."""

import pytest

from ctrkit import progress
from ctrkit.progress import Meter


@pytest.mark.parametrize(
    ("done", "line"),
    [
        (0, "train: 500/2,000 samples, 50 samples/s, 30 s left, loss 0.5"),
        (1000, "train: 1,500/2,000 samples, 50 samples/s, 10 s left, loss 0.5"),
    ],
)
def test_rate_and_time_left(
    done: int, line: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What another process did before a kill counts as done, not for the rate."""
    clock = {"now": 100.0}
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock["now"])
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: False, raising=False)
    with Meter("train", 2000, "samples", done=done) as meter:
        clock["now"] += 1
        meter.add(50)  # a line at most every five seconds
        clock["now"] += 9
        meter.add(450, "loss 0.5")
        assert capsys.readouterr().err.splitlines() == [line]
        meter.add(0)
    last = f"train: {done + 500:,}/2,000 samples"
    assert capsys.readouterr().err.startswith(last)
