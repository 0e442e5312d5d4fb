"""examples/deploy: every query names metrics and labels that exist, every command line and setting is one of ours."""

import configparser
import contextlib
import json
import pathlib
import re
import shlex
import shutil
import subprocess
import tomllib
import urllib.request

import pytest
import yaml
from cli.peer_kit import PATIENT
from cli.pki_kit import Authority
from prometheus_client import Counter, Gauge, Histogram
from prometheus_client.metrics import MetricWrapperBase

from sglang_kvcodec import metrics, peer_metrics
from sglang_kvcodec.cli.main import build_parser, main
from sglang_kvcodec.cli.serve_security import check_metrics
from sglang_kvcodec.config import Access, parse_bytes, parse_remotes
from sglang_kvcodec.format.exchange import PutOutcome
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.peer import PeerProcess

ROOT = pathlib.Path(__file__).parents[1]
DEPLOY = ROOT / "examples/deploy"

SUFFIXES = {Counter: ("_total",), Gauge: ("",), Histogram: ("_bucket", "_sum", "_count")}
SCRAPE_LABELS = {"instance", "job"}


def series() -> dict[str, set[str]]:
    """Every series that a scrape shows, and its labels."""
    found = {}
    for metric in (*vars(metrics).values(), *vars(peer_metrics).values()):
        if isinstance(metric, MetricWrapperBase):
            (family,) = metric.describe()
            for suffix in SUFFIXES[type(metric)]:
                bucket = {"le"} if suffix == "_bucket" else set()
                found[family.name + suffix] = set(metric._labelnames) | bucket | SCRAPE_LABELS
    return found


SERIES = series()
NOT_SERIES = {
    *("sum", "by", "count", "rate", "increase", "histogram_quantile", "and", "label_values", "__name__", "time"),
    *("__rate_interval", "instance"),
}


def faults(query: str) -> list[str]:
    """What is wrong with a query, in words."""
    found = [] if all(query.count(a) == query.count(b) for a, b in ("()", "{}", "[]")) else ["brackets"]
    if query.count('"') % 2:
        found.append("quotes")
    bare = re.sub(r'"[^"]*"', '""', query)
    groupings = re.findall(r"\bby \(([^)]*)\)", bare)
    selected = re.findall(r"(\w+)\{([^}]*)\}", bare)
    rest = re.sub(r"\bby \([^)]*\)|\{[^}]*\}|\[[^\]]*\]", " ", bare)
    names = {word for word in re.findall(r"[A-Za-z_]\w*", rest) if word not in NOT_SERIES}
    found += [f"no metric is called {name}" for name in sorted(names - SERIES.keys())]
    if not names & SERIES.keys():
        found.append("it names no metric")
    for name, selector in selected:
        labels = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", selector))
        found += [f"{name} has no label {label}" for label in sorted(labels - SERIES.get(name, labels))]
    known = set().union(*(SERIES[name] for name in names & SERIES.keys()))
    for grouping in groupings:
        labels = {label.strip() for label in grouping.split(",")}
        found += [f"nothing has the label {label}" for label in sorted(labels - known)]
    return found


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("kvcodec_peer_redy", "no metric is called kvcodec_peer_redy"),
        ("rate(kvcodec_peer_rpcs[5m])", "no metric is called kvcodec_peer_rpcs"),
        ("kvcodec_peer_rpc_seconds", "no metric is called"),
        ('kvcodec_peer_rpcs_total{state="OK"}', "no label state"),
        ("sum by (methd) (kvcodec_peer_rpcs_total)", "nothing has the label methd"),
        ("sum by (method) (kvcodec_peer_rpcs_total", "brackets"),
        ("1", "it names no metric"),
    ],
)
def test_a_fault_is_found(query, words):
    assert any(words in fault for fault in faults(query))


def dashboard():
    return json.loads((DEPLOY / "grafana-dashboard.json").read_text())


def panels():
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def test_every_query_of_the_dashboard_names_what_there_is():
    queries = [(panel["title"], target["expr"]) for panel in panels() for target in panel["targets"]]
    assert len(queries) > 40
    assert [(title, query, faults(query)) for title, query in queries if faults(query)] == []


def test_the_dashboard_fits_together():
    """Ids differ, panels do not overlap, legends show labels that their query leaves, and variables are there."""
    every = dashboard()["panels"]
    assert len({panel["id"] for panel in every}) == len(every)
    cells = [
        (x, y)
        for panel in every
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) == 23
    variables = {variable["name"] for variable in dashboard()["templating"]["list"]}
    for panel in panels():
        for target in panel["targets"]:
            assert set(re.findall(r"\$\{?(\w+)", target["expr"])) <= variables | {"__rate_interval"}
            legend = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert legend <= labels_left(target["expr"]), (panel["title"], target)


def labels_left(query: str) -> set[str]:
    """The labels of a query's result."""
    groupings = re.findall(r"\bby \(([^)]*)\)", query)
    if groupings:
        return {label.strip() for label in groupings[0].split(",")} - {"le"}
    if re.match(r"(sum|count)\(", query):
        return set()
    return set().union(*(SERIES[name] for name in re.findall(r"kvcodec_\w+", query)))


def test_the_variable_for_instances_names_metrics():
    (variable,) = (v for v in dashboard()["templating"]["list"] if v["name"] == "instance")
    (names,) = re.findall(r'__name__=~"([^"]*)"', variable["query"]["query"])
    assert set(names.split("|")) <= SERIES.keys()


def rules():
    groups = yaml.safe_load((DEPLOY / "prometheus-rules.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_every_alert_names_what_there_is():
    assert len({rule["alert"] for rule in rules()}) == len(rules()) > 10
    assert [(rule["alert"], faults(rule["expr"])) for rule in rules() if faults(rule["expr"])] == []


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_is_whole(rule):
    assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
    assert re.fullmatch(r"\d+[smhd]", rule.get("for", "0s"))
    assert rule["labels"]["severity"] in ("info", "warning")
    shown = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
    assert shown <= labels_left(rule["expr"])
    assert set(rule["annotations"]) == {"summary", "description"}


def test_what_the_alerts_and_the_dashboard_call_outcomes_are_outcomes():
    values = [value for rule in rules() for value in re.findall(r'outcome="(\w+)"', rule["expr"])]
    assert values
    assert set(values) <= {outcome.value for outcome in PutOutcome}


class Secrets:
    """Files of a certificate and of tokens, as the examples want them."""

    def __init__(self, directory: pathlib.Path):
        authority = Authority(directory)
        self.ca, (self.certificate, self.key) = authority.file, authority.issue("peer")
        self.tokens, self._directory = directory / "tokens.toml", directory

    def issue(self, capsys, command: str) -> pathlib.Path:
        """Does a `kvcodec token` of an example's comment; the file of the token."""
        words = shlex.split(command)
        assert words[:2] == ["kvcodec", "token"]
        words[words.index("--tokens") + 1] = str(self.tokens)
        file = self._directory / words[words.index(">") + 1]
        assert main(words[1 : words.index(">")]) == 0
        file.write_text(capsys.readouterr().out)
        return file

    @property
    def arguments(self) -> list[str]:
        """Of a peer, in the place of the example's files."""
        named = {"--tls-cert": self.certificate, "--tls-key": self.key, "--tokens": self.tokens}
        return [word for name, file in named.items() for word in (name, str(file))]


@pytest.fixture
def secrets(tmp_path):
    return Secrets(tmp_path)


def token_commands(file: str) -> list[str]:
    return re.findall(r"^# +(kvcodec token .*)$", (DEPLOY / file).read_text(), re.MULTILINE)


def test_a_peer_shows_what_is_asked_of_it(secrets, capsys):
    """A real peer with the example's settings, but on a port, a store and files of the test."""
    (command,) = token_commands("kvcodec-peer.service")
    token = secrets.issue(capsys, command)
    arguments = ["--config", str(DEPLOY / "peer.toml"), "--metrics-port", "0", *secrets.arguments]
    with PeerProcess(arguments=arguments) as process:
        access = Access(tls_ca=str(secrets.ca), token_file=str(token))
        with contextlib.closing(GrpcPeer(process.remote, PATIENT, access=access)) as client:
            assert client.lookup(bytes(32), [bytes(32)]).covered_pages == 0
        address = process.ready_line.rpartition("metrics=")[2]
        with urllib.request.urlopen(f"http://{address}/metrics", timeout=60) as response:
            shown = set(re.findall(r"^# TYPE (kvcodec_\w+)", response.read().decode(), re.MULTILINE))
    queries = [target["expr"] for panel in panels() for target in panel["targets"]] + [rule["expr"] for rule in rules()]
    asked = {name for query in queries for name in re.findall(r"kvcodec_\w+", query)}
    exported_by_a_peer = {
        metric.describe()[0].name + SUFFIXES[type(metric)][0].replace("_bucket", "")
        for metric in vars(peer_metrics).values()
        if isinstance(metric, MetricWrapperBase)
    }
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in asked}
    assert families & exported_by_a_peer <= shown
    assert len(families & exported_by_a_peer) > 15


def settings_of(capsys, arguments):
    """What ``kvcodec serve`` makes of a command line, by name."""
    parsed = build_parser().parse_args(["serve", *arguments, "--print-config"])
    assert parsed.run(parsed) == 0
    return tomllib.loads(capsys.readouterr().out)


def is_secured(settings):
    """Whether a peer with these settings asks for TLS and tokens, and may be without neither.

    It takes a flag of its own to have its metrics open to other machines all the same.
    """
    host = settings["listen"].rpartition(":")[0]
    check_metrics(settings["metrics-port"], host, settings["metrics-insecure"])
    return bool(settings["tls-cert"] and settings["tls-key"] and settings["tokens"]) and not settings["insecure"]


def test_the_settings_file(capsys):
    settings = settings_of(capsys, ["--config", str(DEPLOY / "peer.toml")])
    assert settings["store"] == "lmdb:/var/lib/kvcodec"
    assert settings["drain-s"] == 20
    assert is_secured(settings)


def test_the_systemd_unit(capsys, tmp_path):
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read_string((DEPLOY / "kvcodec-peer.service").read_text())
    service = unit["Service"]
    program, *command = shlex.split(service["ExecStart"])
    assert pathlib.PurePosixPath(program).name == "kvcodec"
    assert command[0] == "serve"
    command[command.index("--config") + 1] = str(DEPLOY / "peer.toml")
    settings = settings_of(capsys, command[1:])
    assert settings["drain-s"] < int(service["TimeoutStopSec"])
    assert settings["store"] == f"lmdb:/var/lib/{service['StateDirectory']}"
    assert "-HUP $MAINPID" in service["ExecReload"]
    assert is_secured(settings)
    # What the comment installs is where the settings look, for the group of the service.
    text = (DEPLOY / "kvcodec-peer.service").read_text()
    installed = set(re.findall(r"^#   install -g (?:\S+) -m 0640 [A-Z]+ (\S+)$", text, re.MULTILINE))
    assert installed == {settings["tls-cert"], settings["tls-key"]}
    assert f"--tokens {settings['tokens']} " in text
    assert set(re.findall(r"(?<=-g )\S+|(?<=groupadd --system )\S+", text)) == {service["SupplementaryGroups"]}
    # Where systemd is installed it has a word in it as well; it wants the program to be there.
    if analyze := shutil.which("systemd-analyze"):
        copy = tmp_path / "kvcodec-peer.service"
        copy.write_text((DEPLOY / "kvcodec-peer.service").read_text().replace(program, "/bin/true"))
        done = subprocess.run([analyze, "verify", copy], capture_output=True, text=True, timeout=120)
        assert (done.returncode, done.stderr) == (0, "")


def test_the_container_file(capsys):
    text = (DEPLOY / "Containerfile").read_text()
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", text, re.MULTILINE)
    (command,) = re.findall(r"^CMD (.*)$", text, re.MULTILINE)
    assert json.loads(entry) == ["kvcodec", "serve"]
    settings = settings_of(capsys, json.loads(command))
    (volume,) = re.findall(r"^VOLUME (\S+)$", text, re.MULTILINE)
    (ports,) = re.findall(r"^EXPOSE (.*)$", text, re.MULTILINE)
    assert settings["store"] == f"lmdb:{volume}"
    assert is_secured(settings)
    (mounted,) = re.findall(r"-v \./peer:(\S+):ro", text)
    for setting in ("tls-cert", "tls-key", "tokens"):
        name = pathlib.PurePosixPath(settings[setting]).relative_to(mounted)
        assert re.search(rf"# .*\b{re.escape(str(name))}\b", text)
    assert {int(port) for port in ports.split()} == {
        int(settings["listen"].rpartition(":")[2]),
        settings["metrics-port"],
    }
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        assert all((ROOT / source).exists() for source in sources.split())
    (extras,) = re.findall(r'"\.\[([a-z,0-9]+)\]"', text)
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}": ' in setup for extra in extras.split(","))


