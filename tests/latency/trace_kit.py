from sglang_kvcodec.flow.trace import FileTracer


def tracer(path):
    return FileTracer(path, "sglang-kvcodec rank 0")


def fetched(tracer, rid="r1", at_s=100.0):
    """A request that was fetched: first token after a second."""
    span, work = tracer.span, tracer.work
    span(rid, "lookup queue", at_s, at_s + 0.01)
    span(rid, "lookup", at_s + 0.01, at_s + 0.05, asked_pages=31, stored_pages=31)
    span(rid, "plan", at_s + 0.05, at_s + 0.05, reason="fetch_all", tier="high", pages=31)
    span(rid, "fetch queue", at_s + 0.05, at_s + 0.06)
    span(rid, "wire", at_s + 0.06, at_s + 0.3, bytes=1000, pages=8)
    span(rid, "wire", at_s + 0.3, at_s + 0.6, bytes=3000, pages=23)
    span(rid, "held", at_s, at_s + 0.5)
    for group in range(2):
        for side in ("KEY", "VALUE"):
            start_s = at_s + 0.5 + 0.1 * group
            work("decode", start_s, start_s + 0.08, group=group, side=side, pages=31)
            work("restore", start_s + 0.08, start_s + 0.1, group=group, side=side, pages=31)
    work("wait for layer 0", at_s + 0.5, at_s + 0.6)
    work("wait for layer 3", at_s + 0.65, at_s + 0.7)
    span(rid, "restore", at_s + 0.5, at_s + 0.7)
    span(rid, "forward", at_s + 0.5, at_s + 0.95, new_tokens=25, prefix_tokens=1984)
    span(rid, "first token", at_s, at_s + 1.0, prompt_tokens=2009)


def computed(tracer, rid, at_s):
    """A request of which nothing was stored."""
    tracer.span(rid, "lookup", at_s, at_s + 0.01)
    tracer.span(rid, "forward", at_s + 0.02, at_s + 0.4, new_tokens=2009, prefix_tokens=0)
    tracer.span(rid, "first token", at_s, at_s + 0.41)
