"""Stage 1 of LeTs and TLEG: each option that changes how a step is computed, against the run without it."""

from device.runs import CACHE, FLOAT32, VARIANTS, assert_sound, cells

import pytest

KINDS = ("lets", "descendants", "tleg")


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_learns_and_writes_what_it_has_learnt(runs, kind):
    finished = runs.of(kind)
    assert_sound(finished)
    first, last = (line["train_loss"] for line in finished.epochs)
    assert last < first


@pytest.mark.parametrize(("kind", "variant"), cells(*KINDS))
def test_variant(runs, kind, variant):
    runs.compare(kind, VARIANTS[variant])


def test_logits_of_the_teacher_are_read_from_the_cache(runs):
    cached = runs.of("lets", f"{FLOAT32} {CACHE}")
    files = {path: path.stat().st_mtime_ns for path in (runs.out / "lets" / "teacher-cache").rglob("*.safetensors")}
    assert files
    again = runs.of("lets", f"{FLOAT32} {CACHE} --no-model-ema")  # the average changes no step
    assert again.loss == pytest.approx(cached.loss, rel=1e-4)
    assert {path: path.stat().st_mtime_ns for path in files} == files