@pytest.fixture
def kubernetes():
    """The documents by kind; there is one of each."""
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes.yaml").read_text()))
    by_kind = {document["kind"]: document for document in documents}
    assert len(by_kind) == len(documents) == 5
    assert all(document["apiVersion"] and document["metadata"]["name"] for document in documents)
    return by_kind


def test_kubernetes_runs_a_peer_with_settings_that_it_takes(kubernetes, capsys, tmp_path):
    stateful_set = kubernetes["StatefulSet"]["spec"]
    pod = stateful_set["template"]["spec"]
    (container,) = pod["containers"]
    (mounted,) = (v["configMap"]["name"] for v in pod["volumes"] if "configMap" in v)
    assert mounted == kubernetes["ConfigMap"]["metadata"]["name"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    (file,) = kubernetes["ConfigMap"]["data"]
    assert container["args"] == ["--config", f"{mounts['config']}/{file}"]
    (tmp_path / file).write_text(kubernetes["ConfigMap"]["data"][file])
    settings = settings_of(capsys, ["--config", str(tmp_path / file)])
    assert settings["drain-s"] < pod["terminationGracePeriodSeconds"]
    assert settings["store"] == f"lmdb:{mounts['pages']}"
    (claim,) = stateful_set["volumeClaimTemplates"]
    needed = 2 * parse_bytes(settings["capacity"]) + (256 << 20) + parse_bytes(settings["calibration-capacity"])
    assert parse_bytes(claim["spec"]["resources"]["requests"]["storage"]) >= needed
    assert is_secured(settings)
    for setting in ("tls-cert", "tls-key", "tokens"):
        assert settings[setting] in secret_files(kubernetes)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"grpc": int(settings["listen"].rpartition(":")[2]), "metrics": settings["metrics-port"]}


