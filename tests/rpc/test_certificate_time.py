"""When certificates expire, read out of files that another library has made."""

import base64
import datetime

import pytest
from cli.pki_kit import DAY, Authority
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sglang_kvcodec.errors import FormatError
from sglang_kvcodec.rpc.certificate_time import expires_at_s


def issued(directory, ends):
    certificate, _ = Authority(directory).issue("peer", ends=ends)
    return certificate.read_bytes()


# The last two are written with four digits of the year.
@pytest.mark.parametrize("ends", [-DAY / 2, DAY, 3650 * DAY, 20000 * DAY, 900_000 * DAY], ids=str)
def test_it_is_the_time_that_the_certificate_says(tmp_path, ends):
    pem = issued(tmp_path, ends)
    expected = x509.load_pem_x509_certificate(pem).not_valid_after_utc
    assert expires_at_s(pem) == expected.timestamp()


def test_of_a_chain_the_first_to_expire_counts(tmp_path):
    early, late = issued(tmp_path, DAY), issued(tmp_path, 9 * DAY)
    assert expires_at_s(late + b"\nwords between\n" + early) == expires_at_s(early) < expires_at_s(late)


def test_the_last_century(tmp_path):
    authority = Authority(tmp_path)
    past = datetime.datetime(1999, 12, 31, 23, 59, 58, tzinfo=datetime.UTC) - datetime.datetime.now(datetime.UTC)
    certificate, _ = authority.issue("old", starts=past - DAY, ends=past)
    told = datetime.datetime.fromtimestamp(expires_at_s(certificate.read_bytes()), datetime.UTC)
    assert told.year == 1999
    assert told == x509.load_pem_x509_certificate(certificate.read_bytes()).not_valid_after_utc


def test_what_is_cut_off_or_none_is_an_error_of_ours(tmp_path):
    der = x509.load_pem_x509_certificate(issued(tmp_path, DAY)).public_bytes(Encoding.DER)
    for size in range(len(der)):
        with pytest.raises(FormatError):
            expires_at_s(pem_of(der[:size]))
    with pytest.raises(FormatError, match="no certificate"):
        expires_at_s(b"nothing of the kind")


def pem_of(der):
    return b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(der) + b"-----END CERTIFICATE-----\n"
