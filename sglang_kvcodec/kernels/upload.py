"""Host memory to a kernel's device."""

from __future__ import annotations

import torch


def upload(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The same values on ``device``, copied in the order of the current stream; on a GPU the host does not wait.

    The copy goes through pinned memory, which torch's allocator of pinned memory gives to nobody else before the copy
    has ended. From pageable memory the call would wait for all that is queued on the stream.
    """
    if device.type != "cuda" or values.device.type != "cpu" or not values.numel():
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
