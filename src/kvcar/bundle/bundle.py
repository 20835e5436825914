"""A bundle is a folder: ``plan.json``, ``codecs.safetensors`` and ``README.md``. Fit writes it, every runtime reads it.

``plan.json`` holds a manifest: the plan, which model it was fitted for, how, what was measured, the SHA-256 of the codecs and
one of its own contents. Loading checks versions, shapes, ranges and checksums, and ``check_model`` that the model is the one
it was fitted for.
"""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import save as save_safetensors
from torch import Tensor
from transformers import PreTrainedModel

from ..codecs import CODECS, Codec, Quantizer, Stored, checked, read_quantizer
from ..errors import BundleError, ModelMismatchError, PlanError, require
from ..geometry import BFLOAT16_BYTES
from ..kernels.page_means import rounded_means
from ..models.fingerprint import Fingerprint, fingerprint, mismatch
from ..models.geometry import geometry_of
from ..models.settings import differing_settings, settings_of
from ..plan import FORMAT_VERSION, Block, Plan
from ..sizes import REFERENCE_TOKENS, size_in_words, stored_bytes
from .card import model_card
from .files import (
    CARD_FILE,
    CODECS_FILE,
    PLAN_FILE,
    check_target,
    local_folder,
    manifest_digest,
    read_files,
    upload,
    write_folder,
)
from .origin import FitProvenance, ModelIdentity

_FINGERPRINT = "fingerprint"


_PERIODS = (1, 2, 3, 4)  # an emoji takes two to four tokens
_TURNS_WEIGHT = 2


