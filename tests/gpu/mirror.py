"""A device that is pretended: its tensors say that they are on it, and keep their values in the CPU's memory.

As a GPU does, it refuses operations that mix tensors of two devices, and its tensors give no NumPy arrays. It has no
streams and no memory to run out of, and rounds as the CPU does, in bfloat16 too. Call `mirror` before the process takes
its first derivative: torch counts devices then, once.
"""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "mirror"
MOVES = ("_to_copy", "_copy_from", "copy_")
"""Operations that may take tensors of two devices."""

INDEXED = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")
"""Operations whose second argument may be on the CPU: indices."""


@cache
def mirror() -> torch.device:
    """The device, known to torch from the first call on."""
    backend = SimpleNamespace(
        is_available=lambda: True,
        device_count=lambda: 1,
        current_device=lambda: 0,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda seed: None,
    )
    _setup_privateuseone_for_python_backend(NAME, backend)
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(lambda operation, *args, **kwargs: _run(operation, args, kwargs), "PrivateUse1")
    everything.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    # Those that torch itself calls below the level of Python, where the fallback is not asked, or by filling a tensor
    # of no size.
    for name in ("arange", "arange.start", "arange.start_step", "linspace", "eye", "eye.m", "empty_strided"):
        aten.impl(name, _maker(_operation(name)), "PrivateUse1")
    copy = _operation("copy_")
    aten.impl("copy_", lambda to, *rest: _run(copy, (to, *rest), {}), "PrivateUse1")
    mirror.kept = everything, aten  # registered as long as they live
    return torch.device(NAME, 0)


class Mirrored(torch.Tensor):
    """A tensor on the device; `values` are on the CPU."""

    values: torch.Tensor

    @staticmethod
    def __new__(cls, values: torch.Tensor, requires_grad: bool = False) -> Mirrored:
        with torch.inference_mode(False):
            found = torch.Tensor._make_wrapper_subclass(
                cls,
                values.size(),
                strides=values.stride(),
                storage_offset=values.storage_offset(),
                dtype=values.dtype,
                device=mirror(),
                requires_grad=requires_grad,
            )
        found.values = values
        return found

    def untyped_storage(self) -> torch.UntypedStorage:
        """Of the values: those who write files ask which tensors share their memory."""
        return self.values.untyped_storage()

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return _run(operation, args, kwargs or {})

    def __repr__(self) -> str:
        return f"mirrored {self.values!r}"


def _run(operation, args: tuple, kwargs: dict):
    """An operation on values on the CPU, if all tensors are on one device; its result is on that, or where asked."""
    if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"):
        return operation.decompose(*args, **kwargs)  # in inference mode, these come here whole
    pretended = next((each for each in tree_leaves((args, kwargs)) if isinstance(each, FakeTensor)), None)
    if pretended is not None:  # shapes alone are asked for
        args, kwargs = tree_map_only(Mirrored, lambda each: _pretend(each, pretended.fake_mode), (args, kwargs))
        return operation(*args, **kwargs)
    name, device = operation.overloadpacket.__name__, kwargs.get("device")
    fixed = (args[0], *args[2:]) if name in INDEXED else args
    tensors = [each for each in tree_leaves((fixed, kwargs)) if isinstance(each, torch.Tensor)]
    here = [isinstance(each, Mirrored) for each in tensors]
    # A number may be a tensor of the CPU.
    if name not in MOVES and any(here) and any(each.dim() for each, own in zip(tensors, here, strict=True) if not own):
        raise RuntimeError(f"expected all tensors on one device in {operation}: {[each.device for each in tensors]}")
    if name in INDEXED and not here[0] and any(isinstance(each, Mirrored) for each in tree_leaves(args[1])):
        raise RuntimeError(f"indices are on {NAME}, and what they index is on the CPU, in {operation}")
    own_args, own_kwargs = tree_map_only(Mirrored, lambda each: each.values, (args, kwargs))
    own_kwargs = {key: value for key, value in own_kwargs.items() if key not in ("device", "pin_memory")}
    found = operation(*own_args, **own_kwargs)
    if name == "copy_":
        return args[0]
    if (torch.device(device).type != NAME) if device is not None else not any(here):
        return found
    found = tree_map_only(torch.Tensor, Mirrored, found)
    return return_and_correct_aliasing(operation, args, kwargs, found) if any(here) else found


def _pretend(tensor: Mirrored, mode) -> FakeTensor:
    with torch.inference_mode(False):
        return FakeTensor(mode, tensor.values.detach().to("meta"), mirror())


def _operation(name: str):
    packet, _, overload = name.partition(".")
    return getattr(getattr(torch.ops.aten, packet), overload or "default")


def _maker(operation):
    def make(*args, device=None, pin_memory=None, layout=None, **kwargs) -> Mirrored:
        return Mirrored(operation(*args, **kwargs))

    return make
