"""The order in which the runs of a study start, the weights that are kept for them, and groups that are like others."""

from pathlib import Path

from common.errors import InputError
from study.groups import groups_of, planned_vits
from study.kept import that_fit
from study.plan import Study, order_of
from study.records import Record
from study.runner import Runner
from study.study_file import read_study

import pytest
import yaml
from small_study import STUDY

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


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


LIKE = """
  "scratch, smoothed":
    like: scratch
    seeds: [0, 1]
    options: {smoothing: 0.1}
  "scratch, other name":
    like: "scratch, smoothed"
    method: scratch, smoothed
    sizes: [L2-H2]
    epochs: [2]
    options: {smoothing: null}
"""


def with_groups(folder: Path, groups: str) -> Path:
    (folder / "study.yaml").write_text(STUDY.replace("report:", f"{groups.strip(chr(10))}\nreport:"))
    return folder / "study.yaml"


def test_groups_that_are_like_others(tmp_path):
    path = with_groups(tmp_path, LIKE)
    study = read_study(path)
    smoothed, other = study.groups["scratch, smoothed"], study.groups["scratch, other name"]
    assert (smoothed.method, smoothed.seeds, smoothed.epochs, smoothed.lrs) == (
        "scratch, smoothed",
        [0, 1],
        [1],
        [0.003],
    )
    assert smoothed.options == {"model": "{arch}", "smoothing": 0.1}
    assert (other.method, other.sizes, other.epochs) == ("scratch, smoothed", ["L2-H2"], [2])
    assert other.options == {"model": "{arch}"}  # null removes an option
    content = yaml.safe_load(path.read_text())
    planned = planned_vits(content | {"runs": groups_of(content["runs"])}, path)  # reports read the same file
    assert ("scratch, smoothed", "DIGITS", "L2-H2", 2, 1) in planned
    assert ("scratch, smoothed", "DIGITS", "L1-H1", 1, 0) in planned


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ("  a: {like: scratsh}", "runs, a: like is 'scratsh', which is no group"),
        ("  a: {like: b}\n  b: {like: a}", "runs: a → b → a: groups are like each other in a circle"),
        ("  a: {like: scratch, options: [1]}", "runs, a: the group: options is [1], expected dict"),
    ],
)
def test_groups_that_are_like_none(tmp_path, groups, message):
    with pytest.raises(InputError) as error:
        read_study(with_groups(tmp_path, groups))
    assert message in str(error.value)


def test_a_family_is_tuned_for_its_largest_and_smallest_member():
    assert Record({}, 0.1, {}, result={"accuracy": 80.0, "smallest": 70.0}).tuned_on == 75.0
    assert Record({}, 0.1, {}, result={"accuracy": 80.0}).tuned_on == 80.0


@pytest.mark.parametrize("name", ["family", "gpu"])
def test_the_elastic_family_of_a_study_has_the_recipe_that_is_offered(name):
    recipe = yaml.safe_load((CONFIGS / "elastic.yaml").read_text())
    stage_1 = yaml.safe_load((CONFIGS / f"study_{name}.yaml").read_text())["runs"]["elastic stage 1"]["options"]
    taken = {"order", "descendants", "descendant-sampling", "chain-weight", "teacher-model", "distillation-type"}
    taken |= {"distillation-alpha", "distillation-tau"}
    assert {option: stage_1[option] for option in taken} == {option: recipe[option] for option in taken}
