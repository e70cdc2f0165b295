"""All checks of combinations of options. They run before anything is built.

What depends on a file, the data or the device is checked where that is read or used.
"""

from dataclasses import fields

import models
from common.errors import InputError
from datasets import DATA_SETS, SHARDED, are_small
from models.baselines import NEED_GRADIENTS
from models.preprocessing import SMALL
from models.registry import METHODS, method_of_stage_1
from pipeline.shard_cache import is_remote
from training.config import (
    SOURCE,
    TAGGED,
    TIMM,
    AugmentConfig,
    Config,
    DataConfig,
    ModelConfig,
    OutputConfig,
    TeacherConfig,
    option_name,
    options_of,
    tagged_name,
)

# kinds of run besides stage 1 of a method, whose kind is the name of the method
STAGE_2, PLAIN = "descend", "plain"
OPTIONS_OF_STAGE_2 = ("mapping_layer", "mapping_layer_coeff", "width_select", "depth_select", "skip_init", "gene_ema")
OPTIONS_OF_DESCENDANTS = ("descendants", "descendant_depths", "descendant_heads", "descendant_mlp_ratios")
OPTIONS_OF_DESCENDANTS += ("descendant_weight", "descendant_sampling", "descendant_warmup_epochs")
OPTIONS_OF_DESCENDANTS += ("descendant_coarse_to_fine", "chain_weight")


def check(config: Config) -> str:
    """Check all combinations of options.

    Args:
        config: after `training.config.resolve`, and once more after `training.config.resolve_with`, which completes it.

    Returns:
        The kind of the run, as `kind_of_run` names it.

    Raises:
        InputError: options are missing, or exclude each other.
    """
    kind = kind_of_run(config.model)
    check_kind(kind, config)
    check_timm(config.model)
    check_source_teacher(config)
    check_features(config)
    check_linear_probe(kind, config)
    check_augmentation(config.augment, config.data)
    check_mixup(config)
    check_teacher_cache(config.teacher, config.data)
    check_data(config.data)
    if config.runtime.eval and config.optim.model_ema and not config.runtime.resume:
        raise InputError("--resume is missing: --eval --model-ema evaluates the averaged weights of a checkpoint")
    check_output(config)
    check_push(config.output, kind, averages=config.optim.model_ema, evaluates=config.runtime.eval)
    return kind


# ---------------------------------------------------------------------------------------------------------------------
# Which run they describe
# ---------------------------------------------------------------------------------------------------------------------


def kind_of_run(config: ModelConfig) -> str:
    """The name of a method for its stage 1, such as ``lets``; ``descend`` (stage 2); or ``plain``.

    Raises:
        InputError: the options do not say which, or contradict each other.
    """
    if (method := method_of_stage_1(config)) is not None:
        check_stage_1(config, method)
        return method.method
    if config.load_gene:
        check_descend(config)
        return STAGE_2
    if config.des_arch:
        raise InputError("--load-gene is missing: it names the learngene that initialises --des-arch")
    if (config.init is None) != (config.init_path is None):
        missing = "--init" if config.init is None else "--init-path"
        raise InputError(f"{missing} is missing: --init says how, and --init-path from which trained ViT")
    if config.init and (config.finetune or not models.is_vit(config.model or "")):
        raise InputError("--init makes a ViT from another one: give --model deit_… or a ViT of timm's, no --finetune")
    if not config.model:
        raise InputError(
            "nothing to run: give --src-arch, with or without --tgt-arch, or --des-arch and --load-gene, or --model"
        )
    return PLAIN


def check_stage_1(config: ModelConfig, method: type[models.AuxNet]) -> None:
    """Raises InputError unless the options give the sizes of an Aux-Net, and nothing for another kind of run."""
    needed = [option_name(option) for option in method.arch_options]
    for option in method.arch_options:
        if not getattr(config, option):
            raise InputError(
                f"{option_name(option)} is missing: stage 1 of {method.title} needs {' and '.join(needed)}"
            )
    for option in ("load_gene", "des_arch", "model", "src_arch", "tgt_arch", "init", "init_path"):
        if getattr(config, option) and option not in method.arch_options:
            train = "trains" if len(needed) == 1 else "train"
            raise InputError(
                f"{option_name(option)} belongs to another run: {' and '.join(needed)} {train} a learngene"
            )
    method.check_config(config)


