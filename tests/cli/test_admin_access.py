"""``kvcodec admin`` at peers that ask for TLS and tokens: whose pages are seen, moved and left alone."""

import contextlib
import json
import time

import pytest
from peer_kit import HASHES, NAMESPACE, PAGES, PATIENT, fetch_all, make_page, metrics_of
from pki_kit import Authority

from sglang_kvcodec.cli.main import main
from sglang_kvcodec.config import Access
from sglang_kvcodec.errors import PeerDeniedError, PeerError
from sglang_kvcodec.format.page_archive import read_archive
from sglang_kvcodec.rpc.admin_client import PeerAdmin
from sglang_kvcodec.rpc.client import GrpcPeer
from sglang_kvcodec.testing.peer import PeerProcess

PATIENCE_S = 60


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path)


@pytest.fixture
def admin(site, capfd):
    """Runs ``kvcodec admin`` with a token; its exit status, what it printed and what went wrong."""

    def run(token, command, *arguments, access=()):
        capfd.readouterr()
        words = ["admin", command, "--remote", site.process.remote, "--token-file", token, *access, *arguments]
        return main(list(map(str, words))), *capfd.readouterr()

    return run


def hashes_in(file):
    with file.open("rb") as stream:
        return sorted(page.key.page_hash for page in read_archive(stream))


def test_by_tls_with_tokens_of_the_scope_admin_alone(site, admin, authority, tmp_path):
    tokens = {
        scopes: site.issue(scopes.replace(",", "-"), scopes) for scopes in ("read", "write", "admin", "write,admin")
    }
    certificate, key = authority.issue("peer")
    process = site.serve("--tls-cert", certificate, "--tls-key", key)
    with contextlib.closing(
        GrpcPeer(process.remote, PATIENT, access=Access(tls_ca=str(authority.file), token_file=str(tokens["write"])))
    ) as client:
        client.put(NAMESPACE, PAGES)
    tls = ("--tls-ca", authority.file)
    file = tmp_path / "file"
    commands = [["ls"], ["ls", NAMESPACE.hex()], ["verify"], ["warm"], ["export", file], ["stat", "--by-namespace"]]
    for command in commands:
        for scope in ("read", "write"):
            status, out, err = admin(tokens[scope], *command, access=tls)
            assert (status, "has not the scope admin" in err) == (2, True), (command, out)
            assert not (command[0] == "export" and file.exists())
        status, out, err = admin(tokens["admin"], *command, access=tls)
        assert status == 0, err
    assert hashes_in(file) == sorted(HASHES)
    assert site.refused("scope") == 2 * len(commands)
    # Each needs what it does, and no scope includes another.
    for command in (["import", file], ["rm", NAMESPACE.hex(), HASHES[0].hex(), "--yes"]):
        status, _, err = admin(tokens["write" if command[0] == "import" else "admin"], *command, access=tls)
        assert (status, "has not the scope" in err) == (2, True)
    assert admin(tokens["write"], "rm", NAMESPACE.hex(), HASHES[0].hex(), "--yes", access=tls)[0] == 0
    status, out, _ = admin(tokens["write,admin"], "import", file, access=tls)
    assert (status, "stored 1 pages, 3 were there" in out) == (0, True)
    # Neither without the token nor without TLS.
    status, _, err = admin("", "ls", access=tls)
    assert (status, "asks for a token" in err) == (2, True)
    assert main(["admin", "ls", "--remote", f"grpc://{process.address}", "--token-file", str(tokens["admin"])]) == 2


def wait_until(condition):
    deadline_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


@pytest.fixture
def tenants(site):
    """Tokens of the operator, of the default tenant and of two others, and their pages: four, three and two."""
    tokens = {"operator": site.issue("operator", "admin"), "default": site.issue("default", "read,write,admin")}
    for tenant in ("a", "b"):
        tokens[tenant] = site.issue(tenant, "read,write,admin", tenant=tenant)
    site.serve()
    site.client(tokens["a"]).put(NAMESPACE, PAGES)
    site.client(tokens["b"]).put(NAMESPACE, PAGES[:3])
    site.client(tokens["default"]).put(NAMESPACE, PAGES[2:])
    return tokens


