"""Makes Triton believe in a GPU whose kernels the machine runs.

The launcher, the JIT's specialisation of the actual arguments and the compiler run as they are, down to PTX. A stand-in
for the NVIDIA backend hands the PTX on where the assembler's output would be, and the driver that "loads" it parses it.
"""

import os
from typing import Any

import numpy as np

from ptx.machine import Kernel, Run
from ptx.memory import Extent, extent

TARGETS = ("sm_80", "sm_90", "sm_100")
_BITS = {"fp16": np.float16, "fp32": np.float32, "fp64": np.float64}


class Utils:
    """What Triton asks of a driver's library."""

    def __init__(self, compile_only: bool) -> None:
        self.compile_only = compile_only
        self.kernels: list[Kernel] = []

    def get_device_properties(self, device: int) -> dict[str, int]:
        # the shared memory of a block on an H100; nothing of ours comes near
        return {"max_shared_mem": 232448, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        if not self.compile_only:
            self.kernels.append(Kernel(binary.decode()))
        return 1, len(self.kernels) - 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


class Device:
    """The driver: the target that Triton compiles for, and how launches run."""

    def __init__(self, target: str, compile_only: bool) -> None:
        self.target, self.compile_only = target, compile_only
        self.run = Run()
        self.utils = Utils(compile_only)

    @property
    def capability(self) -> int:
        return int(self.target.removeprefix("sm_"))

    def launcher_cls(self, src: Any, metadata: Any) -> "Launcher":
        return Launcher(self, src, metadata)

    def get_current_device(self) -> int:
        return self.capability  # so that each target has a cache of kernels of its own

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.capability, 10)

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability, 32)

    def get_active_torch_device(self) -> Any:
        import torch

        return torch.device("cpu")

    def is_active(self) -> bool:
        return True

    def map_python_to_cpp_type(self, kind: str) -> str:
        return kind


class Launcher:
    """Takes a launch where the generated launcher of a GPU would: the arguments of the kernel's Python signature."""

    def __init__(self, device: Device, src: Any, metadata: Any) -> None:
        self.device, self.shared = device, metadata.shared
        self.names = list(src.fn.arg_names)
        self.kinds = [src.signature[name] for name in self.names]

    def __call__(
        self,
        x: int,
        y: int,
        z: int,
        stream: int,
        function: int,
        packed: Any,
        data: Any,
        enter: Any,
        leave: Any,
        *args: Any,
    ) -> None:
        if self.device.compile_only:
            return
        bits: list[int] = []
        extents: list[Extent] = []
        for name, kind, value in zip(self.names, self.kinds, args, strict=True):
            _flatten(name, kind, value, bits, extents)
        kernel = self.device.utils.kernels[function]
        self.device.run.launch(kernel, (x, y, z), extents, bits, self.shared).function = function


def _flatten(name: str, kind: Any, value: Any, bits: list[int], extents: list[Extent]) -> None:
    """Appends the bits of an argument that reaches the kernel, and the bytes of every tensor among the arguments."""
    if isinstance(kind, tuple):
        fields = getattr(value, "_fields", range(len(kind)))
        for field, part, inner in zip(fields, kind, value, strict=True):
            _flatten(f"{name}.{field}", part, inner, bits, extents)
    elif kind == "constexpr":
        pass
    elif kind.startswith("*"):
        extents.append(extent(value, name))
        bits.append(value.data_ptr())
    elif kind in _BITS:
        word = np.array([value], _BITS[kind])
        bits.append(int(word.view(f"u{word.itemsize}")[0]))
    elif kind[0] in "iu":
        width = max(int(kind[1:]), 8)
        bits.append(int(value) & ((1 << width) - 1))
    else:
        raise NotImplementedError(f"ptx: argument {name} of type {kind}")


def _stand_in() -> type:
    """Returns the NVIDIA backend without its assembler: the binary of a kernel is its PTX."""
    from triton.backends.nvidia.compiler import CUDABackend

    class Backend(CUDABackend):
        def make_cubin(self, src: str, metadata: Any, options: Any, capability: int) -> bytes:
            return src.encode()

        def hash(self) -> str:
            return f"ptx-machine-{self.target.arch}"

    return Backend


def install(target: str = "sm_90", compile_only: bool = False) -> Device:
    """Makes every kernel that is launched from now on run on the machine; returns the device.

    It must precede the import of the kernels in a process without ``TRITON_INTERPRET``. The target may be changed
    afterwards: ``device.target = "sm_80"``. With ``compile_only`` a launch compiles, down to the assembler's output,
    and runs nothing.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("ptx: TRITON_INTERPRET=1 is set, so that kernels are not compiled: unset it")
    if target not in TARGETS:
        raise ValueError(f"ptx: target must be one of {', '.join(TARGETS)}, got {target!r}")
    import triton
    from triton import backends

    device = Device(target, compile_only)
    if not compile_only:
        nvidia = backends.backends["nvidia"]
        backends.backends["nvidia"] = type(nvidia)(compiler=_stand_in(), driver=nvidia.driver)
    triton.runtime.driver.set_active(device)
    return device
