"""Names of devices. The lock of a GPU is tested where there is one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ctrkit import devices
from ctrkit.errors import UsageError, UserError

gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")


def test_names() -> None:
    assert devices.resolve("cpu") == "cpu"
    assert devices.resolve("auto") == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UsageError, match=r"train\.device = 'gpu' is not a device; use 'auto'"):
        devices.resolve("gpu", "train.device")
    with pytest.raises(UsageError, match="torch finds"):
        devices.resolve("cuda:77")
    for name in ("mps", "meta"):
        with pytest.raises(UsageError, match=f"device = '{name}' is not supported; use 'auto', 'cpu' or 'cuda'"):
            devices.resolve(name)


def test_memory_that_is_not_there_is_told() -> None:
    with pytest.raises(UserError, match=r"not enough memory: .*allocate 4000000000000000 bytes.* Take less$"):  # noqa: SIM117
        with devices.memory_told("Take less"):
            torch.empty(10**15)
    with pytest.raises(RuntimeError, match="shape"), devices.memory_told("Take less"):
        torch.ones(2).view(3)


def test_a_cpu_is_shared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices.tempfile, "tempdir", str(tmp_path))
    with devices.lock("cpu"), devices.lock("cpu"):
        assert list(tmp_path.iterdir()) == []


@gpu
def test_a_gpu_is_not_shared() -> None:
    code = "from ctrkit import devices\nwith devices.lock('cuda'): print('mine', flush=True)"
    with devices.lock("cuda"):
        other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(timeout=15)
    out, err = other.communicate()
    assert out == b"mine\n"
    assert b"waiting for the GPU" in err
