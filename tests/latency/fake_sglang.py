"""Stands in for an SGLang server over HTTP: it knows what it holds, what is stored, and counts as kvcodec does."""

import http.server
import json
import threading

PAGE_TOKENS = 64
CHARS_PER_TOKEN = 4
BYTES_PER_TOKEN = 100
RATIO = 4


class FakeSGLang(http.server.ThreadingHTTPServer):
    """Serves on loopback while it is entered."""

    daemon_threads = True

    def __init__(self, kvcodec=True, answer=lambda prompt: f"answer to {prompt[-20:]}"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.kvcodec = kvcodec
        self.answer = answer
        self.asked = []
        self.forgotten = 0
        self.held = []
        self.stored = []
        self.counts = {"fetched": 0, "published": 0, "plans": 0}

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def __enter__(self):
        self._thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self._thread.join()
        self.server_close()

    def chat(self, messages):
        """``(text, prompt tokens, cached on the device, cached at the peer)``."""
        prompt = "".join(f"<{message['role']}>{message['content']}" for message in messages)
        self.asked.append(prompt)
        held, stored = (_cached_tokens(prompt, prompts) for prompts in (self.held, self.stored))
        storage = max(0, stored - held) if self.kvcodec else 0
        self.counts["fetched"] += storage
        self.counts["plans"] += 1
        self.held.append(prompt)
        if self.kvcodec:
            self.stored.append(prompt)
            self.counts["published"] += 1
        return self.answer(prompt), len(prompt) // CHARS_PER_TOKEN, held, storage

    def metrics(self):
        if not self.kvcodec:
            return "sglang:num_requests 1\n"
        labels = '{model_name="m",tp_rank="0"'
        return (
            f"# HELP x\nkvcodec_peer_up{labels}}} 1.0\nkvcodec_publish_queue_bytes{labels}}} 0.0\n"
            f'kvcodec_published_pages_total{labels},outcome="stored"}} {self.counts["published"]}\n'
            f"kvcodec_fetched_bytes_total{labels}}} {self.counts['fetched'] * BYTES_PER_TOKEN}\n"
            f"kvcodec_restored_bytes_total{labels}}} {self.counts['fetched'] * BYTES_PER_TOKEN * RATIO}\n"
            f'kvcodec_plans_total{labels},reason="fetch_all"}} {self.counts["plans"]}\n'
            f'kvcodec_plans_total{labels},reason="nothing_stored"}} 7\n'
        )


def _cached_tokens(prompt, prompts):
    common = max((_common_chars(prompt, other) for other in prompts), default=0)
    whole = min(common // CHARS_PER_TOKEN, len(prompt) // CHARS_PER_TOKEN - 1)
    return whole // PAGE_TOKENS * PAGE_TOKENS


def _common_chars(text, other):
    return next((at for at, (a, b) in enumerate(zip(text, other, strict=False)) if a != b), min(len(text), len(other)))


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        match self.path:
            case "/health":
                self._send("")
            case "/metrics":
                self._send(server.metrics())
            case "/model_info":
                self._send(json.dumps({"model_path": "/models/a-model"}))
            case "/tokenize":
                self._send(json.dumps({"count": len(json.loads(body)["prompt"]) // CHARS_PER_TOKEN}))
            case "/flush_cache":
                server.held.clear()
                self._send("")
            case "/hicache/storage-backend/clear" if server.kvcodec:
                server.forgotten += 1
                self._send("")
            case "/v1/chat/completions":
                self._chat(json.loads(body))
            case _:
                self._send("no such path", 404)

    do_POST = do_GET

    def _chat(self, request):
        text, tokens, device, storage = self.server.chat(request["messages"])
        details = {"device": device, "host": 0, "storage": storage}
        events = [
            {"id": f"rid-{len(self.server.asked)}", "choices": [{"delta": {"content": text}, "finish_reason": "stop"}]},
            {"id": f"rid-{len(self.server.asked)}", "choices": [], "sglext": {"cached_tokens_details": details}}
            | {"usage": {"prompt_tokens": tokens, "completion_tokens": 1}},
        ]
        self._send("".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n")

    def _send(self, text, status=200):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass
