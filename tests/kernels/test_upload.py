"""What goes to the device in one copy."""

import numpy as np
import torch

from sglang_kvcodec.kernels.upload import upload_together


def test_arrays_and_byte_strings_keep_types_shapes_and_values():
    parts = {
        "numbers": np.arange(6, dtype=np.int32).reshape(2, 3),
        "bytes": [b"ab", b"", b"cde"],
        "nothing": np.empty(0, np.float32),
        "backwards": np.arange(5, dtype=np.int64)[::-1],
        "unsigned": np.array([1, 2**32 - 1], np.uint32),
        "none": [],
    }
    there = upload_together(parts, torch.device("cpu"))
    assert there["numbers"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert bytes(there["bytes"].numpy()) == b"abcde"
    assert there["nothing"].shape == (0,)
    assert there["nothing"].dtype == torch.float32
    assert there["backwards"].tolist() == [4, 3, 2, 1, 0]
    assert there["unsigned"].dtype == torch.uint32
    assert there["unsigned"].numpy().tolist() == [1, 2**32 - 1]
    assert there["none"].numel() == 0
    assert len({tensor.data_ptr() % 16 for tensor in there.values() if tensor.numel()}) == 1
