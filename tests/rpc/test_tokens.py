"""The token file: what it may say, and that it is never half taken."""

import hashlib
import os
import threading
import time

import pytest

from sglang_kvcodec.config import Access
from sglang_kvcodec.errors import ConfigurationError
from sglang_kvcodec.rpc import admin_pb2
from sglang_kvcodec.rpc import peer_pb2 as pb
from sglang_kvcodec.rpc.admission import SCOPE_OF_METHOD
from sglang_kvcodec.rpc.channels import TokenSource, check_files
from sglang_kvcodec.rpc.tokens import SCOPES, TokenEntry, TokenFile, TokenTable, append_entry, new_token

SHA = hashlib.sha256(b"secret").hexdigest()
SECRET = "ab" * 32
TOKEN = f'[[token]]\nname = "a"\nsha256 = "{SHA}"\nscopes = ["read"]\n'


def test_every_rpc_has_its_scope():
    services = pb.DESCRIPTOR.services_by_name["Peer"], admin_pb2.DESCRIPTOR.services_by_name["Admin"]
    methods = [method.name for service in services for method in service.methods]
    # One table for both services: no two methods have the same name.
    assert sorted(SCOPE_OF_METHOD) == sorted(methods)
    assert set(SCOPE_OF_METHOD.values()) <= {*SCOPES, None}


def test_a_token_is_found_by_itself_alone():
    table = TokenTable.parse(f'tenant_secret = "{SECRET}"\n{TOKEN}tenant = "t"\nexpires = 2027-01-31T00:00:00+01:00\n')
    entry = table.find("secret")
    assert entry == TokenEntry("a", hashlib.sha256(b"secret").digest(), frozenset({"read"}), "t", 1801350000.0)
    assert entry in table
    assert table.tenant_secret == bytes.fromhex(SECRET)
    for other in ("", "Secret", "secret ", SHA, "\udc80"):
        assert table.find(other) is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[token", "not TOML"),
        ("tokens = 1", "unknown field 'tokens'"),
        ("token = 1", r"\[\[token\]\]"),
        ("token = [1]", "token 1 is not a table"),
        (TOKEN + 'secret = "x"\n', "unknown field 'secret'"),
        (TOKEN + TOKEN, "same name"),
        (TOKEN + TOKEN.replace('"a"', '"b"'), "same sha256"),
        (TOKEN.replace('"a"', '"../a"'), "name of token 1"),
        (TOKEN.replace('"a"', '""'), "name of token 1"),
        (TOKEN.replace('"a"', "1"), "name of token 1"),
        (TOKEN.replace(SHA, SHA[1:]), "sha256 of token 1"),
        (TOKEN.replace(SHA, SHA.upper()), "sha256 of token 1"),
        (TOKEN.replace('["read"]', "[]"), "scopes of token 1"),
        (TOKEN.replace('["read"]', '["read", "root"]'), "scopes of token 1"),
        (TOKEN.replace('["read"]', '"read"'), "scopes of token 1"),
        (TOKEN.replace('["read"]', '[["read"]]'), "scopes of token 1"),
        (TOKEN + 'tenant = "t"\n', "tenant_secret"),
        (TOKEN + 'tenant = "a/b"\n', "tenant of token 1"),
        (TOKEN + "tenant = 7\n", "tenant of token 1"),
        (TOKEN + "expires = 2027-01-31\n", "expires of token 1"),
        (TOKEN + "expires = 2027-01-31T00:00:00\n", "expires of token 1"),
        (TOKEN + 'expires = "never"\n', "expires of token 1"),
        (f'tenant_secret = "{SECRET[1:]}"\n' + TOKEN, "64 hexadecimal"),
        ("tenant_secret = 7\n" + TOKEN, "64 hexadecimal"),
    ],
)
def test_what_a_file_may_not_say(tmp_path, text, words):
    path = tmp_path / "tokens.toml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        TokenFile(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"#" * (1 << 20) + b"\n"])
def test_what_is_no_token_file(tmp_path, content):
    path = tmp_path / "tokens.toml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError):
        TokenFile(path)


def test_a_file_is_read_again_when_it_changes(tmp_path):
    path = tmp_path / "tokens.toml"
    path.write_text(TOKEN)
    tokens = TokenFile(path)
    entry = tokens.table.find("secret")
    assert tokens.admits(entry)
    path.write_text(TOKEN.replace("read", "write"))
    tokens.reload_if_changed()
    # Its name and hash are the same, what it may is not.
    assert not tokens.admits(entry)
    path.write_text("nonsense")
    tokens.reload_if_changed()
    assert tokens.table.find("secret").scopes == {"write"}
    path.unlink()
    tokens.reload_if_changed()
    assert tokens.table.find("secret").scopes == {"write"}


def test_a_token_expires_while_it_is_used(tmp_path):
    path = tmp_path / "tokens.toml"
    entry = TokenEntry("a", bytes(32), frozenset({"read"}), expires_at_s=float(int(time.time()) + 2))
    append_entry(path, entry)
    tokens = TokenFile(path)
    assert tokens.table.entries == (entry,)
    deadline_s = time.monotonic() + 60
    while tokens.admits(entry):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_what_is_appended_is_what_is_read(tmp_path):
    path = tmp_path / "tokens.toml"
    entries = [
        TokenEntry(f"n{index}", hashlib.sha256(new_token().encode()).digest(), frozenset(scopes), tenant, expires)
        for index, (scopes, tenant, expires) in enumerate(
            [(("read",), "", None), (SCOPES, "t-1.x", None), (("write", "admin"), "", 2e9)]
        )
    ]
    append_entry(path, entries[0])
    secret = TokenFile(path).table.tenant_secret
    path.chmod(0o640)
    for entry in entries[1:]:
        append_entry(path, entry)
    table = TokenFile(path).table
    assert table.entries == tuple(entries)
    assert table.tenant_secret == secret
    assert len(secret) == 32
    assert path.stat().st_mode & 0o777 == 0o640
    assert list(tmp_path.iterdir()) == [path]


def test_a_secret_is_added_to_a_file_without_one_and_comments_stay(tmp_path):
    path = tmp_path / "tokens.toml"
    path.write_text("# ours\n" + TOKEN)
    append_entry(path, TokenEntry("b", bytes(32), frozenset({"read"}), "t"))
    assert "# ours" in path.read_text()
    assert [entry.name for entry in TokenFile(path).table.entries] == ["a", "b"]


def test_a_clients_token_follows_its_file(tmp_path):
    path = tmp_path / "token"
    path.write_text("  one\n")
    source = TokenSource(str(path))
    assert source.metadata() == (("authorization", "Bearer one"),)
    for later_s, content in ((1, ""), (2, "two words"), (3, "caf\u00e9")):
        path.write_text(content)
        touch(path, later_s)
        source.look_again()
        assert source.metadata() == (("authorization", "Bearer one"),)
    path.unlink()
    source.look_again()
    assert source.metadata() == (("authorization", "Bearer one"),)
    path.write_text("two")
    touch(path, 4)
    threads = [threading.Thread(target=source.look_again) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.metadata() == (("authorization", "Bearer two"),)


def touch(path, later_s):
    at_ns = time.time_ns() + later_s * 10**9
    os.utime(path, ns=(at_ns, at_ns))


@pytest.mark.parametrize("content", [b"", b"\n", b"two words", b"caf\xc3\xa9", b"a" * 5000])
def test_what_is_no_token(tmp_path, content):
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match="does not hold a token"):
        check_files(Access(token_file=str(path)))


def test_no_file_is_no_token():
    source = TokenSource("")
    source.look_again()
    assert source.metadata() == ()
