"""Settings of a server with kvcodec: parsed once, checked at construction, passed as a value.

The same names serve the flags (``--kvcodec-profile``), the environment (``KVCODEC_PROFILE``) and the fields.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Mapping

from sglang_kvcodec.errors import ConfigurationError

DECODERS = ("auto", "nvdec", "software")
ENCODERS = ("auto", "nvenc", "x265")
PLANS = ("auto", "always")
ADMISSIONS = ("early", "landed")
COMPUTE_WHILE_FETCHING = ("idle", "always", "failing", "never")
PROFILES = ("raw", "exact", "high", "balanced", "compact")
LOSSLESS_PROFILES = ("raw", "exact")
"""Those that restore what was in the pool, bit for bit."""
MIB = 1 << 20
MAX_OBJECT_BYTES = 256 * MIB
"""No page object is larger; a peer and a server refuse what claims to be."""
MAX_ARTIFACT_BYTES = 2 << 30
"""No calibration artifact is larger; a peer and a server refuse what claims to be."""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def parse_bytes(text: str) -> int:
    """``"50GB"``, ``"512MiB"``, ``"1048576"`` as a number of bytes.

    Raises:
        ConfigurationError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]I?)?B?\s*", text.upper())
    if match is None:
        raise ConfigurationError(f"not a size: {text!r}; write e.g. 50GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def parse_cpus(text: str) -> frozenset[int]:
    """``"0-3,8"`` as numbers of CPUs; none for an empty text.

    Raises:
        ConfigurationError: not such a list.
    """
    cpus: set[int] = set()
    for part in text.split(",") if text else ():
        match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if first > last:
            raise ConfigurationError(f"not a list of CPUs: {text!r}; write e.g. 0-3,8")
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def parse_bits_per_s(text: str) -> int:
    """``"1Gbps"``, ``"100Mbps"`` as bits per second.

    Raises:
        ConfigurationError: not a bandwidth.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)BPS\s*", text.upper())
    bits_per_s = int(float(match[1]) * _UNITS[match[2]]) if match else 0
    if bits_per_s < 1:
        raise ConfigurationError(f"not a bandwidth: {text!r}; write e.g. 1Gbps or 100Mbps")
    return bits_per_s


def parse_remote(url: str) -> str:
    """``"grpc://HOST:PORT"``, or ``grpcs`` by TLS, as the ``"HOST:PORT"`` a gRPC channel takes.

    Raises:
        ConfigurationError: not such a URL.
    """
    match = re.fullmatch(r"grpcs?://(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(\d{1,5})/?", url)
    if match is None or not 0 < int(match[2]) < 65536:
        raise ConfigurationError(f"not a peer's address: {url!r}; write grpc://HOST:PORT, grpcs:// for TLS")
    return f"{match[1]}:{match[2]}"


def parse_remotes(url: str) -> tuple[str, ...]:
    """``"grpc://HOST:PORT,HOST:PORT"`` as addresses, one or several.

    Raises:
        ConfigurationError: not such a URL, or an address twice.
    """
    scheme, separator, addresses = url.partition("://")
    parsed = tuple(parse_remote(f"{scheme}{separator}{address}") for address in addresses.split(","))
    if len(set(parsed)) < len(parsed):
        raise ConfigurationError(f"a peer's address is there twice: {url!r}")
    return parsed


def uses_tls(url: str) -> bool:
    """Whether a peer's URL asks for TLS."""
    return url.startswith("grpcs://")


def is_loopback(host: str) -> bool:
    """Whether a host, as it is written in an address, is this machine and no other can reach it."""
    return re.fullmatch(r"localhost|127(\.\d{1,3}){3}|\[::1\]", host) is not None


@dataclasses.dataclass(frozen=True)
class Access:
    """What a client shows a peer, and how it knows the peer. Names of files, empty for none."""

    tls_ca: str = ""
    """PEM: who signs the peer's certificate; the system's CAs without."""
    tls_cert: str = ""
    """PEM: the client's own certificate, for peers that ask for one."""
    tls_key: str = ""
    """PEM: its private key."""
    token_file: str = ""
    """One line: the client's token."""
    insecure: bool = False
    """Send the token in plaintext to another machine."""

    def require_fit(self, remote: str) -> None:
        """Refuses settings that do not go with the peers' URL.

        Raises:
            ConfigurationError: TLS without ``grpcs``, half a certificate, or a token that others could read.
        """
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ConfigurationError("a client's certificate needs its key, tls_cert and tls_key")
        if uses_tls(remote):
            return
        if self.tls_ca or self.tls_cert:
            raise ConfigurationError(f"{remote!r} is plaintext; write grpcs:// for TLS")
        hosts = [address.rpartition(":")[0] for address in parse_remotes(remote)]
        if self.token_file and not self.insecure and not all(is_loopback(host) for host in hosts):
            raise ConfigurationError(
                f"no token is sent to {remote!r} in plaintext; write grpcs:// for TLS, "
                "or allow it with insecure where the network is trusted"
            )


@dataclasses.dataclass(frozen=True)
class Timeouts:
    """How long each phase of talking to a peer may take, in seconds."""

    connect_s: float = 1.0
    lookup_s: float = 0.5
    progress_s: float = 5.0
    """Longest silence inside a Fetch or a Put."""
    fetch_s: float = 60.0
    """Longest whole Fetch: the request is prefilled after it."""
    restore_s: float = 30.0
    """Longest restore of a batch, which is computed after it."""
    put_s: float = 60.0
    calibration_s: float = 600.0
    """Longest whole transfer of a calibration artifact: no request waits for one."""
    start_calibration_s: float = 60.0
    """The same for the artifact that a server asks for while it starts; it starts without when that takes longer."""
    retry_s: float = 2.0
    """How long a peer that failed is left alone before it is tried again, in the background."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            if not getattr(self, field.name) > 0:
                raise ConfigurationError(f"time-out {field.name} must be above zero")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """How one SGLang server uses kvcodec."""

    remote: str
    """URL of the storage peer, ``grpc://HOST:PORT``, or of several, ``grpc://HOST:PORT,HOST:PORT``; ``grpcs``: TLS."""
    profile: str = "exact"
    """Quality tier, one of :data:`PROFILES`; or several, separated by commas, that are stored side by side."""
    host_cache_bytes: int = 1 << 30
    """Bound of the fetched page objects kept in host memory."""
    publish_queue_bytes: int = 512 * MIB
    """Bound of the pages that wait to be encoded, as bytes of uncoded KV; what does not fit is dropped and counted."""
    min_fetch_tokens: int = 64
    """A shorter stored prefix is computed rather than fetched."""
    encode_threads: int = 1
    decode_threads: int = 2
    read_only: bool = False
    """Fetch, but publish nothing."""
    auto_calibrate: bool = False
    """Make a calibration from what is published where the peer has none."""
    encoder_processes: int = 1
    """Processes that run libx265, each with a thread that feeds it; 0 to run it on ``encode_threads`` threads."""
    decoder: str = "auto"
    """What decodes pictures, one of :data:`DECODERS`."""
    encoder: str = "auto"
    """What encodes pictures, one of :data:`ENCODERS`."""
    gpu_memory_bytes: int = 1 << 30
    """Bound of the GPU memory of decoders and restore buffers, kept out of SGLang's pool; nothing without a GPU."""
    cpus: str = ""
    """CPUs for the threads and encoder processes of kvcodec, such as ``0-3,8``; empty for all of the server's."""
    replicas: int = 2
    """Of several peers, on how many each page is kept."""
    plan: str = "auto"
    """``auto``: fetch what is predicted to be faster than prefill; ``always``: every stored prefix."""
    admit: str = "early"
    """``early``: admit a request when what is missing of its pages will be in time; ``landed``: when all is there."""
    compute_while_fetching: str = "idle"
    """When a prompt's start may be computed while the end of its stored prefix is fetched, if that is predicted to be
    no slower. ``idle``: while nothing else is computed; ``always``: while no other prompt is; ``failing``: as ``idle``,
    but only once the link has failed in the middle of a fetch; ``never``."""
    trace: str = ""
    """File for a trace of every request; empty for none."""
    tls_ca: str = ""
    """See :class:`Access`, also for the next four."""
    tls_cert: str = ""
    tls_key: str = ""
    token_file: str = ""
    insecure: bool = False
    timeouts: Timeouts = dataclasses.field(default_factory=Timeouts)

    def __post_init__(self) -> None:
        parse_remotes(self.remote)
        self.access.require_fit(self.remote)
        self._check_tiers()
        parse_cpus(self.cpus)
        for name, known in (
            ("decoder", DECODERS),
            ("encoder", ENCODERS),
            ("plan", PLANS),
            ("admit", ADMISSIONS),
            ("compute_while_fetching", COMPUTE_WHILE_FETCHING),
        ):
            if getattr(self, name) not in known:
                raise ConfigurationError(f"unknown {name} {getattr(self, name)!r}; there are {', '.join(known)}")
        for name in (
            "host_cache_bytes",
            "publish_queue_bytes",
            "encode_threads",
            "decode_threads",
            "min_fetch_tokens",
            "gpu_memory_bytes",
            "replicas",
        ):
            if getattr(self, name) < 1:
                raise ConfigurationError(f"{name} must be at least 1")
        if self.encoder_processes < 0:
            raise ConfigurationError("encoder_processes must be at least 0")
        if self.auto_calibrate and self.tiers[0] in LOSSLESS_PROFILES:
            raise ConfigurationError(f"profile {self.profile!r} needs no calibration; leave auto_calibrate away")
        if self.auto_calibrate and self.read_only:
            raise ConfigurationError("auto_calibrate learns from what is published, and read_only publishes nothing")

    def _check_tiers(self) -> None:
        names = self.profile.split(",")
        for name in names:
            if name not in PROFILES:
                raise ConfigurationError(f"unknown profile {name!r}; there are {', '.join(PROFILES)}")
        if len(set(names)) < len(names):
            raise ConfigurationError(f"a profile is there twice: {self.profile!r}")
        if 0 < sum(name in LOSSLESS_PROFILES for name in names) < len(names):
            raise ConfigurationError(
                f"profiles {self.profile!r}: a lossless one can't be stored beside lossy ones, "
                "for what is computed after lossy pages would no longer be exact"
            )

    @property
    def tiers(self) -> tuple[str, ...]:
        """The profiles, the best first."""
        return tuple(name for name in PROFILES if name in self.profile.split(","))

    @property
    def access(self) -> Access:
        """What the server shows its peers."""
        return Access(self.tls_ca, self.tls_cert, self.tls_key, self.token_file, self.insecure)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> ServerConfig:
        """Settings from ``KVCODEC_*`` variables, for ``Engine(radix_cache_backend="kvcodec")``.

        Raises:
            ConfigurationError: ``KVCODEC_REMOTE`` is missing, or a value is bad.
        """
        return cls.from_strings(cls.strings_from_env(env))

    @staticmethod
    def strings_from_env(env: Mapping[str, str] | None = None) -> dict[str, str]:
        """The settings that ``KVCODEC_*`` variables give, as :meth:`from_strings` takes them."""
        env = os.environ if env is None else env
        return {name: env[variable] for name, variable in ENV_NAMES.items() if env.get(variable)}

    @classmethod
    def from_strings(cls, values: Mapping[str, str]) -> ServerConfig:
        """Settings from ``{field name: text}``; see :data:`ENV_NAMES` for the names.

        Raises:
            ConfigurationError: ``remote`` is missing, a name is unknown, or a value is bad.
        """
        if not values.get("remote"):
            raise ConfigurationError(
                "kvcodec needs a storage peer: --kvcodec-remote grpc://HOST:PORT (or KVCODEC_REMOTE)"
            )
        kinds: dict[str, str] = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        kwargs: dict[str, object] = {}
        for name, text in values.items():
            if name not in ENV_NAMES:
                raise ConfigurationError(f"unknown kvcodec setting {name!r}")
            if name.endswith("_bytes"):
                kwargs[name] = parse_bytes(text)
            elif kinds[name] == "int":
                kwargs[name] = _parse_int(name, text)
            elif kinds[name] == "bool":
                kwargs[name] = _parse_bool(name, text)
            else:
                kwargs[name] = text
        return cls(**kwargs)  # type: ignore[arg-type]


def _parse_int(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ConfigurationError(f"{name} must be a whole number, not {text!r}") from None


def _parse_bool(name: str, text: str) -> bool:
    value = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}.get(text.lower())
    if value is None:
        raise ConfigurationError(f"{name} must be true or false, not {text!r}")
    return value


ENV_NAMES = {
    field.name: "KVCODEC_" + field.name.removesuffix("_bytes").upper()
    for field in dataclasses.fields(ServerConfig)
    if field.name != "timeouts"
}
"""Field name -> environment variable; the flag is the same in lower case with dashes and ``--`` in front."""
