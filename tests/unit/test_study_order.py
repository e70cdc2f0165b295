"""The order in which the runs of a study start, which weights are kept for them, and options that are given for all."""

from pathlib import Path

from study.kept import that_fit
from study.plan import Study, order_of
from study.runner import Runner
from study.study_file import read_study

import pytest
from small_study import STUDY


@pytest.fixture
def study(tmp_path: Path) -> Study:
    (tmp_path / "study.yaml").write_text("in_order: true\n" + STUDY)
    return read_study(tmp_path / "study.yaml")


def test_runs_in_the_order_of_the_file(study, tmp_path):
    ranks = Runner(study, tmp_path, 1, order_of(study.all_runs)).ranks()
    ranked = [run for run in sorted(ranks, key=ranks.__getitem__, reverse=True) if not run.tuning]
    assert [run.seed for run in ranked] == sorted(run.seed for run in ranked)
    names = [run.group.name for run in ranked if run.seed == 0]
    places = {name: names.index(name) for name in names}
    assert sorted(places, key=places.__getitem__) == [*study.groups]
    assert all(ranks[needed] >= ranks[run] for run in ranks for needed in run.after)


def test_weights_that_are_kept_for_runs_that_wait(study):
    of_seed = {run.seed: run for run in study.runs.values() if run.group.name == "LeTs stage 1"}
    teacher = next(run for run in study.runs.values() if run.group.name == "teacher")
    sizes = {of_seed[0]: 4, of_seed[1]: 5, teacher: 3}
    awaited = {of_seed[0], of_seed[1]}
    assert that_fit(awaited, sizes, 9, study.place_of) == [of_seed[0], of_seed[1]]
    assert that_fit(awaited, sizes, 8, study.place_of) == [
        teacher,
        of_seed[0],
    ]  # seed 1 is done again, from its teacher
    assert that_fit(awaited, sizes, 2, study.place_of) == []


def test_where_the_data_are_and_what_runs(tmp_path):
    text = STUDY.replace("data-set: DIGITS", "data-set: DIGITS, data-path: elsewhere")
    (tmp_path / "study.yaml").write_text(text)
    study = read_study(tmp_path / "study.yaml", tmp_path, "cpu")
    assert {(run.options["data-path"], run.options["device"]) for run in study.all_runs} == {(str(tmp_path), "cpu")}
