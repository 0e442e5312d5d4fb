"""Every hook into SGLang 0.5.23, in one place.

SGLang logs and swallows what a plugin raises, so nothing here may fail quietly: if registering fails, the flag is
unknown to SGLang's parser and the backend unknown to its registry, and a server that was asked for kvcodec won't start.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from sglang.srt.arg_groups.resolution_hooks import register_resolution_hook
from sglang.srt.plugins import load_plugins
from sglang.srt.plugins.hook_registry import HookRegistry, HookType

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.plugin.gpu_memory import keep_room
from sglang_kvcodec.plugin.layer_kinds import suit_layer_kinds
from sglang_kvcodec.plugin.settings import BACKEND_NAME, add_flags, prepare, take_flags

_SCHEDULER = "sglang.srt.managers.scheduler"
_WEIGHTS = "sglang.srt.managers.scheduler_components.weight_updater.SchedulerWeightUpdaterManager"
_SERVE_BACKENDS = "sglang.cli.serve_backends"
_caches: list[Any] = []
"""The caches of this process; one scheduler, so one at most."""
_ADDER = "sglang.srt.managers.schedule_policy.PrefillAdder"
_STREAMER = "sglang.srt.managers.scheduler_components.output_streamer.SchedulerOutputStreamer"


def register() -> None:
    """Registers the hooks that this process needs."""
    HookRegistry.register("sglang.srt.server_args.ServerArgs.add_cli_args", _after_add_cli_args, HookType.AFTER)
    HookRegistry.register("sglang.srt.server_args.ServerArgs.from_cli_args", _after_from_cli_args, HookType.AFTER)
    HookRegistry.register("sglang.srt.server_args.ServerArgs.resolve_once", _before_resolve_once, HookType.BEFORE)
    # The first step that reads the model's configuration.
    register_resolution_hook("handle_model_specific_adjustments")(_around_model_specific)
    # The step that settles SGLang's share of the GPU.
    register_resolution_hook("handle_gpu_memory_settings")(_around_gpu_memory)
    if _SCHEDULER in sys.modules:
        # Only where a scheduler may run: naming a module in a hook imports it.
        from sglang.srt.mem_cache.registry import register_radix_cache_backend, registered_radix_cache_backends

        if BACKEND_NAME not in registered_radix_cache_backends():
            register_radix_cache_backend(BACKEND_NAME, _build_radix_cache)
        HookRegistry.register(f"{_SCHEDULER}.Scheduler.__init__", _after_scheduler_init, HookType.AFTER)
        HookRegistry.register(f"{_SCHEDULER}.Scheduler._record_step_counters", _after_step, HookType.AFTER)
        HookRegistry.register(f"{_SCHEDULER}.Scheduler.run_batch", _around_run_batch, HookType.AROUND)
        HookRegistry.register(f"{_SCHEDULER}.Scheduler.get_new_batch_prefill", _around_new_batch, HookType.AROUND)
        HookRegistry.register(f"{_SCHEDULER}.Scheduler.process_batch_result", _before_result, HookType.BEFORE)
        HookRegistry.register(f"{_SCHEDULER}.Scheduler.on_idle", _after_on_idle, HookType.AFTER)
        HookRegistry.register(f"{_SCHEDULER}.Scheduler.handle_generate_request", _before_generate, HookType.BEFORE)
        HookRegistry.register(f"{_SCHEDULER}.Scheduler.send_abort_output", _around_abort_output, HookType.AROUND)
        HookRegistry.register(f"{_ADDER}.add_one_req", _around_add_one_req, HookType.AROUND)
        HookRegistry.register(f"{_ADDER}.add_chunked_req", _around_add_chunked_req, HookType.AROUND)
        HookRegistry.register(f"{_STREAMER}.stream_output", _around_stream_output, HookType.AROUND)
        for source in ("disk", "distributed", "tensor", "ipc"):
            HookRegistry.register(f"{_WEIGHTS}.update_weights_from_{source}", _before_weights, HookType.BEFORE)
        HookRegistry.register(f"{_STREAMER}._get_storage_backend_type", _around_storage_backend_type, HookType.AROUND)


def load_plugins_for_serve_help() -> None:
    """Has ``sglang serve --help`` load plugins, as ``sglang serve`` and ``launch_server --help`` do.

    Its help comes before the call that loads them (``sglang/cli/serve.py``, ``serve``). The registry of serve backends
    is made before either, and its module is light, so a hook there can be applied while sglang is being imported.
    """
    HookRegistry.register(f"{_SERVE_BACKENDS}.ServeBackendRegistry.__init__", _after_serve_backends, HookType.AFTER)
    HookRegistry.apply_hooks()


def _after_serve_backends(result: object, *args: object, **kwargs: object) -> None:
    load_plugins()


# ---- arguments ----


def _after_add_cli_args(result: object, parser: argparse.ArgumentParser) -> None:
    add_flags(parser)


def _after_from_cli_args(result: Any, cls: type, args: argparse.Namespace) -> Any:
    take_flags(result, args)
    if getattr(args, "enable_kvcodec", False):
        try:
            prepare(result)
        except ConfigurationError as error:
            raise SystemExit(f"sglang-kvcodec: {error}") from None
    return result


def _before_resolve_once(server_args: Any) -> None:
    if not getattr(server_args, "_resolution_finished", False):
        prepare(server_args)


def _around_model_specific(server_args: Any, previous: Callable[[Any], None]) -> None:
    try:
        suit_layer_kinds(server_args)
    except ConfigurationError as error:
        if hasattr(server_args, "_kvcodec_settings"):
            # Asked for on the command line.
            raise SystemExit(f"sglang-kvcodec: {error}") from None
        raise
    previous(server_args)


def _around_gpu_memory(server_args: Any, previous: Callable[[Any], None]) -> None:
    previous(server_args)
    try:
        keep_room(server_args)
    except ConfigurationError as error:
        if hasattr(server_args, "_kvcodec_settings"):
            raise SystemExit(f"sglang-kvcodec: {error}") from None
        raise


# ---- scheduler ----


def _build_radix_cache(ctx: Any) -> Any:
    from sglang_kvcodec.plugin.radix_cache import build_radix_cache

    cache = build_radix_cache(ctx)
    _caches.append(cache)
    return cache


def _before_weights(*args: object, **kwargs: object) -> None:
    for cache in _caches:
        cache.weights_changing()


def _is_ours(tree_cache: object) -> bool:
    module = sys.modules.get("sglang_kvcodec.plugin.radix_cache")
    return module is not None and isinstance(tree_cache, module.KVCodecRadixCache)


def _after_scheduler_init(result: object, scheduler: Any, *args: object, **kwargs: object) -> None:
    if not _is_ours(scheduler.tree_cache):
        return
    # These two gate the calls the cache lives on: prefetch_from_storage, check_prefetch_progress and
    # has_pending_cache_operations; ready_to_load_host_cache and finish_external_linker_loads.
    scheduler.tree_cache.scheduler = scheduler
    scheduler.enable_lmcache = True
    scheduler.enable_unified_cache_external_linker = True


def _after_on_idle(result: object, scheduler: Any) -> None:
    if _is_ours(scheduler.tree_cache):
        scheduler.tree_cache.rest_while_held()


def _after_step(result: object, scheduler: Any, batch: Any, *args: object, **kwargs: object) -> None:
    # SGLang has just added what the pass took to its own account of prefill time.
    if _is_ours(scheduler.tree_cache):
        scheduler.tree_cache.passed(batch, scheduler.total_prefill_busy_us)


def _around_run_batch(original: Callable[..., Any], scheduler: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    if not _is_ours(scheduler.tree_cache):
        return original(scheduler, batch, *args, **kwargs)
    start_s = time.monotonic()
    result = original(scheduler, batch, *args, **kwargs)
    scheduler.tree_cache.ran(batch, time.monotonic() - start_s)
    return result


def _around_new_batch(original: Callable[..., Any], scheduler: Any, *args: Any, **kwargs: Any) -> Any:
    if not _is_ours(scheduler.tree_cache):
        return original(scheduler, *args, **kwargs)
    return scheduler.tree_cache.look_past_held(lambda: original(scheduler, *args, **kwargs))


def _before_result(scheduler: Any, batch: Any, *args: object, **kwargs: object) -> None:
    if _is_ours(scheduler.tree_cache):
        scheduler.tree_cache.result_comes(batch)


def _before_generate(scheduler: Any, tokenized: Any, *args: object, **kwargs: object) -> None:
    if _is_ours(scheduler.tree_cache):
        scheduler.tree_cache.retries.note(tokenized)


def _around_add_one_req(
    original: Callable[..., Any], adder: Any, req: Any, has_chunked_req: bool, *args: Any, **kwargs: Any
) -> Any:
    if not _is_ours(adder.tree_cache):
        return original(adder, req, has_chunked_req, *args, **kwargs)
    room = adder.rem_chunk_tokens
    most = adder.tree_cache.most_tokens(req, req.prefix_len + req.host_hit_length)
    held_back = 0
    if room is not None and has_chunked_req:
        # SGLang follows one request in chunks at a time. One of ours whose chunk was cut short has left room that
        # another must not begin in.
        missing = len(req.full_untruncated_fill_ids) - req.prefix_len - req.host_hit_length
        if adder.ceil_paged_tokens(missing) > room:
            from sglang.srt.managers.schedule_policy import AddReqResult

            return AddReqResult.OTHER
    elif room is not None and most is not None and most < room:
        held_back = room - most
        adder.rem_chunk_tokens = most
    admitted = len(adder.can_run_list)
    result = original(adder, req, has_chunked_req, *args, **kwargs)
    is_chunked = adder.new_chunked_req is req
    if held_back and not is_chunked:
        adder.rem_chunk_tokens += held_back
    if len(adder.can_run_list) > admitted:
        adder.tree_cache.launched(req, is_last=not is_chunked)
    return result


def _around_add_chunked_req(original: Callable[..., Any], adder: Any, req: Any) -> Any:
    if not _is_ours(adder.tree_cache):
        return original(adder, req)
    most = adder.tree_cache.most_tokens(req, req.prefix_len)
    if most is not None:
        adder.chunked_req_limit = min(most, adder.chunked_req_limit or most)
    admitted = len(adder.can_run_list)
    still_chunked = original(adder, req)
    if len(adder.can_run_list) > admitted:
        adder.tree_cache.launched(req, is_last=still_chunked is None)
    return still_chunked


def _around_stream_output(
    original: Callable[..., None], streamer: Any, reqs: Sequence[Any], *args: Any, **kwargs: Any
) -> None:
    cache = streamer.tree_cache
    if not _is_ours(cache):
        original(streamer, reqs, *args, **kwargs)
        return
    lost = [req for req in reqs if cache.has_lost(req.finished_reason)]
    original(streamer, [req for req in reqs if req not in lost] if lost else reqs, *args, **kwargs)
    for req in lost:
        cache.restart(req)


def _around_abort_output(original: Callable[..., None], scheduler: Any, abort_req: Any, req: Any) -> None:
    if _is_ours(scheduler.tree_cache) and scheduler.tree_cache.has_lost(req.discard_output_reason):
        scheduler.tree_cache.restart(req)
    else:
        original(scheduler, abort_req, req)


def _around_storage_backend_type(original: Callable[..., str], streamer: Any) -> str:
    return BACKEND_NAME if _is_ours(streamer.tree_cache) else original(streamer)
