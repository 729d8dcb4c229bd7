"""What is read only when it is used: an HTTP client that commands do not need, and that the daemon does."""

from __future__ import annotations

import subprocess
import sys


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_a_connection_does_not_read_the_http_client() -> None:
    found = run("import sys, gpuyard_protocol.bus.nats; print('aiohttp.client' in sys.modules)")
    assert found == "False"


def test_who_uses_it_has_all_of_it() -> None:
    found = run(
        "import gpuyard_protocol.bus.nats, aiohttp\n"
        "from aiohttp import web\n"
        "import aiohttp.test_utils\n"
        "from nats.aio.transport import WebSocketTransport\n"
        "print(aiohttp.ClientSession.__name__, web.Application.__name__, WebSocketTransport.__name__)"
    )
    assert found == "ClientSession Application WebSocketTransport"


def test_a_module_that_is_not_there_or_is_loaded_is_left_alone() -> None:
    found = run(
        "import sys, json\n"
        "from gpuyard_protocol.bus.deferred import defer\n"
        "defer('no_such_module_anywhere'); defer('json')\n"
        "print(sys.modules['json'] is json, 'no_such_module_anywhere' in sys.modules)"
    )
    assert found == "True False"


def test_a_library_does_without_what_it_would_use_if_it_were_there() -> None:
    found = run(
        "import sys\n"
        "from gpuyard_protocol.bus.deferred import absent\n"
        "with absent('rich'):\n"
        "    import structlog\n"
        "print('rich' in sys.modules, structlog.dev.rich is None)\n"
        "import rich.console\n"
        "with absent('rich'):\n"
        "    import rich\n"
        "print(rich.console.Console.__name__)"
    )
    assert found == "False True\nConsole"


def test_a_daemon_reads_no_web_server_before_it_leads() -> None:
    found = run("import sys, gpuyard_daemon.process; print('aiohttp.web' in sys.modules)")
    assert found == "False"
