"""The ceiling: a server that answers every Rank with the same bytes.

Same transport as ours (synchronous grpcio, as many threads, same method path, a reply of the same size) and
nothing else: what it spends per reply, no server of this kind can save.
"""

from __future__ import annotations

import argparse
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from loadtest.bench.child import announce
from server.config import ServeSettings


def main() -> None:
    """Serves until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reply-file", type=Path, required=True, help="a serialised RankResponse")
    parser.add_argument("--port-file", type=Path, required=True, help="written with the bound port once serving")
    options = parser.parse_args()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    reply = options.reply_file.read_bytes()
    ours = ServeSettings()
    server = grpc.server(ThreadPoolExecutor(ours.rank_threads), options=[("grpc.so_reuseport", 0)])
    handler = grpc.unary_unary_rpc_method_handler(lambda request, context: reply)  # bytes in, bytes out
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("liverank.v1.Ranking", {"Rank": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    announce(options.port_file, port)
    stop.wait()
    server.stop(grace=1.0).wait()


if __name__ == "__main__":
    main()
