import pytest

from sglang_kvcodec.storage.memory import MemoryEngine
from sglang_kvcodec.testing.storage import StorageEngineContract


class TestMemoryEngine(StorageEngineContract):
    @pytest.fixture
    def make_engine(self):
        return MemoryEngine
