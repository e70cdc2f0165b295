"""Elastic families, stage 2, plain models and evaluation, as `test_stage_1_variants` does for the rest."""

import json

import main
from device.runs import FLOAT32, KINDS, VARIANTS, assert_sound, cells

import pytest

OTHERS = ("elastic", "features", "stage-2", "plain")


@pytest.mark.parametrize("kind", OTHERS)
def test_a_run_learns_and_writes_what_it_has_learnt(runs, kind):
    finished = runs.of(kind)
    assert_sound(finished)
    *_, first, last = (line["train_loss"] for line in finished.epochs if line["epoch"] >= 0)
    assert last < first


@pytest.mark.parametrize(("kind", "variant"), cells(*OTHERS))
def test_variant(runs, kind, variant):
    runs.compare(kind, VARIANTS[variant])


def evaluated(runs, capsys, kind: str, more: str) -> dict[str, float]:
    """What --eval says of the checkpoint of a run."""
    checkpoint = runs.of(kind).folder / "checkpoint.pth"
    capsys.readouterr()
    assert main.main(runs.options(kind, f"--resume {checkpoint} --eval {more}")) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


ALL = pytest.mark.full


@pytest.mark.parametrize(
    ("kind", "more", "tolerance"),
    [
        *(pytest.param(kind, FLOAT32, 1e-5, marks=() if kind in OTHERS else ALL) for kind in KINDS),
        ("stage-2", f"{FLOAT32} --cache-data", 1e-5),
        pytest.param("stage-2", f"{FLOAT32} --compile", 1e-5, marks=ALL),
        pytest.param("stage-2", f"{FLOAT32} --num-workers 2", 1e-5, marks=ALL),
        pytest.param("stage-2", "--amp-dtype bfloat16", 0.03, marks=ALL),
        ("stage-2", "--amp-dtype float16", 0.03),
    ],
)
def test_evaluation_says_what_the_log_says(runs, capsys, kind, more, tolerance):
    """Of the same weights, in float32."""
    last = runs.of(kind).epochs[-1]
    found = evaluated(runs, capsys, kind, more)
    assert found["test_loss"] == pytest.approx(last["test_loss"], rel=tolerance)
    assert found["test_acc1"] == pytest.approx(last["test_acc1"], abs=300 * tolerance)


@pytest.mark.parametrize("kind", ["elastic", "stage-2"])
def test_evaluation_of_the_average(runs, capsys, kind):
    found = evaluated(runs, capsys, kind, f"{FLOAT32} --model-ema")
    assert found["test_loss"] == pytest.approx(runs.of(kind).epochs[-1]["ema_test_loss"], rel=1e-5)
    assert found["test_loss"] != runs.of(kind).epochs[-1]["test_loss"]
