# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
"""Stored prefixes in vLLM: a KV connector that writes pages of 256 tokens as records and loads them instead of a prefill.

    vllm serve M --kv-transfer-config '{"kv_connector": "KVCarConnector",
        "kv_connector_module_path": "kvcar.serve.vllm_connector", "kv_role": "kv_both", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"bundle": "FOLDER or hub id", "folder": "FOLDER"}}'

Attention and pages stay vLLM's own. The scheduler looks at a record, checksum and all, before it promises it; what fails
all the same when a worker decodes it is reported, and vLLM computes it again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import vllm
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorBase_V1, KVConnectorMetadata, KVConnectorRole
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index
from vllm.v1.kv_cache_interface import FullAttentionSpec

from ..bundle import Bundle
from ..context import check_store
from ..errors import InputError, KVCarError, ModelMismatchError, UnsupportedModelError, require
from .record_coder import RecordCoder
from .record_file import PAGE_TOKENS, RecordKey, token_chain
from .record_store import RecordStore
from .vllm.model import check_weights, rotation_of
from .vllm_pages import EnginePages, slots_of

TESTED = ("0.32",)
"""Versions of vLLM, by their first two numbers, that the tests were run with."""

_log = logging.getLogger("vllm.kvcar")


@dataclass(frozen=True)
class StoreOptions:
    """What ``kv_connector_extra_config`` may say.

    Attributes:
        bundle: folder, or id on the hub.
        folder: of records.
        save: whether to write records, or only to load them.
        allow_untested: run on versions of vLLM and on devices that kvcar was not tested with.
    """

    bundle: str
    folder: str
    save: bool = True
    allow_untested: bool = False

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> StoreOptions:
        """Read the options; raises InputError for what is missing, unknown or of another kind."""
        known = [each.name for each in fields(cls)]
        if set(given) - set(known) or not {"bundle", "folder"} <= set(given):
            raise InputError(
                f'kv_connector_extra_config must be {{"bundle": "FOLDER or hub id", "folder": "FOLDER"}}, where '
                f"{', '.join(known[2:])} may be added; got {dict(given)!r}"
            )
        options = cls(**given)
        require(str, bundle=options.bundle, folder=options.folder)
        require(bool, save=options.save, allow_untested=options.allow_untested)
        return options


class PageJob(NamedTuple):
    """One page of a request to load or save.

    Attributes:
        request: its id.
        key: of the record.
        blocks: of vLLM, that hold the page's tokens.
        skip: so many of its first tokens are not to be loaded, as they are there.
    """

    request: str
    key: RecordKey
    blocks: tuple[int, ...]
    skip: int = 0


@dataclass
class StoredPages(KVConnectorMetadata):
    """What the scheduler tells the worker of one step."""

    loads: list[PageJob] = field(default_factory=list)
    saves: list[PageJob] = field(default_factory=list)


class KVCarConnector(KVConnectorBase_V1):
    """See the module."""

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        super().__init__(vllm_config=vllm_config, role=role, kv_cache_config=kv_cache_config)
        self._options = StoreOptions.of(self._kv_transfer_config.kv_connector_extra_config)
        _check_config(vllm_config, kv_cache_config, self._options)
        self._block_tokens = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self._store = RecordStore(self._options.folder, _coder(vllm_config, self._options))
        self._requests: dict[str, Any] = {}
        self._external: dict[str, int] = {}
        self._pages: EnginePages | None = None
        self._failed_blocks: set[int] = set()
        self._failed_requests: set[str] = set()
        if role == KVConnectorRole.SCHEDULER:
            coder = self._store.coder
            _log.info(
                "kvcar stores prefixes: bundle %s (%s), records of %d tokens in %s, %s",
                self._options.bundle, coder.bundle.digest[:12], PAGE_TOKENS, self._store.folder,
                "read and written" if self._saves else "only read",
            )  # fmt: skip

    @property
    def _saves(self) -> bool:
        return self._options.save and self._kv_transfer_config.is_kv_producer

    # The scheduler's side

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int | None, bool]:
        """Count the tokens that records hold beyond those that vLLM has; at least one token is left to compute."""
        if not self._kv_transfer_config.is_kv_consumer or not _is_plain(request):
            return 0, False
        keys = self._keys(request)[: (request.num_tokens - 1) // PAGE_TOKENS]
        page = num_computed_tokens // PAGE_TOKENS
        while page < len(keys) and self._store.holds(keys[page]):
            page += 1
        return max(0, page * PAGE_TOKENS - num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Take note of a request that is about to run, and of what it was promised."""
        del blocks
        self._requests[request.request_id] = request
        if num_external_tokens > 0:
            self._external[request.request_id] = num_external_tokens

    def build_connector_meta(self, scheduler_output: Any) -> StoredPages:
        """List the pages to load before a step and to save after it."""
        meta = StoredPages()
        for request_id, computed, is_new in _scheduled(scheduler_output):
            request, external = self._requests.get(request_id), self._external.pop(request_id, 0)
            if request is None or not _is_plain(request):
                continue
            stop = min(computed + scheduler_output.num_scheduled_tokens[request_id], request.num_tokens)
            first_new = 0 if is_new else computed // PAGE_TOKENS
            if not external and stop // PAGE_TOKENS <= first_new:
                continue
            meta.loads += self._jobs(request, (computed - external) // PAGE_TOKENS, computed, computed - external)
            if self._saves:
                jobs = self._jobs(request, first_new, stop, 0)
                meta.saves += [job for job in jobs if not self._store.holds(job.key)]
        for request_id in scheduler_output.finished_req_ids:
            self._requests.pop(request_id, None)
        return meta

    def request_finished(self, request: Any, block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """Forget a request; its pages were saved as they were filled."""
        del block_ids
        self._requests.pop(request.request_id, None)
        self._external.pop(request.request_id, None)
        return False, None

    def _keys(self, request: Any) -> list[RecordKey]:
        coder, salt = self._store.coder, (request.cache_salt or "").encode()
        return token_chain(request.all_token_ids[:], coder.fingerprint, coder.bundle.digest, salt)

    def _jobs(self, request: Any, first: int, stop: int, start: int) -> list[PageJob]:
        """Whole pages from ``first`` on that end by token ``stop``; tokens before ``start`` are not to be loaded."""
        if first >= stop // PAGE_TOKENS:
            return []
        assert self._kv_cache_manager is not None
        blocks, per_page = (
            self._kv_cache_manager.get_block_ids(request.request_id)[0],
            PAGE_TOKENS // self._block_tokens,
        )
        return [
            PageJob(
                request.request_id, key, tuple(blocks[page * per_page : (page + 1) * per_page]),
                max(0, start - page * PAGE_TOKENS),
            )
            for page, key in enumerate(self._keys(request)[: stop // PAGE_TOKENS])
            if page >= first
        ]  # fmt: skip

    # The worker's side

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Decode the records that this step needs into vLLM's pages."""
        del kwargs
        self._failed_requests = set()
        for job in self._metadata.loads:
            if job.request not in self._failed_requests:
                try:
                    self._load(job, forward_context)
                    continue
                except KVCarError as error:
                    _log.warning("a stored page of request %s is computed again: %s", job.request, error)
                    self._failed_requests.add(job.request)
            # What comes after a page that is missing cannot be used either.
            self._failed_blocks.update(job.blocks[job.skip // self._block_tokens :])

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Everything is loaded before the first layer."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Blocks span layers, so pages are saved when all layers are through."""

    def wait_for_save(self) -> None:
        """Write the pages that this step has filled."""
        for job in self._metadata.saves:
            if job.request not in self._failed_requests and self._pages is not None:
                slots = slots_of(job.blocks, self._block_tokens)
                self._store.write(job.key, *self._pages.read(slots))

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Name the blocks that were promised and could not be loaded."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    @property
    def _metadata(self) -> StoredPages:
        found = self._get_connector_metadata()
        assert isinstance(found, StoredPages)
        if self._pages is None and (found.loads or found.saves):
            context = self._vllm_config.compilation_config.static_forward_context
            self._pages = EnginePages(_layers(context, self._store.coder), self._store.coder.geometry.head_dim)
        return found

    def _load(self, job: PageJob, forward_context: Any) -> None:
        del forward_context
        assert self._pages is not None
        keys, values = self._store.read(job.key)
        slots = slots_of(job.blocks, self._block_tokens)
        self._pages.write(slots[job.skip :], keys[:, :, job.skip :], values[:, :, job.skip :])


def _scheduled(output: Any) -> list[tuple[str, int, bool]]:
    """Id, tokens computed before, and whether it is new or resumed, of every request of a step."""
    new = [(request.req_id, request.num_computed_tokens, True) for request in output.scheduled_new_reqs]
    cached = output.scheduled_cached_reqs
    return new + [
        (request, computed, request in cached.resumed_req_ids)
        for request, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True)
    ]


def _is_plain(request: Any) -> bool:
    """Whether tokens alone decide what a request's keys and values are."""
    return (
        not request.mm_features
        and request.lora_request is None
        and request.prompt_token_ids is not None
        and getattr(request, "prompt_embeds", None) is None
    )


def _coder(config: Any, options: StoreOptions) -> RecordCoder:
    check_store()
    bundle = Bundle.from_pretrained(options.bundle)
    check_weights(bundle, config.model_config)
    rotary = rotation_of(config.model_config.hf_config, bundle.plan.geometry)
    return RecordCoder(bundle, lambda _: rotary, config.model_config.dtype)


def _check_config(config: Any, kv_cache_config: Any, options: StoreOptions) -> None:
    """Refuse what stored prefixes do not support of vLLM; raises UnsupportedModelError with all that is in the way."""
    parallel, device = config.parallel_config, config.device_config.device.type
    groups = kv_cache_config.kv_cache_groups
    specs = [group.kv_cache_spec for group in groups]
    tested = ".".join(vllm.__version__.split(".")[:2]) in TESTED and device == "cpu"
    found = {
        f"vLLM {vllm.__version__} on {device}, which was not tested (set allow_untested to try)": not tested
        and not options.allow_untested,
        "kv_load_failure_policy is not recompute, so a damaged record would end its request": (
            config.kv_transfer_config.kv_load_failure_policy != "recompute"
        ),
        "tensor, pipeline or context parallelism is on": parallel.world_size > 1
        or parallel.decode_context_parallel_size > 1
        or parallel.prefill_context_parallel_size > 1,
        "speculative decoding is on": config.speculative_config is not None,
        f"--kv-cache-dtype is {config.cache_config.cache_dtype} (leave it auto)": config.cache_config.cache_dtype
        not in ("auto", str(config.model_config.dtype).removeprefix("torch.")),
        "not every layer keeps all of the past in pages of one kind": len(specs) != 1
        or type(specs[0]) is not FullAttentionSpec,
        f"blocks of {[spec.block_size for spec in specs]} tokens, of which {PAGE_TOKENS} are no multiple": any(
            PAGE_TOKENS % spec.block_size for spec in specs
        ),
    }
    reasons = [reason for reason, there in found.items() if there]
    if reasons:
        raise UnsupportedModelError(f"kvcar cannot store prefixes here: {'; '.join(reasons)}")


def _layers(context: Mapping[str, Any], coder: RecordCoder) -> Sequence[Any]:
    """VLLM's attention layers in order; raises ModelMismatchError where they are not those of the bundle."""
    geometry = coder.geometry
    layers = {extract_layer_index(name): each for name, each in context.items() if isinstance(each, Attention)}
    shapes = {(each.num_kv_heads, each.head_size) for each in layers.values()}
    if sorted(layers) != list(range(geometry.layers)) or shapes != {(geometry.kv_heads, geometry.head_dim)}:
        raise ModelMismatchError(
            f"vLLM has {len(layers)} layers of attention of (KV heads, head dim) {sorted(shapes)}; the bundle is for "
            f"{geometry.layers} of ({geometry.kv_heads}, {geometry.head_dim}): use the bundle's model"
        )
    return [layers[index] for index in sorted(layers)]
