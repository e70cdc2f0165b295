"""The teacher of distillation, and the cache of its logits.

The images of a step are a function of seed, epoch and step (samplers.py, engine.py), and so are the teacher's logits. A
run can cache them for later runs on the same images: another Aux-Net, an ablation, more epochs. TinyViT (Wu et al.,
ECCV 2022) shows that the largest logits are enough, and that a run with a cache is as fast as one without a teacher.
"""

import hashlib
import json
import math
import sys
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

from common.devices import can_pin, to_device
from common.errors import InputError, one_line
from common.files import atomic_write, read_json
from models.preprocessing import Preprocessing
from pipeline.loader import dataset_fingerprint
from training.config import option_name

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from tqdm import tqdm

STEPS_OF_A_FILE = 100  # ImageNet's in batches of 128: 5 MB with 100 classes kept, 51 MB with all of them in float32
SAME_IMAGE = 0.02  # largest difference between the means of one image, whose last digits depend on the decoder
CAST_BY_AUTOCAST = {layer.forward for layer in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)}

# the options that the teacher's outputs are a function of; mixup's smoothing, say, changes the targets alone
OPTIONS = ("data_set", "cache_data", "seed", "input_size", "batch_size", "repeated_aug", "color_jitter", "aa")
OPTIONS += ("train_interpolation", "reprob", "remode", "recount", "mixup", "cutmix", "cutmix_minmax", "mixup_prob")
OPTIONS += ("mixup_switch_prob", "mixup_mode", "teacher_model", "teacher_cache_top")
# in the key only if they differ from these values, so that older caches stay valid
LATER_OPTIONS = {"three_augment": False, "src": False, "crop_padding": None}
LATER_OPTIONS |= {"mean": [*IMAGENET_DEFAULT_MEAN], "std": [*IMAGENET_DEFAULT_STD]}


class Teacher:
    """A frozen network in inference mode, in the precision of the run.

    The weights of linear layers and convolutions are stored in that precision: autocast remembers its casts of weights
    that need gradients alone, and would cast these in every step. All others, norms above all, stay in float32, so that
    the logits are those that autocast gives. A run in float32 has a teacher in float32: its precision was chosen.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype):
        """
        Args:
            model: the network, perhaps compiled; it is changed.
            dtype: of the autocast in which the teacher is called.
        """
        self.model = model.requires_grad_(False).eval()
        for module in self.model.modules():
            if type(module).forward in CAST_BY_AUTOCAST:
                for parameter in module.parameters(recurse=False):
                    parameter.data = parameter.data.to(dtype)

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of augmented ``images``."""
        with torch.inference_mode():
            logits = self.model(images)
        return logits.clone()  # which autograd may save, unlike tensors of inference mode

    def digest(self) -> str:
        """A fingerprint of the weights."""
        return hashlib.sha256(
            b"".join(hashlib.sha256(as_bytes(tensor.cpu())).digest() for tensor in self.model.state_dict().values())
        ).hexdigest()


class Renormalised(nn.Module):
    """A network for images that are normalised in another way than those it was trained on."""

    def __init__(self, model: nn.Module, ours: Preprocessing, theirs: Preprocessing):
        """
        Args:
            model: the network.
            ours: of the images that it is called with.
            theirs: of the images that it was trained on.
        """
        super().__init__()
        self.model = model
        numbers = (ours.mean, ours.std, theirs.mean, theirs.std)
        mean, std, own_mean, own_std = (torch.tensor(n, dtype=torch.float64).view(3, 1, 1) for n in numbers)
        self.register_buffer("scale", (std / own_std).float())
        self.register_buffer("shift", ((mean - own_mean) / own_std).float())

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images * self.scale + self.shift)


