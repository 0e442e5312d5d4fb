"""Settings: what is accepted, and one clear sentence for everything that is not."""

import dataclasses

import pytest

from sglang_kvcodec.config import (
    ENV_NAMES,
    MIB,
    PROFILES,
    Access,
    ServerConfig,
    Timeouts,
    parse_bytes,
    parse_cpus,
    parse_remote,
    parse_remotes,
)
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.profile import PROFILE_NAMES

REMOTE = {"KVCODEC_REMOTE": "grpc://peer:50051"}


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("1048576", 1048576),
        ("50GB", 50 * 10**9),
        ("50gb", 50 * 10**9),
        (" 512 MiB ", 512 * MIB),
        ("1.5K", 1500),
        ("2Ti", 2 << 40),
        ("0", 0),
        ("7B", 7),
    ],
)
def test_sizes(text, size_bytes):
    assert parse_bytes(text) == size_bytes


@pytest.mark.parametrize(
    "text", ["", "GB", "-1", "1e9", "50 G B", "50PB", "0x10", "1,5GB", "50GBs", "\N{ARABIC-INDIC DIGIT FIVE}x"]
)
def test_a_bad_size_says_how_to_write_one(text):
    with pytest.raises(ConfigurationError, match=r"^not a size: .*; write e\.g\. 50GB or 512MiB$"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("grpc://127.0.0.1:1", "127.0.0.1:1"),
        ("grpc://kv-peer_0.local:65535/", "kv-peer_0.local:65535"),
        ("grpc://[::1]:50051", "[::1]:50051"),
    ],
)
def test_addresses(url, target):
    assert parse_remote(url) == target


def test_several_addresses():
    assert parse_remotes("grpc://peer:1") == ("peer:1",)
    assert parse_remotes("grpc://b:1,[::1]:2,a:1") == ("b:1", "[::1]:2", "a:1")


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("grpc://a:1,", "grpc://HOST:PORT"),
        ("grpc://a:1,b", "grpc://HOST:PORT"),
        ("a:1,b:2", "grpc://HOST:PORT"),
        ("grpc://a:1,grpc://b:2", "grpc://HOST:PORT"),
        ("grpc://a:1,b:2,a:1", "twice"),
    ],
)
def test_bad_lists_of_addresses(url, says):
    with pytest.raises(ConfigurationError, match=says):
        parse_remotes(url)


@pytest.mark.parametrize(
    "url",
    [
        "",
        "peer:50051",
        "http://peer:50051",
        "grpc://peer",
        "grpc://peer:0",
        "grpc://peer:65536",
        "grpc://:50051",
        "grpc://::1:50051",
        "grpc://peer:50051/path",
        "grpc://peer:50051\n",
        "grpc://user@peer:50051",
    ],
)
def test_a_bad_address_says_how_to_write_one(url):
    with pytest.raises(
        ConfigurationError, match=r"^not a peer's address: .*; write grpc://HOST:PORT, grpcs:// for TLS$"
    ):
        parse_remote(url)


@pytest.mark.parametrize(
    ("text", "cpus"),
    [("", set()), ("0", {0}), ("0-3,8", {0, 1, 2, 3, 8}), (" 5 , 7-7", {5, 7}), ("3,1-3", {1, 2, 3})],
)
def test_lists_of_cpus(text, cpus):
    assert parse_cpus(text) == cpus


@pytest.mark.parametrize("text", ["-1", "1-", "3-2", "0,,1", "a", "1 2", "0x1", "100000"])
def test_a_bad_list_of_cpus_says_how_to_write_one(text):
    with pytest.raises(ConfigurationError, match=r"not a list of CPUs: .*; write e\.g\. 0-3,8"):
        parse_cpus(text)


