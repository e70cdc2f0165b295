"""--order and --depth-order of an elastic ViT on the command line, from a source that is trained here."""

from pathlib import Path

import models
from models.order import in_order, rank_layers
from models.pruning import scores_of
from training.build_data import order_loader
from training.command_line import parse_options
from training.launch import prepare

import pytest
import torch
from conftest import Outcome, Run, epochs_of, free_port, run_many, set_up_run
from forked_cases import Case, run_cases
from safetensors.torch import load_file
from torch import Tensor

DATA = "--data-set DIGITS --num-workers 0 --device cpu --no-repeated-aug --batch-size 32 --warmup-epochs 0"
LEARNS = "--aa none --reprob 0 --mixup 0 --cutmix 0 --smoothing 0 --drop-path 0 --lr 2e-3 --unscale-lr --cache-data"
SOURCE = "deit_nano_patch8_32_L3_H2"
SMALL = models.ViTArch(width=32, depth=2, num_heads=1, patch_size=8, img_size=32)
TRAINED = {"source": f"{DATA} --model {SOURCE} --input-size 32 {LEARNS} --epochs 4 --output-dir OUT/source"}
ELASTIC = f"{DATA} --src-arch {SOURCE} --input-size 32 --src-path"
TAYLOR = f"{ELASTIC} OUT/source --order taylor --order-images 64"
FAMILIES = {
    "taylor": f"{TAYLOR} --depth-order output --epochs 0 --output-dir OUT/taylor",
    "two": f"{TAYLOR} --depth-order output --epochs 0 --output-dir OUT/two",
    "begun": f"{TAYLOR} --depth-order taylor --train-images 32 --epochs 1 --output-dir OUT/resumed",
}
RESUMED = {"resumed": FAMILIES["begun"].replace("--epochs 1", "--epochs 2 --resume auto")}


class Runs:
    def __init__(self, out: Path):
        self.out, self.outcomes = out, {}

    def add(self, lines: dict[str, str]) -> None:
        runs = {
            name: Run(line.replace("OUT", str(self.out)).split(), processes=2 if name == "two" else 1)
            for name, line in lines.items()
        }
        self.outcomes |= run_many(runs, self.out / f"runs{len(self.outcomes)}")

    def of(self, name: str) -> Outcome:
        outcome = self.outcomes[name]
        assert set(outcome.codes) == {0}, outcome.stderr
        return outcome

    def gene(self, name: str) -> models.Learngene:
        self.of(name)
        return models.load_learngene(self.out / name / "learngene.safetensors")

    def start(self, options: str) -> models.Elastic:
        """The Aux-Net that training would start from."""
        return set_up_run(options.replace("OUT", str(self.out)).split()).model


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Runs:
    runs = Runs(tmp_path_factory.mktemp("order"))
    for phase in (TRAINED, FAMILIES, RESUMED):
        runs.add(phase)
    weights = load_file(runs.out / "source" / "model.safetensors")
    torch.save({name: w for name, w in weights.items() if not name.startswith("head.")}, runs.out / "headless.pth")
    return runs


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name in found if not torch.equal(found[name], expected[name])] == []


def test_the_largest_member_is_the_source(runs):
    before, after = (epochs_of(runs.out / name)[-1]["test_acc1"] for name in ("source", "taylor"))
    assert before == after > 15
    ordered, plain = runs.gene("taylor"), runs.start(f"{ELASTIC} OUT/source").eval()
    images = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(ordered.descend(ordered.arch).eval()(images), plain(images), atol=1e-4, rtol=1e-4)
    small = [gene.descend(SMALL).eval()(images) for gene in (ordered, models.Learngene.of(plain))]
    assert not torch.allclose(*small, atol=1e-2)


def test_two_processes_find_the_same_order(runs):
    assert_equal(runs.gene("two").tensors, runs.gene("taylor").tensors)
    said = runs.of("two").stdout
    assert said.count("neurons and heads are in order of importance, by Taylor scores, over 64 training images") == 1
    assert said.count("layers from the least to the most important are ") == 1


DIFFERENT = """
import os
import training.launch, training.ordering, training.loop
if os.environ["RANK"] == "1":
    scores_of = training.ordering.scores_of
    training.ordering.scores_of = lambda vit, source: scores_of({name: -1 - w for name, w in vit.items()}, source)
begin = training.loop.begin_writing
def shown(run):
    for model in (run.model, run.ema.module):
        print("model", [tensor.double().sum(-1).tolist() for tensor in model.state_dict().values()])
    begin(run)
training.loop.begin_writing = shown
"""


