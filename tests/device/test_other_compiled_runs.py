"""--compile with elastic families, stage 2 and plain models."""

from device.compiling import check_compiled, compiled

import pytest


@pytest.mark.parametrize("kind", compiled("elastic", "features", "stage-2", "plain"))
def test_compiled_run(runs, kind, monkeypatch):
    check_compiled(runs, kind, monkeypatch)
