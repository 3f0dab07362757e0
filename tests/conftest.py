import functools
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the scripts lie in the repo's root
torch.set_num_threads(1)
# most tests compare with restatements on the CPU, bit for bit; test_cuda.py shows the GPU to others
os.environ.setdefault("GPUS_FOR_TESTS", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))
os.environ["CUDA_VISIBLE_DEVICES"] = ""
for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "TORCHELASTIC_RESTART_COUNT"):
    os.environ.pop(name, None)  # tests may themselves be run by a cluster's launcher

import procs  # noqa: E402
from datasets import make_folder  # noqa: E402

import common  # noqa: E402


@pytest.fixture(autouse=True)
def _handlers():
    """Signals do again what they did, whatever a test's runs caught: Ctrl-C ends pytest."""
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def root(tmp_path_factory):
    """A data set of 8 train images, 4 of them labelled, and 8 val images."""
    return make_folder(tmp_path_factory.mktemp("data") / "root", val=8)


@pytest.fixture
def small(monkeypatch):
    """Networks of a few weights in the runs of this process."""
    monkeypatch.setattr(common, "build_network", procs.tiny_network)


@pytest.fixture(scope="session")
def straight(root, tmp_path_factory):
    """What an undisturbed run of a script on `root` leaves."""

    @functools.cache
    def result_of(script: str) -> dict:
        out = tmp_path_factory.mktemp(script) / "out"
        with pytest.MonkeyPatch.context() as m:
            m.setattr(common, "build_network", procs.tiny_network)
            procs.SCRIPTS[script].main(procs.flags(script, root, out))
        return procs.result(out)

    return result_of
