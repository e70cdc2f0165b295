"""The teacher of distillation: its precision, and the cache of its outputs."""

import copy
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import models
from losses import DistillationLoss
from training.loop import train
from training.teacher import Teacher, TeacherCache, compress_topk, decompress_topk

import numpy as np
import pytest
import torch
from conftest import Run, assert_same_result, run_many, set_up_run
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

LETS = "--src-arch deit_nano_patch8_16_L2_H1 --tgt-arch deit_nano_patch8_16_L4_H2"
TLEG = "--model aux_deit_nano_patch8_16_L4"
STEPS = 6  # of an epoch


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """48 images of four classes, and the weights of two teachers."""
    folder, generator = tmp_path_factory.mktemp("teacher"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 1)):
        for label in "abcd":
            (folder / "data" / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / label / f"{i}.png")
    for seed in (0, 1):
        torch.manual_seed(seed)
        torch.save({"model": models.create_model("test_resnet", num_classes=4).state_dict()}, folder / f"{seed}.pth")
    return folder


def options(root: Path, *more: object) -> list[str]:
    """A run that is distilled, of one epoch of `STEPS` steps."""
    data = f"--data-set FOLDER --data-path {root}/data --batch-size 8 --num-workers 0 --input-size 16 --lr 5e-3"
    teacher = f"--teacher-model test_resnet --teacher-path {root}/0.pth --distillation-type soft --distillation-tau 2"
    return f"{data} {teacher} --warmup-epochs 0 --epochs 1 --log-interval 2".split() + " ".join(map(str, more)).split()


def trained(root: Path, *more: object, at_call: Callable[[int], None] = lambda call: None) -> tuple[int, int]:
    """Train in this process: the exit status, and how often the teacher's network was asked."""
    run, calls = set_up_run(options(root, *more)), []

    def asked(*_) -> None:
        calls.append(None)
        at_call(len(calls))

    network = run.teacher.teacher.model if isinstance(run.teacher, TeacherCache) else run.teacher.model
    network.register_forward_hook(asked)
    return train(run), len(calls)


@pytest.fixture(scope="module")
def uncached(root) -> Path:
    assert trained(root, LETS, "--output-dir", root / "uncached") == (0, STEPS)
    return root / "uncached"


@pytest.fixture(scope="module")
def cache(root, uncached) -> Path:
    """What a run has kept, whose result is that of one without cache."""
    assert trained(root, LETS, "--teacher-cache", root / "cache", "--output-dir", root / "writing") == (0, STEPS)
    assert_same_result(root / "writing", uncached)
    return root / "cache"


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_with_a_cache_has_the_result_of_one_without_and_asks_no_teacher(root, uncached, cache, tmp_path, capsys):
    assert trained(root, LETS, "--teacher-cache", cache, "--output-dir", tmp_path) == (0, 0)
    assert_same_result(tmp_path, uncached)
    assert re.search(r"waiting for data [\d.e-]+, teacher [\d.e-]+, ", capsys.readouterr().out)


def test_another_aux_net_loss_and_more_epochs_use_the_same_cache(root, cache, tmp_path):
    shutil.copytree(cache, tmp_path / "cache")
    other = (
        f"{TLEG} --epochs 2 --distillation-type hard --distillation-alpha 0.3 --lr 1e-3 --smoothing 0 --accum-iter 4"
    )
    assert trained(root, other, "--output-dir", tmp_path / "uncached") == (0, 2 * STEPS)
    found = trained(root, other, "--teacher-cache", tmp_path / "cache", "--output-dir", tmp_path / "cached")
    assert found == (0, STEPS)  # of the second epoch
    assert_same_result(tmp_path / "cached", tmp_path / "uncached")


@pytest.mark.parametrize("killed", [False, True])
def test_a_run_that_is_interrupted_keeps_what_it_can(root, uncached, tmp_path, killed):
    """Killed, it leaves nothing of the steps since the last file; the rest of the epoch is a file all the same."""
    common = LETS, "--teacher-cache", tmp_path / "cache", "--output-dir", tmp_path / "run"

    def stop(call: int) -> None:
        if call == 4:
            signal.raise_signal(signal.SIGTERM)

    assert trained(root, *common, at_call=stop) == (143, 4)
    if killed:
        (tmp_path / "cache" / "epoch_0" / "process_0_step_0.safetensors").unlink()
    resume = "--resume", tmp_path / "run" / "checkpoint.pth"
    assert trained(root, *common, *resume) == (0, STEPS - 4)
    assert_same_result(tmp_path / "run", uncached)
    if killed:
        assert trained(root, LETS, "--teacher-cache", tmp_path / "cache", "--output-dir", tmp_path / "again") == (0, 4)
        assert_same_result(tmp_path / "again", uncached)
    assert trained(root, LETS, "--teacher-cache", tmp_path / "cache") == (0, 0)


