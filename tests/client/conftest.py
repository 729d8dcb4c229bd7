"""One real yard for all tests of the client."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.yard import Yard, running_yard


@pytest.fixture(scope="session")
def yard() -> Iterator[Yard]:
    with running_yard(nodes=1, simulate="8xH100-80GB") as yard:
        yield yard
