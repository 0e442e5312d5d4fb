"""The HTTP client, against a server that answers as SGLang 0.5.23 was seen to."""

import http.server
import json
import threading

import pytest

from sglang_kvcodec.testing.clear_texts import clear_texts
from sglang_kvcodec.testing.sglang_client import CachedTokens, SGLangClient

USAGE = {"prompt_tokens": 112, "total_tokens": 120, "completion_tokens": 2}


def chunk(**fields: object) -> str:
    return json.dumps({"id": "r-7", "object": "chat.completion.chunk", "choices": [], **fields})


def choice(content: str | None, finish: str | None = None) -> dict[str, object]:
    return {
        "choices": [{"index": 0, "delta": {"reasoning_content": None, "content": content}, "finish_reason": finish}]
    }


class FakeServer(http.server.ThreadingHTTPServer):
    """Answers each path with the next of its prepared ``(status, body)``, the last one for ever."""

    daemon_threads = True

    def __init__(self, answers):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers = {path: list(bodies) for path, bodies in answers.items()}
        self.requests = []


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        length = int(self.headers.get("Content-Length", 0))
        self.server.requests.append((self.path, self.rfile.read(length)))
        answers = self.server.answers[self.path]
        status, body = answers.pop(0) if len(answers) > 1 else answers[0]
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    do_POST = do_GET

    def log_message(self, *args):
        pass


@pytest.fixture
def serve():
    servers = []

    def start(answers):
        server = FakeServer(answers)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return server, SGLangClient(f"http://127.0.0.1:{server.server_port}", timeout_s=10)

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def stream(*chunks: str) -> str:
    return "".join(f"data: {text}\n\n" for text in (*chunks, "[DONE]"))


def test_a_streamed_answer(serve):
    body = stream(
        chunk(**choice("")),
        chunk(**choice("def")),
        chunk(**choice(" f\n\n")),
        chunk(**choice(None, "length")),
        chunk(
            usage=None,
            sglext={"cached_tokens_details": {"device": 64, "host": 0, "storage": 128, "storage_backend": "k"}},
        ),
        chunk(usage=USAGE),
    )
    server, client = serve({"/v1/chat/completions": [(200, body)]})
    reply = client.chat([{"role": "user", "content": "hello"}], max_tokens=2, extra={"seed": 7})
    assert (reply.text, reply.finish_reason) == ("def f\n\n", "length")
    assert (reply.prompt_tokens, reply.completion_tokens) == (112, 2)
    assert reply.cached == CachedTokens(device=64, host=0, storage=128)
    assert reply.rid == "r-7"
    assert 0 < reply.ttft_s <= reply.total_s
    sent = json.loads(server.requests[0][1])
    assert (sent["temperature"], sent["max_tokens"], sent["seed"]) == (0, 2, 7)


def test_nothing_cached_is_zero(serve):
    _, client = serve({"/v1/chat/completions": [(200, stream(chunk(**choice("x")), chunk(usage=USAGE)))]})
    assert client.chat([], 1).cached == CachedTokens(0, 0, 0)


def test_an_error_inside_the_stream_is_raised(serve):
    _, client = serve({"/v1/chat/completions": [(200, stream(json.dumps({"error": {"message": "out of cheese"}})))]})
    with pytest.raises(OSError, match="out of cheese"):
        client.chat([], 1)


def test_a_refused_request_is_raised(serve):
    _, client = serve({"/v1/chat/completions": [(400, "too long")]})
    with pytest.raises(OSError, match="400: too long"):
        client.chat([], 1)


def test_metrics_are_summed_over_labels(serve):
    text = '# HELP a b\na_total{x="1 {"} 2.0\na_total{x="2"} 3e2\nb 1\n'
    _, client = serve({"/metrics": [(200, text)]})
    assert client.metrics() == {"a_total": 302.0, "b": 1.0}


def test_a_metric_by_one_of_its_labels(serve):
    series = ['a_total{x="1",reason="p"} 2', 'a_total{reason="p",x="2"} 3', 'a_total{reason="q r"} 1']
    _, client = serve({"/metrics": [(200, "\n".join([*series, 'ab_total{reason="p"} 9', "a_total 5", ""]))]})
    assert client.metric_by("a_total", "reason") == {"p": 5.0, "q r": 1.0}


