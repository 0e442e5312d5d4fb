"""The flags that SGLang gets, and what they do to SGLang's own arguments."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from sglang_kvcodec.config import ENV_NAMES, PROFILES, ServerConfig
from sglang_kvcodec.errors import UnsupportedError
from sglang_kvcodec.rpc.channels import check_files

logger = logging.getLogger(__name__)

SGLANG_VERSION = "0.5.23"
BACKEND_NAME = "kvcodec"
DEFAULT_PAGE_TOKENS = 64
MIN_PAGE_TOKENS = 16
MAX_PAGE_TOKENS = 256

_HELP = {
    "remote": "Address of the storage peer, grpc://HOST:PORT, or of several, grpc://HOST:PORT,HOST:PORT; grpcs: TLS.",
    "tls_ca": "File of the CA that signs the peer's certificate, for grpcs; the system's CAs without.",
    "tls_cert": "File of this server's own certificate, for a peer that asks for one.",
    "tls_key": "File of its private key.",
    "token_file": "File that holds this server's token, for a peer that asks for one.",
    "insecure": "true: send the token in plaintext to another machine.",
    "replicas": "Of several storage peers, on how many each page is kept.",
    "profile": f"Quality tier: {', '.join(PROFILES)}; 'exact' restores the KV cache bit for bit. Several, e.g. "
    "high,balanced, are stored side by side, and each request gets the one that brings its first token soonest.",
    "host_cache_bytes": "Bound of the fetched page objects kept in host memory, e.g. 8GB.",
    "publish_queue_bytes": "Bound of the KV that waits to be encoded, e.g. 512MiB; what does not fit is dropped.",
    "min_fetch_tokens": "A shorter stored prefix is computed rather than fetched.",
    "plan": "auto: fetch a stored prefix if that is predicted to be faster than computing it; always: fetch every one.",
    "admit": "early: admit a request when what is missing of its pages will land in time; landed: when all is there.",
    "compute_while_fetching": "When to compute a prompt's start while the end of its stored prefix is fetched, if that "
    "is no slower. idle: while nothing else is computed; always: while no other prompt is; failing: as idle, but only "
    "once the link has failed in the middle of a fetch; never.",
    "trace": "File for a trace of every request, for ui.perfetto.dev; ranks above 0 write theirs beside it.",
    "encode_threads": "Threads that pack new pages, and encode them without encoder processes.",
    "decoder": "What decodes pictures: nvdec (the GPU's video engines), software, or auto: the best there is.",
    "encoder": "What encodes pictures: nvenc (where the GPU has it), x265, or auto: the best there is.",
    "encoder_processes": "Processes that run libx265; 0 to run it on threads of the server.",
    "decode_threads": "Threads that decode fetched pages.",
    "cpus": "CPUs for the threads and encoder processes of kvcodec, e.g. 0-3,8; by default all that the server has.",
    "gpu_memory_bytes": "Bound of the GPU memory of decoders and restore buffers; SGLang's pool gets that much less.",
    "read_only": "true: fetch, but publish nothing.",
    "auto_calibrate": "true: where the peer has no calibration, make one in the background from what is published.",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds ``--enable-kvcodec`` and ``--kvcodec-*``."""
    group = parser.add_argument_group("kvcodec", "remote KV cache (sglang-kvcodec)")
    group.add_argument("--enable-kvcodec", action="store_true", help="Share KV cache through a kvcodec storage peer.")
    for name, env_name in ENV_NAMES.items():
        group.add_argument(_flag(env_name), dest=f"kvcodec_{name}", default=None, metavar="VALUE", help=_HELP[name])


def _flag(env_name: str) -> str:
    return "--" + env_name.lower().replace("_", "-")


def take_flags(server_args: Any, args: argparse.Namespace) -> None:
    """Notes the parsed flags on ``server_args``, where they survive the way into the scheduler process."""
    if not getattr(args, "enable_kvcodec", False):
        return
    given = {name: value for name in ENV_NAMES if (value := getattr(args, f"kvcodec_{name}", None)) is not None}
    server_args._kvcodec_settings = given
    server_args.radix_cache_backend = BACKEND_NAME


def prepare(server_args: Any) -> None:
    """Checks, before SGLang resolves its arguments, that a server asked for kvcodec can have it.

    Sets what kvcodec needs of SGLang's arguments and logs it. Does nothing for any other server.

    Raises:
        ConfigurationError: with one sentence that says what to change.
    """
    if getattr(server_args, "radix_cache_backend", None) != BACKEND_NAME:
        return
    check_version()
    check_files(server_config(server_args).access)
    _check_conflicts(server_args)
    if server_args.page_size is None:
        server_args.page_size = DEFAULT_PAGE_TOKENS
        logger.info("kvcodec: page size set to %d", DEFAULT_PAGE_TOKENS)
    elif not MIN_PAGE_TOKENS <= server_args.page_size <= MAX_PAGE_TOKENS:
        raise UnsupportedError(
            f"kvcodec needs a page size of {MIN_PAGE_TOKENS} to {MAX_PAGE_TOKENS} tokens, not {server_args.page_size}"
        )


def server_config(server_args: Any) -> ServerConfig:
    """The settings: flags over environment.

    Raises:
        ConfigurationError: a bad or missing value.
    """
    given = getattr(server_args, "_kvcodec_settings", None)
    return ServerConfig.from_strings({**ServerConfig.strings_from_env(), **(given or {})})


def check_version() -> None:
    """Refuses an SGLang that this package was not made for.

    Raises:
        UnsupportedError: with both versions.
    """
    import sglang

    if sglang.__version__ != SGLANG_VERSION:
        raise UnsupportedError(f"this kvcodec works with SGLang {SGLANG_VERSION}, and this is {sglang.__version__}")


_CONFLICTS = {
    "disable_radix_cache": "--disable-radix-cache",
    "enable_hierarchical_cache": "--enable-hierarchical-cache",
    "enable_lmcache": "--enable-lmcache",
    "enable_flexkv": "--enable-flexkv",
    "enable_unified_cache_external_linker": "--enable-unified-cache-external-linker",
    "hicache_storage_backend": "--hicache-storage-backend",
    "speculative_algorithm": "--speculative-algorithm",
}


def _check_conflicts(server_args: Any) -> None:
    for name, flag in _CONFLICTS.items():
        if getattr(server_args, name, None):
            raise UnsupportedError(f"kvcodec does not work together with {flag}")
    if getattr(server_args, "disaggregation_mode", "null") not in (None, "null"):
        raise UnsupportedError("kvcodec does not work together with --disaggregation-mode")
    if (getattr(server_args, "dcp_size", 1) or 1) > 1:
        raise UnsupportedError("kvcodec does not work with decode context parallelism")
    if (getattr(server_args, "pp_size", 1) or 1) > 1 and len(server_config(server_args).tiers) > 1:
        raise UnsupportedError("kvcodec keeps one profile with pipeline parallelism, not several")