def check_timm(config: ModelConfig) -> None:
    """Raises InputError where timm has no weights for an option that takes those of a tag."""
    for option in TAGGED:
        name = tagged_name(config, option) or ""
        if getattr(config, option) == TIMM and (models.follows_grammar(name) or "@" in name):
            raise InputError(
                f"{option_name(option)} {TIMM} takes weights that timm offers, and has none of {name}: expected the "
                "name of an architecture of timm's, such as vit_small_patch16_224.augreg_in1k"
            )


def check_descend(config: ModelConfig) -> None:
    if models.is_aux_name(config.des_name):
        raise InputError(f"{config.des_name} is an Aux-Net: --load-gene initialises a deit_… Des-Net")
    if not config.des_name:
        raise InputError("--des-arch is missing: it names the Des-Net that --load-gene initialises")
    if config.finetune or config.init or config.init_path:
        raise InputError("--load-gene gives the first weights, as do --finetune and --init: choose one")


def check_kind(kind: str, config: Config) -> None:
    """Raises InputError where an option is given that a run of this kind does not use."""
    options, usual = options_of(config), options_of(Config())
    if kind in METHODS:
        usual |= METHODS[kind].defaults
    given = [name for name, value in options.items() if value != usual[name]]
    for name in given:
        owners = [cls for cls in METHODS.values() if name in cls.options]
        if owners and kind not in [cls.method for cls in owners]:
            usage, titles = (" or ".join(words) for words in zip(*((c.usage, c.title) for c in owners), strict=True))
            raise InputError(f"{option_name(name)} needs {usage}: it is an option of stage 1 of {titles}")
        if name == "order_images" and not orders_by_images(config.model):
            raise InputError(
                "--order-images needs --init taylor, --order taylor, or --depth-order taylor or output: the images say "
                "what is important"
            )
        if name in OPTIONS_OF_STAGE_2 and kind != STAGE_2:
            raise InputError(f"--{name} needs --load-gene: it says how a Des-Net is made from a learngene")
        if name in OPTIONS_OF_DESCENDANTS and kind in (STAGE_2, PLAIN):
            raise InputError(f"{option_name(name)} needs stage 1 of a method: Des-Nets are trained beside its Aux-Net")
        if name in OPTIONS_OF_DESCENDANTS and not config.model.descendants:
            raise InputError(
                f"--descendants is missing: {option_name(name)} says which are trained beside the Aux-Net, and how"
            )
    if config.model.descendants:
        check_descendants(config)


def check_descendants(config: Config) -> None:
    """Raises InputError where options of the descendants of a step exclude each other."""
    model, epochs = config.model, config.schedule.epochs
    if model.chain_weight and model.descendants + (model.descendant_weight < 1) < 2:
        raise InputError("--chain-weight needs two members in a step, the next larger one and another: --descendants 2")
    if 0 < epochs <= model.descendant_warmup_epochs:
        warm_up = f"--descendant-warmup-epochs {model.descendant_warmup_epochs}"
        raise InputError(f"{warm_up} leaves none of {epochs} epochs to the other sizes")


def orders_by_images(config: ModelConfig) -> bool:
    """Whether gradients or outputs on training images say what is important."""
    return bool({config.init, config.order, config.depth_order} & {*NEED_GRADIENTS, "output"})


def check_source_teacher(config: Config) -> None:
    """Raises InputError unless --teacher-model source has a source."""
    if config.teacher.teacher_model != SOURCE:
        return
    if method_of_stage_1(config.model) is None or not config.model.src_path:
        raise InputError("--src-path is missing: --teacher-model source is the ViT that stage 1 starts from")
    if config.teacher.teacher_path:
        raise InputError(
            "--teacher-path belongs to another teacher: the weights of --teacher-model source are --src-path"
        )
    if config.teacher.distillation_type == "none":
        raise InputError("--distillation-type is missing: it says how --teacher-model source teaches")


