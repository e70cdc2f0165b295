"""The options of a run as frozen dataclasses, one for each part of the program.

Every field has the name and the default of an option of main.py (``--batch-size`` is ``DataConfig.batch_size``), whose
meaning ``main.py --help`` gives. The command line is one way to make a `Config` (`training.command_line`); from Python
the dataclasses are made directly. `resolve` replaces what depends on other options or on the machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace

import models
from common.devices import accelerator
from common.errors import InputError, error_context
from datasets import DATA_SETS
from models.listed import source_of
from models.registry import method_of_stage_1

LEARNGENE, MODEL, CHECKPOINT = "learngene.safetensors", "model.safetensors", "checkpoint.pth"
SOURCE = "source"  # in the place of a teacher: the ViT of --src-path
TIMM = "timm"  # in the place of a path: the weights of the architecture's tag, as timm offers them
TAGGED = ("src_path", "finetune", "init_path")  # options that take it


def local_path() -> str | None:
    """A field that names a file or folder of this machine, or an address: files for other people do not repeat it."""
    return field(default=None, metadata={"local": True})


@dataclass(frozen=True)
class ModelConfig:
    """Which model is built, and what its weights start from."""

    method: str | None = None
    model: str | None = None
    src_arch: str | None = None
    tgt_arch: str | None = None
    des_arch: str | None = None
    load_gene: str | None = local_path()
    gene_ema: bool = False
    mapping_layer: tuple[int, ...] | None = None
    mapping_layer_coeff: tuple[int, ...] | None = None
    width_select: str = "continuous"
    depth_select: str = "default"
    skip_init: tuple[str, ...] = ()
    init: str | None = None
    init_path: str | None = local_path()
    order_images: int = 512
    layers_per_row: int | None = None
    group_size: int = 2
    full_width: bool = False
    src_path: str | None = local_path()
    freeze_src: bool = False
    trans_init_scheme: tuple[str, str] | None = None
    trans_init_noise: tuple[float, float] = (0.03, 0.03)
    order: str | None = None
    depth_order: str | None = None
    # None: what the method says (`AuxNet.defaults`)
    descendants: int | None = None
    descendant_depths: tuple[int, ...] | None = None
    descendant_heads: tuple[int, ...] | None = None
    descendant_mlp_ratios: tuple[float, ...] | None = None
    descendant_weight: float | None = None
    descendant_sampling: str | None = None
    descendant_warmup_epochs: int | None = None
    descendant_coarse_to_fine: bool | None = None
    chain_weight: float | None = None
    finetune: str | None = local_path()
    drop: float = 0.0
    drop_path: float = 0.1
    grad_checkpointing: bool = False

    @property
    def arch(self) -> str | None:
        """The name of the ViT that is trained: Aux-Net, Des-Net or model."""
        return self.tgt_arch or self.des_arch or self.model or self.src_arch

    @property
    def arch_option(self) -> str:
        """The option that gives `arch`, for messages."""
        if self.tgt_arch or self.src_arch:
            return f"--tgt-arch {self.tgt_arch}" if self.tgt_arch else f"--src-arch {self.src_arch}"
        return self.des_option

    @property
    def des_name(self) -> str:
        """The name of the Des-Net, or of a model that is trained as it is."""
        return self.des_arch or self.model or ""

    @property
    def des_option(self) -> str:
        """The option that gives `des_name`, for messages."""
        return f"--des-arch {self.des_arch}" if self.des_arch else f"--model {self.model}"


@dataclass(frozen=True)
class DataConfig:
    """The images, and how they are read."""

    data_set: str = "IMNET"
    data_path: str | None = local_path()
    download: bool = field(default=False, metadata={"local": True})
    shard_cache: str | None = local_path()
    shard_cache_gb: float = field(default=200, metadata={"local": True})
    train_images: int | None = None
    holdout: int | None = None
    nb_classes: int | None = None
    inat_category: str = "name"
    hf_image_column: str | None = None
    hf_label_column: str | None = None
    hf_train_split: str | None = None
    hf_val_split: str | None = None
    input_size: int | None = None
    batch_size: int = 64
    num_workers: int = 10
    cache_data: bool = False
    pin_mem: bool = True
    skip_bad_images: bool = False
    # None: those of the weights that the run starts from (`training.preprocessing`)
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    interpolation: str | None = None
    eval_crop_ratio: float | None = None
    crop_mode: str | None = None


@dataclass(frozen=True)
class AugmentConfig:
    """Augmentation, mixup, and the targets that follow from it."""

    three_augment: bool = False
    src: bool = False
    crop_padding: int | None = None
    color_jitter: float | None = 0.3
    aa: str | None = "rand-m9-mstd0.5-inc1"
    train_interpolation: str = "bicubic"
    repeated_aug: bool = True
    reprob: float = 0.25
    remode: str = "pixel"
    recount: int = 1
    mixup: float = 0.8
    cutmix: float = 1.0
    cutmix_minmax: tuple[float, float] | None = None
    mixup_prob: float = 1.0
    mixup_switch_prob: float = 0.5
    mixup_mode: str = "batch"
    smoothing: float = 0.1
    bce_loss: bool = False

    @property
    def mixes(self) -> bool:
        """Whether images are mixed."""
        return self.mixup > 0 or self.cutmix > 0 or self.cutmix_minmax is not None


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, and average of the weights."""

    opt: str = "adamw"
    opt_eps: float = 1e-8
    opt_betas: tuple[float, ...] | None = None
    momentum: float = 0.9
    weight_decay: float = 0.05
    lr: float = 5e-4
    unscale_lr: bool = False
    accum_iter: int = 1
    clip_grad: float | None = None
    model_ema: bool | None = None  # None: in training, not in evaluation or for a linear probe
    model_ema_decay: float = 0.99996
    model_ema_force_cpu: bool = False


