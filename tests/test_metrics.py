"""docs/metrics.md says the same as metrics.py and peer_metrics.py."""

import pathlib
import re

from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from sglang_kvcodec import metrics, peer_metrics

DOCS = pathlib.Path(__file__).parents[1] / "docs/metrics.md"
KINDS = {Counter: "counter", Gauge: "gauge", Histogram: "histogram"}


def all_metrics() -> list[MetricWrapperBase]:
    values = [*vars(metrics).values(), *vars(peer_metrics).values()]
    return [value for value in values if isinstance(value, MetricWrapperBase)]


def exported_rows() -> dict[str, tuple[str, str]]:
    """Exported name -> (kind, labels) of every metric, as a scrape shows them."""
    rows = {}
    for metric in all_metrics():
        (family,) = metric.describe()
        suffix = "_total" if isinstance(metric, Counter) else ""
        rows[family.name + suffix] = (KINDS[type(metric)], ", ".join(metric._labelnames))
    return rows


def documented_rows() -> dict[str, tuple[str, str]]:
    rows = {}
    for line in DOCS.read_text().splitlines():
        match = re.match(r"\| `(kvcodec_\w+)` \| (\w+) \|([^|]*)\| [^|]+ \|$", line)
        assert match or not line.startswith("| `"), f"not a metric's row: {line}"
        if match:
            assert match[1] not in rows, f"{match[1]} is documented twice"
            rows[match[1]] = (match[2], match[3].replace("`", "").strip())
    return rows


def test_every_metric_is_documented_as_it_is():
    assert documented_rows() == exported_rows()


def test_names_carry_units_and_the_prefix():
    for name, (kind, _) in exported_rows().items():
        assert name.startswith("kvcodec_")
        assert kind != "histogram" or name.endswith("_seconds")


def test_every_metric_has_a_help_text():
    for metric in all_metrics():
        (family,) = metric.describe()
        assert len(family.documentation) > 10