def test_environment_names_are_the_fields_without_their_unit():
    assert ENV_NAMES == {
        "remote": "KVCODEC_REMOTE",
        "replicas": "KVCODEC_REPLICAS",
        "admit": "KVCODEC_ADMIT",
        "compute_while_fetching": "KVCODEC_COMPUTE_WHILE_FETCHING",
        "profile": "KVCODEC_PROFILE",
        "host_cache_bytes": "KVCODEC_HOST_CACHE",
        "publish_queue_bytes": "KVCODEC_PUBLISH_QUEUE",
        "min_fetch_tokens": "KVCODEC_MIN_FETCH_TOKENS",
        "encode_threads": "KVCODEC_ENCODE_THREADS",
        "decode_threads": "KVCODEC_DECODE_THREADS",
        "read_only": "KVCODEC_READ_ONLY",
        "auto_calibrate": "KVCODEC_AUTO_CALIBRATE",
        "encoder_processes": "KVCODEC_ENCODER_PROCESSES",
        "decoder": "KVCODEC_DECODER",
        "encoder": "KVCODEC_ENCODER",
        "gpu_memory_bytes": "KVCODEC_GPU_MEMORY",
        "cpus": "KVCODEC_CPUS",
        "plan": "KVCODEC_PLAN",
        "trace": "KVCODEC_TRACE",
        "tls_ca": "KVCODEC_TLS_CA",
        "tls_cert": "KVCODEC_TLS_CERT",
        "tls_key": "KVCODEC_TLS_KEY",
        "token_file": "KVCODEC_TOKEN_FILE",
        "insecure": "KVCODEC_INSECURE",
    }


def test_every_setting_can_be_given_by_environment():
    config = ServerConfig.from_env(
        REMOTE
        | {
            "KVCODEC_PROFILE": "high",
            "KVCODEC_HOST_CACHE": "2GiB",
            "KVCODEC_PUBLISH_QUEUE": "1MB",
            "KVCODEC_MIN_FETCH_TOKENS": "128",
            "KVCODEC_ENCODE_THREADS": "3",
            "KVCODEC_DECODE_THREADS": "4",
            "KVCODEC_READ_ONLY": "TRUE",
            "KVCODEC_REPLICAS": "3",
            "KVCODEC_PLAN": "always",
            "KVCODEC_TLS_CA": "ca",
            "KVCODEC_TLS_CERT": "cert",
            "KVCODEC_TLS_KEY": "key",
            "KVCODEC_TOKEN_FILE": "token",
            "KVCODEC_REMOTE": "grpcs://peer:50051",
            "UNRELATED": "ignored",
        }
    )
    assert config.access == Access("ca", "cert", "key", "token")
    assert config == ServerConfig(
        *("grpcs://peer:50051", "high", 2 << 30, 10**6, 128, 3, 4, True),
        replicas=3,
        plan="always",
        tls_ca="ca",
        tls_cert="cert",
        tls_key="key",
        token_file="token",
    )


def test_what_is_not_given_keeps_its_default():
    assert ServerConfig.from_env(REMOTE | {"KVCODEC_PROFILE": ""}) == ServerConfig("grpc://peer:50051")


def test_the_environment_of_the_process_is_read(monkeypatch):
    monkeypatch.setenv("KVCODEC_REMOTE", "grpc://elsewhere:7")
    monkeypatch.setenv("KVCODEC_PROFILE", "raw")
    config = ServerConfig.from_env()
    assert (config.remote, config.profile) == ("grpc://elsewhere:7", "raw")


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        ({}, r"kvcodec needs a storage peer: --kvcodec-remote grpc://HOST:PORT \(or KVCODEC_REMOTE\)"),
        ({"KVCODEC_REMOTE": ""}, r"kvcodec needs a storage peer: .*"),
        ({"KVCODEC_REMOTE": "peer"}, r"not a peer's address: 'peer'; write grpc://HOST:PORT, grpcs:// for TLS"),
        (REMOTE | {"KVCODEC_PROFILE": "best"}, r"unknown profile 'best'; there are .*, compact"),
        (REMOTE | {"KVCODEC_PROFILE": "high,best"}, r"unknown profile 'best'; there are .*, compact"),
        (REMOTE | {"KVCODEC_PROFILE": "high,"}, r"unknown profile ''; there are .*, compact"),
        (REMOTE | {"KVCODEC_PROFILE": "high,high"}, r"a profile is there twice: 'high,high'"),
        (REMOTE | {"KVCODEC_PROFILE": "high,exact"}, r"profiles 'high,exact': a lossless one can't be .* be exact"),
        (
            REMOTE | {"KVCODEC_PROFILE": "raw,exact", "KVCODEC_AUTO_CALIBRATE": "1"},
            r"profile 'raw,exact' needs no calibration; leave auto_calibrate away",
        ),
        (REMOTE | {"KVCODEC_HOST_CACHE": "lots"}, r"not a size: 'lots'; write e\.g\. 50GB or 512MiB"),
        (REMOTE | {"KVCODEC_HOST_CACHE": "0"}, r"host_cache_bytes must be at least 1"),
        (REMOTE | {"KVCODEC_PUBLISH_QUEUE": "0MB"}, r"publish_queue_bytes must be at least 1"),
        (REMOTE | {"KVCODEC_ENCODE_THREADS": "two"}, r"encode_threads must be a whole number, not 'two'"),
        (REMOTE | {"KVCODEC_DECODE_THREADS": "1.5"}, r"decode_threads must be a whole number, not '1\.5'"),
        (REMOTE | {"KVCODEC_DECODE_THREADS": "-1"}, r"decode_threads must be at least 1"),
        (REMOTE | {"KVCODEC_CPUS": "1,x"}, r"not a list of CPUs: '1,x'; write e\.g\. 0-3,8"),
        (REMOTE | {"KVCODEC_GPU_MEMORY": "0"}, r"gpu_memory_bytes must be at least 1"),
        (REMOTE | {"KVCODEC_ENCODER_PROCESSES": "-1"}, r"encoder_processes must be at least 0"),
        (REMOTE | {"KVCODEC_DECODER": "x265"}, r"unknown decoder 'x265'; there are auto, nvdec, software"),
        (REMOTE | {"KVCODEC_ENCODER": "best"}, r"unknown encoder 'best'; there are auto, nvenc, x265"),
        (REMOTE | {"KVCODEC_PLAN": "never"}, r"unknown plan 'never'; there are auto, always"),
        (REMOTE | {"KVCODEC_MIN_FETCH_TOKENS": "0"}, r"min_fetch_tokens must be at least 1"),
        (REMOTE | {"KVCODEC_AUTO_CALIBRATE": "true"}, r"profile 'exact' needs no calibration; leave .* away"),
        (
            REMOTE | {"KVCODEC_AUTO_CALIBRATE": "1", "KVCODEC_PROFILE": "high", "KVCODEC_READ_ONLY": "1"},
            r"auto_calibrate learns from what is published, and read_only publishes nothing",
        ),
        (REMOTE | {"KVCODEC_READ_ONLY": "maybe"}, r"read_only must be true or false, not 'maybe'"),
    ],
)
def test_a_bad_value_gives_one_clear_sentence(variables, sentence):
    with pytest.raises(ConfigurationError, match=f"^{sentence}$") as caught:
        ServerConfig.from_env(variables)
    assert "\n" not in str(caught.value)


def test_an_unknown_setting_is_refused():
    with pytest.raises(ConfigurationError, match="unknown kvcodec setting 'timeouts'"):
        ServerConfig.from_strings({"remote": "grpc://peer:1", "timeouts": "1"})


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Timeouts)])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_time_out_is_above_zero(name, value):
    with pytest.raises(ConfigurationError, match=f"time-out {name} must be above zero"):
        Timeouts(**{name: value})


def test_settings_are_values():
    config = ServerConfig("grpc://peer:1")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.profile = "raw"
    assert hash(config) == hash(dataclasses.replace(config))


@pytest.mark.parametrize(
    ("profile", "tiers"),
    [
        ("exact", ("exact",)),
        ("exact,raw", ("raw", "exact")),
        ("compact,high,balanced", ("high", "balanced", "compact")),
    ],
)
def test_several_tiers_are_taken_from_the_best_to_the_smallest(profile, tiers):
    assert ServerConfig("grpc://peer:1", profile=profile).tiers == tiers


def test_the_profiles_an_operator_can_ask_for_are_those_of_the_format():
    assert PROFILES == PROFILE_NAMES