def test_some_classes_alone(root, tmp_path):
    """The run that writes has the result of those that read."""
    common = LETS, "--teacher-cache", tmp_path / "cache", "--teacher-cache-top 2 --output-dir"
    assert trained(root, *common, tmp_path / "first") == (0, STEPS)
    assert trained(root, *common, tmp_path / "second") == (0, 0)
    assert_same_result(tmp_path / "second", tmp_path / "first")
    kept = load_file(tmp_path / "cache" / "epoch_0" / "process_0_step_0.safetensors")
    assert kept["largest"].shape == kept["classes"].shape == (STEPS, 8, 2)
    assert (kept["largest"].dtype, kept["classes"].dtype, kept["rest"].dtype) == (
        torch.float16, torch.int16, torch.float16,
    )  # fmt: skip


@pytest.mark.full
def test_two_processes(root, tmp_path):
    """Each keeps its own; a run of one process has other images."""
    common = options(root, LETS, "--batch-size 4 --output-dir")
    cached = ["--teacher-cache", str(tmp_path / "cache")]
    runs = {  # each of two processes waits for the one before
        "uncached": Run([*common, str(tmp_path / "uncached")], 2),
        "first": Run([*common, str(tmp_path / "first"), *cached], 2),
        "second": Run([*common, str(tmp_path / "second"), *cached], 2),
        "one": Run([*common, str(tmp_path / "one"), *cached]),
    }
    outcomes = run_many(runs, tmp_path / "printed")
    for name in ("first", "second"):
        assert outcomes[name].codes == [0, 0], outcomes[name].stderr
        assert_same_result(tmp_path / name, tmp_path / "uncached")
    files = sorted(path.name for path in (tmp_path / "cache" / "epoch_0").iterdir())
    assert files == ["process_0_step_0.safetensors", "process_1_step_0.safetensors"]
    assert outcomes["one"].codes == [2]
    assert outcomes["one"].stderr == (
        f"error: --teacher-cache {tmp_path / 'cache'} was made with number of processes 2, this run has 1\n"
    )


@pytest.mark.parametrize("damage", ["a byte", "the end", "another run's"])
def test_a_damaged_file_is_made_again(root, uncached, cache, tmp_path, capsys, damage):
    shutil.copytree(cache, tmp_path / "cache")
    file = tmp_path / "cache" / "epoch_0" / "process_0_step_0.safetensors"
    content = bytearray(file.read_bytes())
    content[-300] ^= 1
    if damage == "the end":
        file.write_bytes(content[:-300])
    elif damage == "a byte":
        file.write_bytes(content)
    else:
        save_file(load_file(file), file, metadata={"cache": "0" * 64, "crc32": "0"})
    assert trained(root, LETS, "--teacher-cache", tmp_path / "cache", "--output-dir", tmp_path / "run") == (0, STEPS)
    assert_same_result(tmp_path / "run", uncached)
    assert capsys.readouterr().err.count(f"warning: {file} is not used") == 1
    found, expected = load_file(file), load_file(cache / "epoch_0" / file.name)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_full_disk_ends_the_keeping_alone(root, tmp_path, capsys):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "epoch_0").write_text("where a folder is needed")
    assert trained(root, LETS, "--teacher-cache", tmp_path / "cache", "--epochs 2") == (0, 2 * STEPS)
    assert capsys.readouterr().err.count("cannot be written") == 1
    assert not (tmp_path / "cache" / "epoch_1").exists()


