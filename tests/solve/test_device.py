import logging

import pytest
import torch

from mpfx.solve import device


@pytest.mark.parametrize(
    ("triton", "compiler", "lacks"),
    [
        (True, "clang", None),
        (True, "CC", None),
        (True, None, "Triton needs a C compiler, but there is none of gcc, clang, cc, nor does CC name one"),
        (False, "gcc", "Triton is not installed"),
    ],
)
def test_kernels_need_triton_and_a_compiler_for_it(
    triton: bool,
    compiler: str | None,
    lacks: str | None,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What is missing is said before anything is solved; then PyTorch solves."""
    monkeypatch.setattr(device, "find_spec", lambda _: object() if triton else None)
    monkeypatch.setattr(device, "which", lambda name: f"/bin/{name}" if name == compiler else None)
    monkeypatch.delenv("CC", raising=False)
    if compiler == "CC":
        monkeypatch.setenv("CC", "a compiler")
    device._has_triton.cache_clear()
    with caplog.at_level(logging.WARNING, "mpfx.solve"):
        assert device.has_kernels(torch.device("cuda")) is (lacks is None)
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == ([] if lacks is None else [lacks])
    assert not device.has_kernels(torch.device("cpu"))
    device._has_triton.cache_clear()