class TeacherCache:
    """A teacher that writes its logits to files, and reads those that exist.

    A file has the logits as they are, or with ``top`` the largest log-probabilities in float16, their classes, and the
    mean probability of all other classes, which stands for each of them when they are read. A run that writes trains
    with the compressed logits too, so that a run that reads has the same result.

    A file ``epoch_E/process_R_step_S.safetensors`` has the logits of up to 100 steps and a checksum. It is written
    atomically when the run leaves these steps: an interrupted run loses no more, and nothing is copied from the device
    before. Missing or damaged steps are computed again. The mean of each image is kept too, to detect logits of other
    images, whatever the reason.
    """

    def __init__(
        self,
        teacher: Callable[[Tensor], Tensor],
        folder: Path,
        cache_key: dict[str, object],
        num_classes: int,
        images_per_step: int,
        top: int | None = None,
        rank: int = 0,
        device: torch.device | str = "cpu",
        steps_of_a_file: int = STEPS_OF_A_FILE,
    ):
        """
        Args:
            cache_key: `cache_key_of` the run.
            images_per_step: of all processes together.
        """
        self.teacher, self.folder, self.rank, self.device = teacher, folder, rank, torch.device(device)
        self.num_classes, self.top = num_classes, top
        self.images_per_step, self.steps_of_a_file = images_per_step, steps_of_a_file
        self.digest = hashlib.sha256(json.dumps(cache_key, sort_keys=True).encode()).hexdigest()
        self.writable, self.compared = True, False
        self._close()
        self.set_position(0)

    def set_position(self, epoch: int, images: int = 0) -> None:
        """Start at ``images`` (of all processes) of ``epoch``, as `samplers.TrainSampler` does.

        If that is between two steps, as after a resume with another number of processes, the steps have other images
        than those of other runs: the cache is neither read nor written until the next epoch.
        """
        self.flush()
        self.epoch, (self.step, between) = epoch, divmod(images, self.images_per_step)
        self.alike = not between

    def __call__(self, images: Tensor) -> Tensor:
        """Logits (batch, classes) of augmented ``images``, those of the next step.

        Raises:
            InputError: the logits in the cache, of this step or one before, are of other images.
        """
        step, self.step = self.step, self.step + 1
        path = self.folder / f"epoch_{self.epoch}" / f"process_{self.rank}_step_{step - step % self.steps_of_a_file}"
        if path.with_suffix(".safetensors") != self.path:
            self.flush()
            self.path = path.with_suffix(".safetensors")
            self.outputs = self._read() if self.alike and self.path.exists() else {}
        means = images.mean(dim=(1, 2, 3))
        if step in self.outputs:
            self.others = self.others + ((means - self.outputs[step]["means"]).abs() > SAME_IMAGE).sum()
            if not self.compared:  # before long work
                self._compare()
        else:
            self.outputs[step] = {"means": means, **compress_topk(self.teacher(images), self.top)}
            self.more = True
        kept = self.outputs[step]
        return kept["logits"] if self.top is None else decompress_topk(kept, self.num_classes)

    def flush(self) -> None:
        """Compare the images, and write the steps that are not in the file.

        Raises:
            InputError: the logits in the cache are of other images.
        """
        self._compare()
        if self.more and self.alike and self.writable:
            steps = sorted(self.outputs)
            tensors = {
                name: torch.stack([self.outputs[step][name] for step in steps]).cpu() for name in self.outputs[steps[0]]
            }
            tensors["steps"] = torch.tensor(steps)
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with atomic_write(self.path) as unfinished:
                    save_file(tensors, unfinished, metadata=self._seal(tensors))
            except OSError as error:
                self.writable = False
                warn(f"{self.path} cannot be written ({error.strerror}): no more of the teacher's outputs are kept")
        self._close()

    def _close(self) -> None:
        self.path: Path | None = None
        self.outputs: dict[int, dict[str, Tensor]] = {}
        self.more = False  # than what is in the file
        self.others: Tensor | int = 0  # images that are not those that the teacher saw

    def _compare(self) -> None:
        others, self.compared = int(self.others), self.compared or isinstance(self.others, Tensor)
        if others:
            raise InputError(
                f"--teacher-cache {self.folder}: {self.path} was made from other images than this run's, {others} of "
                "those that were compared: another folder is needed if the data or their decoders have changed"
            )

    def _read(self) -> dict[int, dict[str, Tensor]]:
        """The content of a file by steps, on the device; empty if the file is damaged."""
        try:
            with safe_open(self.path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  it is no dictionary
                seal = file.metadata()
        except (OSError, SafetensorError) as error:
            seal, problem = None, one_line(error)
        else:
            problem = "it is not what was written there, or was for another run"
        if seal is None or seal != self._seal(tensors):
            warn(f"{self.path} is not used ({problem}): the teacher is asked again")
            return {}
        steps = tensors.pop("steps").tolist()
        if can_pin(self.device):
            tensors = {name: tensor.pin_memory() for name, tensor in tensors.items()}
        tensors = {name: to_device(tensor, self.device) for name, tensor in tensors.items()}
        return {step: {name: tensor[i] for name, tensor in tensors.items()} for i, step in enumerate(steps)}

    def _seal(self, tensors: dict[str, Tensor]) -> dict[str, str]:
        """Cache key and checksum of a file's tensors: safetensors has no checksum of its own."""
        checksum = 0
        for name in sorted(tensors):
            checksum = zlib.crc32(as_bytes(tensors[name]), checksum)
        return {"cache": self.digest, "crc32": str(checksum)}


def compress_topk(logits: Tensor, top: int | None) -> dict[str, Tensor]:
    """The form in which ``logits`` (batch, classes) are stored.

    Returns:
        ``logits``, or with ``top`` the log-probabilities ``largest`` (batch, top) of ``classes`` (batch, top), and
        ``rest`` (batch), the logarithm of the mean probability of all other classes.
    """
    if top is None:
        return {"logits": logits}
    log_p = F.log_softmax(logits.float(), dim=1)
    largest, classes = log_p.topk(top, dim=1)
    others = log_p.scatter(1, classes, -torch.inf).logsumexp(dim=1)
    rest = others - math.log(logits.shape[1] - top)
    number = torch.int16 if logits.shape[1] <= 2**15 else torch.int32
    return {"largest": largest.half(), "classes": classes.to(number), "rest": rest.half()}


def decompress_topk(kept: dict[str, Tensor], num_classes: int) -> Tensor:
    """Logits (batch, num_classes) in float32 from the output of `compress_topk` with ``top``."""
    logits = kept["rest"].float()[:, None].repeat(1, num_classes)
    return logits.scatter_(1, kept["classes"].long(), kept["largest"].float())


def cache_key_of(
    options: Mapping[str, object], dataset: Dataset, teacher: Teacher, dtype: torch.dtype, processes: int
) -> dict[str, object]:
    """Everything that the teacher's outputs in a run are a function of, in JSON's types.

    Left out is what changes the last digits alone, such as the device, and what changes the images without another
    name, such as versions of libraries or of the files. `TeacherCache` compares images.

    Args:
        options: of the run, by name, as `training.config.options_of` gives them.
    """
    names = [*OPTIONS, *(name for name, usual in LATER_OPTIONS.items() if options[name] not in (None, usual))]
    return {
        **{option_name(name): options[name] for name in names},
        "precision": str(dtype).removeprefix("torch."),
        "number of processes": processes,
        "number of training images": len(dataset),
        "fingerprint of their names": dataset_fingerprint(dataset),
        "fingerprint of the teacher's weights": teacher.digest(),
    }


def open_cache(folder: Path, cache_key: dict[str, object]) -> None:
    """Create the cache in ``folder``, or check that the one there has the same key.

    Raises:
        InputError: the outputs in it are of other runs than that of ``cache_key``, or it cannot be written.
    """
    path = folder / "teacher_cache.json"
    try:
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(path) as unfinished:
                Path(unfinished).write_text(json.dumps(cache_key, indent=1) + "\n")
            return
    except OSError as error:
        raise InputError(f"--teacher-cache {folder} cannot be written: {error.strerror}") from error
    found = read_json(path)
    if not isinstance(found, dict):
        raise InputError(f"{path} describes no teacher cache: another --teacher-cache is needed")
    for name in [*cache_key, *found]:
        if found.get(name) != cache_key.get(name):
            theirs, ours = (json.dumps(it.get(name))[:50] for it in (found, cache_key))
            raise InputError(f"--teacher-cache {folder} was made with {name} {theirs}, this run has {ours}")


def as_bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def warn(sentence: str) -> None:
    tqdm.write(f"warning: {sentence}", file=sys.stderr)
