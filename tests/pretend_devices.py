"""Devices that a machine does not have: tensors on the CPU that say they are elsewhere, and refuse to meet those of another device.

Everything that is called while ``pretend_devices()`` is entered passes a function mode, which runs it on the CPU and looks where its
tensors are. Only operations that move tensors take those of two devices, as on real ones.
"""

from collections.abc import Iterator
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_map

FIRST, SECOND = torch.device("xla:0"), torch.device("xla:1")
CPU = torch.device("cpu")
_GETTERS = {Tensor.device.__get__}
_SET_DATA = Tensor.data.__set__
_MOVES = {Tensor.to, Tensor.copy_, Tensor.cpu, Tensor.numpy, Tensor.tolist, Tensor.item, Tensor.type_as}
# What a module asks that moves.
_ASK = {torch._C._nn._parse_to, torch._has_compatible_shallow_copy_type}  # pyright: ignore[reportAttributeAccessIssue]
_LIKE = {Tensor.new_empty, Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_tensor}


def where(tensor: Tensor) -> torch.device:
    return tensor.__dict__.get("pretended", CPU)


def put(tensor: Tensor, device: torch.device) -> Tensor:
    tensor.pretended = device
    return tensor


class _Pretend(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in _GETTERS:
            return where(args[0])
        if func is Tensor.__deepcopy__:  # its memo, with tensors of all devices, is written to
            return put(func(*args), where(args[0]))
        if func in _ASK:
            return func(*args, **kwargs)
        if func is torch.histc:  # takes no integers on a CPU, where models know it
            args = (put(args[0].float(), where(args[0])), *args[1:])
        if func == _SET_DATA:  # as modules do that move
            put(args[0], where(args[1]))
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Tensor)]
        target = self._target(func, tensors, args, kwargs)
        args, kwargs = tree_map(_on_cpu, (args, kwargs))
        given = set(map(id, tensors))

        def placed(x: Any) -> Any:
            if not isinstance(x, Tensor) or where(x) == target:
                return x
            # What moves is another tensor, if it were not for the memory.
            return put(x.view_as(x) if id(x) in given else x, target)

        return tree_map(placed, func(*args, **kwargs))

    def _target(self, func: Any, tensors: list[Tensor], args: Any, kwargs: Any) -> torch.device:
        """Where the result is."""
        asked = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.device)]
        if isinstance(kwargs.get("device"), str):
            asked.append(torch.device(kwargs["device"]))
        if func is Tensor.cpu:
            return CPU
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], Tensor):
            return where(args[1])
        if func is Tensor.to and len(args) > 1 and isinstance(args[1], str):
            return torch.device(args[1])
        if asked:
            return asked[0]
        if func in _MOVES or func in _LIKE:
            return where(tensors[0])
        # Numbers travel freely, and gradients come without a place.
        placed = {where(x) for x in tensors if x.ndim} if torch._C._current_graph_task_id() < 0 else set()
        if func is Tensor.__getitem__ or func is Tensor.__setitem__ or func is Tensor.index_select:
            placed = {where(args[0])} | (placed - {CPU})
        if len(placed) > 1:
            raise RuntimeError(f"{getattr(func, '__name__', func)}: tensors on {sorted(map(str, placed))}")
        return next(iter(placed), where(tensors[0]) if tensors else CPU)


def _on_cpu(x: Any) -> Any:
    return CPU if isinstance(x, torch.device) else "cpu" if isinstance(x, str) and x.startswith("xla") else x


def pretend_devices() -> TorchFunctionMode:
    """Enter to have ``FIRST`` and ``SECOND`` beside the CPU."""
    return _Pretend()


def on_one_device(model: nn.Module) -> nn.Module:
    """Lay a model on the first device."""
    for part in model.modules():
        for tensor in [*part._parameters.values(), *part._buffers.values()]:
            if tensor is not None:
                put(tensor, FIRST)
    return model


def over_two_devices(
    model: nn.Module, layers: nn.ModuleList, devices: tuple[torch.device, ...] = (FIRST, SECOND)
) -> nn.Module:
    """Share ``layers`` out among ``devices``, neighbours together; lay all else on the first, with hooks as ``device_map`` makes them."""
    on_one_device(model)
    for place, layer in enumerate(layers):
        device = devices[place * len(devices) // len(layers)]
        for tensor in [*layer.parameters(), *layer.buffers()]:
            put(tensor, device)
        add_hook_to_module(layer, AlignDevicesHook(execution_device=device, skip_keys="past_key_values"))
    for part in _outside(model, set(layers)):
        for each in part.modules():
            add_hook_to_module(each, AlignDevicesHook(execution_device=FIRST))
    add_hook_to_module(
        model, AlignDevicesHook(execution_device=FIRST, io_same_device=True, skip_keys="past_key_values")
    )
    return model


def _outside(module: nn.Module, layers: set[nn.Module]) -> Iterator[nn.Module]:
    """The largest modules that hold none of the layers and are none."""
    for part in module.children():
        if part in layers:
            continue
        if layers.isdisjoint(part.modules()):
            yield part
        else:
            yield from _outside(part, layers)