def test_other_images_of_the_same_names_are_found_out(root, cache, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    for path in tmp_path.glob("data/train/*/*.png"):
        Image.eval(Image.open(path), lambda value: 255 - value // 2).save(path)
    common = LETS, "--data-path", tmp_path / "data", "--teacher-cache", cache
    with pytest.raises(models.InputError, match=r"epoch_0/process_0_step_0.safetensors was made from other images"):
        trained(root, *common)


# ---------------------------------------------------------------------------------------------------------------------
# What does not fit
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("--seed 1", "was made with --seed 0, this run has 1"),
        ("--batch-size 4", "was made with --batch-size 8, this run has 4"),
        ("--aa none", 'was made with --aa "rand-m9-mstd0.5-inc1", this run has null'),
        ("--ThreeAugment", "was made with --three-augment null, this run has true"),
        ("--mixup 0.5", "was made with --mixup 0.8, this run has 0.5"),
        ("--no-repeated-aug", "was made with --repeated-aug true, this run has false"),
        ("--teacher-cache-top 2", "was made with --teacher-cache-top null, this run has 2"),
        ("--teacher-path {root}/1.pth", "was made with fingerprint of the teacher's weights "),
        ("--data-path {root}/fewer", "was made with number of training images 48, this run has 47"),
        ("--data-path {root}/other", "was made with fingerprint of their names "),
        ("--amp-dtype bfloat16", 'was made with precision "float32", this run has "bfloat16"'),
        ("--distillation-type none", "--teacher-cache needs --distillation-type soft or hard"),
        ("--teacher-cache-top 4", "--teacher-cache-top 4: the data have 4 classes"),
    ],
)  # fmt: skip
def test_a_cache_of_other_runs_is_refused(root, cache, more, sentence):
    for name, change in (("fewer", Path.unlink), ("other", lambda path: path.rename(path.with_name("x.png")))):
        if name in more:
            shutil.copytree(root / "data", root / name)
            change(root / name / "train" / "a" / "1.png")
    command = options(root, LETS, "--teacher-cache", cache, more.format(root=root))
    with pytest.raises(models.InputError, match=re.escape(sentence)):
        set_up_run(command)


def test_a_cache_of_other_shifts_is_refused(root, tmp_path):
    torch.save({"model": models.create_model("test_resnet", num_classes=10).state_dict()}, tmp_path / "ten.pth")
    digits = f"--data-set DIGITS --train-images 64 --teacher-path {tmp_path}/ten.pth --teacher-cache {tmp_path}/cache"
    set_up_run(options(root, LETS, digits))
    with pytest.raises(models.InputError, match="was made with --crop-padding null, this run has 1"):
        set_up_run(options(root, LETS, digits, "--crop-padding 1"))


def test_a_folder_that_is_no_cache_is_refused(root, tmp_path):
    (tmp_path / "teacher_cache.json").write_text("[]")
    with pytest.raises(models.InputError, match=r"teacher_cache.json describes no teacher cache"):
        set_up_run(options(root, LETS, "--teacher-cache", tmp_path))
    with pytest.raises(models.InputError, match=r"--teacher-cache .*0.pth.* cannot be written: Not a directory"):
        set_up_run(options(root, LETS, "--teacher-cache", root / "0.pth" / "x"))
    with pytest.raises(models.InputError, match="--teacher-cache is missing"):
        set_up_run(options(root, LETS, "--teacher-cache-top 2"))


# ---------------------------------------------------------------------------------------------------------------------
# The cache
# ---------------------------------------------------------------------------------------------------------------------


def batch(epoch: int, step: int) -> torch.Tensor:
    return torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(100 * epoch + step))


def says(images: torch.Tensor) -> torch.Tensor:
    return images.flatten(1)[:, :5] * 3


