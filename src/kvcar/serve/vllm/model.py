"""What kvcar must know of a model that vLLM runs in a form of its own: whether its weights are the bundle's, how keys rotate.

vLLM fuses and shards weights, so the checkpoint on disk is looked at: the same few hundred numbers, by the same names.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from ...bundle import Bundle
from ...errors import ModelMismatchError, UnsupportedModelError
from ...geometry import KVGeometry
from ...kernels.rotary import RotaryTable
from ...models.fingerprint import Fingerprint, mismatch, sampled_places
from ...models.rotation import learn_rotations
from ...models.settings import differing_settings, settings_of
from ...models.weights import weights_in_use

_LEAST_FOUND = 0.9
_INDEX = "model.safetensors.index.json"


def check_weights(bundle: Bundle, model_config: Any) -> None:
    """Refuse a checkpoint that the bundle was not fitted for.

    Args:
        bundle: with sampled weights.
        model_config: vLLM's, which names the checkpoint.

    Raises:
        ModelMismatchError: its weights or settings are others.
        UnsupportedModelError: it has no safetensors files, or other names than the model in transformers.
    """
    folder = _folder(model_config.model, getattr(model_config, "revision", None))
    values, wanted, dtype = _sampled(folder, bundle.fingerprint.values)
    differs = mismatch(
        Fingerprint(wanted, bundle.fingerprint.dtype, ""), Fingerprint(values, str(dtype).removeprefix("torch."), "")
    )
    if differs is not None:
        raise ModelMismatchError(
            f"the bundle was fitted for the weights of {bundle.model.name[:80]}, but of {model_config.model} {differs}; use the "
            "bundle's model, or fit a bundle for this one"
        )
    config = getattr(model_config, "hf_config", None) or AutoConfig.from_pretrained(folder)
    differing = differing_settings(bundle.model.settings, settings_of(config))
    if differing:
        raise ModelMismatchError(
            f"the bundle was fitted for {bundle.model.name[:80]}, but {model_config.model} differs in {', '.join(differing[:5])}; use "
            "the bundle's model, or fit a bundle for this one"
        )


def rotation_of(config: Any, geometry: KVGeometry) -> RotaryTable | None:
    """Learn how a model of this config rotates its keys, from one random layer of it; None where it does not.

    Raises:
        UnsupportedModelError: transformers cannot make such a layer.
    """
    if not geometry.rotary:
        return None
    small = copy.deepcopy(config)
    small.num_hidden_layers = 1
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(getattr(small, name, None), list):
            setattr(small, name, getattr(small, name)[:1])
    small.vocab_size, small.pad_token_id = min(config.vocab_size, 256), None
    small.intermediate_size = min(getattr(config, "intermediate_size", None) or 64, 64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(small).float().eval()
        own = geometry.model_copy(update={"layers": 1})
        return learn_rotations(model, own).get(0)
    except (ValueError, RuntimeError, AttributeError, TypeError) as error:
        raise UnsupportedModelError(
            f"how {type(config).__name__} rotates its keys cannot be learned from one layer of it in transformers: {error}"
        ) from error


def _folder(model: str, revision: str | None) -> Path:
    """Folder of a checkpoint, which vLLM has loaded already."""
    if Path(model).is_dir():
        return Path(model)
    return Path(
        snapshot_download(model, revision=revision, allow_patterns=["*.safetensors", "*.json"], local_files_only=True)
    )


def _sampled(folder: Path, expected: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """Weights of a checkpoint at the places of a fingerprint, those of the fingerprint that they belong to, and their dtype."""
    names = _parameters(folder)
    files = _files(folder)
    each, rest = divmod(len(expected), len(names))
    if rest:
        raise ModelMismatchError(
            f"the bundle has {len(expected)} sampled weights, which are not equally many of each of the model's {len(names)}"
        )
    found, wanted, dtype = [], [], torch.float32
    for place, (name, shape) in enumerate(names):
        if name not in files:
            continue
        with safe_open(files[name], "pt") as checkpoint:
            tensor = checkpoint.get_tensor(name)
        if tuple(tensor.shape) != shape:
            raise ModelMismatchError(
                f"{name} has shape {tuple(tensor.shape)} on disk, and {shape} by the model's config"
            )
        found.append(tensor.flatten()[sampled_places(tensor.numel(), each)].float())
        wanted.append(expected[place * each : (place + 1) * each])
        dtype = tensor.dtype
    if len(found) < _LEAST_FOUND * len(names):
        raise UnsupportedModelError(
            f"only {len(found)} of {len(names)} weights of {folder} have the names that transformers gives them, so it cannot be "
            "told whether they are the bundle's"
        )
    return torch.cat(found), torch.cat(wanted), dtype


def _parameters(folder: Path) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the model's weights in the order of a fingerprint."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    used = weights_in_use(model).parameters
    return sorted((n, tuple(p.shape)) for n, p in used.items() if p.is_floating_point() and p.numel())


def _files(folder: Path) -> dict[str, Path]:
    """Which file of a checkpoint has a weight, by its name."""
    index = folder / _INDEX
    if index.is_file():
        return {n: folder / file for n, file in json.loads(index.read_text())["weight_map"].items()}
    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as checkpoint:
            found |= dict.fromkeys(checkpoint.keys(), path)
    if not found:
        raise UnsupportedModelError(
            f"{folder} has no safetensors files, by which kvcar would tell whether the weights are the bundle's"
        )
    return found