def secret_files(kubernetes):
    """The path in the container of every file of a secret that the comments make -> the name of the file."""
    pod = kubernetes["StatefulSet"]["spec"]["template"]["spec"]
    text = (DEPLOY / "kubernetes.yaml").read_text()
    made = dict(re.findall(r"^#   kubectl create secret generic (\S+) (.*)$", text, re.MULTILINE))
    mounts = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
    files = {}
    for volume in pod["volumes"]:
        if "secret" in volume:
            # Readable for the pod's group, which the peer's user is in, and nobody else.
            assert volume["secret"]["defaultMode"] == 0o440
            names = re.findall(r"--from-file=(\S+)", made.pop(volume["secret"]["secretName"]))
            files |= {f"{mounts[volume['name']]}/{name}": name for name in names}
    assert made == {}
    return files


def test_kubernetes_asks_who_is_alive_and_who_is_ready(kubernetes, secrets, capfd):
    """The probes at a real peer: it is ready as long as all is as it should be, and alive as long as it answers."""
    (container,) = kubernetes["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    readiness = container["readinessProbe"]
    assert readiness["timeoutSeconds"] < readiness["periodSeconds"]
    server, probe = token_commands("kubernetes.yaml")
    files = {
        "tokens.toml": secrets.tokens,
        "tls.crt": secrets.certificate,
        "tls.key": secrets.key,
        "ca.crt": secrets.ca,
    }
    for command in (server, probe):
        token = secrets.issue(capfd, command)
        files[token.name] = token
    places = {path: str(files[name]) for path, name in secret_files(kubernetes).items()}
    with PeerProcess(arguments=[*secrets.arguments, "--metrics-port", "0"]) as process:
        program, *command = readiness["exec"]["command"]
        assert program == "kvcodec"
        for place, file in places.items():
            command = [word.replace(place, file) for word in command]
        assert f"localhost:{ports['grpc']}" in " ".join(command)
        # The certificate of the test is for the address.
        command = [word.replace(f"localhost:{ports['grpc']}", process.address) for word in command]
        assert main(command) == 0
        metrics_address = process.ready_line.rpartition("metrics=")[2]
        for name in ("startupProbe", "livenessProbe"):
            asked = container[name]["httpGet"]
            assert asked["port"] in ports
            with urllib.request.urlopen(f"http://{metrics_address}{asked['path']}", timeout=60) as response:
                assert response.status == 200
        token.write_text("another")
        assert main(command) == 2
        assert "does not know the token" in capfd.readouterr().err
    assert main(command) == 2


def test_the_parts_of_the_kubernetes_example_find_each_other(kubernetes):
    stateful_set = kubernetes["StatefulSet"]["spec"]
    template = stateful_set["template"]
    labels = template["metadata"]["labels"]
    (container,) = template["spec"]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    service = kubernetes["Service"]
    assert stateful_set["serviceName"] == service["metadata"]["name"]
    assert stateful_set["selector"]["matchLabels"] == labels == service["spec"]["selector"]
    assert kubernetes["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    policy = kubernetes["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"] == labels
    assert {port["port"] for rule in policy["ingress"] for port in rule["ports"]} == set(ports.values())
    assert {port["targetPort"]: port["port"] for port in service["spec"]["ports"]} == ports
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        *(volume["name"] for volume in template["spec"]["volumes"]),
        *(claim["metadata"]["name"] for claim in stateful_set["volumeClaimTemplates"]),
    }
    # What the comment tells servers to say.
    (remote,) = re.findall(r"--kvcodec-remote (\S+)", (DEPLOY / "kubernetes.yaml").read_text())
    name = kubernetes["StatefulSet"]["metadata"]["name"]
    assert remote.startswith("grpcs://")
    assert parse_remotes(remote) == tuple(
        f"{name}-{number}.{stateful_set['serviceName']}:{ports['grpc']}" for number in range(stateful_set["replicas"])
    )


def test_a_mistake_in_an_example_is_found(capsys):
    assert main(["serve", "--config", str(DEPLOY / "kubernetes.yaml"), "--print-config"]) == 2
    assert "is no TOML" in capsys.readouterr().err
