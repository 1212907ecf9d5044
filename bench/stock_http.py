"""A server as the standard library has it, for /health: ThreadingHTTPServer and BaseHTTPRequestHandler.

At its best: keep-alive, one write an answer (wbufsize), no Nagle delay, no log.
"""
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BODY = b'{"status": "ok"}'


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    def log_request(self, *_):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 1024
    daemon_threads = True


if __name__ == "__main__":
    import sys

    Server(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
