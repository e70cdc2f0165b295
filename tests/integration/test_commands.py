"""Commands and YAML files written for DeiT, DeiT III and the published programs: accepted, implemented, or refused."""

import random
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import models
from common.errors import InputError
from common.files import read_checkpoint
from datasets import build_transform
from losses import BinaryCrossEntropy
from options import option_parser
from scripts import convert_learngene, make_family
from study.command_line import parse
from training.build_data import build_mixup
from training.command_line import parse_options
from training.config import AugmentConfig, Config, options_of

import conftest
import numpy as np
import pytest
import torch
import yaml
from conftest import ENVIRONMENT, MAIN, Outcome, Run, free_port, run_many
from PIL import Image, ImageFilter
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch.nn import functional as F

MODEL = "deit_nano_patch8_16_L2_H1"
DIGITS = "--data-set DIGITS --num-workers 0 --epochs 1 --warmup-epochs 0 --train-images 64 --batch-size 32"
PLAIN = f"{DIGITS} --model {MODEL}"
LETS = "--src-arch deit_nano_patch8_32_L2_H1 --tgt-arch deit_nano_patch8_32_L4_H2"
WITHOUT_EFFECT = (
    "--dist_url env:// --dist-url tcp://localhost:1 --world_size 8 --patience-epochs 10 --dist-eval "
    "--dist_backend nccl --distributed --resplit --train-mode --tune_depth --tune_width --tune_small_model "
    "--trans_tie_param --tune_residual_noise 0.01 --initialize_scheme seq --mapping_scheme 8_16 "
    "--coeff_mapping e2 --local_rank 0"
)
DEIT_3 = "--ThreeAugment --bce-loss --smoothing 0.0 --reprob 0.0 --color-jitter 0.3 --unscale-lr --repeated-aug"
EMPTY = "--output_dir= --resume= --finetune= --teacher-path= --data-path= --config= --push-to-hub= --wandb="

# a YAML file with the keys, tags and nulls of the published ones
PUBLISHED = f"""\
batch_size: 32
epochs: 1
unscale_lr: true
model: {MODEL}
pretrained: false
model_ema_force_cpu: false
opt_eps: !!float 1e-8
opt_betas: null
clip_grad: null
accumulation_step: 2
lr: !!float 5e-4
lr_noise: null
min_lr: 1e-5
warmup_epochs: 0
patience_epochs: 10
aa: null
resplit: false
cosub: false
train_mode: true
teacher_path: ''
distillation_type: none
finetune: ''
resume: ''
data_set: DIGITS
train-images: 64
dist_eval: true
num_workers: 0
world_size: 1
dist_url: env://
"""

# every option of DeiT's, DeiT III's and LeTs' main.py that is not in REFUSED, with a value; most of them the default
FOREIGN = """
    --batch-size 64 --batch 64 --epochs 300 --unscale-lr --model resnet18 --input-size 224 --drop 0.0
    --drop-path 0.1 --model-ema --no-model-ema --model-ema-decay 0.99996 --model-ema-force-cpu --opt adamw
    --opt-eps 1e-8 --opt-betas 0.9 0.999 --clip-grad 1.0 --accumulation-step 1 --momentum 0.9 --weight-decay 0.05
    --sched cosine --lr 5e-4 --lr-noise 0.1 0.9 --lr-noise-pct 0.67 --lr-noise-std 1.0 --warmup-lr 1e-6
    --min-lr 1e-5 --decay-epochs 30 --warmup-epochs 5 --cooldown-epochs 10 --patience-epochs 10 --decay-rate 0.1
    --dr 0.1 --color-jitter 0.4 --aa rand-m9-mstd0.5-inc1 --smoothing 0.1 --train-interpolation bicubic
    --repeated-aug --no-repeated-aug --train-mode --ThreeAugment --src --bce-loss --reprob 0.25 --remode pixel
    --recount 1 --resplit --mixup 0.8 --cutmix 1.0 --cutmix-minmax 0.2 0.8 --mixup-prob 1.0 --mixup-switch-prob 0.5
    --mixup-mode batch --teacher-model regnety_160 --teacher-path x --distillation-type none
    --distillation-alpha 0.5 --distillation-tau 1.0 --finetune x --data-path x --data-set IMNET --nb-classes 1000
    --inat-category name --output_dir x --device cuda --seed 0 --resume x --start_epoch 0 --eval
    --eval-crop-ratio 0.875 --dist-eval --num_workers 10 --pin-mem --no-pin-mem --distributed --world_size 1
    --dist_url env:// --src-arch x --tgt-arch x --des-arch x --tune_depth --tune_width --trans_tie_param
    --trans_init_scheme stackbert_noisy rand --tune_small_model --tune_residual_noise 0.01 --learning_rate_res 1e-3
    --weight_decay_res 0.0 --load-gene x --initialize_scheme seq --mapping_scheme 8_16 --mapping_layer 0,1
    --coeff_mapping e2 --mapping_layer_coeff 0,2"""

