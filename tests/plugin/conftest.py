"""Imports SGLang once, without its warnings."""

import warnings

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import sglang.srt.mem_cache.memory_pool
    import sglang.srt.mem_cache.unified_cache.unified_cache_linker
    import sglang.srt.plugins.hook_registry  # noqa: F401
