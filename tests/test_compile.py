"""--compile is the same run, and no part of the networks falls back to eager."""

import functools
import logging

import pytest
import torch
from datasets import make_folder
from helpers import TINY, run_main
from torch import nn

import mkd
import segkc
import speed

SCRIPTS = {"speed": speed, "mkd": mkd, "segkc": segkc}


@pytest.mark.parametrize("script", SCRIPTS)
def test_compile(script, tmp_path, monkeypatch, caplog):
    """Guards: graph breaks that fail, a full cache. Traced alone: code generation takes minutes."""
    traced, compile_part = [], nn.Module.compile

    def backend(graph: torch.fx.GraphModule, inputs: list) -> torch.fx.GraphModule:
        traced.append(len(graph.graph.nodes))
        return graph

    small = ["--senior", "resnet18"] * (script == "segkc")
    make_folder(tmp_path / "root", val=2)
    argv = [*TINY, *small, "--dataset", "folder", "--root", str(tmp_path / "root")]
    argv += ["--backbone", "resnet18", "--split", "1/2"]
    plain, *_ = run_main(SCRIPTS[script], argv, tmp_path / "plain")
    assert not traced
    monkeypatch.setattr(
        nn.Module, "compile", functools.partialmethod(compile_part, backend=backend)
    )
    limit = torch._dynamo.config.cache_size_limit
    torch._dynamo.reset()
    try:
        with caplog.at_level(logging.WARNING, "torch._dynamo"):
            compiled, *_ = run_main(SCRIPTS[script], [*argv, "--compile"], tmp_path / "compiled")
    finally:
        torch._dynamo.config.cache_size_limit = limit
        torch._dynamo.reset()
    assert not [r.message for r in caplog.records if "hit config." in r.message]
    assert max(traced) > 50  # a backbone in one piece
    for a, b in zip(plain, compiled, strict=True):
        loss = [k for k in a if k[:1] in "lL"]
        assert {k: a[k] for k in loss} == pytest.approx({k: b[k] for k in loss}, rel=1e-4)
