"""The ceiling: a server that answers every Rank with the same bytes, and does nothing else.

``--transport threads``: grpcio's synchronous server as everybody uses it. ``--transport direct``: ours, without a
thread per call (`server/rpc/direct.py`). Same method path, a reply of the same size.
"""

from __future__ import annotations

import argparse
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc

from loadtest.bench.child import announce
from server.rpc.direct import DirectMethod, DirectServer

THREADS = 64
_RANK = "/liverank.v1.Ranking/Rank"


def main() -> None:
    """Serves until SIGTERM."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reply-file", type=Path, required=True, help="a serialised RankResponse")
    parser.add_argument("--port-file", type=Path, required=True, help="written with the bound port once serving")
    parser.add_argument("--transport", choices=("threads", "direct"), required=True)
    options = parser.parse_args()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    reply = options.reply_file.read_bytes()
    server = grpc.server(ThreadPoolExecutor(THREADS), options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    if options.transport == "direct":
        DirectServer(server, {_RANK: DirectMethod(lambda call: None, lambda call, _: call.reply(reply))}).start()
    else:
        handler = grpc.unary_unary_rpc_method_handler(lambda request, context: reply)  # bytes in, bytes out
        service = grpc.method_handlers_generic_handler("liverank.v1.Ranking", {"Rank": handler})
        server.add_generic_rpc_handlers((service,))
        server.start()
    announce(options.port_file, port)
    stop.wait()
    server.stop(grace=1.0).wait()


if __name__ == "__main__":
    main()
