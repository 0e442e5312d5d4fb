"""A process that encodes pictures for another, which starts it with :func:`main` as its program.

Canvases come in memory that both share, a request and its answer over a socket. The process ends when the other end of
the socket is closed or the process that started it is gone, whatever it does at that moment. It holds neither torch nor
SGLang, so it starts fast and stays small.

Request: :data:`REQUEST`. Answer: :data:`ANSWER`, then for a success the sizes of the parameter sets and of each picture
as uint32, little endian, then those bytes; for a failure its message in UTF-8.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import threading
from collections.abc import Sequence

import numpy as np

from sglang_kvcodec.errors import CodecError
from sglang_kvcodec.video.base import EncodedPictures
from sglang_kvcodec.video.software import SoftwareEncoder

REQUEST = struct.Struct("<IIII")
"""Pictures, rows and width of their canvases, which begin at the first byte of the memory; 1 for uniform blocks."""
ANSWER = struct.Struct("<II")
"""Status, and a number: of sizes that follow after a success, of bytes of the message after a failure."""
SUCCEEDED, FAILED = 0, 1

NICENESS = 19
"""The least that there is: a prompt's first pages are coded while its next ones are computed, maybe on these cores."""
_PARENT_CHECK_MS = 1000


def receive(connection: socket.socket, size_bytes: int) -> bytearray:
    """Exactly so many bytes.

    Raises:
        EOFError: the other end is gone.
        TimeoutError: the connection has a time-out, and nothing came for so long.
    """
    data = bytearray(size_bytes)
    view = memoryview(data)
    while view:
        count = connection.recv_into(view)
        if not count:
            raise EOFError("the other end is gone")
        view = view[count:]
    return data


def send_encoded(connection: socket.socket, encoded: EncodedPictures) -> None:
    """Answers with pictures."""
    parts = [encoded.parameter_sets, *encoded.pictures]
    sizes = struct.pack(f"<{len(parts)}I", *map(len, parts))
    connection.sendall(b"".join([ANSWER.pack(SUCCEEDED, len(parts)), sizes, *parts]))


def send_failure(connection: socket.socket, message: str) -> None:
    """Answers with a failure."""
    text = message.encode(errors="replace")
    connection.sendall(ANSWER.pack(FAILED, len(text)) + text)


def receive_encoded(connection: socket.socket) -> EncodedPictures:
    """The answer to a request.

    Raises:
        CodecError: the encoder failed; it can be asked again.
        EOFError: the other end is gone.
        TimeoutError: as :func:`receive`.
    """
    status, count = ANSWER.unpack(receive(connection, ANSWER.size))
    if status != SUCCEEDED:
        raise CodecError(receive(connection, count).decode(errors="replace"))
    sizes = struct.unpack(f"<{count}I", receive(connection, 4 * count))
    parts = [bytes(receive(connection, size)) for size in sizes]
    return EncodedPictures(parts[0], tuple(parts[1:]))


def serve(connection: socket.socket, memory_fd: int) -> None:
    """Answers requests until the other end is gone."""
    encoders = {flag: SoftwareEncoder(uniform_blocks=flag) for flag in (False, True)}
    memory: mmap.mmap | None = None
    while True:
        try:
            count, rows, width, uniform_blocks = REQUEST.unpack(receive(connection, REQUEST.size))
        except EOFError:
            return
        size_bytes = count * rows * width
        if memory is None or len(memory) < size_bytes:
            memory = mmap.mmap(memory_fd, os.fstat(memory_fd).st_size, prot=mmap.PROT_READ)
        try:
            canvases = np.frombuffer(memory, np.uint8, size_bytes).reshape(count, rows, width)
            encoded = encoders[bool(uniform_blocks)].encode(canvases)
        except (CodecError, ValueError) as error:
            send_failure(connection, str(error))
        else:
            send_encoded(connection, encoded)


def _end_with_parent(connection_fd: int, parent_pid: int) -> None:
    """Ends this process when its parent is gone, even amid a picture.

    The system's own signal for it would come when the *thread* that started this process ends. The end of the socket is
    not enough: a fork of the parent may hold it open.
    """
    poll = select.poll()
    poll.register(connection_fd, select.POLLRDHUP | select.POLLHUP)
    while not poll.poll(_PARENT_CHECK_MS) and os.getppid() == parent_pid:
        pass
    os._exit(0)


def main(arguments: Sequence[str]) -> None:
    """Serves on the socket and the memory whose descriptors are given, for the process whose id is given."""
    connection_fd, memory_fd, parent_pid = map(int, arguments)
    os.nice(NICENESS)
    connection = socket.socket(fileno=connection_fd)
    threading.Thread(target=_end_with_parent, args=(connection_fd, parent_pid), daemon=True).start()
    connection.sendall(ANSWER.pack(SUCCEEDED, 0))
    serve(connection, memory_fd)