def check_features(config: Config) -> None:
    """Raises InputError where --distillation-type feature is given to another run, or with what it has no use for."""
    model, teacher, method = config.model, config.teacher, method_of_stage_1(config.model)
    if teacher.distillation_type != "feature":
        return
    if method is None or "feature_maps" not in method.training_only:
        owners = " or ".join(cls.usage for cls in METHODS.values() if "feature_maps" in cls.training_only)
        raise InputError(f"--distillation-type feature needs {owners}: it maps features of parts to those of the whole")
    if teacher.teacher_model != SOURCE:
        raise InputError(
            f"--distillation-type feature has no use for --teacher-model {teacher.teacher_model}: expected source"
        )
    if teacher.teacher_cache:
        raise InputError("--teacher-cache keeps logits: the features of --distillation-type feature are too many")
    usual = method.defaults | {"distillation_tau": TeacherConfig().distillation_tau}
    for option in ("chain_weight", "distillation_tau", "distillation_mean"):
        value = options_of(config)[option]
        if value != usual[option]:
            raise InputError(f"{option_name(option)} {value} is about logits, and has no effect on features")
    for option in ("order", "depth_order"):
        if teacher.without_labels and getattr(model, option) == "taylor":
            raise InputError(f"{option_name(option)} taylor needs the loss of a head, and features alone have none")


def check_linear_probe(kind: str, config: Config) -> None:
    """Raises InputError where --linear-probe has no features to fit a head to, or they would change."""
    if not config.runtime.linear_probe:
        return
    if config.schedule.epochs or config.runtime.eval:
        found = "--eval" if config.runtime.eval else f"--epochs {config.schedule.epochs}"
        raise InputError(f"--linear-probe fits a head to frozen features: expected --epochs 0, found {found}")
    if config.optim.model_ema:
        raise InputError("--model-ema averages over steps of training: --linear-probe has none, expected one of them")
    if kind not in (STAGE_2, PLAIN) or (kind == PLAIN and not models.is_vit(config.model.model)):
        raise InputError("--linear-probe is for ViTs: expected --des-arch, or a ViT for --model")


# ---------------------------------------------------------------------------------------------------------------------
# Whether the rest fits
# ---------------------------------------------------------------------------------------------------------------------


def check_augmentation(augment: AugmentConfig, data: DataConfig) -> None:
    """Raises InputError where options of the augmentation exclude each other."""
    if augment.src and not augment.three_augment:
        raise InputError("--ThreeAugment is missing: --src says how it crops")
    if augment.three_augment and data.cache_data:
        raise InputError("--cache-data cannot augment with --ThreeAugment: expected one of them")
    for option in ("aa", "reprob") if augment.three_augment else ():
        value = getattr(augment, option)
        if value and value != getattr(AugmentConfig(), option):
            raise InputError(f"--ThreeAugment takes the place of --{option} {value}: expected one of them")
    padding, size = augment.crop_padding, data.input_size
    if padding is None or size is None:  # the size may be that of a learngene
        return
    if not augment.src and not are_small(data.data_set, size):
        raise InputError(
            f"--crop-padding {padding} is for images that are shifted: those of --data-set {data.data_set} at "
            f"--input-size {size} have random crops, expected small images or --src"
        )
    if padding >= size:
        raise InputError(f"--crop-padding {padding} leaves nothing of an image: expected less than --input-size {size}")


def check_mixup(config: Config) -> None:
    """Raises InputError where images cannot be mixed as the options say."""
    augment, batch_size = config.augment, config.data.batch_size
    if augment.mixes and batch_size % 2 and config.trains:
        raise InputError(f"--batch-size {batch_size} is odd: --mixup and --cutmix pair the images of a batch")
    if augment.cutmix_minmax is not None and config.data.input_size is not None:
        low, high = (int(share * config.data.input_size) for share in augment.cutmix_minmax)
        if low > high or low >= config.data.input_size:
            given = " ".join(f"{share:g}" for share in augment.cutmix_minmax)
            raise InputError(f"--cutmix-minmax {given}: expected MIN ≤ MAX, and MIN below the whole image")


