import pytest

from sglang_kvcodec.storage.artifact_memory import MemoryArtifactStore
from sglang_kvcodec.testing.artifacts import ArtifactStoreContract


class TestMemoryArtifactStore(ArtifactStoreContract):
    @pytest.fixture
    def make_store(self):
        return MemoryArtifactStore
