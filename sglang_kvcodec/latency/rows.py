"""What a sweep found, as rows: medians, spreads and ratios within the same repeat."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from sglang_kvcodec.latency.samples import DEVICE, PLANNER, PLANNER_FIRST, PREFILL, Method, Sample
from sglang_kvcodec.latency.servers import bits_per_s_of
from sglang_kvcodec.latency.sweep import AS_IS
from sglang_kvcodec.testing.conversation import first_difference

NO_RIVALS = (DEVICE, PLANNER, PLANNER_FIRST)
"""What an oracle can't choose: it chooses among prefill and the servers that take every hit."""


def spread(name: str, values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, 10th and 90th percentile of ``values`` under names that begin with ``name``."""
    ranked = statistics.quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    return {
        f"{name}_median": round(statistics.median(values), digits),
        f"{name}_p10": round(ranked[0], digits),
        f"{name}_p90": round(ranked[-1], digits),
    }


class Found:
    """The samples of a sweep, by bandwidth, method and repeat."""

    def __init__(self, samples: Sequence[Sample], methods: Sequence[Method]) -> None:
        """Orders them.

        Args:
            samples: each method has one of each repeat at each bandwidth.
            methods: that were measured.
        """
        self._methods = {method.name: method for method in methods}
        self._samples: dict[str, dict[str, dict[int, Sample]]] = {}
        for sample in samples:
            of_bandwidth = self._samples.setdefault(sample.bandwidth, {})
            of_bandwidth.setdefault(sample.method, {})[sample.repeat] = sample

    @property
    def bandwidths(self) -> list[str]:
        """From the slowest to the fastest."""
        return sorted(self._samples, key=lambda name: _bits_per_s(name) or float("inf"))

    def method_of(self, name: str) -> Method:
        """The server that gave the samples of a name."""
        return self._methods[{DEVICE: PREFILL, PLANNER_FIRST: PLANNER}.get(name, name)]

    def samples_of(self, bandwidth: str, name: str) -> list[Sample]:
        """By repeat; none where there are none."""
        found = self._samples[bandwidth].get(name, {})
        return [found[repeat] for repeat in sorted(found)]

    def names(self) -> list[str]:
        """Baselines, then tiers, then planners."""
        first, last = [PREFILL, DEVICE], [PLANNER, PLANNER_FIRST]
        all_names = dict.fromkeys(name for of_bandwidth in self._samples.values() for name in of_bandwidth)
        tiers = [name for name in all_names if name not in (*first, *last)]
        return [name for name in (*first, *tiers, *last) if name in all_names]

    def rows(self) -> list[dict[str, Any]]:
        """One for each bandwidth and method."""
        return [self._row(bandwidth, name) for bandwidth in self.bandwidths for name in self.names()]

    def _row(self, bandwidth: str, name: str) -> dict[str, Any]:
        samples, method = self.samples_of(bandwidth, name), self.method_of(name)
        replies = [sample.reply for sample in samples]
        row: dict[str, Any] = {
            "bandwidth": bandwidth,
            "bits_per_s": _bits_per_s(bandwidth),
            "method": name,
            "profile": method.profile or None,
            "plan": method.plan or None,
            "repeats": len(samples),
            **spread("ttft_s", [reply.ttft_s for reply in replies]),
            "ratio_to_prefill_median": self._ratio(bandwidth, name, (PREFILL,)),
            "prompt_tokens_median": statistics.median(reply.prompt_tokens for reply in replies),
            **{
                f"cached_{tier}_tokens_median": statistics.median(getattr(reply.cached, tier) for reply in replies)
                for tier in ("device", "host", "storage")
            },
        }
        if method.has_kvcodec:
            fetched, restored = (
                [sample.fetched_bytes for sample in samples],
                [sample.restored_bytes for sample in samples],
            )
            row["fetched_bytes_median"] = statistics.median(fetched)
            row["compression_ratio"] = round(sum(restored) / sum(fetched), 3) if sum(restored) else None
            row["same_words"] = sum(not self.difference(sample) for sample in samples)
            row["same_words_share_mean"] = round(statistics.mean(self._agreement(sample) for sample in samples), 3)
        if name in (PLANNER, PLANNER_FIRST):
            row["over_best_median"] = self._ratio(bandwidth, name, self._rivals())
            row["reasons"] = " ".join("+".join(sample.reasons) or "none" for sample in samples)
            row["tiers"] = " ".join("+".join(sample.tiers) or "none" for sample in samples)
        return row

    def _rivals(self) -> tuple[str, ...]:
        return tuple(name for name in self.names() if name not in NO_RIVALS)

    def _ratio(self, bandwidth: str, name: str, others: Sequence[str]) -> float:
        """Median over repeats of TTFT over the best of others in the same repeat."""
        rivals = [self.samples_of(bandwidth, other) for other in others]
        best_s = [min(sample.reply.ttft_s for sample in same) for same in zip(*rivals, strict=True)]
        ttfts_s = [sample.reply.ttft_s for sample in self.samples_of(bandwidth, name)]
        ratios: list[float] = [a / b for a, b in zip(ttfts_s, best_s, strict=True)]
        return round(statistics.median(ratios), 3)

    def planner_over_best(self) -> dict[str, float]:
        """Bandwidth -> TTFT of the planner over the best that an oracle would have chosen; empty without a planner."""
        if PLANNER not in self.names():
            return {}
        return {bandwidth: self._ratio(bandwidth, PLANNER, self._rivals()) for bandwidth in self.bandwidths}

    def truths(self, sample: Sample) -> list[str]:
        """What the server without kvcodec said to the same prompt, computing all of it and the end alone.

        A server that fetches computes the end alone. Sums of other lengths may be rounded differently, so a word may
        hang on that without kvcodec too, and either is right.
        """
        return [
            other.reply.text
            for name in (PREFILL, DEVICE)
            for other in self.samples_of(sample.bandwidth, name)
            if other.repeat == sample.repeat
        ]

    def difference(self, sample: Sample) -> str:
        """Where the words part from those of the server without kvcodec; empty if they do not."""
        truths = self.truths(sample)
        return "" if sample.reply.text in truths else first_difference(sample.reply.text, truths[0])

    def _agreement(self, sample: Sample) -> float:
        """Which share of the answer is that of the server without kvcodec, up to the first difference."""
        return max(_common_share(sample.reply.text, truth) for truth in self.truths(sample))

    def broken_words(self) -> list[str]:
        """A sentence for each answer of a lossless method that is not the one of the server without kvcodec."""
        return [
            f"{name} at {bandwidth}, repeat {sample.repeat}: {words}"
            for bandwidth in self.bandwidths
            for name in self.names()
            if self.method_of(name).is_lossless
            for sample in self.samples_of(bandwidth, name)
            if (words := self.difference(sample))
        ]

    def worth_a_picture(self) -> str | None:
        """Of the planner's requests one that fetched, at the slowest bandwidth at which it did: what a trace calls it.

        A settled one, or else a first one; where it fetched none, the last one. None without a planner.
        """
        requests = [
            sample
            for name in (PLANNER, PLANNER_FIRST)
            for bandwidth in self.bandwidths
            for sample in self.samples_of(bandwidth, name)
        ]
        settled = [sample for sample in requests if sample.method == PLANNER]
        fetched = [sample for sample in requests if sample.reply.cached.storage]
        return (fetched[:1] or settled[-1:])[0].reply.rid if settled else None


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested values under joined names, lists as words: what fits in a line of CSV."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}_")
        else:
            found[f"{prefix}{name}"] = " ".join(map(str, value)) if isinstance(value, list | tuple) else value
    return found


def _common_share(text: str, truth: str) -> float:
    same = next((at for at, (a, b) in enumerate(zip(text, truth, strict=False)) if a != b), min(len(text), len(truth)))
    return same / max(len(text), len(truth)) if text or truth else 1.0


def _bits_per_s(bandwidth: str) -> float | None:
    return None if bandwidth == AS_IS else bits_per_s_of(bandwidth)
