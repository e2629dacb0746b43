"""The examples in the docstrings of the public names say what happens."""

import doctest
import inspect

import pytest
import torch

import sdp_kernels


@pytest.mark.parametrize("name", sdp_kernels.__all__)
def test_the_example_runs(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    public = getattr(sdp_kernels, name)
    assert "Example:" in (inspect.getdoc(public) or "")
    names = {"torch": torch, **{name: getattr(sdp_kernels, name) for name in sdp_kernels.__all__}}
    found = doctest.DocTestFinder(recurse=False).find(public, name, globs=names)
    (example,) = (each for each in found if each.examples)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        result = doctest.DocTestRunner().run(example)
    assert result.attempted > 0
    assert not result.failed, capsys.readouterr().out
