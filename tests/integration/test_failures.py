"""Whatever happens to the peer and to what it keeps, the answer is that of a server without kvcodec."""

import contextlib
import os
import signal
import subprocess
import sys
import threading

import pytest
from integration.cluster import MODEL, PAGE_TOKENS, ask, forget, metric, others, wait_for, wait_up

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.format.namespace import PageKey
from sglang_kvcodec.format.page_object import PREFIX, PageObject, PicturePart, SideData, build_page_object
from sglang_kvcodec.format.spec import layer_groups

pytestmark = pytest.mark.sglang


def test_peer_killed_in_the_middle_of_a_fetch_and_back(fresh, stored):
    text, answer = stored
    objects = fresh.stat().objects
    fresh.restart_peer("1Mbps")
    wait_up(fresh.b)
    fetched = metric(fresh.b, "kvcodec_fetched_bytes_total")
    replies = []
    asking = threading.Thread(target=lambda: replies.append(ask(fresh.b, text)))
    asking.start()
    wait_for(lambda: metric(fresh.b, "kvcodec_fetched_bytes_total") > fetched + 20_000, "fetched bytes")
    fresh.peer.kill()
    asking.join()
    assert replies[0].text == answer
    wait_for(lambda: metric(fresh.b, "kvcodec_peer_up") == 0, "sign of the loss")
    assert metric(fresh.b, "kvcodec_peer_errors_total", rpc="fetch") > 0

    # Requests flow while it is down, and nothing stored is lost.
    assert ask(fresh.b, text).text == answer
    fresh.restart_peer()
    wait_up(fresh.b)
    assert fresh.stat().objects >= objects
    forget(fresh.b)
    again = ask(fresh.b, text)
    assert again.text == answer
    assert again.cached.storage > 0


def test_peer_killed_in_the_middle_of_a_put_and_back(fresh):
    # Some twenty pages: the first are published while the answer is still being written.
    text, answer = fresh.clear_text(pieces=2)
    before = fresh.stat().objects
    replies = []
    asking = threading.Thread(target=lambda: replies.append(ask(fresh.a, text)))
    asking.start()
    wait_for(lambda: metric(fresh.a, "kvcodec_publish_queue_bytes") > 0, "pages to publish")
    fresh.peer.kill()
    asking.join()
    assert replies[0].text == answer
    assert ask(fresh.a, text).text == answer
    fresh.start_peer()
    wait_up(fresh.a)
    assert fresh.stat().objects >= before
    assert fresh.a.client.wait_published()
    forget(fresh.b)
    assert ask(fresh.b, text).text == answer


def test_peer_is_full(fresh):
    # Room for about ten pages: older ones go, newer ones stay, every answer is right.
    fresh.restart_peer(capacity="700KB")
    wait_up(fresh.a)
    for _ in range(3):
        text, answer = fresh.clear_text()
        assert ask(fresh.a, text).text == answer
        assert fresh.a.client.wait_published()
    stat = fresh.stat()
    assert stat.stored_bytes <= 700_000
    assert stat.evicted_objects > 0
    forget(fresh.b)
    wait_up(fresh.b)
    assert ask(fresh.b, text).text == answer
    fresh.restart_peer()


def _rebuilt(page: PageObject, key: PageKey, profile=None, spoil=None) -> bytes:
    """The same page under another key or with other contents, with checksums that hold."""
    spec = page.header.spec
    groups = [{side: page.side_data(group.index, side) for side in spec.sides} for group in layer_groups(spec)]
    if spoil is not None:
        groups = [{side: spoil(data) for side, data in group.items()} for group in groups]
    return build_page_object(key, spec, profile or page.header.profile_name, groups, page.parameter_sets)


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _bit_flipped(data: bytes) -> bytes:
    at = len(data) - 100
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _manifest_bit_flipped(data: bytes) -> bytes:
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


def _other_version(data: bytes) -> bytes:
    magic, version, *rest = PREFIX.unpack_from(data)
    return PREFIX.pack(magic, version + 1, *rest) + data[PREFIX.size :]


def _other_model(data: bytes) -> bytes:
    page = PageObject(data)
    return _rebuilt(page, PageKey(bytes(32), page.header.key.page_hash))


def _other_page(data: bytes) -> bytes:
    page = PageObject(data)
    return _rebuilt(page, PageKey(page.header.key.namespace_digest, bytes(32)))


def _other_profile(data: bytes) -> bytes:
    page = PageObject(data)
    spec = page.header.spec
    raw = SideData(stored=bytes(spec.layers * spec.layer_values * 2))
    return build_page_object(page.header.key, spec, "raw", [dict.fromkeys(spec.sides, raw) for _ in layer_groups(spec)])


def _garbage(data: bytes) -> bytes:
    return bytes(range(256)) * 40


