import argparse
import types

import pytest

from sglang_kvcodec.config import ENV_NAMES, ServerConfig
from sglang_kvcodec.errors import ConfigurationError, UnsupportedError
from sglang_kvcodec.plugin import hooks, settings
from sglang_kvcodec.plugin.settings import BACKEND_NAME, add_flags, prepare, server_config, take_flags

REMOTE = "grpc://peer:7000"


@pytest.fixture(autouse=True)
def _no_environment(monkeypatch):
    for variable in ENV_NAMES.values():
        monkeypatch.delenv(variable, raising=False)


def parse(*arguments):
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_flags(parser)
    return parser.parse_args(arguments)


def server_args(*arguments, **fields):
    """SGLang's arguments as far as kvcodec looks at them, after its flags were taken."""
    args = types.SimpleNamespace(radix_cache_backend=None, page_size=None, **fields)
    take_flags(args, parse(*arguments))
    return args


def one_sentence(text):
    return text and "\n" not in text and len(text) < 200


def test_without_the_flag_nothing_changes(monkeypatch):
    monkeypatch.setenv("KVCODEC_REMOTE", "nonsense")
    args = server_args("--kvcodec-remote", "also nonsense")
    prepare(args)
    assert args == types.SimpleNamespace(radix_cache_backend=None, page_size=None)


def test_flags_become_settings():
    args = server_args(
        "--enable-kvcodec",
        *("--kvcodec-remote", REMOTE, "--kvcodec-profile", "high", "--kvcodec-host-cache", "8GB"),
        *("--kvcodec-publish-queue", "64MiB", "--kvcodec-min-fetch-tokens", "300", "--kvcodec-encode-threads", "3"),
        *("--kvcodec-decode-threads", "4", "--kvcodec-read-only", "true"),
    )
    assert args.radix_cache_backend == BACKEND_NAME
    assert server_config(args) == ServerConfig(
        remote=REMOTE,
        profile="high",
        host_cache_bytes=8 * 10**9,
        publish_queue_bytes=64 << 20,
        min_fetch_tokens=300,
        encode_threads=3,
        decode_threads=4,
        read_only=True,
    )


def test_every_setting_has_a_flag_with_help():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    text = parser.format_help()
    for variable in ENV_NAMES.values():
        assert "--" + variable.lower().replace("_", "-") in text


def test_flags_go_before_the_environment(monkeypatch):
    monkeypatch.setenv("KVCODEC_REMOTE", "grpc://from-env:1")
    monkeypatch.setenv("KVCODEC_PROFILE", "raw")
    assert server_config(server_args("--enable-kvcodec")).remote == "grpc://from-env:1"
    config = server_config(server_args("--enable-kvcodec", "--kvcodec-remote", REMOTE))
    assert (config.remote, config.profile) == (REMOTE, "raw")


def test_an_engine_takes_its_settings_from_the_environment(monkeypatch):
    monkeypatch.setenv("KVCODEC_REMOTE", REMOTE)
    args = types.SimpleNamespace(radix_cache_backend=BACKEND_NAME, page_size=None)
    prepare(args)
    assert args.page_size == 64
    assert server_config(args) == ServerConfig(remote=REMOTE)


@pytest.mark.parametrize(("given", "becomes"), [(None, 64), (16, 16), (48, 48), (256, 256)])
def test_the_page_size_is_set_unless_it_was_chosen(given, becomes):
    args = server_args("--enable-kvcodec", "--kvcodec-remote", REMOTE)
    args.page_size = given
    prepare(args)
    assert args.page_size == becomes


def test_a_pipeline_keeps_one_profile():
    prepare(server_args("--enable-kvcodec", "--kvcodec-remote", REMOTE, "--kvcodec-profile", "high", pp_size=2))
    args = server_args("--enable-kvcodec", "--kvcodec-remote", REMOTE, "--kvcodec-profile", "high,balanced", pp_size=2)
    with pytest.raises(UnsupportedError, match="one profile with pipeline parallelism") as caught:
        prepare(args)
    assert one_sentence(str(caught.value))