REFUSED = {  # one line, status 2, with all of these in it
    "--cosub": ["--cosub", "not implemented"],
    "--attn-only": ["--attn-only", "not implemented"],
    "--no-train-mode": ["--no-train-mode", "--drop-path 0"],
    "--pretrained": ["--pretrained", "--finetune"],
    "--load-tar": ["--load-tar", "--data-set WDS"],
    "--tune_residual": ["--tune-residual", "not implemented"],
    "--no_trans_tie_param": ["--no-trans-tie-param", "not implemented"],
    "--nodes 1 --ngpus 8": ["--nodes", "run_with_submitit.py", "torchrun"],
    "--src": ["--ThreeAugment is missing", "--src"],
    "--ThreeAugment --cache-data": ["--cache-data", "--ThreeAugment"],
    "--ThreeAugment --aa original": ["--ThreeAugment", "--aa original"],
    "--nb-classes 1000": ["--nb-classes 1000", "10 classes"],
    "--local-rank 1": ["--local-rank 1", "LOCAL_RANK", "torchrun"],
    "--patience-epoch 3": ["--patience-epoch", "--patience-epochs"],
    "--world_size many": ["--world-size", "many"],
    "--output_dir= --resume auto": ["--output-dir is missing", "--resume auto"],
    "--output_dir= --on-nan rollback": ["--output-dir is missing", "--on-nan rollback"],
    "--output_dir= --wandb x": ["--output-dir is missing", "--wandb"],
    "--output_dir= --push-to-hub a/b": ["--output-dir is missing", "--push-to-hub"],
    "--output_dir=~nobody-of-this-name/x": ["--output-dir", "~nobody-of-this-name"],
    "--resume ~/missing.pth": ["HOME/missing.pth is missing"],
}


class Results(NamedTuple):
    out: Path
    of: dict[str, Outcome]


def photographs(folder: Path) -> Path:
    """48 pictures of two classes, larger than the input."""
    pixels = np.random.default_rng(0).integers(0, 256, (48, 6, 8, 3), dtype=np.uint8)
    for i, image in enumerate(map(Image.fromarray, pixels)):
        for split in ("train", "val"):
            path = folder / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.resize((80, 60)).save(path)
    return folder


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    out = tmp_path_factory.mktemp("commands")
    (out / "published.yaml").write_text(PUBLISHED)
    (out / "home").mkdir()
    crops = f"--data-set FOLDER --data-path {photographs(out / 'data')} --model deit_nano_patch8_72_L2_H1"
    crops += f" {DEIT_3} --src --num-workers 0 --epochs 1 --warmup-epochs 0 --batch-size 8 --no-model-ema"
    runs = {
        "without effect": f"{PLAIN} {WITHOUT_EFFECT} --accumulation-step 2 --dr 0.2 --output_dir {out}/plain",
        "DeiT III": f"{DIGITS} {LETS} {DEIT_3} --nb-classes 10 --descendants 1 --no-model-ema --output_dir {out}/lets",
        "src": f"{crops} --save-every-steps 4 --keep-checkpoints 9 --output_dir {out}/src",
        "published": f"--config {out}/published.yaml --output-dir=~/published",
        "empty": f"{EMPTY} {PLAIN}",
        **{args: f"{PLAIN} {args}" for args in REFUSED},
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ENVIRONMENT, "HOME", str(out / "home"))
        first = run_many({name: Run(args.split()) for name, args in runs.items()}, out / "first")
    middle = next(  # a checkpoint within an epoch
        path for path in sorted((out / "src").glob("checkpoint*.pth")) if read_checkpoint(path)["position"]["steps"]
    )
    second = {
        "again": f"--config {out}/plain/args.yaml --output-dir {out}/again",
        "resumed": f"{crops} --output_dir {out}/resumed --resume {middle}",
    }
    return Results(out, first | run_many({name: Run(args.split()) for name, args in second.items()}, out / "second"))


def succeeded(outcome: Outcome) -> bool:
    assert (outcome.codes, outcome.stderr) == ([0], ""), outcome.stderr
    return True


# ---------------------------------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------------------------------


