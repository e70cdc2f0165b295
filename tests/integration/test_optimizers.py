"""Every optimiser of timm: a resumed run is the run that was never interrupted, or it is refused before it starts.

Besides: what else of optimiser and schedule is said before training, and --compile on a machine without a compiler.
"""

import copy
import re
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import engine
import main
import models
import utils
from common.errors import InputError
from common.files import read_checkpoint
from training import optimizers
from training.build import build_optimizer
from training.checkpoints import check_state, restore, save_checkpoint
from training.command_line import parse_options
from training.config import Config
from training.optimizers import check_optimizer, compiles

import pytest
import torch
from conftest import ENVIRONMENT, run_main
from timm.optim import get_optimizer_info, list_optimizers
from timm.optim._optim_factory import OptimInfo, default_registry
from timm.optim.kron import Kron
from torch import nn

TINY = "deit_nano_patch8_16_L1_H1"
LOOKAHEAD = ("lookahead_adamw", "lookahead_sgd", "lookahead_lamb", "lookahead_adafactorbv")
CPU = torch.device("cpu")
LENGTH = 8  # batches of an epoch; Lookahead averages after every 6th step


def options(opt: str, *more: str) -> Config:
    return parse_options(["--data-set", "DIGITS", "--model", TINY, "--lr", "1e-3", "--unscale-lr", "--opt", opt, *more])