@pytest.mark.parametrize("page_size", [0, 1, 15, 257])
def test_a_page_size_out_of_bounds_is_refused(page_size):
    args = server_args("--enable-kvcodec", "--kvcodec-remote", REMOTE)
    args.page_size = page_size
    with pytest.raises(UnsupportedError, match="page size of 16 to 256") as caught:
        prepare(args)
    assert one_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("disable_radix_cache", True, "--disable-radix-cache"),
        ("enable_hierarchical_cache", True, "--enable-hierarchical-cache"),
        ("enable_lmcache", True, "--enable-lmcache"),
        ("enable_flexkv", True, "--enable-flexkv"),
        ("enable_unified_cache_external_linker", True, "--enable-unified-cache-external-linker"),
        ("hicache_storage_backend", "file", "--hicache-storage-backend"),
        ("speculative_algorithm", "EAGLE", "--speculative-algorithm"),
        ("disaggregation_mode", "prefill", "--disaggregation-mode"),
        ("dcp_size", 2, "decode context parallelism"),
    ],
)
def test_what_does_not_go_together_is_refused_with_one_sentence(field, value, named):
    args = server_args("--enable-kvcodec", "--kvcodec-remote", REMOTE, **{field: value})
    with pytest.raises(UnsupportedError) as caught:
        prepare(args)
    assert named in str(caught.value)
    assert one_sentence(str(caught.value))


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((), "--kvcodec-remote"),
        (("--kvcodec-remote", "http://peer:1"), "grpc://HOST:PORT"),
        (("--kvcodec-remote", REMOTE, "--kvcodec-profile", "best"), "'best'"),
        (("--kvcodec-remote", REMOTE, "--kvcodec-host-cache", "much"), "'much'"),
        (("--kvcodec-remote", REMOTE, "--kvcodec-host-cache", "0"), "host_cache_bytes"),
        (("--kvcodec-remote", REMOTE, "--kvcodec-encode-threads", "two"), "'two'"),
        (("--kvcodec-remote", REMOTE, "--kvcodec-read-only", "perhaps"), "'perhaps'"),
    ],
)
def test_bad_values_end_the_start_with_one_sentence(arguments, named):
    args = types.SimpleNamespace(radix_cache_backend=None, page_size=None)
    with pytest.raises(SystemExit) as caught:
        hooks._after_from_cli_args(args, object, parse("--enable-kvcodec", *arguments))
    assert named in str(caught.value)
    assert one_sentence(str(caught.value))


def test_another_sglang_is_refused(monkeypatch):
    monkeypatch.setattr("sglang.__version__", "0.5.99")
    with pytest.raises(UnsupportedError, match=f"{settings.SGLANG_VERSION}.*0.5.99"):
        prepare(server_args("--enable-kvcodec", "--kvcodec-remote", REMOTE))


def test_certificates_and_tokens_are_read_before_a_model_is_loaded(tmp_path):
    flags = ("--enable-kvcodec", "--kvcodec-remote", "grpcs://peer:7000")
    with pytest.raises(ConfigurationError, match=r"can't read .*/none"):
        prepare(server_args(*flags, "--kvcodec-token-file", f"{tmp_path}/none"))
    (tmp_path / "ca").write_text("nonsense")
    with pytest.raises(ConfigurationError, match="no certificates of a CA"):
        prepare(server_args(*flags, "--kvcodec-tls-ca", f"{tmp_path}/ca"))
    (tmp_path / "token").write_text("secret\n")
    with pytest.raises(ConfigurationError, match="in plaintext"):
        prepare(server_args(*flags[:2], REMOTE, "--kvcodec-token-file", f"{tmp_path}/token"))
    prepare(server_args(*flags, "--kvcodec-token-file", f"{tmp_path}/token"))


def test_a_value_is_checked_where_the_environment_gave_it(monkeypatch):
    monkeypatch.setenv("KVCODEC_REMOTE", REMOTE)
    monkeypatch.setenv("KVCODEC_PUBLISH_QUEUE", "lots")
    with pytest.raises(ConfigurationError, match="lots"):
        prepare(server_args("--enable-kvcodec"))