@pytest.mark.full
def test_processes_that_round_differently_start_from_one_order(runs, tmp_path):
    place = dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port()))
    places = [{**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]
    options = f"{ELASTIC} OUT/source --order magnitude --depth-order magnitude --epochs 0"
    case = Case(options.replace("OUT", str(runs.out)).split(), places, DIFFERENT)
    outcome = run_cases({"": case}, tmp_path / "cases")[""]
    assert outcome.codes == [0, 0], outcome.said
    first, second = ([line for line in said.splitlines() if line.startswith("model")] for said in outcome.said)
    assert len(first) == 2
    assert first == second


def test_a_resumed_run_does_not_order_again(runs):
    said = "in order of importance", "from the least to the most important"
    assert all(line in runs.of("begun").stdout for line in said)
    assert not any(line in runs.of("resumed").stdout for line in said)
    start, trained = runs.start(f"{TAYLOR} --depth-order taylor --train-images 32"), runs.gene("resumed").tensors
    assert torch.equal(trained["layers"], start.layers)
    torch.testing.assert_close(trained["q_weight"], start.q_weight.data, atol=5e-3, rtol=0)  # after two steps


def test_orders_of_magnitude(runs):
    source = load_file(runs.out / "source" / "model.safetensors")
    aux_net = runs.start(f"{ELASTIC} OUT/source --order magnitude --depth-order magnitude")
    scores = scores_of(source, aux_net.arch)
    assert_equal(aux_net.to_vit().state_dict(), in_order(source, aux_net.arch, scores))
    assert aux_net.layers[1, :2].tolist() == sorted(rank_layers(scores)[:2])


@pytest.mark.parametrize("order", ["none", "taylor"])
def test_taylor_depth_order(runs, order, capsys):
    """Layers have the same ranking, whether the neurons in them are in order or not."""
    aux_net = runs.start(f"{ELASTIC} OUT/source --order {order} --depth-order taylor --order-images 64")
    assert capsys.readouterr().out.count("by Taylor scores, over 64 training images") == (2 if order == "taylor" else 1)
    config = prepare(parse_options(f"{TAYLOR} --batch-size 16".replace("OUT", str(runs.out)).split()))
    source = load_file(runs.out / "source" / "model.safetensors")
    scores = torch.zeros(3, dtype=torch.float64)
    vit = models.create_vit(aux_net.arch, num_classes=10)
    vit.load_state_dict(source)
    for images, labels in order_loader(config, torch.device("cpu")):
        vit.zero_grad()
        torch.nn.functional.cross_entropy(vit.eval()(images), labels, reduction="sum").backward()
        for layer, block in enumerate(vit.blocks):
            scores[layer] += sum((p * p.grad).double().sum() for p in block.parameters()).abs().detach()
    ranking = scores.argsort(descending=True).tolist()
    assert [aux_net.layers[d - 1, :d].tolist() for d in (1, 2, 3)] == [sorted(ranking[:d]) for d in (1, 2, 3)]


def test_a_source_without_head(runs):
    for how in ("--order taylor", "--depth-order taylor"):
        with pytest.raises(models.InputError, match=f"{how}, unlike magnitude, needs the source's head: --src-path"):
            runs.start(f"{ELASTIC} OUT/headless.pth {how}")
    aux_net = runs.start(f"{ELASTIC} OUT/headless.pth --order magnitude --depth-order output --order-images 32")
    assert sorted(aux_net.layers[2].tolist()) == [0, 1, 2]


ERRORS = {
    f"--src-arch {SOURCE} --order taylor": "--src-path is missing: --order taylor",
    f"--src-arch {SOURCE} --depth-order output": "--src-path is missing: --depth-order output",
    f"--model {SOURCE} --order magnitude": "--order needs --src-arch without --tgt-arch",
    f"--src-arch {SOURCE} --src-path OUT/source --order magnitude --order-images 8": "--order-images needs ",
}


@pytest.mark.parametrize("options", ERRORS)
def test_refused_options(runs, options):
    with pytest.raises(models.InputError) as raised:
        runs.start(f"{DATA} --input-size 32 {options}")
    assert ERRORS[options] in str(raised.value)
