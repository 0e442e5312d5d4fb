"""Memory of a peer that serves: what a message took is kept for the next, and what lasts is not looked at again."""

from __future__ import annotations

import ctypes
import gc

from sglang_kvcodec.rpc.limits import GRPC_MESSAGE_BYTES


def keep_freed_memory() -> None:
    """Lets glibc keep what a message leaves behind: giving it back and faulting it in anew costs as much as copying it.

    Frees one block larger than any message. glibc takes the size of such a block for the size from which memory comes
    from the system and goes back to it, and twice that for what it keeps free (``malloc/malloc.c``, ``__libc_free``;
    mallopt(3), ``M_MMAP_THRESHOLD``). So it is set for the whole process, as it is by any large block that anybody
    frees; it is never lowered, and nothing changes where the process has set it by ``mallopt``. The block is not
    touched, so it takes no memory.
    """
    libc = ctypes.CDLL(None)
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = [ctypes.c_void_p], None
    libc.free(libc.malloc(GRPC_MESSAGE_BYTES))


def keep_lasting_objects() -> None:
    """Takes all objects that are there now out of garbage collection.

    Those of a peer that has started last as long as it does, and going through them takes some ten milliseconds, in
    which no request is answered.
    """
    gc.collect()
    gc.freeze()
