"""--compile with LeTs and TLEG."""

from device.compiling import check_compiled, compiled

import pytest


@pytest.mark.parametrize("kind", compiled("lets", "descendants", "tleg"))
def test_compiled_run(runs, kind, monkeypatch):
    check_compiled(runs, kind, monkeypatch)
