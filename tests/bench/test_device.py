"""Devices and dtypes by name; sizes of caches."""

from pathlib import Path

import pytest
import torch

from mpfx.bench.device import _cpu_cache, device_of, dtype_of, environment, last_level_cache

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cpus", ""])
def test_other_devices_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"to be cpu, cuda or cuda:<number> but got {name!r}"):
        device_of(name)


def test_a_device_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(None) == device_of("cpu") == CPU
    with pytest.raises(ValueError, match="finds 0 CUDA devices: choose another, or `cpu`"):
        device_of("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(None) == torch.device("cuda", 0)
    assert device_of("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="finds 2 CUDA devices"):
        device_of("cuda:2")


def test_dtypes() -> None:
    assert dtype_of(None, CPU) == torch.float32
    assert dtype_of(None, torch.device("cuda")) == torch.bfloat16
    assert dtype_of("float16", CPU) == torch.float16
    with pytest.raises(ValueError, match="one of float32, float16, bfloat16 but got 'int8'"):
        dtype_of("int8", CPU)


def test_the_cache_is_the_sum_of_the_last_level(tmp_path: Path) -> None:
    """Four cores: L1 each, one L3 for the first three and one for the last."""
    for core in range(4):
        for index, (level, size) in enumerate(((1, "48K"), (3, "1024K"))):
            cache = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            cache.mkdir(parents=True)
            shared = f"{core}" if level == 1 else ("0-2" if core < 3 else "3")
            for name, text in (("level", str(level)), ("size", size), ("shared_cpu_list", shared)):
                (cache / name).write_text(text + "\n")
    assert _cpu_cache(tmp_path) == 2 << 20
    assert _cpu_cache(tmp_path / "nowhere") == 0
    for file in tmp_path.glob("cpu*/cache/index1/size"):  # of the L3: not told by every processor
        file.unlink()
    assert _cpu_cache(tmp_path) == 4 * 48 << 10
    assert last_level_cache(CPU) >= 1 << 18


def test_the_environment_names_versions() -> None:
    found = environment(CPU, torch.bfloat16)
    assert found["torch"] == torch.__version__
    assert found["dtype"] == "bfloat16"
    assert found["kind"] == "cpu"
    assert found["device"]