class Asked:
    """A cache of files of four steps, whose teacher counts."""

    def __init__(self, folder: Path, **kwargs):
        self.calls = 0
        self.cache = TeacherCache(
            self.teacher, folder, {"--seed": 0}, num_classes=5, images_per_step=4, steps_of_a_file=4, **kwargs
        )

    def teacher(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return says(images)

    def steps(self, epoch: int, steps: range) -> int:
        """How often the teacher is asked in ``steps``, whose outputs are its own."""
        before = self.calls
        self.cache.set_position(epoch, 4 * steps.start)
        assert all(torch.equal(self.cache(batch(epoch, step)), says(batch(epoch, step))) for step in steps)
        return self.calls - before


def test_parts_of_files_are_put_together(tmp_path):
    first = Asked(tmp_path)
    assert first.steps(3, range(2, 10)) == 8
    first.cache.flush()
    files = sorted((tmp_path / "epoch_3").iterdir())
    assert [load_file(path)["steps"].tolist() for path in files] == [[2, 3], [4, 5, 6, 7], [8, 9]]
    second = Asked(tmp_path)
    assert second.steps(3, range(12)) == 4
    assert second.steps(3, range(6, 12)) == 0  # as after going back to a checkpoint
    assert second.steps(2, range(2)) == 2
    assert Asked(tmp_path).steps(3, range(12)) == 0


def test_two_runs_write_one_cache(tmp_path):
    one, two = Asked(tmp_path), Asked(tmp_path)
    for step in range(6):
        assert one.cache.step == two.cache.step == step
        for asked in (one, two):
            assert torch.equal(asked.cache(batch(0, step)), says(batch(0, step)))
    one.cache.flush()
    two.cache.flush()
    assert (one.calls, two.calls) == (6, 6)
    assert Asked(tmp_path).steps(0, range(6)) == 0


def test_an_epoch_whose_steps_begin_elsewhere_is_not_kept(tmp_path):
    """It was begun with another batch size: its images are in other steps."""
    assert Asked(tmp_path).steps(1, range(4)) == 4
    asked = Asked(tmp_path)
    asked.cache.set_position(0, 6)
    images = batch(7, 7)
    assert torch.equal(asked.cache(images), says(images))
    assert asked.steps(1, range(4)) == 4
    assert not (tmp_path / "epoch_0").exists()


def test_one_image_among_others_is_found_out_when_its_file_is_left(tmp_path):
    asked = Asked(tmp_path)
    asked.steps(0, range(4))
    asked.cache.set_position(0)
    for step in range(4):
        images = batch(0, step)
        images[1] += step == 2
        asked.cache(images)
    with pytest.raises(models.InputError, match="other images than this run's, 1 of those"):
        asked.cache.flush()


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_what_is_left_out_is_given_back_as_its_mean(tau):
    torch.manual_seed(0)
    logits = 4 * torch.randn(6, 10)
    p = logits.softmax(1)
    kept = compress_topk(logits, 3)
    found = decompress_topk(kept, 10)
    expected = p.clone()
    for row, classes in zip(expected, p.topk(3, dim=1).indices, strict=True):
        others = torch.ones(10, dtype=torch.bool)
        others[classes] = False
        row[others] = row[others].mean()
    torch.testing.assert_close(found.exp(), expected, rtol=5e-3, atol=1e-6)  # half precision
    torch.testing.assert_close(found.exp().sum(1), torch.ones(6), rtol=2e-3, atol=0)
    student, labels = torch.randn(6, 10), torch.randint(10, (6,))
    for kind in ("soft", "hard"):
        loss = DistillationLoss(nn.CrossEntropyLoss(), kind, 1.0, tau)
        torch.testing.assert_close(
            loss(student, labels, found), loss(student, labels, expected.log()), rtol=5e-3, atol=1e-5
        )
    assert torch.equal(found.argmax(1), logits.argmax(1))


def test_all_classes_are_exact_in_their_precision():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        logits = torch.randn(3, 7).to(dtype)
        assert torch.equal(compress_topk(logits, None)["logits"], logits)


# ---------------------------------------------------------------------------------------------------------------------
# The network
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "levit_128s"])
def test_low_precision_gives_what_autocast_gave(name):
    torch.manual_seed(0)
    network = models.create_model(name, num_classes=10).eval()
    images = torch.randn(2, *network.pretrained_cfg["input_size"])
    for parameter in network.parameters():  # no layer that says nothing
        nn.init.normal_(parameter, std=0.1)
    teacher = Teacher(copy.deepcopy(network), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(teacher(images), network(images))
    norms = (nn.LayerNorm, nn.BatchNorm2d, nn.BatchNorm1d)
    assert all(
        p.dtype == torch.float32 for m in teacher.model.modules() if isinstance(m, norms) for p in m.parameters()
    )
    assert any(p.dtype == torch.bfloat16 for p in teacher.model.parameters())
    assert {p.dtype for p in Teacher(network, torch.float32).model.parameters()} == {torch.float32}


def test_compiled_without_graph_break_and_fit_for_autograd():
    torch.manual_seed(0)
    network = models.create_model("test_resnet", num_classes=5)
    images, student = torch.randn(4, 3, 32, 32), torch.randn(4, 5, requires_grad=True)
    expected = Teacher(copy.deepcopy(network), torch.float32)(images)
    teacher = Teacher(torch.compile(network, backend="aot_eager", fullgraph=True), torch.float32)
    found = teacher(images)
    torch.testing.assert_close(found, expected)
    assert teacher.digest() == Teacher(network, torch.float32).digest()
    (student * found).sum().backward()  # which keeps the teacher's logits
    assert torch.equal(student.grad, found)