DAMAGES = {
    "truncated": _truncated,
    "bit flipped": _bit_flipped,
    "manifest bit flipped": _manifest_bit_flipped,
    "other format version": _other_version,
    "other model": _other_model,
    "other page": _other_page,
    "other profile": _other_profile,
    "garbage": _garbage,
}


def _checked(data: bytes, key: bytes) -> bytes:
    PageObject(data, PageKey.from_bytes(key))
    return data


_PRINT_LAST_HASH = """
import sys
from array import array

from sglang.srt.mem_cache.radix_cache import RadixKey
from sglang.srt.mem_cache.utils import get_storage_hash_str
from transformers import AutoTokenizer

model, page_tokens, text = sys.argv[1], int(sys.argv[2]), sys.stdin.read()
question = [{"role": "user", "content": text}]
ids = AutoTokenizer.from_pretrained(model).apply_chat_template(question, add_generation_prompt=True, return_dict=True)
# At least one token is always computed.
key = RadixKey(array("q", ids["input_ids"][:-1]), None).page_aligned(page_tokens)
print(get_storage_hash_str(key, None, page_size=page_tokens)[-1])
"""


def _last_page_hash(text: str) -> bytes:
    """Of the last whole page of the prompt that a question becomes; by a child, for what SGLang's import warns of."""
    command = [sys.executable, "-c", _PRINT_LAST_HASH, MODEL, str(PAGE_TOKENS)]
    printed = subprocess.run(command, input=text, check=True, capture_output=True, text=True).stdout
    return bytes.fromhex(printed.split()[-1])


def _tamper(cluster, damage, bandwidth_limit=None) -> int:
    """Replaces every stored object by a damaged one under the same key; how many. No scrub finds them first."""
    with cluster.store() as engine:
        for server in (cluster.a, cluster.b):
            wait_for(lambda s=server: metric(s, "kvcodec_peer_up") == 0, "sign of the loss")
        tampered = 0
        for key in _all_keys(cluster):
            data = engine.get(key)
            assert engine.delete(key)
            # What an earlier test has damaged is gone then.
            with contextlib.suppress(FormatError):
                assert engine.put(key, damage(_checked(data, key)))
                tampered += 1
    cluster.start_peer(bandwidth_limit, arguments=["--scrub-rate", "0"])
    return tampered


_PRINT_KEYS = """
import sys
import lmdb
env = lmdb.open(sys.argv[1], readonly=True, lock=False, max_dbs=8)
objects = env.open_db(b"objects", create=False)
with env.begin() as txn:
    for key, _ in txn.cursor(objects):
        print(key.hex())
"""


def _tamper_at_one(cluster, server, parts, part, damage) -> int:
    """The same for what one rank or stage of a server has stored, which are so many."""
    log = server.log_text()
    with cluster.store():
        namespaces = {PageKey.from_bytes(key).namespace_digest for key in _all_keys(cluster)}
    mine = sorted(digest for digest in namespaces if f"namespace {digest.hex()[:16]}" in log)
    assert len(mine) == parts

    def at_one(data):
        return damage(data) if PageObject(data).key.namespace_digest == mine[part] else data

    return _tamper(cluster, at_one)


def _is_computed(server, text, answer, damage) -> None:
    """Asks for what :func:`_tamper_at_one` has spoilt: it is counted where it is found, and computed everywhere."""
    wait_up(server)
    missed, failed = metric(server, "kvcodec_misses_total"), metric(server, "kvcodec_restore_failures_total")
    reply = ask(server, text)
    assert reply.text == answer
    if damage is _bit_flipped:
        assert metric(server, "kvcodec_misses_total") > missed
    else:
        assert reply.cached.storage == 0
        assert metric(server, "kvcodec_restore_failures_total") == failed + 1
    # Nothing leaked.
    assert server.client.wait_published()
    forget(server)