@dataclass(frozen=True)
class ScheduleConfig:
    """Length of the run, and the schedule of the learning rate."""

    epochs: int = 300
    start_epoch: int = 0
    sched: str = "cosine"
    lr_noise: tuple[float, ...] | None = None
    lr_noise_pct: float = 0.67
    lr_noise_std: float = 1.0
    warmup_lr: float = 1e-6
    min_lr: float = 1e-5
    decay_epochs: float = 30
    warmup_epochs: int = 5
    cooldown_epochs: int = 10
    decay_rate: float = 0.1


@dataclass(frozen=True)
class TeacherConfig:
    """Distillation."""

    teacher_model: str = "regnety_160"
    teacher_path: str | None = local_path()
    distillation_type: str = "none"
    distillation_alpha: float | None = None  # None: 0.5, of features 1
    distillation_tau: float = 1.0
    distillation_mean: str | None = None  # None: what the method says
    teacher_cache: str | None = local_path()
    teacher_cache_top: int | None = None

    @property
    def without_labels(self) -> bool:
        """Whether features alone are learnt. What is trained then has no head."""
        return self.distillation_type == "feature" and self.distillation_alpha == 1

    @property
    def option(self) -> str:
        """The option that gives the weights of the teacher, for messages."""
        return f"--teacher-path {self.teacher_path}" if self.teacher_path else f"--teacher-model {self.teacher_model}"


@dataclass(frozen=True)
class RuntimeConfig:
    """How the run is executed."""

    eval: bool = False
    linear_probe: bool = False
    resume: str | None = None
    device: str = "auto"
    amp_dtype: str = "auto"
    compile: bool = False
    seed: int = 0
    on_nan: str = "stop"
    dist_timeout: float = 10
    log_interval: int = 50


@dataclass(frozen=True)
class OutputConfig:
    """What is written, when, and where."""

    output_dir: str | None = local_path()
    eval_interval: int = 1
    save_every_steps: int | None = None
    save_every_minutes: float | None = None
    keep_checkpoints: int = 1
    wandb: str | None = None
    push_to_hub: str | None = None
    push_ema: bool = False


