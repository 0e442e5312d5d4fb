import pytest

pytest.register_assert_rewrite("sglang_kvcodec.testing.storage", "sglang_kvcodec.testing.artifacts")