def _all_keys(cluster) -> list[bytes]:
    """Keys of everything stored. Read by a child: LMDB allows one handle of a store per process."""
    command = [sys.executable, "-c", _PRINT_KEYS, str(cluster.store_dir)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sorted({bytes.fromhex(line) for line in printed.split()})


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_stored_object_that_is_not_what_it_should_be(fresh, stored, damage):
    text, answer = stored
    assert _tamper(fresh, damage) > 0
    wait_up(fresh.b)
    missed = metric(fresh.b, "kvcodec_misses_total")
    reply = ask(fresh.b, text)
    assert reply.text == answer
    assert reply.cached.storage == 0
    assert metric(fresh.b, "kvcodec_misses_total") > missed

    # The damage heals: the page is computed, stored anew and used.
    assert fresh.b.client.wait_published()
    forget(fresh.b)
    healed = ask(fresh.b, text)
    assert healed.text == answer
    assert healed.cached.storage > 0


@pytest.fixture
def stored_and_rated(fresh):
    """As ``stored``, of some thirty pages; the second server knows its rates, so that it admits requests early."""
    text, answer = fresh.clear_text(pieces=3)
    assert ask(fresh.a, text).text == answer
    wait_up(fresh.b)
    ask(fresh.b, fresh.text())
    for server in (fresh.a, fresh.b):
        assert server.client.wait_published()
        forget(server)
    for _ in range(2):
        assert ask(fresh.b, text).text == answer
        forget(fresh.b)
    return text, answer


def beside(cluster, are_others):
    """Others are answered, or nobody is."""
    return others(cluster.b, *cluster.clear_text()) if are_others else contextlib.nullcontext()


@pytest.mark.parametrize("are_others", [False, True], ids=["alone", "beside others"])
def test_what_turns_out_bad_after_an_early_admission_is_computed(fresh, stored_and_rated, are_others):
    text, answer = stored_and_rated
    # The last bytes that come.
    last = _last_page_hash(text)

    def damage(data):
        return _bit_flipped(data) if PageObject(data).key.page_hash == last else data

    assert _tamper(fresh, damage, "30Mbps") > 0
    wait_up(fresh.b)
    early = metric(fresh.b, "kvcodec_early_admissions_total")
    failed = metric(fresh.b, "kvcodec_restore_failures_total", reason="arrival")
    ahead = metric(fresh.b, "kvcodec_ahead_restores_total", outcome="failed")
    with beside(fresh, are_others):
        reply = ask(fresh.b, text)
    assert reply.text == answer
    assert reply.cached.storage == 0
    assert metric(fresh.b, "kvcodec_early_admissions_total") == early + 1
    assert metric(fresh.b, "kvcodec_restore_failures_total", reason="arrival") == failed + 1
    assert metric(fresh.b, "kvcodec_ahead_restores_total", outcome="failed") == ahead + are_others
    # It gets idle, and the page is stored anew.
    assert fresh.b.client.wait_published()
    forget(fresh.b)
    healed = ask(fresh.b, text)
    assert healed.text == answer
    assert healed.cached.storage > 0
    fresh.restart_peer()


@pytest.mark.parametrize("are_others", [False, True], ids=["alone", "beside others"])
@pytest.mark.parametrize("stop", ["kill", "pause"])
def test_a_peer_that_goes_after_an_early_admission(fresh, stored_and_rated, stop, are_others):
    text, answer = stored_and_rated
    fresh.restart_peer("50Mbps")
    wait_up(fresh.b)
    early = metric(fresh.b, "kvcodec_early_admissions_total")
    replies = []
    asking = threading.Thread(target=lambda: replies.append(ask(fresh.b, text)))
    with beside(fresh, are_others):
        asking.start()
        wait_for(
            lambda: metric(fresh.b, "kvcodec_early_admissions_total") > early or not asking.is_alive(),
            "early admission",
        )
        os.kill(fresh.peer.pid, signal.SIGKILL if stop == "kill" else signal.SIGSTOP)
        asking.join()
    assert replies[0].text == answer
    assert metric(fresh.b, "kvcodec_early_admissions_total") > early
    assert ask(fresh.b, text).text == answer
    fresh.peer.kill()
    fresh.restart_peer()
    wait_up(fresh.b)
    forget(fresh.b)
    again = ask(fresh.b, text)
    assert again.text == answer
    assert again.cached.storage > 0


def _unrestorable(data: bytes) -> bytes:
    """Checksums that hold around pictures that decode to something else: only restoring can tell."""
    page = PageObject(data)

    def spoil(side: SideData) -> SideData:
        return SideData(PicturePart(side.picture.data, side.picture.plane_digest ^ 1), side.stored, side.escapes)

    return _rebuilt(page, page.header.key, spoil=spoil)


@pytest.mark.parametrize("is_longer", [False, True], ids=["whole", "start of a longer prompt"])
def test_pages_that_fail_after_admission_are_computed(fresh, stored, is_longer):
    text, answer = stored
    if is_longer:
        # SGLang lets go of the request between two chunks of it.
        text, answer = fresh.clear_text(pieces=2, after=text)
    _tamper(fresh, _unrestorable)
    wait_up(fresh.b)
    reply = ask(fresh.b, text)
    assert reply.text == answer
    assert reply.finish_reason in ("stop", "length")
    assert reply.cached.storage == 0
    assert metric(fresh.b, "kvcodec_restore_failures_total") > 0
    # Nothing leaked: the server gets idle and flushes, and others are served.
    forget(fresh.b)
    other, answer = fresh.clear_text()
    assert ask(fresh.b, other).text == answer