@cache
def _turns(tokens: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What takes the errors of a page to their means over every n-th token, for each period, and the costs of these to nats a token.

    Returns:
        Float32 ``[means, tokens]``, and ``[means, periods]``.
    """
    periods = [period for period in _PERIODS if period == 1 or tokens >= 2 * period]
    means, weights = [], []
    for place, period in enumerate(periods):
        count = tokens // period
        for first in range(period):
            row = torch.zeros(tokens, dtype=torch.float32)
            row[first : count * period : period] = 1 / count
            means.append(row)
            weights.append(count / period * torch.eye(len(periods), dtype=torch.float32)[place])
    return torch.stack(means).to(device), torch.stack(weights).to(device)


@dataclass(frozen=True)
class CodedBlock:
    """The codec and quantiser of one block; both None for a lossless one."""

    codec: Codec | None
    quantizer: Quantizer | None

    def tensors(self) -> dict[str, Tensor]:
        """What the codecs file stores for the block."""
        if self.codec is None or self.quantizer is None:
            return {}
        return self.codec.tensors() | {f"quantizer.{k}": v for k, v in self.quantizer.tensors().items()}

    def round_trip(self, x: Tensor, mean_tokens: int | None = None) -> Tensor:
        """What the cache gives back for vectors float32 ``[..., W]``.

        Args:
            x: the vectors; ``[N, W]`` where pages store their mean errors.
            mean_tokens: tokens of a page where they do; those that fill none have none.
        """
        if self.codec is None or self.quantizer is None:
            return x
        decoded = self.codec.decode(self.quantizer.latents(self.quantizer.codes(self.codec.encode(x))))
        scale = None if mean_tokens is None else self.codec.mean_scale()
        if scale is None or mean_tokens is None:
            return decoded
        whole = len(x) // mean_tokens * mean_tokens
        means = (x - decoded)[:whole].unflatten(0, (-1, mean_tokens)).mean(1)
        read = rounded_means(means, scale)
        return torch.cat([decoded[:whole] + read.repeat_interleave(mean_tokens, 0), decoded[whole:]])

    def error(self, x: Tensor, stored: Tensor) -> Tensor:
        """What reading ``stored`` values ``[..., N, S]`` leaves out of vectors float32 ``[..., N, W]``; of no lossless block."""
        assert self.codec is not None
        assert self.quantizer is not None
        return x - self.codec.decode(self.quantizer.latents(stored))

    def cost(self, error: Tensor, together: int = 1) -> Tensor:
        """What errors of vectors cost, nats ``[..., N]``; for codecs that know it alone.

        The metric takes errors of different tokens for independent, so that attention averages them. One that many tokens have in
        common, or every second to fourth one, as in text that repeats itself, is not averaged: it costs as often as it would
        have been. What comes in turns counts more, as the pages before and after have it too.

        Args:
            error: float32 ``[..., N, W]``.
            together: neighbouring tokens, of which ``N`` is a multiple, whose common error counts so.
        """
        assert self.codec is not None
        if together == 1:
            return self.codec.error_cost(error)
        pages = error.unflatten(-2, (-1, together))
        means, weights = _turns(together, error.device)
        cost = self.codec.error_cost(torch.cat([pages, means @ pages], dim=-2))
        own, turns = cost[..., :together], cost[..., together:] @ weights
        alone, common = own.mean(-1, keepdim=True), turns[..., :1]
        periods = torch.arange(1, turns.shape[-1] + 1, device=error.device)
        # Of independent errors, and of those that all tokens have, nothing is left in turns on average; the first period has none.
        left = (turns - common / periods - alone * (1 - 1 / periods)).amax(-1, keepdim=True).clamp_min(0)
        # Of independent errors the second term is nothing on average.
        return (own + (common - alone) / 2 + _TURNS_WEIGHT * left).flatten(-2)

    def on(self, device: torch.device, block: Block, plan: Plan) -> CodedBlock:
        """The same with its tensors on a device; ``block`` is the plan's."""
        return CodedBlock.from_tensors({name: t.to(device) for name, t in self.tensors().items()}, block, plan)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], block: Block, plan: Plan) -> CodedBlock:
        """Rebuild and check; raises BundleError."""
        if block.lossless:
            checked(tensors, {})
            if block.page_means or block.trellis:
                raise BundleError(
                    "a lossless block has no codes, and no errors for pages to store; the bundle is damaged, fit it again"
                )
            return cls(None, None)
        prefix = "quantizer."
        own = {k: v for k, v in tensors.items() if not k.startswith(prefix)}
        scales = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        codec = CODECS[block.codec].from_tensors(own, len(block.slots) * plan.geometry.head_dim, block.latents)
        if block.page_means and codec.mean_scale() is None:
            raise BundleError(
                f"pages store no mean errors of the {block.codec} codec; the bundle is damaged, fit it again"
            )
        rounded = codec.rounded_decoder()
        if rounded is not None and len(rounded.decoder) != len(block.slots):
            raise BundleError(
                f"the codec of a block has {len(rounded.decoder)} slots, but the plan needs {len(block.slots)}; the bundle is "
                "damaged, fit it again"
            )
        return cls(codec, read_quantizer(scales, block, plan.page_tokens))