def test_every_option_of_the_published_programs_is_known_with_its_default():
    args, defaults = options_of(parse_options(FOREIGN.split())), options_of(Config())
    others = {
        "model",
        "input_size",
        "clip_grad",
        "color_jitter",
        "opt_betas",
        "lr_noise",
        "cutmix_minmax",
        "nb_classes",
    }
    others |= {"teacher_path", "finetune", "data_path", "output_dir", "resume", "src_arch"}
    others |= {"tgt_arch", "des_arch", "load_gene", "mapping_layer", "mapping_layer_coeff", "device"}
    flags = {"unscale_lr", "model_ema", "model_ema_force_cpu", "repeated_aug", "three_augment", "src", "bce_loss"}
    flags |= {"eval", "pin_mem"}
    # defaults of these programs, which here depend on the source
    assert args.pop("trans_init_scheme") == ["stackbert_noisy", "rand"]
    assert args.pop("eval_crop_ratio") == 0.875
    assert args.pop("distillation_alpha") == 0.5  # here 1 for features
    assert {name for name in args if args[name] != defaults[name]} == others | flags


def test_options_without_effect_are_accepted_and_not_recorded(results):
    assert succeeded(results.of["without effect"])
    recorded = yaml.safe_load((results.out / "plain" / "args.yaml").read_text())
    assert recorded.keys().isdisjoint({"dist_url", "world_size", "patience_epochs", "dist_eval", "local_rank"})
    assert (recorded["accum_iter"], recorded["decay_rate"]) == (2, 0.2)
    assert succeeded(results.of["again"])
    logs = [(results.out / name / "log.txt").read_text() for name in ("plain", "again")]
    assert logs[0] == logs[1]


def test_a_published_yaml_file_is_read(results):
    assert succeeded(results.of["published"])
    recorded = yaml.safe_load((results.out / "home" / "published" / "args.yaml").read_text())
    assert (recorded["aa"], recorded["accum_iter"], recorded["unscale_lr"]) == ("none", 2, True)
    assert "teacher_path" not in recorded


def test_empty_texts_are_not_given_and_nothing_is_written(results):
    assert succeeded(results.of["empty"])
    assert "epoch 0: test_acc1" in results.of["empty"].stdout
    assert not [name for name in ("checkpoint.pth", "log.txt", "args.yaml") if Path(name).exists()]


@pytest.mark.parametrize("args", REFUSED)
def test_what_is_not_done_is_said_in_one_line(results, args):
    outcome = results.of[args]
    assert outcome.codes == [2], outcome.stderr
    (line,) = outcome.stderr.splitlines()
    line = line.replace(str(results.out / "home"), "HOME")
    assert not [part for part in REFUSED[args] if part not in line], line


