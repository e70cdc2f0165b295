"""Which run the options describe, and whether they belong together."""

import argparse

import models
from common.errors import InputError
from models.lets import DEPTH_SCHEMES, WIDTH_SCHEMES
from options import option_parser
from pipeline.shards import is_remote

# ---------------------------------------------------------------------------------------------------------------------
# Which run they describe
# ---------------------------------------------------------------------------------------------------------------------


# options of one kind of run alone, and what that kind is
OPTIONS_OF = {
    "lets": (
        (
            *("layers_per_row", "group_size", "full_width", "src_path", "freeze_src", "trans_init_scheme"),
            *("descendants", "descendant_depths", "descendant_heads", "descendant_weight"),
        ),
        "needs --src-arch and --tgt-arch: it says how the weights of a LeTs Aux-Net are made",
    ),
    "descend": (
        ("mapping_layer", "mapping_layer_coeff", "width_select", "depth_select", "skip_init", "gene_ema"),
        "needs --load-gene: it says how a Des-Net is made from a learngene",
    ),
}


def check_kind(args: argparse.Namespace) -> str:
    """`kind_of_run`, with nothing said that such a run would not do.

    Raises:
        InputError: as `kind_of_run`, or an option of another kind of run is given.
    """
    kind, defaults = kind_of_run(args), vars(option_parser().parse_args([]))
    for other, (options, reason) in OPTIONS_OF.items():
        for option in options:
            if other != kind and getattr(args, option) != defaults[option]:
                raise InputError(f"--{option} {reason}")
    if not args.descendants:
        for option in OPTIONS_OF["lets"][0]:
            if option.startswith("descendant_") and getattr(args, option) != defaults[option]:
                raise InputError(
                    f"--descendants is missing: --{option} says which are trained beside the Aux-Net, and how"
                )
    if args.descendants and args.compile:
        raise InputError("--compile needs the same sizes in every step: --descendants draws others each time")
    check_augmentation(args, defaults)
    if args.teacher_cache and args.distillation_type == "none":
        raise InputError("--teacher-cache needs --distillation-type soft or hard: it keeps what a teacher says")
    if args.teacher_cache_top and not args.teacher_cache:
        raise InputError("--teacher-cache is missing: --teacher-cache-top says how much of the outputs is kept in it")
    if args.teacher_cache and args.skip_bad_images:
        raise InputError("--skip-bad-images changes the images of a step, for which --teacher-cache keeps outputs")
    if args.shard_cache and not (args.data_set == "WDS" and is_remote(args.data_path or "")):
        raise InputError("--shard-cache keeps shards from elsewhere: --data-set WDS with an address or a command")
    if args.shard_cache_gb != defaults["shard_cache_gb"] and not args.shard_cache:
        raise InputError("--shard-cache is missing: --shard-cache-gb says how much is kept in it")
    if args.eval and args.model_ema and not args.resume:
        raise InputError("--resume is missing: --eval --model-ema evaluates the averaged weights of a checkpoint")
    if args.push_ema and not (args.push_to_hub and args.model_ema):
        missing = "--push-to-hub is missing" if args.model_ema else "--no-model-ema leaves nothing to upload"
        raise InputError(f"{missing}: --push-ema uploads the averaged weights")
    if args.push_ema and kind in ("lets", "tleg"):
        raise InputError("--push-ema is for other models: --push-to-hub uploads a learngene with its average anyway")
    if args.data_set == "WDS" and (args.train_images or args.holdout):
        option = "--train-images" if args.train_images else "--holdout"
        raise InputError(f"{option} takes single images, which --data-set WDS cannot: expected another --data-set")
    return kind


def check_augmentation(args: argparse.Namespace, defaults: dict) -> None:
    """Raises InputError where options of the augmentation exclude each other."""
    if args.src and not args.three_augment:
        raise InputError("--ThreeAugment is missing: --src says how it crops")
    if args.three_augment and args.cache_data:
        raise InputError("--cache-data cannot augment with --ThreeAugment: expected one of them")
    for option in ("aa", "reprob") if args.three_augment else ():
        value = getattr(args, option)
        if value and value != defaults[option]:
            raise InputError(f"--ThreeAugment takes the place of --{option} {value}: expected one of them")


def kind_of_run(args: argparse.Namespace) -> str:
    """``lets`` or ``tleg`` (stage 1), ``descend`` (stage 2), or ``plain``.

    Raises:
        InputError: the options do not say which, or contradict each other.
    """
    if args.src_arch or args.tgt_arch:
        if not (args.src_arch and args.tgt_arch):
            missing = "--tgt-arch" if args.src_arch else "--src-arch"
            raise InputError(f"{missing} is missing: stage 1 of LeTs needs --src-arch and --tgt-arch")
        for option in ("load_gene", "des_arch", "model", "finetune", "init", "init_path"):
            if getattr(args, option):
                option = "--" + option.replace("_", "-")
                raise InputError(f"{option} belongs to another run: --src-arch and --tgt-arch train a learngene")
        if args.freeze_src and not args.src_path:
            raise InputError("--src-path is missing: --freeze-src trains what expands a trained ViT")
        for scheme, known in zip(args.trans_init_scheme, (DEPTH_SCHEMES, WIDTH_SCHEMES), strict=True):
            if scheme not in known:
                raise InputError(f"--trans-init-scheme {scheme} is unknown: expected one of {', '.join(known)}")
        return "lets"
    if args.load_gene:
        if models.is_aux_name(args.des_arch or args.model or ""):
            raise InputError(f"{args.des_arch or args.model} is an Aux-Net: --load-gene initialises a deit_… Des-Net")
        if not (args.des_arch or args.model):
            raise InputError("--des-arch is missing: it names the Des-Net that --load-gene initialises")
        if args.finetune or args.init or args.init_path:
            raise InputError("--load-gene gives the first weights, as do --finetune and --init: choose one")
        return "descend"
    if args.des_arch:
        raise InputError("--load-gene is missing: it names the learngene that initialises --des-arch")
    if (args.init is None) != (args.init_path is None):
        missing = "--init" if args.init is None else "--init-path"
        raise InputError(f"{missing} is missing: --init says how, and --init-path from which trained ViT")
    if args.init and (args.finetune or not models.follows_grammar(args.model or "") or models.is_aux_name(args.model)):
        raise InputError("--init makes a ViT from another one: give --model deit_…, and no --finetune")
    if not args.model:
        raise InputError("nothing to run: give --src-arch and --tgt-arch, or --des-arch and --load-gene, or --model")
    return "tleg" if models.is_aux_name(args.model) else "plain"
