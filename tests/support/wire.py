"""The NATS protocol by hand: for bytes that no client library would send."""

from __future__ import annotations

import asyncio
import base64
import json
from urllib.parse import urlsplit

import nkeys


async def publish_raw(url: str, seed: str, frame: bytes) -> bytes:
    """Log in with an nkey, write `frame` as it is, and return what the server said until it had read all of it."""
    address = urlsplit(url)
    reader, writer = await asyncio.open_connection(address.hostname, address.port)
    try:
        info = json.loads((await reader.readline()).removeprefix(b"INFO "))
        key = nkeys.from_seed(seed.encode())
        signature = base64.urlsafe_b64encode(key.sign(info["nonce"].encode())).rstrip(b"=").decode()
        login = {
            "verbose": False,
            "headers": True,
            "no_responders": True,
            "nkey": key.public_key.decode(),
            "sig": signature,
        }
        writer.write(b"CONNECT " + json.dumps(login).encode() + b"\r\n" + frame + b"PING\r\n")
        await writer.drain()
        heard = b""
        async with asyncio.timeout(5):
            while b"PONG" not in heard and (chunk := await reader.read(4096)):
                heard += chunk
        return heard
    finally:
        writer.close()
        await writer.wait_closed()
