"""Key and certificate files, read with errors that name the file.

A key file is an nkey's seed, or NATS' credentials: a token that says what the key may do, and the seed. What it is, its
contents say; everything that takes the one takes the other.

nats-py reads the seed again at each login; reading it here first turns a missing or damaged file into a sentence
instead of an exception of a library.
"""

from __future__ import annotations

import ssl
from pathlib import Path

import nkeys

from gpuyard_protocol.bus.base import BusError

#: How files with credentials end that this project writes.
CREDENTIALS_SUFFIX = ".creds"
_TOKEN_BEGINS = b"-----BEGIN NATS USER JWT-----"
_SEED_BEGINS = b"-----BEGIN USER NKEY SEED-----"


def has_token(key_file: str) -> bool:
    """Whether the file holds credentials, not a seed alone."""
    try:
        return Path(key_file).read_bytes().lstrip().startswith(_TOKEN_BEGINS)
    except OSError as error:
        raise BusError(f"cannot read the key file {key_file}: {error.strerror or error}") from None


def read_public_key(seed_file: str) -> str:
    """The public key of a key file; a `BusError` says what is wrong with the file."""
    try:
        _, _, seed = Path(seed_file).read_bytes().rpartition(_SEED_BEGINS)
        return str(nkeys.from_seed(bytearray(seed.split()[0])).public_key.decode())
    except OSError as error:
        raise BusError(f"cannot read the key file {seed_file}: {error.strerror or error}") from None
    except (nkeys.NkeysError, ValueError, TypeError, IndexError) as error:
        raise BusError(f"{seed_file} holds no nkey seed ({type(error).__name__})") from None


def tls_context(ca: str | None, cert: str | None, key: str | None) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=ca)
        if cert is not None:
            context.load_cert_chain(cert, key)
    except OSError as error:
        raise BusError(f"cannot use the TLS files {ca}, {cert}, {key}: {error}") from None
    return context


def untrusted(where: str, error: ssl.SSLCertVerificationError) -> BusError:
    """Asking again would not change it."""
    return BusError(
        f"the certificate of {where} is not to be believed ({error.verify_message}): the authority in tls_ca did not "
        "sign it, or not for that name"
    )