def test_an_operator_sees_all_and_a_tenant_its_own(tenants, admin):
    listed = {}
    for name, token in tenants.items():
        status, out, _ = admin(token, "ls", "--json")
        assert status == 0
        listed[name] = {line["namespace"]: line["objects"] for line in map(json.loads, out.splitlines())}
    assert listed["a"] == {NAMESPACE.hex(): 4}
    assert listed["b"] == {NAMESPACE.hex(): 3}
    assert sorted(listed["operator"].values()) == [2, 3, 4]
    assert listed["operator"][NAMESPACE.hex()] == 2
    assert listed["default"] == listed["operator"]
    (stored,) = (namespace for namespace, pages in listed["operator"].items() if pages == 3)
    for name, namespace, pages in (("a", NAMESPACE.hex(), 4), ("operator", stored, 3), ("a", stored, 0)):
        assert len(admin(tenants[name], "ls", namespace, "--json")[1].splitlines()) == pages
    status, out, _ = admin(tenants["b"], "stat", "--json", "--by-namespace")
    stat = json.loads(out)
    # How much others store it is not told.
    assert (status, stat["objects"], len(stat["namespaces"])) == (0, 0, 1)


def test_verify_and_warm_take_a_tenants_pages_for_what_they_are(tenants, admin):
    status, out, _ = admin(tenants["operator"], "verify")
    assert (status, "2 sound, 0 damaged, 0 gone meanwhile, 7 sound ones of tenants" in out) == (0, True), out
    status, out, _ = admin(tenants["b"], "verify")
    assert (status, "3 sound, 0 damaged, 0 gone" in out, "tenants" in out) == (0, True, False)
    assert "read 9 pages" in admin(tenants["operator"], "warm")[1]
    assert "read 4 pages" in admin(tenants["a"], "warm")[1]


def test_pages_move_with_a_token_of_their_tenant(site, tenants, admin, tmp_path):
    file = tmp_path / "file"
    status, out, err = admin(tenants["operator"], "export", file)
    assert (status, hashes_in(file)) == (1, sorted(HASHES[2:]))
    assert "exported 2 pages" in out
    assert "left out 7 pages of tenants: export those with a token of their tenant" in err
    status, out, err = admin(tenants["b"], "export", file, "--force")
    assert (status, hashes_in(file), err) == (0, sorted(HASHES[:3]), "")
    # From one tenant to another: it is who imports that says whose they are then.
    assert admin(tenants["a"], "rm", NAMESPACE.hex(), "--yes")[0] == 0
    assert site.client(tenants["b"]).lookup(NAMESPACE, HASHES).covered_pages == 3
    status, out, _ = admin(tenants["a"], "import", file)
    assert (status, "stored 3 pages, 0 were there" in out) == (0, True)
    assert fetch_all(site.client(tenants["a"]), HASHES[:3]) == [data for _, data in PAGES[:3]]
    assert "stored 0 pages, 3 were there" in admin(tenants["b"], "import", file)[1]
    assert site.client(tenants["default"]).lookup(NAMESPACE, HASHES).present == (False, False, True, True)


def test_an_operator_removes_a_tenants_namespace_by_its_stored_name(site, tenants, admin):
    lines = map(json.loads, admin(tenants["operator"], "ls", "--json")[1].splitlines())
    (stored,) = (line["namespace"] for line in lines if line["objects"] == 3)
    assert "deleted 0 pages" in admin(tenants["a"], "rm", stored, "--yes")[1]
    # Fetched by that name they are missing, and not deleted for it.
    fetched = list(site.client(tenants["default"]).fetch(bytes.fromhex(stored), HASHES[:3]))
    assert [type(event).__name__ for event in fetched] == ["FetchedMissing"] * 3
    assert fetch_all(site.client(tenants["b"]), HASHES[:3]) == [data for _, data in PAGES[:3]]
    assert "deleted 3 pages" in admin(tenants["default"], "rm", stored, "--yes")[1]
    assert site.client(tenants["b"]).lookup(NAMESPACE, HASHES).covered_pages == 0
    assert site.client(tenants["a"]).lookup(NAMESPACE, HASHES).covered_pages == 4


