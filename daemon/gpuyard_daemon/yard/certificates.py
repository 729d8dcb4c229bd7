"""The yard's own certificate authority, and the NATS server's certificate from it.

    tls/ca.pem  tls/ca.key  tls/server.pem  tls/server.key  tls/server.json (the names it was made for)

Made with the `openssl` program (docs/decisions/0006): it happens once in a yard's life and again when a name changes
or the certificate nears its end. The authority signs this server, and nodes' HTTP endpoints where they are wanted
beyond loopback (`node-NAME.pem`, `.key`), and nothing else; users and nodes get `ca.pem` with their keys, and trust it
for this yard alone. Clients need no certificate: they prove who they are with their nkeys.
"""

from __future__ import annotations

import ipaddress
import os
import secrets
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec

from gpuyard_daemon.yard.server_config import TlsFiles
from gpuyard_daemon.yard.server_files import ConfigurationError, tls_files

CA_DAYS = 3650
SERVER_DAYS = 825
#: A certificate that ends within this time is made anew.
RENEW_S = 90 * 86_400

_CA_SECTION = """\
[req]
distinguished_name = name
x509_extensions = extensions
prompt = no
[name]
CN = gpuyard {yard}
[extensions]
basicConstraints = critical, CA:TRUE, pathlen:0
keyUsage = critical, keyCertSign, cRLSign
subjectKeyIdentifier = hash
"""
_SERVER_SECTION = """\
[req]
distinguished_name = name
prompt = no
[name]
CN = {bearer}
[extensions]
basicConstraints = critical, CA:FALSE
keyUsage = critical, digitalSignature
extendedKeyUsage = {usage}
subjectKeyIdentifier = hash
authorityKeyIdentifier = keyid
subjectAltName = {names}
"""
#: Servers of a cluster show theirs to each other from both ends; a node's is good for its own endpoint alone, so that
#: no node can pass for a server.
_SERVER_USAGE = "serverAuth, clientAuth"
_NODE_USAGE = "serverAuth"
_SHOWN_USAGE = b"TLS Web Client Authentication"
_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def ensure_certificates(state: Path, yard: str, names: Sequence[str]) -> TlsFiles:
    """The authority and a certificate for `names` (host names and addresses), made where missing or outdated."""
    files = tls_files(state)
    directory = files.ca.parent
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    wanted = sorted({"localhost", "127.0.0.1", "::1", *names})
    if not files.ca.exists():
        _make_authority(directory, yard)
    if not _still_good(files, wanted):
        _make_server_certificate(directory, "server", f"gpuyard {yard} nats", wanted, _SERVER_USAGE)
    return files


def make_node_certificate(state: Path, node: str, names: Sequence[str]) -> tuple[Path, Path]:
    """Certificate and key for a node's own HTTP endpoint, from the yard's authority; made anew each time."""
    authority = tls_files(state).ca
    if not authority.exists():
        raise ConfigurationError(f"there is no authority at {authority}: `gpuyard init --listen` makes the yard's")
    wanted = sorted({"localhost", "127.0.0.1", "::1", *names})
    _make_server_certificate(authority.parent, f"node-{node}", f"gpuyard node {node}", wanted, _NODE_USAGE)
    return authority.parent / f"node-{node}.pem", authority.parent / f"node-{node}.key"


def _still_good(files: TlsFiles, names: list[str]) -> bool:
    try:
        made_for = msgspec.json.decode(files.cert.with_suffix(".json").read_bytes(), type=list[str])
    except (OSError, msgspec.MsgspecError):
        return False
    if made_for != names or not files.key.exists():
        return False
    shown = ("openssl", "x509", "-in", str(files.cert), "-noout")
    usage = _run(*shown, "-ext", "extendedKeyUsage")
    return _SHOWN_USAGE in usage.stdout and _run(*shown, "-checkend", str(RENEW_S)).returncode == 0


def _make_authority(directory: Path, yard: str) -> None:
    with tempfile.TemporaryDirectory(dir=directory) as place:
        section, key, cert = (Path(place) / name for name in ("ca.cnf", "ca.key", "ca.pem"))
        section.write_text(_CA_SECTION.format(yard=yard))
        request = ("openssl", "req", "-x509", "-config", str(section), "-days", str(CA_DAYS), *_NEW_KEY)
        _must(*request, "-keyout", str(key), "-out", str(cert))
        key.chmod(0o600)
        cert.chmod(0o644)
        key.replace(directory / "ca.key")
        cert.replace(directory / "ca.pem")


def _make_server_certificate(directory: Path, stem: str, bearer: str, names: list[str], usage: str) -> None:
    alternatives = ", ".join(f"{'IP' if _is_address(name) else 'DNS'}:{name}" for name in names)
    with tempfile.TemporaryDirectory(dir=directory) as place:
        section, key, asked, cert = (
            Path(place) / name for name in ("server.cnf", "server.key", "server.csr", "server.pem")
        )
        section.write_text(_SERVER_SECTION.format(bearer=bearer, names=alternatives, usage=usage))
        request = ("openssl", "req", "-new", "-config", str(section), *_NEW_KEY)
        _must(*request, "-keyout", str(key), "-out", str(asked))
        sign: tuple[str, ...] = ("openssl", "x509", "-req", "-in", str(asked), "-days", str(SERVER_DAYS))
        sign += ("-CA", str(directory / "ca.pem"), "-CAkey", str(directory / "ca.key"))
        sign += ("-set_serial", f"0x{secrets.token_hex(16)}", "-extfile", str(section), "-extensions", "extensions")
        _must(*sign, "-out", str(cert))
        key.chmod(0o600)
        cert.chmod(0o644)
        # The names last: without them the next call makes both files again.
        (directory / f"{stem}.json").unlink(missing_ok=True)
        key.replace(directory / f"{stem}.key")
        cert.replace(directory / f"{stem}.pem")
    (directory / f"{stem}.json").write_bytes(msgspec.json.encode(names))


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _must(*arguments: str) -> None:
    done = _run(*arguments)
    if done.returncode != 0:
        said = done.stderr.decode(errors="replace").strip()[-500:]
        raise ConfigurationError(f"openssl cannot make the server's certificate: {said}")


def _run(*arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        # A private umask: keys are never readable by others, not even for a moment.
        return subprocess.run(
            arguments, capture_output=True, check=False, umask=0o077, env={**os.environ, "OPENSSL_CONF": os.devnull}
        )
    except FileNotFoundError:
        raise ConfigurationError(
            "a NATS server that other machines reach needs TLS, and there is no `openssl` here to make its "
            "certificate: install it (apt-get install openssl)"
        ) from None
