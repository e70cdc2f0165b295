"""--compile: what a compiled step computes, and that each kind is compiled as a whole."""

from functools import partial

from common.errors import InputError
from training.build import check_compiler

import pytest
import torch
from device.runs import FLOAT32, KINDS, Variant
from torch._dynamo.utils import counters

# A compiled step adds in another order, which AdamW makes more of.
COMPILED = Variant("--compile", 0.02, 1e-3)
BY_INDUCTOR = ("lets", "stage-2")  # on a CPU, where a C++ compiler takes ten seconds for each graph


@pytest.fixture
def compiler(device, request, monkeypatch) -> None:
    """torch.compile as the kind of run in the test's name uses it."""
    kind = request.node.callspec.params["kind"]
    torch._dynamo.reset()
    if device.type == "cpu" and kind not in BY_INDUCTOR:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    try:
        check_compiler("--compile", device)
    except InputError as error:
        pytest.skip(str(error))
    counters.clear()


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kind", KINDS)
def test_compiled_without_graph_breaks(runs, kind):
    runs.of(kind)
    counters.clear()
    runs.compare(kind, COMPILED)
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"], dict(counters["graph_break"])


@pytest.mark.parametrize("kind", ["lets"])
@pytest.mark.usefixtures("compiler")
def test_compiled_in_bfloat16(runs, device, kind):
    if device.type == "cpu":
        pytest.skip("the other test compiles enough on a CPU")
    base, found = runs.of(kind), runs.of(kind, "--amp-dtype bfloat16 --compile")
    assert found.loss == pytest.approx(base.loss, rel=0.02)
    assert FLOAT32