def test_a_drain_with_tokens(site):
    """What a token has under way ends whole; new calls are refused as a peer's that goes, whoever makes them."""
    token = site.issue("a", "read,write,admin")
    process = site.serve("--bandwidth-limit", "100Mbps", "--drain-s", "60")
    pages = [make_page(f"drained {index}", 700_001) for index in range(3)]
    hashes = [page_hash for page_hash, _ in pages]
    client, other, stranger = site.client(token), site.client(token), site.client()
    client.put(NAMESPACE, pages)
    assert other.lookup(NAMESPACE, hashes).covered_pages == 3
    with pytest.raises(PeerDeniedError):
        stranger.lookup(NAMESPACE, hashes)
    fetching = client.fetch(NAMESPACE, hashes)
    fetched = [next(fetching)]
    process.signal_stop()
    with contextlib.closing(PeerAdmin(other)) as admin:
        for call in (
            lambda: other.lookup(NAMESPACE, hashes),
            lambda: stranger.lookup(NAMESPACE, hashes),
            lambda: list(admin.pages()),
        ):
            wait_until(lambda call=call: "shutting down" in failure_of(call))
    fetched += fetching
    received_bytes = sum(len(getattr(event, "data", b"")) + len(getattr(event, "header", b"")) for event in fetched)
    assert received_bytes == sum(len(data) for _, data in pages)
    assert process.wait() == 0


def test_a_reading_ends_when_its_token_is_withdrawn(site):
    site.issue("kept")
    token = site.issue("old", "write,admin")
    process = site.serve("--bandwidth-limit", "40Mbps")
    client = site.client(token)
    pages = [make_page(f"withdrawn {index}", 700_001) for index in range(8)]
    client.put(NAMESPACE, pages)
    with contextlib.closing(PeerAdmin(client)) as admin:
        reading = admin.read(NAMESPACE, [page_hash for page_hash, _ in pages])
        assert next(reading) == pages[0][1]
        site.file.write_text(site.file.read_text().replace('"old"', '"new"'))
        process.hang_up()
        with pytest.raises(PeerDeniedError, match="no longer valid"):
            list(reading)
    assert site.refused("withdrawn_token") == 1


def failure_of(call):
    try:
        call()
    except PeerError as error:
        return str(error)
    return ""


def test_a_hang_up_has_settings_and_tokens_read_again(site, tmp_path):
    """The scrub, which was off, walks; the tokens are read although their file is as it was, and still asked for."""
    token = site.issue("a")
    settings = tmp_path / "peer.toml"
    settings.write_text("scrub-rate = 0\n")
    process = site.serve("--config", settings)
    client = site.client(token)
    client.put(NAMESPACE, PAGES)
    settings.write_text('scrub-rate = "1GB"\n')
    assert "kvcodec_store_scrub_passes_total 0.0" in metrics_of(process)
    assert "kvcodec_peer_token_reloads_total{" not in metrics_of(process)
    process.hang_up()
    wait_until(lambda: "kvcodec_store_scrub_passes_total 1.0" in metrics_of(process))
    wait_until(lambda: 'kvcodec_peer_token_reloads_total{outcome="ok"} 1.0' in metrics_of(process))
    assert fetch_all(client) == [data for _, data in PAGES]
    with pytest.raises(PeerDeniedError):
        site.client().lookup(NAMESPACE, HASHES)


@pytest.mark.parametrize("place", ["flag", "variable", "file"])
def test_security_is_set_like_any_other_setting(site, place, authority, monkeypatch, tmp_path):
    token = site.issue("a")
    certificate, key = authority.issue("peer")
    values = {
        "tls-cert": str(certificate),
        "tls-key": str(key),
        "tokens": str(site.file),
        "client-max-streams": 5,
        "client-bandwidth-limit": "1Gbps",
        "idle-timeout": 20,
        "insecure": True,
    }
    arguments = []
    if place == "flag":
        for name, value in values.items():
            arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    elif place == "variable":
        for name, value in values.items():
            monkeypatch.setenv(f"KVCODEC_SERVE_{name.upper().replace('-', '_')}", str(value))
    else:
        (tmp_path / "peer.toml").write_text(
            "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
        )
        arguments = ["--config", str(tmp_path / "peer.toml")]
    with PeerProcess(arguments=arguments) as process:
        access = Access(tls_ca=str(authority.file), token_file=str(token))
        with contextlib.closing(GrpcPeer(f"grpcs://{process.address}", PATIENT, access=access)) as client:
            client.put(NAMESPACE, PAGES)
            assert fetch_all(client) == [data for _, data in PAGES]
        stranger = Access(tls_ca=str(authority.file))
        with (
            contextlib.closing(GrpcPeer(f"grpcs://{process.address}", PATIENT, access=stranger)) as client,
            pytest.raises(PeerDeniedError),
        ):
            client.stat()