def new_run(config: Config) -> SimpleNamespace:
    """As much of a run as training and checkpoints need."""
    torch.manual_seed(0)
    model = models.create_model(config.model.model, num_classes=4, drop_path_rate=0.1)
    optimizer, scheduler = build_optimizer(config.optim, config.schedule, config.data.batch_size, seed=0, model=model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return SimpleNamespace(
        config=config,
        classes=list("abcd"),
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        ema=None,
        scaler=scaler,
        epoch=0,
    )


def train(run: SimpleNamespace, epochs: int) -> SimpleNamespace:
    for epoch in range(run.epoch, run.epoch + epochs):
        generator = torch.Generator().manual_seed(epoch)
        batches = [(torch.randn(4, 3, 16, 16, generator=generator), torch.arange(4)) for _ in range(LENGTH)]
        run.scheduler.step(epoch)
        engine.train_one_epoch(
            run.model, lambda logits, targets, _: nn.functional.cross_entropy(logits, targets), batches,
            run.optimizer, CPU, epoch, scaler=run.scaler, autocast=nullcontext(),
        )  # fmt: skip
    run.epoch += epochs
    return run


def content_of(run: SimpleNamespace) -> dict:
    """What a checkpoint holds."""
    return {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}


def restore_by_file(run: SimpleNamespace, content: dict, folder: Path) -> None:
    """By way of a file."""
    save_checkpoint(folder / "checkpoint.pth", content)
    restore(run, folder / "checkpoint.pth", read_checkpoint(folder / "checkpoint.pth"))


def resumed_from(run: SimpleNamespace, content: dict, folder: Path) -> SimpleNamespace:
    other = new_run(run.config)
    restore_by_file(other, content, folder)
    other.epoch = run.epoch
    return other


def trained_state(opt: str) -> tuple[SimpleNamespace, dict]:
    """A run after an epoch, and what a checkpoint of it holds."""
    run = train(new_run(options(opt)), 1)
    return run, copy.deepcopy(content_of(run))


def refusal(opt: str, *more: str) -> str | None:
    try:
        check_optimizer(options(opt, *more).optim, CPU)
    except InputError as error:
        return str(error)
    return None


# ---------------------------------------------------------------------------------------------------------------------
# Exact, or refused
# ---------------------------------------------------------------------------------------------------------------------


OFTEN = ("adamw", "sgd", "lamb", "lookahead_adamw", "kron", "adahessian", "fusedadam")  # of which some are refused


@pytest.mark.parametrize(
    "opt",
    [pytest.param(opt, marks=() if opt in OFTEN else pytest.mark.full) for opt in [*list_optimizers(), *LOOKAHEAD]],
)
def test_a_resumed_run_is_the_same_or_refused_before_it_starts(opt, tmp_path):
    refused = refusal(opt)
    if refused:
        info = get_optimizer_info(opt)
        assert info.second_order or info.opt_class is Kron or isinstance(info.opt_class, str)  # of another package
        instead = re.fullmatch(rf"--opt {opt} cannot be used: [^\n]+; --opt (\w+) can", refused)[1]
        assert refusal(instead) is None
        return
    whole = train(new_run(options(opt)), 1)
    resumed = resumed_from(whole, content_of(whole), tmp_path)
    train(whole, 1)
    train(resumed, 1)
    for (name, a), b in zip(resumed.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    assert optimizers.same(resumed.optimizer.state_dict(), whole.optimizer.state_dict())


def test_kron_is_resumed_exactly_where_it_can_be_used(monkeypatch):
    """Its own generator is in its state; what it draws of torch's depends on the seed and the step."""
    monkeypatch.setattr(optimizers.opt_einsum, "is_available", lambda: True)
    monkeypatch.setattr(optimizers, "SHAPES", ((24,), (24, 20)))
    assert refusal("kron") is None
    assert refusal("lookahead_kron") is None
    generator = torch.get_rng_state()
    assert compiles(check_optimizer(options("kron").optim, CPU))
    assert not compiles(check_optimizer(options("adamw").optim, CPU))
    assert torch.equal(torch.get_rng_state(), generator)  # the check disturbs no random numbers


class Hidden(torch.optim.SGD):
    """Counts its steps where no checkpoint sees them."""

    steps = 0

    def step(self, closure: None = None) -> None:
        self.steps += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad /= self.steps
        super().step()


class OwnGenerator(torch.optim.SGD):
    """Draws from a generator that is not in its state."""

    def __init__(self, *args: object, **kwargs: object):
        super().__init__(*args, **kwargs)
        self.generator = torch.Generator().manual_seed(0)

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad += torch.randn(parameter.shape, generator=self.generator)
        super().step()


class OwnClass(torch.optim.SGD):
    """Keeps an object in its state that a file cannot hold as plain data."""

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["note"] = SimpleNamespace()
        super().step()


class Drawing(torch.optim.SGD):
    """Draws from torch's generator, which is set before every step."""

    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad += torch.randn_like(parameter)
        super().step()


@pytest.fixture
def registered(monkeypatch) -> Callable[[type], str]:
    """Adds an optimiser to timm's for the time of a test, and gives its name."""

    def register(kind: type) -> str:
        name = kind.__name__.lower()
        info = OptimInfo(name=name, opt_class=kind, has_eps=False, has_momentum=True)
        monkeypatch.setitem(default_registry._optimizers, name, info)
        return name

    return register


@pytest.mark.parametrize("kind", [Hidden, OwnGenerator, OwnClass])
def test_an_optimiser_that_hides_its_state_is_refused(registered, kind):
    name = registered(kind)
    assert re.match(f"--opt {name} cannot be used: a run could not be resumed exactly, as .*; .* can$", refusal(name))


def test_what_an_optimiser_draws_is_the_same_in_all_processes(registered, monkeypatch):
    name = registered(Drawing)
    assert refusal(name) is None
    weights = []
    for rank in (0, 1):
        monkeypatch.setattr(engine.utils, "rank", lambda rank=rank: rank)
        run = new_run(options(name))
        for module in run.model.modules():
            if hasattr(module, "drop_prob"):
                module.drop_prob = 0.0  # which each process draws
        weights.append([parameter.detach() for parameter in train(run, 1).model.parameters()])
    assert optimizers.same(*weights)


@pytest.mark.parametrize("opt", ["lookahead_lamb", "adan"])
def test_rolling_back_takes_counters_back(opt, tmp_path):
    """Also to a time before the first step."""
    run = new_run(options(opt))
    start = copy.deepcopy(content_of(run))
    train(run, 1)
    restore_by_file(run, start, tmp_path)
    run.epoch = 0
    train(run, 2)
    whole = train(new_run(options(opt)), 2)
    assert optimizers.same(run.optimizer.state_dict(), whole.optimizer.state_dict())


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints of others
# ---------------------------------------------------------------------------------------------------------------------


def test_numbers_that_were_tensors_in_another_version_and_the_other_way_round(tmp_path):
    for opt in ("adamw", "adabelief", "radamlegacy"):
        run, content = trained_state(opt)
        for values in content["optimizer"]["state"].values():
            step = values["step"]
            values["step"] = int(step) if isinstance(step, torch.Tensor) else torch.tensor(float(step))
        resumed = resumed_from(run, content, tmp_path)
        assert optimizers.same(resumed.optimizer.state_dict(), run.optimizer.state_dict())


DAMAGE = {  # optimiser, name of a value, and what is in its place: a function of the right one
    "missing": ("madgrad", "x0", None),
    "shape": ("adafactor", "exp_avg_sq", lambda value: value[..., :-1]),
    "shape of a factor": ("adafactor", "exp_avg_sq_row", lambda value: value[None]),
    "not finite": ("mars", "last_grad", lambda value: value + torch.inf),
    "no tensor": ("adabelief", "exp_avg_var", lambda value: 3),
    "negative": ("adamp", "step", lambda value: -7),
    "huge": ("adamp", "step", lambda value: 10**400),
    "fraction": ("adamp", "step", lambda value: 1.5),
    "step not finite": ("nadamlegacy", "step", lambda value: float("nan")),
    "number not finite": ("nadamlegacy", "m_schedule", lambda value: float("inf")),
    "truth": ("muon", "use_muon", lambda value: not value),
    "text": ("muon", "use_muon", lambda value: "yes"),
    "complex": ("novograd", "exp_avg_sq", lambda value: value.to(torch.complex64)),
    "foreign": ("lion", "exp_avg_sq", lambda value: torch.zeros(2)),
}


@pytest.mark.parametrize("name", [name for name, (opt, *_) in DAMAGE.items() if opt in list_optimizers()])
def test_damaged_state_is_one_sentence(name, tmp_path):
    opt, key, change = DAMAGE[name]
    run, content = trained_state(opt)
    states = content["optimizer"]["state"].values()
    values = next((values for values in states if key in values), content["optimizer"]["state"][0])
    if change is None:
        del values[key]
    else:
        values[key] = change(values.get(key))
    with pytest.raises(InputError, match=rf"holds no training state that fits these options \(its optimizer.* {key} "):
        resumed_from(run, content, tmp_path)


def test_a_list_of_tensors_is_judged_too():
    """Kron's."""
    example = {"Q": [torch.eye(3), torch.eye(2)]}["Q"]
    assert optimizers.same(optimizers.fitted([torch.eye(3), torch.eye(2)], example, "Q"), example)
    for wrong in ([torch.eye(3)], [torch.eye(3), torch.eye(3)], torch.eye(3), [torch.eye(3), torch.eye(2) / 0]):
        with pytest.raises(InputError, match="Q is not that"):
            optimizers.fitted(wrong, example, "Q")


def test_state_of_another_optimiser_is_refused(tmp_path):
    run, content = trained_state("adamw")
    run.config = options("sgd")
    with pytest.raises(InputError, match="its optimizer has no momentum_buffer of "):
        resumed_from(run, content, tmp_path)


def test_state_in_lists_that_is_not_finite_is_not_written():
    optimizer = SimpleNamespace(
        state_dict=lambda: {"state": {0: {"Q": [torch.eye(2), torch.eye(2) / 0]}}}, param_groups=[{"lr": 1.0}]
    )
    run = SimpleNamespace(
        model=nn.Linear(1, 1), ema=None, optimizer=optimizer, epoch=0, position=SimpleNamespace(steps=0)
    )
    with pytest.raises(utils.NotFiniteError):
        check_state(run)


# ---------------------------------------------------------------------------------------------------------------------
# From the command line
# ---------------------------------------------------------------------------------------------------------------------

DIGITS = f"--data-set DIGITS --train-images 64 --num-workers 0 --model {TINY} --device cpu --no-model-ema"
SHORT = f"{DIGITS} --batch-size 16 --lr 1e-2 --warmup-epochs 0 --sched step --decay-epochs 1 --decay-rate 0.9"
FEW = f"{DIGITS} --batch-size 8 --epochs 1"


@pytest.mark.full
@pytest.mark.parametrize("opt", ["lookahead_adamw", "adafactorbv"])
def test_from_the_command_line_too(opt, tmp_path):
    """Four steps in an epoch: Lookahead averages two steps before and four after the run is resumed."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    command = f"{SHORT} --opt {opt} --output-dir".split()
    assert main.main([*command, str(whole), "--epochs", "3"]) == 0
    assert main.main([*command, str(resumed), "--epochs", "2"]) == 0
    assert main.main([*command, str(resumed), "--epochs", "3", "--resume", "auto"]) == 0
    for name in ("model.safetensors", "log.txt"):
        assert (resumed / name).read_bytes() == (whole / name).read_bytes()
    a, b = (read_checkpoint(folder / "checkpoint.pth")["optimizer"] for folder in (whole, resumed))
    assert optimizers.same(a, b)


@pytest.mark.parametrize(
    ("more", "warnings"),
    [
        (
            "--lr 1e-5 --warmup-epochs 0",
            ["1.5625e-07 (--lr 1e-05, scaled to 8 images per optimiser step) is below --min-lr 1e-05, to"],
        ),
        (
            "--lr 1e-5 --unscale-lr --min-lr 2e-5 --warmup-lr 3e-5",
            ["1e-05 (--lr 1e-05) is below --min-lr 2e-05, to which it rises", "below --warmup-lr 3e-05, from which it"],
        ),
        ("--lr 1e-3 --opt sgd --opt-betas 0.9 0.98", ["--opt-betas has no effect: --opt sgd has no betas"]),
        ("--lr 1e-5 --warmup-epochs 0 --sched step", []),
        ("--lr 1e-3", []),
    ],
)
def test_options_that_are_hardly_meant_are_warned_of(more, warnings, capsys):
    assert main.main(f"{FEW} {more}".split()) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == bool(warnings)
    for warning in warnings:
        assert lines[0].startswith("warning: ")
        assert warning in lines[0]


@pytest.mark.full
def test_compiling_without_a_compiler_is_one_sentence(monkeypatch):
    monkeypatch.setitem(ENVIRONMENT, "CXX", "/nonexistent")
    done = run_main(*SHORT.split(), "--epochs", "1", "--compile")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: --compile cannot be used: torch.compile fails on cpu (")
    assert "C++ compiler" in line
    assert done.stdout == ""
