from sglang_kvcodec.latency.samples import Sample
from sglang_kvcodec.testing.sglang_client import CachedTokens, ChatReply


def sample(method, bandwidth="unlimited", repeat=1, ttft_s=1.0, text="def f", storage=None):
    if storage is None:
        storage = 0 if method in ("prefill", "device") or (method == "planner" and bandwidth != "unlimited") else 1984
    reply = ChatReply(
        text=text,
        prompt_tokens=2009,
        completion_tokens=8,
        cached=CachedTokens(storage=storage),
        ttft_s=ttft_s,
        total_s=ttft_s + 1,
        finish_reason="length",
        rid=f"{method}-{bandwidth}-{repeat}",
    )
    fetched = 10_000.0 * storage
    reasons = ("fetch_all",) if method.startswith("planner") else ()
    return Sample(method, bandwidth, repeat, reply, fetched, 3 * fetched, reasons, ("high",) if reasons else ())