def test_forgetting_clears_both_pools_as_soon_as_the_server_is_idle(serve):
    server, client = serve(
        {"/flush_cache": [(200, "")], "/hicache/storage-backend/clear": [(400, "busy"), (200, "cleared")]}
    )
    client.forget()
    assert [path for path, _ in server.requests] == ["/flush_cache", *["/hicache/storage-backend/clear"] * 2]


def test_a_server_that_will_not_forget_is_told(serve):
    _, client = serve({"/flush_cache": [(200, "")], "/hicache/storage-backend/clear": [(404, "what")]})
    with pytest.raises(TimeoutError, match="would not clear its host cache"):
        client.forget(timeout_s=0.01)


def test_flushing_waits_until_the_server_is_idle(serve):
    server, client = serve({"/flush_cache": [(400, "busy"), (400, "busy"), (200, "flushed")]})
    client.flush_cache()
    assert len(server.requests) == 3


def test_flushing_gives_up(serve):
    _, client = serve({"/flush_cache": [(400, "busy")]})
    with pytest.raises(TimeoutError, match="would not flush"):
        client.flush_cache(timeout_s=0.01)


def queue_bytes(queued: int, published: int) -> tuple[int, str]:
    return 200, f"kvcodec_publish_queue_bytes {queued}\nkvcodec_published_pages_total {published}\n"


def test_publishing_is_over_when_nothing_is_queued_and_nothing_comes(serve):
    states = [queue_bytes(0, 0), queue_bytes(4096, 0), queue_bytes(4096, 1), queue_bytes(0, 2)]
    server, client = serve({"/metrics": states})
    assert client.wait_published(timeout_s=30, settle_s=0.3)
    assert len(server.requests) > 4


def test_publishing_that_does_not_end_is_told(serve):
    _, client = serve({"/metrics": [queue_bytes(1, 0)]})
    assert not client.wait_published(timeout_s=0.2, settle_s=0.01)


def test_health(serve):
    _, client = serve({"/health": [(503, ""), (200, "")]})
    assert [client.is_healthy(), client.is_healthy()] == [False, True]
    assert not SGLangClient("http://127.0.0.1:1").is_healthy()


def test_tokens_are_counted(serve):
    _, client = serve({"/tokenize": [(200, '{"tokens": [1, 2, 3], "count": 3}')]})
    assert client.count_tokens("abc") == 3


def scored(*margins: float) -> str:
    tokens = [{"token": "x", "top_logprobs": [{"logprob": -0.1}, {"logprob": -0.1 - margin}]} for margin in margins]
    return json.dumps({"choices": [{"message": {"content": "x" * len(margins)}, "logprobs": {"content": tokens}}]})


def test_an_answer_is_as_clear_as_its_least_clear_token(serve):
    server, client = serve({"/v1/chat/completions": [(200, scored(2.0, 0.5, 7.0))]})
    assert client.decided([{"role": "user", "content": "hello"}], 3) == ("xxx", pytest.approx(0.5))
    sent = json.loads(server.requests[0][1])
    assert (sent["temperature"], sent["max_tokens"], sent["top_logprobs"]) == (0, 3, 2)


def test_an_answer_refused_is_raised(serve):
    _, client = serve({"/v1/chat/completions": [(400, "too long")]})
    with pytest.raises(OSError, match="400: too long"):
        client.decided([], 1)


def test_texts_whose_answer_hangs_on_rounding_are_left_out(serve):
    answers = [scored(4.0, 0.0625), scored(0.5), scored(0.0), scored(1.0, 1.0)]
    _, client = serve({"/v1/chat/completions": [(200, each) for each in answers]})
    assert list(clear_texts(client, "abcd", 2)) == [("b", "x"), ("d", "xx")]


def test_texts_asked_at_once_come_in_their_order(serve):
    server, client = serve({"/v1/chat/completions": [(200, scored(1.0)) for _ in range(5)]})
    assert [text for text, _ in clear_texts(client, "abcde", 1, at_once=2)] == list("abcde")
    assert len(server.requests) == 5
