"""Servers that keep objects for the engines, one of each for all tests of a module."""

import pytest

from sglang_kvcodec.testing.seaweedfs import SeaweedProcess
from sglang_kvcodec.testing.valkey import ValkeyProcess, valkey_cluster


@pytest.fixture(scope="module")
def seaweed(tmp_path_factory):
    with SeaweedProcess(tmp_path_factory.mktemp("seaweedfs")) as process, pytest.MonkeyPatch.context() as patch:
        for name, value in process.env.items():
            patch.setenv(name, value)
        yield process


@pytest.fixture(scope="module")
def valkey(tmp_path_factory):
    with ValkeyProcess(tmp_path_factory.mktemp("valkey")) as process:
        yield process


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with valkey_cluster(tmp_path_factory.mktemp("cluster")) as nodes:
        yield nodes
