import threading
import time

from sglang_kvcodec.flow.news import News


def test_what_was_told_is_counted_and_ends_a_rest():
    news = News()
    before = news.count
    teller = threading.Thread(target=news.tell)
    teller.start()
    started_s = time.monotonic()
    news.wait(60)
    assert time.monotonic() - started_s < 30
    teller.join()
    assert news.count != before
    # It was heard.
    news.wait(0.001)


def test_all_that_many_tell_is_seen():
    news, seen = News(), []
    done = [False] * 8

    def tell(index):
        done[index] = True
        news.tell()

    tellers = [threading.Thread(target=tell, args=(index,)) for index in range(len(done))]
    for teller in tellers:
        teller.start()
    count = -1
    while sum(seen[-1:]) < len(done):
        if news.count != count:
            count = news.count
            seen.append(sum(done))
    for teller in tellers:
        teller.join()
