"""A TCP forwarder on loopback whose network can be made slow: what lies behind it answers late."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

CHUNK_BYTES = 1 << 16


class Proxy:
    """Forwards ``address`` to ``target`` (host:port; may be changed). ``delay_s`` is spent on every chunk of a
    reply, so that calls are answered late but not lost."""

    def __init__(self, target: str) -> None:
        self.target = target
        self.delay_s = 0.0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, name="proxy", daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            host, _, port = self.target.rpartition(":")
            try:
                far = socket.create_connection((host, int(port)), timeout=5.0)
            except OSError:  # nobody is there: the caller sees its connection close
                near.close()
                continue
            far.settimeout(None)
            for pair in ((near, far, False), (far, near, True)):
                threading.Thread(target=self._pump, args=pair, daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, slowed: bool) -> None:
        with contextlib.suppress(OSError):
            while chunk := source.recv(CHUNK_BYTES):
                if slowed and self.delay_s:
                    time.sleep(self.delay_s)
                sink.sendall(chunk)
        for end in (source, sink):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        """Accepts nobody any more; open connections end with their ends."""
        self._listener.close()