def check_teacher_cache(teacher: TeacherConfig, data: DataConfig) -> None:
    if teacher.teacher_cache and teacher.distillation_type == "none":
        raise InputError("--teacher-cache needs --distillation-type soft or hard: it keeps the logits of a teacher")
    if teacher.teacher_cache_top and not teacher.teacher_cache:
        raise InputError("--teacher-cache is missing: --teacher-cache-top says how much of the outputs is kept in it")
    if teacher.teacher_cache and data.skip_bad_images:
        raise InputError("--skip-bad-images changes the images of a step, for which --teacher-cache keeps outputs")


def check_data(data: DataConfig) -> None:
    """Raises InputError where options of the data exclude each other."""
    cached = data.data_set == "HF" or (data.data_set == "WDS" and is_remote(data.data_path or ""))
    if data.shard_cache and not cached:
        raise InputError(
            "--shard-cache keeps data from elsewhere: expected --data-set WDS with an address or a command, or HF"
        )
    if data.shard_cache_gb != DataConfig().shard_cache_gb and not data.shard_cache:
        raise InputError("--shard-cache is missing: --shard-cache-gb says how much is kept in it")
    if data.data_set in SHARDED and (data.train_images or data.holdout):
        option = "--train-images" if data.train_images else "--holdout"
        raise InputError(
            f"{option} takes single images, which --data-set {data.data_set} cannot: expected another --data-set"
        )
    for name in (f.name for f in fields(data) if f.name.startswith("hf_")):
        of_shards = name == "hf_label_column" and data.data_set == "WDS"
        if getattr(data, name) and not (data.data_set == "HF" or of_shards):
            raise InputError(f"{option_name(name)} is of --data-set HF: found --data-set {data.data_set}")
    if data.cache_data:
        check_small(data.data_set, data.input_size)


def check_small(data_set: str, input_size: int | None) -> None:
    """Raises InputError unless the images of a data set are small, and used whole."""
    small = [known for known, (_, _, size) in DATA_SETS.items() if size is not None and known != "HF"]
    if data_set not in small:
        found = "which is read from files" if data_set == "HF" else "whose images are large"
        raise InputError(f"--cache-data cannot hold --data-set {data_set}, {found}: expected one of {', '.join(small)}")
    if input_size is not None and input_size > SMALL:
        raise InputError(f"--cache-data is for an --input-size of up to {SMALL} pixels, found {input_size}")


def check_output(config: Config) -> None:
    """Raises InputError where --output-dir is missing and another option needs it."""
    if config.output.output_dir is not None:
        return
    for given, reason in (
        (config.runtime.resume == "auto", "--resume auto continues from the checkpoints in it"),
        (config.output.wandb, "--wandb keeps its files in it"),
        (config.runtime.on_nan == "rollback", "--on-nan rollback goes back to the checkpoints in it"),
    ):
        if given:
            raise InputError(f"--output-dir is missing: {reason}")


def check_push(output: OutputConfig, kind: str, averages: bool, evaluates: bool) -> None:
    """Raises InputError where the options leave nothing to upload; `common.hub.check_upload` checks the repository."""
    if output.push_ema and not (output.push_to_hub and averages):
        missing = "--push-to-hub is missing" if averages else "--no-model-ema leaves nothing to upload"
        raise InputError(f"{missing}: --push-ema uploads the averaged weights")
    if output.push_ema and kind not in (STAGE_2, PLAIN):
        raise InputError("--push-ema is for other models: --push-to-hub uploads a learngene with its average anyway")
    if output.push_to_hub and (output.output_dir is None or evaluates):
        found = "--eval writes nothing" if evaluates else "--output-dir is missing"
        raise InputError(f"--push-to-hub uploads what a run writes into --output-dir: {found}")
