"""A local HTTP server for tests."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


def serve(answer, port=0):
    """Start a server that calls `answer(handler, body)` for each request, body None for GET; return it and its URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            answer(self, None)

        def do_POST(self):
            answer(self, json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}"))

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_address[1]}"
