"""The weights that a model computes with right now: which adapters are on, and whether anything was written to.

Adapters are told by what peft gives its layers, so that peft need not be there. A parameter that plays no part, of an adapter that is
switched off or merged, is left out, and one of a layer that was wrapped goes by the name it had before: switching all
adapters off gives the model's own weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

_WRAPPED = ("base_layer", "original_module")
_READ = 64  # elements of a parameter that are looked at
_REPLACES = "modules_to_save"  # what an adapter has of its own in place of a module


class WeightsInUse(NamedTuple):
    """What a model's output depends on.

    Attributes:
        parameters: by name; each once, where it is shared. One that is made of other tensors, as quantised weights are, is
            given as those.
        scales: by name, the factors of the adapters that are on.
        inner: names of the tensors that such parameters are made of.
    """

    parameters: dict[str, Tensor]
    scales: dict[str, float]
    inner: set[str]


def weights_in_use(model: nn.Module, offloaded: bool = False) -> WeightsInUse:
    """Find the parameters and scales that play a part in the model's output.

    Args:
        model: to look at.
        offloaded: give weights that accelerate keeps elsewhere until they are needed (``device_map``) as they lie there, instead
            of what stands in their places.
    """
    found, seen = WeightsInUse({}, {}, set()), set[int]()
    for name, value in _walk(model, "", offloaded):
        if not isinstance(value, Tensor):
            found.scales[name] = value
            continue
        # What is kept elsewhere is another tensor at every look, but in the same place where it is shared.
        known = value.data_ptr() if offloaded and not isinstance(value, nn.Parameter) else id(value)
        if known in seen:
            continue
        seen.add(known)
        parts = dict(_parts(name, value))
        found.parameters.update(parts)
        found.inner.update(parts.keys() - {name})
    return found


def _parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor, or those that one is made of whose class says so, as torchao's and quanto's do; they lack most operations."""
    flatten = getattr(type(tensor), "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for own in flatten(tensor)[0]:
        yield from _parts(f"{name}.{own}", getattr(tensor, own))


def offload_hooks(module: nn.Module) -> list[Any]:
    """The hooks by which accelerate brings a module's weights to where they are computed with, and takes them away again."""
    hook = module.__dict__.get("_hf_hook")
    hooks = getattr(hook, "hooks", (hook,))
    return [own for own in hooks if getattr(own, "offload", False) and getattr(own, "weights_map", None) is not None]


def is_offloaded(module: nn.Module, name: str) -> bool:
    """Whether a parameter of a module's own is kept elsewhere until it is needed."""
    return any(name in hook.weights_map for hook in offload_hooks(module))


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes: where its weights are, or are brought to."""
    for part in module.modules():
        for hook in offload_hooks(part):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
        for parameter in part._parameters.values():
            if parameter is not None and parameter.device.type != "meta":
                return parameter.device
    return torch.device("meta")


def active_adapters(model: nn.Module) -> tuple[str, ...]:
    """Name the adapters that are on, and those merged into the weights."""
    names = set[str]()
    for module in model.modules():
        if _has_adapters(module):
            names |= set(_active(module)) | {f"{name} (merged)" for name in _merged(module)}
    return tuple(sorted(names))


@torch.no_grad()
def weights_state(model: nn.Module, rotation: bool = False) -> tuple[object, ...]:
    """Take what changes where weights are replaced, written to, or adapters switched; equal states compare equal.

    Costs some milliseconds for a few hundred parameters, of which it reads a few elements each: writing through ``.data``, as
    merging an adapter does, leaves no other trace, and a write that touches none of them is not seen.

    Args:
        model: to look at.
        rotation: look at the frequencies of rotary modules too, which some models change themselves as they run.
    """
    used = weights_in_use(model)
    tensors = used.parameters | dict(_buffers_in_use(model, rotation))
    places = tuple((name, *_place(p), p.dtype, _version(p)) for name, p in tensors.items())
    return places, tuple(used.scales.items()), active_adapters(model), _elements(tensors)


def _buffers_in_use(model: nn.Module, rotation: bool) -> Iterator[tuple[str, Tensor]]:
    """Floating-point buffers that come with the weights, and frequencies where they are asked for."""
    for prefix, module in model.named_modules():
        for name, buffer in module._buffers.items():
            wanted = name not in module._non_persistent_buffers_set or (rotation and "inv_freq" in name)
            if wanted and buffer is not None and buffer.is_floating_point():
                yield f"buffer {prefix}.{name}", buffer


def _place(parameter: Tensor) -> tuple[int, int]:
    """Which tensor it is, and where; none in particular of one that is brought from elsewhere in every pass."""
    return (0, 0) if parameter.device.type == "meta" else (id(parameter), parameter.data_ptr())


def _walk(module: Any, prefix: str, offloaded: bool) -> Iterator[tuple[str, Tensor | float]]:
    """Parameters and scales in use by name; one that is shared comes once for each of its names."""
    layers: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    if _has_adapters(module):
        layers, on = type(module).adapter_layer_names, _active(module)
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            yield from ((f"{prefix}scaling.{place}", float(scaling[n])) for place, n in enumerate(on) if n in scaling)
    yield from ((prefix + n, _lying(module, n, p, offloaded)) for n, p in module._parameters.items() if p is not None)
    for name, child in module._modules.items():
        if child is None or (on and name == "original_module" and _REPLACES in layers):
            continue
        if name in layers:
            yield from _of_adapters(child, on, f"{prefix}{name}.", offloaded)
        else:
            yield from _walk(child, prefix if layers and name in _WRAPPED else f"{prefix}{name}.", offloaded)


def _lying(module: nn.Module, name: str, parameter: Tensor, offloaded: bool) -> Tensor:
    """A parameter of a module, or what is kept elsewhere of it, where that is asked for."""
    if not offloaded or parameter.device.type != "meta":
        return parameter
    return next((hook.weights_map[name] for hook in offload_hooks(module) if name in hook.weights_map), parameter)


def _of_adapters(
    container: Any, on: tuple[str, ...], prefix: str, offloaded: bool
) -> Iterator[tuple[str, Tensor | float]]:
    """What a dictionary of modules or parameters holds of the adapters that are on, by their place and not their name."""
    for place, name in enumerate(on):
        if name not in container:
            continue
        own = container[name]
        if isinstance(own, nn.Module):
            yield from _walk(own, f"{prefix}{place}.", offloaded)
        else:
            yield f"{prefix}{place}", own


def _has_adapters(module: Any) -> bool:
    names = getattr(type(module), "adapter_layer_names", None)
    return isinstance(names, tuple) and hasattr(module, "active_adapters")


def _merged(module: Any) -> tuple[str, ...]:
    return tuple(getattr(module, "merged_adapters", ()))


def _active(module: Any) -> tuple[str, ...]:
    """Adapters that this module adds as it runs; once merged they are part of its own weights."""
    if getattr(module, "disable_adapters", False) or _merged(module):
        return ()
    return tuple(sorted(module.active_adapters))


def _version(parameter: Tensor) -> int:
    """How often it was written to; tensors made in inference mode do not count."""
    return -1 if parameter.is_inference() else parameter._version


def _elements(parameters: dict[str, Tensor]) -> bytes:
    """Elements of each floating-point parameter, spread over it, fetched together."""
    together: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters.values():
        if parameter.is_floating_point() and parameter.numel() and parameter.device.type != "meta":
            together.setdefault((parameter.device, parameter.dtype), []).append(_spread(parameter.detach()))
    return b"".join(torch.cat(own).float().cpu().numpy().tobytes() for own in together.values())


def _spread(tensor: Tensor) -> Tensor:
    """Up to ``_READ`` elements of a tensor; one of each of some rows where it has many, the first and the last among them."""
    if not tensor.is_contiguous():
        return tensor[tuple(size // 2 for size in tensor.shape)].reshape(1)
    flat = tensor.view(-1)
    return flat[:: max(1, (len(flat) - 1) // (_READ - 1))][:_READ]
