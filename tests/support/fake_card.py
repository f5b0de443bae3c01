"""A pretended card: tensors without values that know their device, shape and type, so that a mix-up fails as it would on CUDA.

    with pretended_card():
        model = tiny_model().to(CARD)           # no driver, no CUDA build of PyTorch
        project(g, J)                           # raises where a CPU tensor meets one of the card

PyTorch's FakeTensorMode does the work. Its device here is "lazy", not "cuda": autograd asks a CUDA runtime for streams, which
a CPU build has not. `is_cuda` is true of it, so that the code takes the branches that it takes on a card. What is read back to
the host (`item`, `tolist`, `numpy`) gets made-up values: ones, True, an identity matrix.
"""

import contextlib
import ctypes
from pathlib import Path

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

CARD = torch.device("lazy:0")
T = torch.Tensor


@contextlib.contextmanager
def pretended_card():
    """Inside, tensors have no values, and those made on CARD are of the card."""
    _guards_for_all()
    with FakeTensorMode(allow_non_fake_inputs=False), _Host():
        yield


def _guards_for_all():
    """Item access and in-place copies first switch to the tensor's device, by a table of device types in which a CPU build has
    few entries; the CPU's, which does nothing, serves for the others."""
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    table = (ctypes.c_void_p * 20).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
    for kind in range(len(table)):
        table[kind] = table[kind] or table[0]


class _Host(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in _READ_BACK:
            return _READ_BACK[func](args[0])
        if func is T.is_cuda.__get__:
            return args[0].device == CARD
        if getattr(func, "__module__", "") == "torch.nn.init" or func in (T.uniform_, T.normal_):
            return (*args, *kwargs.values())[0]
        return func(*args, **kwargs)


def _value(tensor):
    return True if tensor.dtype == torch.bool else 1.0 if tensor.is_floating_point() else 1


def _numpy(tensor):
    if tensor.device.type != "cpu":
        raise TypeError(f"can't convert {tensor.device} tensor to numpy: copy it to the host first")
    square = tensor.dim() == 2 and tensor.shape[0] == tensor.shape[1]
    return np.eye(len(tensor)) if square else np.ones(tuple(tensor.shape))


_READ_BACK = {
    T.item: _value,
    T.__bool__: lambda t: True,
    T.__int__: lambda t: 1,
    T.__float__: lambda t: 1.0,
    T.tolist: lambda t: np.full(tuple(t.shape), _value(t)).tolist(),
    T.numpy: _numpy,
}