@dataclass(frozen=True)
class Config:
    """All options of a run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    augment: AugmentConfig = AugmentConfig()
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    teacher: TeacherConfig = TeacherConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    output: OutputConfig = OutputConfig()

    @property
    def trains(self) -> bool:
        """Whether there is an epoch of training."""
        return self.schedule.epochs > 0 and not self.runtime.eval

    def with_options(self, **options: object) -> "Config":
        """A copy with other values of ``options``, whichever part they belong to."""
        changed = {
            part.name: replace(getattr(self, part.name), **own)
            for part in fields(self)
            if (own := {f.name: options.pop(f.name) for f in fields(getattr(self, part.name)) if f.name in options})
        }
        if options:
            raise TypeError(f"unknown options: {', '.join(options)}")
        return replace(self, **changed)


def resolve(config: Config) -> Config:
    """Replace ``auto`` and None where other options or the machine say what they stand for.

    ``--resume auto`` is left to `training.checkpoints.find_checkpoint`, as only the main process looks for files. What
    depends on the learngene is left to `resolve_with`.
    """
    model_ema, device, size = config.optim.model_ema, config.runtime.device, config.data.input_size
    if config.runtime.eval or config.runtime.linear_probe:  # the model's own weights by default
        model_ema = bool(model_ema)
    elif model_ema is None:
        model_ema = True
    if device == "auto":
        device = accelerator()
    config = config.with_options(model_ema=model_ema, device=device, tgt_arch=target_name(config.model))
    if config.model.load_gene:
        with error_context("--load-gene"):
            config = config.with_options(load_gene=source_of(config.model.load_gene))
    if (method := method_of_stage_1(config.model)) is not None:
        given = options_of(config)
        config = config.with_options(**{name: v for name, v in method.defaults.items() if given[name] is None})
    if config.teacher.distillation_alpha is None:
        alpha = 1.0 if config.teacher.distillation_type == "feature" else 0.5
        config = config.with_options(distillation_alpha=alpha)
    arch = config.model.arch
    if size is None and arch and (not config.model.load_gene or models.follows_grammar(arch)):
        with error_context(config.model.arch_option):
            size = default_input_size(arch, config.data.data_set)
    return config.with_options(input_size=size)


def resolve_with(config: Config, gene: models.Learngene) -> Config:
    """`resolve` for what depends on the learngene: the name ``@L6-H3`` of its own kind, and the size of its images.

    Raises:
        InputError: the learngene has no such name, or is for images that are not square.
    """
    option = "des_arch" if config.model.des_arch else "model"
    with error_context(config.model.des_option):
        name = full_name(config.model.des_name, gene.arch)
    size = config.data.input_size or square(gene.arch, name)
    return config.with_options(**{option: name}, input_size=size)


def target_name(model: ModelConfig) -> str | None:
    """``--tgt-arch``, where ``@L16-H12`` alone is of the kind of ``--src-arch``."""
    if not (model.src_arch and (model.tgt_arch or "").startswith("@")):
        return model.tgt_arch
    with error_context(f"--src-arch {model.src_arch} --tgt-arch {model.tgt_arch}"):
        return full_name(model.tgt_arch, models.parse_arch(model.src_arch))


def full_name(name: str, base: models.ViTArch) -> str:
    """``NAME@L6-H3`` for ``@L6-H3``; other names as they are.

    Args:
        base: the ViT whose kind is meant.

    Raises:
        InputError: there is no name for it.
    """
    if not name.startswith("@"):
        return name
    arch = models.parse_arch(name, base)
    full = models.name_of(arch)
    if not models.is_vit(full):
        raise InputError(f"main.py has no name for {arch}")
    return full


def default_input_size(arch: str, data_set: str) -> int:
    """The size of the architecture's images; without one DeiT's 224, or 32 for data sets of smaller images."""
    if models.is_vit(arch):
        return square(models.parse_arch(arch), arch)
    native = DATA_SETS[data_set][2]
    return 224 if native is None or native >= 32 else 32


def square(arch: models.ViTArch, name: str) -> int:
    """The size of the images of ``arch``.

    Raises:
        InputError: they are not square, as those of all data sets here are made.
    """
    if isinstance(arch.img_size, int):
        return arch.img_size
    height, width = arch.img_size
    raise InputError(f"--input-size is missing: {name} is for images of {height}×{width} pixels, here they are square")


def weight_sources(model: ModelConfig, teacher: TeacherConfig, resume: str | None) -> dict[str, tuple[str, str]]:
    """The weights that options name by path or address.

    Returns:
        For each option that is given: the path, address or `TIMM`, and the file that is meant in a folder, or in a
        repository of the Hub.
    """
    gene = LEARNGENE.replace("learngene", "learngene_ema") if model.gene_ema else LEARNGENE
    sources = {
        "load_gene": (model.load_gene, gene),
        "finetune": (model.finetune, gene if method_of_stage_1(model) else MODEL),
        "resume": (resume, CHECKPOINT),
        "init_path": (model.init_path, MODEL),
        "src_path": (model.src_path, MODEL),
        "teacher_path": (teacher.teacher_path, MODEL),
    }
    return {option: (source, file) for option, (source, file) in sources.items() if source}


def tagged_name(model: ModelConfig, option: str) -> str | None:
    """The architecture whose weights `TIMM` stands for as the value of an option, with its tag."""
    name = model.src_arch if option == "src_path" else model.des_name
    return name.partition("@")[0] if option == "init_path" and name else name


def option_name(field_name: str) -> str:
    """``batch_size`` as ``--batch-size``, for messages."""
    return "--" + field_name.replace("_", "-")


# ---------------------------------------------------------------------------------------------------------------------
# What is recorded of them
# ---------------------------------------------------------------------------------------------------------------------


def named_values(config: Config) -> Iterator[tuple[str, object, bool]]:
    """Name and value of every option, as plain data, and whether it is about this machine."""
    for part in fields(config):
        for f in fields(getattr(config, part.name)):
            value = getattr(getattr(config, part.name), f.name)
            yield f.name, list(value) if isinstance(value, tuple) else value, "local" in f.metadata


def options_of(config: Config) -> dict[str, object]:
    """All options {name: value} as plain data."""
    return {name: value for name, value, _ in named_values(config)}


def options_in_effect(config: Config) -> dict[str, object]:
    """Plain data with which ``--config`` repeats the run from its start."""
    defaults = options_of(Config())
    options = {name: value for name, value in options_of(config).items() if name not in ("resume", "start_epoch")}
    # what was taken back with 'none' has to be taken back again
    taken_back = {name: "none" for name, value in options.items() if value is None and defaults[name] is not None}
    return {name: value for name, value in options.items() if value is not None} | taken_back


def options_file(config: Config) -> dict[str, object]:
    """`options_in_effect` for ``args.yaml``, with which ``--eval`` evaluates the model's own weights, too.

    ``model_ema: true``, the default of training, would make evaluation take the averaged ones.
    """
    options = options_in_effect(config)
    return {name: value for name, value in options.items() if (name, value) != ("model_ema", True)}


def recipe(config: Config) -> dict[str, object]:
    """The options in effect without those about this machine, for files that others will read."""
    local = {name for name, _, is_local in named_values(config) if is_local}
    return {name: value for name, value in options_in_effect(config).items() if name not in local}
