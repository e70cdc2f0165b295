"""Compiled runs, for the files of tests that share them."""

from common.errors import InputError
from device.runs import FLOAT32, KINDS, Runs, Variant
from training.build import check_compiler

import pytest
import torch
from torch._dynamo.utils import counters

WITH_TEACHER = ("lets", "elastic", "features")  # which is compiled, too
# A compiled step adds in another order, and AdamW makes more of that.
COMPILED = Variant(
    "--compile",
    drift=0.02,
    loss=1e-3,
    on_cpu=("descendants", "stage-2"),
    common={kind: "--distillation-type none" for kind in KINDS if kind not in WITH_TEACHER},
)
BY_INDUCTOR = ("lets", "stage-2")  # of the kinds on a CPU, where a C++ compiler takes seconds for each graph


def compiled(*kinds: str) -> list:
    """Kinds of run as parameters of a test; on a CPU ``-m "not full"`` compiles few of them."""
    return [pytest.param(kind, marks=() if kind in COMPILED.on_cpu else pytest.mark.full) for kind in kinds]


def check_compiled(runs: Runs, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled run computes what the other does, in graphs that have no breaks.

    On a CPU most kinds are compiled without code of their own: their graphs and gradients, but not the C++ of them.
    """
    torch._dynamo.reset()
    if runs.device.type == "cpu" and kind not in BY_INDUCTOR:
        by_torch = torch.compile
        monkeypatch.setattr(
            torch, "compile", lambda *args, **kwargs: by_torch(*args, **kwargs | {"backend": "aot_eager"})
        )
    try:
        check_compiler("--compile", runs.device)
    except InputError as error:
        pytest.skip(str(error))
    common = COMPILED.common.get(kind, "")
    runs.of(kind, f"{FLOAT32} {common}")
    counters.clear()
    runs.compare(kind, COMPILED)
    assert counters["stats"]["unique_graphs"] > 0  # `check_compiler` has its own already
    assert not counters["graph_break"], dict(counters["graph_break"])
    if runs.device.type != "cpu" and kind in BY_INDUCTOR:  # what a GPU computes in unless told otherwise
        in_bfloat16 = f"--amp-dtype bfloat16 {common} {COMPILED.options}"
        assert runs.of(kind, in_bfloat16).loss == pytest.approx(runs.of(kind, f"{FLOAT32} {common}").loss, rel=0.02)