@dataclass(frozen=True, repr=False)
class Bundle:
    """Everything needed to compress the cache of one model.

    Attributes:
        plan: how each slot is stored.
        blocks: codec and quantiser per block of the plan.
        fingerprint: sampled weights of the model that it was fitted for.
        model: that model's name and kind.
        fit: how it was fitted.
        figures: what the fit measured, as plain numbers: ``times_smaller``, ``stored_bytes``, ``full_bytes`` and
            ``codec_bytes`` at ``tokens`` tokens; ``held_out``, the figures of ``kvcar.evaluate`` on held-out text, where
            it was measured; ``curve``, pairs of times smaller and expected KL divergence, where the structure was searched.
    """

    plan: Plan
    blocks: tuple[CodedBlock, ...]
    fingerprint: Fingerprint
    model: ModelIdentity
    fit: FitProvenance
    figures: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        """One line: of which model, how much smaller, what the codecs take."""
        tokens = min(REFERENCE_TOKENS, self.plan.geometry.max_positions)
        size = size_in_words(self.plan, tokens, stored_bytes(self.plan, tokens, BFLOAT16_BYTES))
        blocks, codecs = len(self.plan.blocks), self.codec_bytes / 1e6
        return (
            f"<Bundle for {self.model.name}: at {tokens:,} tokens {size}; {blocks} blocks, codecs of {codecs:.1f} MB>"
        )

    @property
    def codec_bytes(self) -> int:
        """Bytes of the codecs' own parameters: like weights, shared by all sequences and not part of the cache."""
        return sum(tensor.nbytes for block in self.blocks for tensor in block.tensors().values())

    @cached_property
    def digest(self) -> str:
        """SHA-256 in hex over plan, codecs, and the sampled weights and settings of the model: what a stored context is tied to.

        Over the tensors themselves and not their file, so that the writer of the file does not matter; over the
        plan's fields that differ from their defaults, so that fields of later versions do not matter either.
        """
        plan = self.plan.model_dump(mode="json", exclude_defaults=True)
        digest = hashlib.sha256(json.dumps(plan, sort_keys=True, separators=(",", ":")).encode())
        for index, block in enumerate(self.blocks):
            for name, tensor in sorted(block.tensors().items()):
                data = tensor.detach().cpu().contiguous()
                digest.update(f"\n{index} {name} {data.dtype} {tuple(data.shape)}\n".encode())
                digest.update(data.numpy().data)
        digest.update(self.model.fingerprint.encode())
        if self.model.settings:
            digest.update(json.dumps(self.model.settings, sort_keys=True, separators=(",", ":")).encode())
        return digest.hexdigest()

    def check_model(self, model: PreTrainedModel) -> None:
        """Refuse a model that the bundle was not fitted for.

        Raises:
            ModelMismatchError: with what differs.
        """
        geometry = geometry_of(model)
        wanted = self.plan.geometry
        if wanted not in (geometry, geometry.with_exact_windows()):
            fields = [f for f in type(wanted).model_fields if getattr(geometry, f) != getattr(wanted, f)]
            differs = ", ".join(f"{f}: {getattr(geometry, f)} instead of {getattr(wanted, f)}" for f in fields)
            raise ModelMismatchError(
                f"this bundle was fitted for {self.model.name[:80]} ({self.model.architecture[:80]}); the model differs in "
                f"{differs}; use the bundle's model or fit a bundle for this one"
            )
        differs = mismatch(self.fingerprint, fingerprint(model))
        if differs is not None:
            raise ModelMismatchError(
                f"this bundle was fitted for the weights of {self.model.name[:80]}, but {differs}; fit a bundle for this model, or "
                "load it again where adapters were merged and taken out, which rounds weights"
            )
        differing = differing_settings(self.model.settings, settings_of(model.config))
        if differing:
            raise ModelMismatchError(
                f"this bundle was fitted for {self.model.name[:80]}, whose weights these are, but the model's configuration differs in "
                f"{', '.join(differing[:5])}; load the model as it was, or fit a bundle for this one"
            )

    def with_figures(self, figures: Mapping[str, Any]) -> Bundle:
        """The same bundle with more figures."""
        return replace(self, figures={**self.figures, **figures})

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = False) -> Path:
        """Write the bundle with its model card, whole or not at all.

        Args:
            folder: where to; must not exist unless ``overwrite`` and it is a bundle.
            overwrite: replace a bundle that is there.

        Raises:
            BundleError: something else is there, or the place cannot be written to.
        """
        require(str, Path, folder=folder)
        folder = Path(folder)
        check_target(folder, overwrite)
        codecs = self._codecs_bytes()
        manifest: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "model": self.model.model_dump(mode="json"),
            "fit": self.fit.model_dump(mode="json"),
            "figures": dict(self.figures),
            "codecs_sha256": hashlib.sha256(codecs).hexdigest(),
            "plan": json.loads(self.plan.to_json()),
        }
        manifest["sha256"] = manifest_digest(manifest)
        files = {CODECS_FILE: codecs, PLAN_FILE: (json.dumps(manifest, indent=1) + "\n").encode()}
        write_folder(
            folder,
            files | {CARD_FILE: model_card(self.plan, self.model, self.fit, self.figures, self.codec_bytes).encode()},
            overwrite,
        )
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str = "Upload a kvcar bundle",
        create_pr: bool = False,
    ) -> str:
        """Upload the bundle with its model card to the Hugging Face hub, by ``huggingface_hub``'s conventions.

        Args:
            repo_id: ``owner/name``; the repository is created where it does not exist.
            private: whether a new repository is private; None leaves that to the owner's settings.
            token: of the hub; None takes the one that was logged in with.
            revision: branch to commit to.
            commit_message: of the commit.
            create_pr: open a pull request instead of committing.

        Returns:
            The address of the repository.
        """
        with tempfile.TemporaryDirectory() as folder:
            written = self.save_pretrained(Path(folder) / "bundle")
            return upload(
                written, repo_id, private, token,
                revision=revision, commit_message=commit_message, create_pr=create_pr,
            )  # fmt: skip

    def _codecs_bytes(self) -> bytes:
        tensors = {f"{_FINGERPRINT}.values": self.fingerprint.values}
        for index, block in enumerate(self.blocks):
            tensors |= {f"blocks.{index}.{name}": t for name, t in block.tensors().items()}
        return save_safetensors({name: t.detach().cpu().contiguous() for name, t in tensors.items()})

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> Bundle:
        """Read and check a bundle from a folder or from the Hugging Face hub.

        Args:
            source: a folder, or ``owner/name`` on the hub, optionally with ``@revision``.
            revision: branch, tag or commit on the hub.
            token: of the hub; None takes the one that was logged in with.
            cache_dir: where downloads are kept; None for the hub's usual place.
            local_files_only: take what was downloaded before.

        Raises:
            BundleError: a file is missing, truncated, tampered with, or does not fit the plan; or the hub has no such bundle.
            PlanError: the plan is malformed or of an unknown version.
        """
        require(str, Path, source=source)
        folder = local_folder(
            source, revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only
        )
        manifest, tensors = read_files(folder)
        plan = Plan.from_data(manifest.get("plan"))
        for block in plan.blocks:
            if block.codec not in CODECS:
                raise PlanError(
                    f"the plan uses codec {block.codec[:40]!r}; this kvcar has {list(CODECS)}; upgrade kvcar"
                )
        figures = manifest.get("figures")
        try:
            model = ModelIdentity.model_validate(manifest.get("model"))
            fit = FitProvenance.model_validate(manifest.get("fit"))
            if not isinstance(figures, dict):
                raise ValueError("figures are an object")
        except ValueError as error:
            problem = error.errors()[0]["msg"][:300] if isinstance(error, ValidationError) else error
            raise BundleError(f"{folder / PLAN_FILE} is damaged: {problem}; fit the bundle again") from None
        of_block = _by_block(tensors, len(plan.blocks))
        values = checked(of_block.pop(_FINGERPRINT), {"values": Stored("n")})["values"]
        blocks = tuple(
            CodedBlock.from_tensors(of_block[f"blocks.{i}"], block, plan) for i, block in enumerate(plan.blocks)
        )
        print_ = Fingerprint(values=values, dtype=model.dtype, digest=model.fingerprint)
        return cls(plan, blocks, print_, model, fit, figures)


def _by_block(tensors: Mapping[str, Tensor], blocks: int) -> dict[str, dict[str, Tensor]]:
    """Tensors below the fingerprint's name and each block's; raises BundleError if one is below none of them."""
    found: dict[str, dict[str, Tensor]] = {_FINGERPRINT: {}} | {f"blocks.{i}": {} for i in range(blocks)}
    for name, tensor in tensors.items():
        owner = re.match(r"(fingerprint|blocks\.\d+)\.", name)
        if owner is None or owner[1] not in found:
            raise BundleError(
                f"{CODECS_FILE} has a tensor {name[:80]!r}, which no block of the plan has; fit the bundle again"
            )
        found[owner[1]][name[owner.end() :]] = tensor
    return found
