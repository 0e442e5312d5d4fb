import pathlib
import types

import pytest

from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.format.calibration import ShardLayout, model_digest
from sglang_kvcodec.format.model_files import model_files_digest
from sglang_kvcodec.format.spec import KVDtype, KVSpec
from sglang_kvcodec.plugin.calibrating import rank_digest
from sglang_kvcodec.plugin.model_path import local_model_path

MODEL = pathlib.Path(__file__).parents[1] / "models" / "tiny-code-lm"
SPEC = KVSpec(layers=6, kv_heads=1, head_dim=128, page_tokens=64, dtype=KVDtype.BFLOAT16)


def args(model_path, **fields):
    return types.SimpleNamespace(model_path=str(model_path), **{"revision": None, "download_dir": None, **fields})


def cached_snapshot(cache_dir, repo, commit, ref="main"):
    """What the hub's client leaves on disk."""
    directory = cache_dir / f"models--{repo.replace('/', '--')}"
    snapshot = directory / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model.safetensors").write_bytes(commit.encode())
    (directory / "refs").mkdir(exist_ok=True)
    (directory / "refs" / ref).write_text(commit)
    return snapshot


def test_a_directory_and_a_single_file_are_where_they_are(tmp_path):
    assert local_model_path(args(MODEL)) == MODEL
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert local_model_path(args(file)) == file


def test_a_hub_id_is_its_local_snapshot_of_that_revision(tmp_path):
    main = cached_snapshot(tmp_path, "someone/model", "1" * 40)
    other = cached_snapshot(tmp_path, "someone/model", "2" * 40, "v2")
    assert local_model_path(args("someone/model", download_dir=str(tmp_path))) == main
    assert local_model_path(args("someone/model", download_dir=str(tmp_path), revision="v2")) == other
    assert model_files_digest(main) != model_files_digest(other)


@pytest.mark.parametrize("name", ["someone/absent", "s3://bucket/model", "/no/such/directory", "absent"])
def test_a_model_that_is_not_here_is_said_to_be_so(tmp_path, name):
    with pytest.raises(ConfigurationError, match="not on this machine"):
        local_model_path(args(name, download_dir=str(tmp_path)))


def test_each_rank_asks_for_what_calibrate_made_for_it():
    def digest(start_layer):
        pool = types.SimpleNamespace(start_layer=start_layer)
        params = types.SimpleNamespace(token_to_kv_pool_allocator=types.SimpleNamespace(get_kvcache=lambda: pool))
        return rank_digest(types.SimpleNamespace(server_args=args(MODEL), params=params, tp_rank=1, tp_size=2), SPEC)

    layout = ShardLayout(6, 1, 128, tp_rank=1, tp_size=2)
    assert digest(None) == digest(0) == model_digest(model_files_digest(MODEL), layout)
    assert digest(3) != digest(0)
