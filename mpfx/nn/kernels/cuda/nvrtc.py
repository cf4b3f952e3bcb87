"""CUDA C++ compiled when it is first needed.

By NVRTC, which comes with torch's CUDA builds, as do NVIDIA's Python bindings: nothing has to be installed, and no
compiler is needed. What was compiled is kept on disk.
"""

import ctypes
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

import torch

from mpfx.nn.kernels.cuda.kept import kept_bytes

_OPTIONS = ("-std=c++17", "-default-device")
_PARTS = {
    "decode.cu": ("packed.cuh", "decode.cuh", "decode.cu", "decode_kernel.cuh"),
    "decode_masked.cu": ("packed.cuh", "masked.cuh", "decode.cuh", "decode_masked.cu", "decode_kernel.cuh"),
    "expand.cu": ("packed.cuh", "masked.cuh", "expand.cu"),
    "tile.cu": ("packed.cuh", "tile.cu"),
}
"""What is compiled as one, in this order, by source file: NVRTC gets one text, so no file includes another one."""


@cache
def available() -> bool:
    """Whether kernels can be compiled and launched here."""
    try:
        return find_spec("cuda.bindings.nvrtc") is not None
    except ModuleNotFoundError:
        return False


@dataclass(frozen=True)
class Launch:
    """How many threads run a kernel, and on how much shared memory.

    Attributes:
        grid: blocks along x and y.
        threads: of a block.
        shared: bytes of dynamic shared memory of a block.
        cluster: blocks along x that are run together and reach each other's shared memory.
        early: whether the kernel may start before what was launched before it on this stream has come to its end; it
            says itself from where on it needs that.
    """

    grid: tuple[int, int]
    threads: int
    shared: int
    cluster: int = 1
    early: bool = False


class Kernel:
    """A compiled function of one argument, a structure that is passed by value."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self.handle = int(function)
        self._shared = 40 << 10  # what every kernel may use, besides what it declares itself

    def __call__(self, launch: Launch, arguments: ctypes.Structure) -> None:
        """Run on the current stream."""
        config, pointers = self._config(launch), (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
        _check(_driver().cuLaunchKernelEx(config, self._function, ctypes.addressof(pointers), 0))

    def _config(self, launch: Launch) -> Any:
        driver = _driver()
        if launch.shared > self._shared:
            attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            _check(driver.cuFuncSetAttribute(self._function, attribute, launch.shared))
            self._shared = launch.shared
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *launch.grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes = launch.shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        config.attrs = [*[_cluster(launch.cluster)] * (launch.cluster > 1), *[_overlapping()] * launch.early]
        config.numAttrs = len(config.attrs)
        return config


@lru_cache(maxsize=512)
def kernel(file: str, name: str, macros: tuple[tuple[str, int], ...], device: int) -> Kernel:
    """Compile ``name`` of a source file beside this one.

    Args:
        file: its name; ``_PARTS`` says what it is compiled with.
        name: of an ``extern "C"`` kernel.
        macros: what is defined for it.
        device: index of the CUDA device that it is for.

    Raises:
        RuntimeError: if it does not compile, with the compiler's log, or the driver does not take it.
    """
    folder = files("mpfx.nn.kernels.cuda")
    return _load("\n".join(folder.joinpath(part).read_text() for part in _PARTS[file]), name, macros, device)


def _load(source: str, name: str, macros: tuple[tuple[str, int], ...], device: int) -> Kernel:
    with torch.cuda.device(device):
        torch.cuda.current_stream().synchronize()  # makes the context of the device current
        binary = compile_source(source, dict(macros), torch.cuda.get_device_capability(device))
        (module,) = _check(_driver().cuModuleLoadData(binary))
        (function,) = _check(_driver().cuModuleGetFunction(module, name.encode()))
    return Kernel(function)


def last_captured() -> int | None:
    """The handle of the kernel that a CUDA graph in the making ends with, on the current stream.

    None: nothing is captured, or what comes last is no kernel, or not the only thing that comes last.
    """
    if not torch.cuda.is_current_stream_capturing():
        return None
    driver = _driver()
    query = getattr(driver, "cuStreamGetCaptureInfo_v3", driver.cuStreamGetCaptureInfo)  # its name before CUDA 13
    status, _, _, _, nodes, *_ = query(torch.cuda.current_stream().cuda_stream)
    if int(status) != 0 or len(nodes) != 1:
        return None
    status, kind = driver.cuGraphNodeGetType(nodes[0])
    if int(status) != 0 or kind != driver.CUgraphNodeType.CU_GRAPH_NODE_TYPE_KERNEL:
        return None
    status, kernel = driver.cuGraphKernelNodeGetParams(nodes[0])
    return int(kernel.func) if int(status) == 0 else None


def compile_source(source: str, macros: Mapping[str, int], capability: tuple[int, int]) -> bytes:
    """Machine code for devices of a compute capability."""
    nvrtc = _nvrtc()
    own = "a" * (capability[0] >= 9)  # what only this generation has, as `wgmma`
    options = [*_OPTIONS, f"--gpu-architecture=sm_{capability[0]}{capability[1]}{own}"]
    options += [f"-D{name}={value}u" if value > 0x7FFFFFFF else f"-D{name}={value}" for name, value in macros.items()]
    version = _check(nvrtc.nvrtcVersion())
    key = hashlib.sha256("\n".join([source, *options, *map(str, version)]).encode()).hexdigest()
    return kept_bytes(f"{key[:32]}.cubin", lambda: _compile(source, options))


def _compile(source: str, options: list[str]) -> bytes:
    nvrtc = _nvrtc()
    (program,) = _check(nvrtc.nvrtcCreateProgram(source.encode(), b"mpfx.cu", 0, None, None))
    encoded = [option.encode() for option in options]
    (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        (size,) = _check(nvrtc.nvrtcGetProgramLogSize(program))
        log = bytearray(size)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"A kernel does not compile with {' '.join(options)}:\n{log.decode(errors='replace')}")
    (size,) = _check(nvrtc.nvrtcGetCUBINSize(program))
    binary = bytearray(size)
    _check(nvrtc.nvrtcGetCUBIN(program, binary))
    nvrtc.nvrtcDestroyProgram(program)
    return bytes(binary)


@cache
def _cluster(size: int) -> Any:
    driver = _driver()
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = size, 1, 1
    return attribute


@cache
def _overlapping() -> Any:
    driver = _driver()
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    attribute.value.programmaticStreamSerializationAllowed = 1
    return attribute


def _check(result: tuple[Any, ...]) -> tuple[Any, ...]:
    status, *values = result
    if int(status) != 0:
        raise RuntimeError(f"A call of the CUDA driver or compiler failed: {status!r}.")
    return tuple(values)


@cache
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


@cache
def _nvrtc() -> Any:
    from cuda.bindings import nvrtc

    return nvrtc
