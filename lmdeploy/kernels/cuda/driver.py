"""Loads cubins and launches their kernels through the CUDA driver, with the attributes that torch does not offer."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Union

import torch
from torch import Tensor

from lmdeploy.kernels.cuda.nvrtc import KernelError

if TYPE_CHECKING:
    from lmdeploy.kernels.cuda.tensor_map import TensorMap

_MAX_DYNAMIC_SHARED_BYTES = 8  # CUfunction_attribute
_CLUSTER_DIMENSION, _PROGRAMMATIC_STREAM_SERIALIZATION = 4, 6  # CUlaunchAttributeID
_DEFAULT_SHARED_BYTES = 40 << 10
_STACK_LIMIT, _STACK_BYTES = 0, 256  # CUlimit
_MPS_ENABLED = 133  # CUdevice_attribute

Argument = Union[Tensor, "TensorMap", int, float, None]


class _Attribute(ctypes.Structure):
    _fields_ = [("id", ctypes.c_uint), ("pad", ctypes.c_uint), ("value", ctypes.c_uint * 16)]


class _Config(ctypes.Structure):
    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class Kernel:
    """A kernel of a cubin in torch's current context, with a fixed block, cluster and dynamic shared memory.

    overlaps: the kernel waits for its predecessor itself (griddepcontrol.wait) and may be started before that has ended.
    """

    def __init__(
        self, cubin: bytes, name: str, *, threads: int, shared_bytes: int = 0, cluster: int = 1, overlaps: bool = False
    ) -> None:
        torch.cuda.current_stream()  # a context must exist before a module is loaded
        torch.cuda.init()
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        library = driver()
        check(library.cuModuleLoadData(ctypes.byref(self._module), cubin), "cuModuleLoadData")
        check(library.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()), name)
        if shared_bytes > _DEFAULT_SHARED_BYTES:
            check(
                library.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED_BYTES, shared_bytes),
                f"{shared_bytes} bytes of shared memory",
            )
        self._attributes = (_Attribute * 2)()
        count = 0
        if cluster > 1:
            self._attributes[count].id = _CLUSTER_DIMENSION
            for axis, size in enumerate((cluster, 1, 1)):
                self._attributes[count].value[axis] = size
            count += 1
        if overlaps:
            self._attributes[count].id = _PROGRAMMATIC_STREAM_SERIALIZATION
            self._attributes[count].value[0] = 1
            count += 1
        self._config = _Config((0, 1, 1), (threads, 1, 1), shared_bytes, None, self._attributes, count)
        self._lock = threading.Lock()  # two engines of a process launch from two threads

    def __call__(self, blocks: int, arguments: Sequence[Argument]) -> None:
        """Launch on torch's current stream: tensors and None as pointers, tensor maps by value, int32, float32."""
        values = [_value(argument) for argument in arguments]
        pointers = (ctypes.c_void_p * len(values))(*[ctypes.addressof(value) for value in values])
        stream = torch.cuda.current_stream().cuda_stream
        with self._lock:
            self._config.grid[0], self._config.stream = blocks, stream
            status = driver().cuLaunchKernelEx(ctypes.byref(self._config), self._function, pointers, None)
        check(status, "cuLaunchKernelEx")


def _value(argument: Argument) -> Any:
    """The argument as a ctypes object, whose address the launch takes."""
    if argument is None:
        return ctypes.c_void_p(0)
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, int):
        return ctypes.c_int(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument.value


@functools.cache
def driver() -> ctypes.CDLL:
    """The CUDA driver's library. Raises KernelError."""
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise KernelError(f"the CUDA driver cannot be loaded: {error}") from None


def copy_async(to: int, source: int, num_bytes: int, stream: int) -> None:
    """Copy between pinned memory and the device, both by address, in a third of the host's time for a torch copy."""
    pointers = ctypes.c_void_p(to), ctypes.c_void_p(source)
    check(driver().cuMemcpyAsync(*pointers, ctypes.c_size_t(num_bytes), ctypes.c_void_p(stream)), "cuMemcpyAsync")


def reserve_less_stack() -> None:
    """Have torch's current context hold 256 bytes of stack for each thread that can run at once, not 1,024.

    That is 198 MiB less on an H100. For a kernel that uses more, the driver reserves more. Source: cudaDeviceSetLimit,
    https://docs.nvidia.com/cuda/cuda-runtime-api/group__CUDART__DEVICE.html
    """
    usual = ctypes.c_size_t()
    check(driver().cuCtxGetLimit(ctypes.byref(usual), _STACK_LIMIT), "cuCtxGetLimit")
    if usual.value > _STACK_BYTES:
        check(driver().cuCtxSetLimit(_STACK_LIMIT, ctypes.c_size_t(_STACK_BYTES)), "cuCtxSetLimit")


@functools.cache
def is_shared(index: int) -> bool:
    """Whether kernels of other processes may run beside this one's on the GPU (MPS); not before drivers that can tell."""
    device, is_on = ctypes.c_int(), ctypes.c_int()
    check(driver().cuDeviceGet(ctypes.byref(device), index), "cuDeviceGet")
    status = driver().cuDeviceGetAttribute(ctypes.byref(is_on), _MPS_ENABLED, device)
    return status == 0 and bool(is_on.value)


def check(status: int, what: str) -> None:
    """Raise KernelError with the driver's own words unless the status is 0."""
    if status:
        text = ctypes.c_char_p()
        driver().cuGetErrorString(status, ctypes.byref(text))
        raise KernelError(f"{what}: {(text.value or b'unknown error').decode()} ({status})")