@pytest.mark.full
def test_the_launcher_without_use_env(tmp_path):
    """It passes --local-rank, another one to each process."""
    launcher = f"-m torch.distributed.launch --nproc_per_node 2 --master_port {free_port()} {MAIN}"
    command = f"{launcher} {PLAIN} --batch-size 16 --output_dir {tmp_path}"
    done = subprocess.run(
        [sys.executable, *command.split()], env=ENVIRONMENT, capture_output=True, text=True, timeout=conftest.SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "2 process(es)" in done.stdout
    assert "local_rank" not in yaml.safe_load((tmp_path / "args.yaml").read_text())


def test_the_rank_of_the_launcher_is_that_of_the_environment(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "local_rank" not in options_of(parse_options(["--local-rank=1"]))
    with pytest.raises(InputError, match="--local-rank is 0, LOCAL_RANK in the environment 1"):
        parse_options(["--local_rank", "0"])


def test_help_is_not_filled_with_foreign_options():
    text = option_parser().format_help()
    assert "--cosub" not in text
    assert text.count("--world-size") == 1
    assert "--ThreeAugment" in text


# ---------------------------------------------------------------------------------------------------------------------
# YAML
# ---------------------------------------------------------------------------------------------------------------------

OFF = ("null", "", "~", "none", "no", "off", "false")
READ = {  # a YAML file, and what it says
    **{f"aa: {value}": {"aa": None} for value in OFF},
    **{f"color-jitter: {value}": {"color_jitter": None} for value in OFF},
    **{f"distillation-type: {value}": {"distillation_type": "none"} for value in OFF},
    **{f"clip_grad: {value}": {"clip_grad": None} for value in OFF},
    **{f"teacher-path: {value}": {"teacher_path": None} for value in ("null", "''", "false")},
    "output_dir: ''": {"output_dir": None},
    "skip-init: null": {"skip_init": []},
    "cutmix_minmax: null": {"cutmix_minmax": None},
    "lr: 5e-4": {"lr": 5e-4},
    "lr: !!float 5e-4": {"lr": 5e-4},
    "seed: 1_000": {"seed": 1000},
    "no_model_ema: true": {"model_ema": False},
    "no-model-ema: false": {"model_ema": True},
    "ThreeAugment: true\nbce_loss: true": {"three_augment": True, "bce_loss": True},
    "batch: 8": {"batch_size": 8},
    "train_mode: true\ndist_url: null\nworld_size: null\njob_dir: ''\ncosub: null": {},
}
NOT_READ = {  # a YAML file, and what the message says
    "epochs: null": "epochs is null, expected a value such as the default, 300",
    "model-ema:": "model-ema is null, expected true or false",
    "eval: ~": "eval is null, expected true or false",
    "mixup: off": "mixup is False, expected a value such as the default, 0.8",
    "trans_init_noise: null": "trans_init_noise is null, expected a value such as the default, 0.03 0.03",
    "aa: yes": "aa is True, expected a single value",
    "epochs: 1\nlr: 1\nepochs: 2": "duplicate key epochs in line 3",
    "output_dir: a\noutput-dir: b": "output_dir and output-dir are the same option",
    "batch-size: 1\nbatch_size: 2": "batch-size and batch_size are the same option",
    "accum_iter: 1\naccumulation_step: 2": "accum_iter and accumulation_step are the same option",
    "model_ema: true\nno_model_ema: true": "model_ema and no_model_ema are the same option",
    "train_mode: false": "--no-train-mode is not implemented",
    "tune_depth: false": "--no-tune-depth is not implemented",
    "cosub: true": "--cosub is not implemented",
    "ngpus: 8": "--ngpus is an option of DeiT's run_with_submitit.py",
    "world_size: [1]": r"world_size is \[1\], expected a single value",
    "dist_eval: 3": "dist_eval is 3, expected true or false",
    "lr: !!python/name:os.system x": "the tag !!python/name:os.system",
}


@pytest.mark.parametrize("text", READ)
def test_yaml_means(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    options = options_of(parse_options(["--config", str(tmp_path / "x.yaml")]))
    assert options == {**options_of(Config()), **READ[text]}


@pytest.mark.parametrize("text", NOT_READ)
def test_yaml_that_cannot_be_meant(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(InputError, match=NOT_READ[text]):
        parse_options(["--config", str(tmp_path / "x.yaml")])


# ---------------------------------------------------------------------------------------------------------------------
# Home folders
# ---------------------------------------------------------------------------------------------------------------------

PATHS = ("load_gene", "init_path", "src_path", "finetune", "resume", "data_path", "shard_cache", "teacher_path")
PATHS += ("teacher_cache", "output_dir")


def test_a_home_folder_is_found_in_every_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.yaml").write_text("".join(f"{name}: ~/{name}\n" for name in PATHS))
    expected = {name: f"{tmp_path}/{name}" for name in PATHS}
    for argv in (["--config=~/x.yaml"], [f"--{name}=~/{name}" for name in PATHS]):
        assert {name: options_of(parse_options(argv))[name] for name in PATHS} == expected
    for name in ("pipe:cat ~/{}", "https://host/~me/x", "hf-hub:a/b", "./~/x", "x/~/y"):
        assert parse_options([f"--data-path={name}"]).data.data_path == name


def test_scripts_find_a_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    aux_net = models.create_aux_net("deit_nano_patch8_16_L2_H1", "deit_nano_patch8_16_L4_H2", num_classes=10)
    models.Learngene.of(aux_net).save(tmp_path / "gene.safetensors")
    assert convert_learngene.main(["~/gene.safetensors", "~/published.pth"]) == 0
    assert (tmp_path / "published.pth").is_file()
    args, _ = make_family.parse(["--load-gene=~/g", "--depths=2", "--heads=1", "--output-dir=~/o", "--data-path=~/d"])
    assert (*args.load_gene, args.output_dir, args.data_path) == tuple(f"{tmp_path}/{name}" for name in "god")
    args = parse(["~/study.yaml", "--results=~/r", "--output", "~/o"])
    assert (args.config, args.results, args.output) == (tmp_path / "study.yaml", tmp_path / "r", tmp_path / "o")


# ---------------------------------------------------------------------------------------------------------------------
# DeiT III's recipe
# ---------------------------------------------------------------------------------------------------------------------


def test_deit_3_trains_and_resumes_exactly(results):
    assert succeeded(results.of["DeiT III"])
    recorded = yaml.safe_load((results.out / "lets" / "args.yaml").read_text())
    assert (recorded["three_augment"], recorded["bce_loss"], recorded["src"]) == (True, True, False)
    assert succeeded(results.of["src"])
    assert succeeded(results.of["resumed"])
    logs = [(results.out / name / "log.txt").read_text() for name in ("src", "resumed")]
    assert logs[0] == logs[1]


def test_binary_cross_entropy():
    logits = torch.tensor([[2.0, -1.0, 0.5], [0.0, 3.0, -2.0]])
    sigmoid = logits.sigmoid()

    def mean_of(targets: torch.Tensor) -> torch.Tensor:
        return -(targets * sigmoid.log() + (1 - targets) * (1 - sigmoid).log()).mean()

    mixed = torch.tensor([[0.7, 0.0, 0.3], [0.0, 1.0, 0.0]])
    classes = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0]])
    torch.testing.assert_close(BinaryCrossEntropy()(logits, mixed), mean_of(classes))
    torch.testing.assert_close(BinaryCrossEntropy(0.3)(logits, mixed), mean_of(0.7 * classes + 0.1))
    labels = torch.tensor([2, 1])
    torch.testing.assert_close(BinaryCrossEntropy()(logits, labels), mean_of(F.one_hot(labels, 3).float()))
    torch.testing.assert_close(BinaryCrossEntropy(0.3)(logits, labels), mean_of(0.7 * F.one_hot(labels, 3) + 0.1))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_two_classes_of_a_mixed_image_are_targets(smoothing):
    """Smoothed targets, all of which are above 0, would make every class one."""
    augment = AugmentConfig(bce_loss=True, smoothing=smoothing, cutmix=0)
    mixup, criterion = build_mixup(augment, input_size=8, num_classes=10)
    np.random.seed(0)
    _, targets = mixup(torch.zeros(4, 3, 8, 8), torch.arange(4))
    logits = torch.full((4, 10), -20.0)
    logits[torch.arange(4), torch.arange(4)] = logits[torch.arange(4), 3 - torch.arange(4)] = 20.0
    assert criterion(logits, targets).item() == pytest.approx(5.2 * smoothing, abs=1e-4)


def parts_of(kind: str, image: Image.Image) -> np.ndarray:
    """``image`` grey or solarised, by its definition."""
    pixels = np.asarray(image if kind == "solarised" else image.convert("L").convert("RGB"), dtype=int)
    return np.where(pixels < 128, pixels, 255 - pixels) if kind == "solarised" else pixels


def test_3_augment_is_one_of_three():
    """Each picture is grey, solarised or (perhaps hardly) blurred, a third of them each; nothing is erased."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)).filter(ImageFilter.GaussianBlur(1))
    options = dict(three_augment=True, src=True, color_jitter=None, reprob=1.0)
    transform = build_transform("FOLDER", True, 32, **options)
    crop, counts = transform.transforms[:3], {"grey": 0, "solarised": 0, "blurred": 0}
    mean, std = (np.array(c)[:, None, None] for c in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    random.seed(0)
    for seed in range(150):
        torch.manual_seed(seed)
        found = ((transform(image).numpy() * std + mean) * 255).round().astype(int).transpose(1, 2, 0)
        torch.manual_seed(seed)
        before = image
        for step in crop:
            before = step(before)
        of_kind = [kind for kind in ("grey", "solarised") if (found == parts_of(kind, before)).all()]
        if not of_kind:
            assert np.abs(found - np.asarray(before, dtype=int)).mean() < 20
        counts[of_kind[0] if of_kind else "blurred"] += 1
    assert sum(counts.values()) == 150
    assert min(counts.values()) > 30, counts


def test_simple_random_crop_keeps_the_whole_picture():
    """The shorter side fits, the frame moves by up to 4 pixels, and what is missing is mirrored."""
    transform = build_transform("FOLDER", True, 32, three_augment=True, src=True, color_jitter=None)
    assert transform.transforms[0](Image.new("RGB", (80, 64))).size == (40, 32)
    corners = set()
    for seed in range(300):
        torch.manual_seed(seed)
        column = torch.arange(32, dtype=torch.uint8).repeat(32, 1)
        moved = np.asarray(transform.transforms[1](Image.fromarray(column.numpy())))
        corners.add(int(moved[0, 16]))
        assert len(np.unique(moved)) >= 28
    assert corners == set(range(12, 21))
