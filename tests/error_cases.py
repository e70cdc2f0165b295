"""Command lines that are wrong, and what the message of each one holds."""

from typing import NamedTuple

from models.names import GRAMMAR

from conftest import TESTS

FIXTURES = TESTS / "fixtures"

DIGITS = "--num-workers 0 --epochs 1 --data-set DIGITS"
MODEL = "--model deit_nano_patch8_32_L2"
PLAIN = f"{DIGITS} {MODEL}"
PROBE = f"{DIGITS} --epochs 0 --linear-probe"
FOLDER = "--num-workers 0 --epochs 1 --model deit_nano_patch8_32_L2"
DESCEND = f"{DIGITS} --des-arch deit_nano_patch8_32_L4_H2"
LETS = "--load-gene FILES/lets.safetensors"
AUX = f"{DIGITS} --src-arch deit_nano_patch8_32_L4_H1"
TEACHER = f"{PLAIN} --distillation-type soft --teacher-model deit_nano_patch8_32_L2"

BOTH = (1, 2)


class Case(NamedTuple):
    """A command line, and what its message holds: the option or file, what was found, what would be right."""

    args: str
    expected: tuple[str, ...]
    processes: tuple[int, ...] = (1,)  # how many it is run in; each number is a run of its own


CASES = {
    # options
    "option": Case(f"{PLAIN} --batch-sise 8", ("--batch-sise", "--batch-size"), BOTH),
    "option_underscore": Case(f"{PLAIN} --outputdir=x", ("--outputdir", "--output-dir")),
    "option_type": Case(f"{PLAIN} --epochs many", ("--epochs", "many", "whole number")),
    "option_choice": Case(f"{PLAIN} --data-set CIFAR", ("--data-set", "CIFAR", "CIFAR10", "DIGITS")),
    "nothing": Case(DIGITS, ("nothing to run", "--src-arch", "--load-gene", "--model")),
    "no_gene": Case(f"{DIGITS} --des-arch deit_nano_patch8_32_L4_H2", ("--load-gene", "--des-arch"), BOTH),
    "no_tgt": Case(f"{AUX} --group-size 1", ("--group-size", "--tgt-arch")),
    "no_src": Case(AUX.replace("--src-arch", "--tgt-arch"), ("--src-arch", "missing")),
    "finetune_of_lets": Case(
        f"{AUX} --tgt-arch deit_nano_patch8_32_L8_H2 --finetune FILES/ten.pth", ("--finetune", "--src-arch")
    ),
    "save_never": Case(f"{PLAIN} --save-every-minutes 0", ("--save-every-minutes", "0 is not above 0")),
    "device": Case(f"{PLAIN} --device nonsense", ("--device nonsense", "cpu", "cuda", "auto"), BOTH),
    "device_of_torch": Case(f"{PLAIN} --device meta", ("--device meta", "cpu", "cuda", "auto")),
    "input_size": Case(f"{DIGITS} --model test_vit --input-size 97", ("--input-size 97", "patch size (16)")),
    "augmentation": Case(f"{PLAIN} --aa nonsense", ("--aa", "nonsense", "rand-m9-mstd0.5-inc1")),
    "seed": Case(f"{PLAIN} --seed -1", ("--seed", "-1")),
    "crop_ratio_0": Case(f"{PLAIN} --eval-crop-ratio 0 --input-size 72", ("--eval-crop-ratio", "0")),
    "crop_ratio_negative": Case(f"{PLAIN} --eval-crop-ratio=-1 --input-size 72", ("--eval-crop-ratio", "-1")),
    "crop_padding": Case(f"{PLAIN} --crop-padding=-1", ("--crop-padding", "-1 is too small")),
    "crop_padding_of_photographs": Case(
        f"{PLAIN} --crop-padding 2 --input-size 72", ("--crop-padding 2", "DIGITS", "--input-size 72", "--src")
    ),
    "crop_padding_of_all": Case(f"{PLAIN} --crop-padding 32", ("--crop-padding 32", "less than --input-size 32")),
    "probe_and_training": Case(f"{PLAIN} --linear-probe", ("--linear-probe", "--epochs 0", "found --epochs 1"), BOTH),
    "probe_and_eval": Case(f"{PROBE} {MODEL} --eval", ("--linear-probe", "--epochs 0", "found --eval")),
    "probe_after_training": Case(f"{PROBE} {MODEL} --start-epoch 1", ("--linear-probe", "--finetune"), BOTH),
    "probe_and_average": Case(f"{PROBE} {MODEL} --model-ema", ("--linear-probe", "--model-ema")),
    "probe_of_stage_1": Case(f"{PROBE} --src-arch deit_nano_patch8_32_L2", ("--linear-probe", "--des-arch", "--model")),
    "probe_of_another_network": Case(f"{PROBE} --model resnet18", ("--linear-probe", "a ViT for --model")),
    "smoothing": Case(f"{PLAIN} --smoothing 2 --mixup 0 --cutmix 0", ("--smoothing", "2")),
    "drop": Case(f"{PLAIN} --drop 2", ("--drop", "2")),
    "drop_aux": Case(f"{AUX} --tgt-arch deit_nano_patch8_32_L8_H2 --drop 2", ("--drop", "2")),
    "optimiser": Case(f"{PLAIN} --opt nonsense", ("--opt nonsense",)),
    "optimiser_unknown_prefix": Case(f"{PLAIN} --opt cautious_adamw", ("--opt cautious_adamw", "adamw?")),
    "optimiser_second_order": Case(f"{PLAIN} --opt adahessian", ("--opt adahessian", "--opt adamw"), BOTH),
    "optimiser_of_package": Case(f"{PLAIN} --opt fusedadam", ("--opt fusedadam", "--opt adam")),
    "betas_of_adan": Case(f"{PLAIN} --opt adan --opt-betas 0.9 0.98", ("--opt adan", "0.9 0.98", "3 betas")),
    "betas": Case(f"{PLAIN} --opt-betas 0.9", ("--opt-betas", "0.9")),
    "schedule": Case(f"{PLAIN} --sched nonsense", ("--sched nonsense",)),
    "initialisation": Case(
        f"{AUX} --tgt-arch deit_nano_patch8_32_L8_H2 --trans-init-scheme stackbert round",
        ("--trans-init-scheme", "round", "rand_softmax"),
    ),
    "batch": Case(f"{PLAIN} --batch-size 2000", ("--batch-size 2000", "1437")),
    "batch_of_two": Case(f"{PLAIN} --batch-size 1000", ("--batch-size 1000", "1437", "2 process"), (2,)),
    "train_images": Case(f"{PLAIN} --train-images 1438", ("--train-images 1438", "1437 training images"), BOTH),
    "train_images_0": Case(f"{PLAIN} --train-images 0", ("--train-images", "0 is too small")),
    "train_images_of_shards": Case(
        f"{FOLDER} --data-set WDS --data-path FILES --train-images 9", ("--train-images", "--data-set WDS")
    ),
    "holdout": Case(
        f"{PLAIN} --train-images 1000 --holdout 438", ("--holdout 438", "--train-images 1000", "1437 training images")
    ),
    "holdout_of_all": Case(f"{PLAIN} --holdout 1437", ("--holdout 1437", "one image to train", "1437")),
    "holdout_of_shards": Case(
        f"{FOLDER} --data-set WDS --data-path FILES --holdout 9", ("--holdout", "--data-set WDS")
    ),
    "eval_interval": Case(f"{PLAIN} --eval-interval 0", ("--eval-interval", "0 is too small")),
    "odd_batch": Case(f"{PLAIN} --batch-size 25", ("--batch-size 25", "odd", "--mixup", "--cutmix"), BOTH),
    "output": Case(f"{PLAIN} --output-dir FILES/text.txt/run", ("--output-dir", "text.txt"), BOTH),
    "output_is_file": Case(f"{PLAIN} --output-dir FILES/text.txt", ("--output-dir", "text.txt")),
    # YAML
    "yaml_key": Case(
        f"{PLAIN} --config FILES/key.yaml", ("--config", "key.yaml", "warmup_epoch", "--warmup-epochs"), BOTH
    ),
    "yaml_number": Case(f"{PLAIN} --config FILES/number.yaml", ("number.yaml", "--epochs", "many"), BOTH),
    "yaml_flag": Case(f"{PLAIN} --config FILES/flag.yaml", ("flag.yaml", "pin_mem", "3", "true or false")),
    "yaml_list": Case(f"{PLAIN} --config FILES/list.yaml", ("list.yaml", "lr", "[1, 2]", "single value")),
    "yaml_text": Case(f"{PLAIN} --config FILES/text.txt", ("--config", "text.txt", "option: value")),
    "yaml_broken": Case(f"{PLAIN} --config FILES/broken.yaml", ("--config", "broken.yaml", "not YAML")),
    "yaml_code": Case(f"{PLAIN} --config FILES/code.yaml", ("--config", "code.yaml", "python/object"), BOTH),
    "yaml_alias": Case(f"{PLAIN} --config FILES/alias.yaml", ("--config", "alias.yaml", "alias *rate")),
    "yaml_missing": Case(f"{PLAIN} --config FILES/no.yaml", ("--config", "no.yaml", "No such file")),
    # architectures
    "architecture": Case(
        f"{DIGITS} {LETS} --des-arch deit_smal_patch16_224_L12",
        ("--des-arch", "deit_smal_patch16_224_L12", GRAMMAR, "deit_small_patch16_224_L12"),
        BOTH,
    ),
    "architecture_of_model": Case(f"{DIGITS} --model resnet81", ("--model", "resnet81", GRAMMAR, "resnet18"), BOTH),
    "architecture_of_aux_net": Case(
        f"{AUX} --tgt-arch deit_base_patch16_224_L16_12",
        ("--tgt-arch", "deit_base_patch16_224_L16_12", GRAMMAR, "deit_base_patch16_224_L16_H12"),
    ),
    "architecture_tag": Case(f"{DIGITS} --model resnet18.nonsense", ("--model", "resnet18", "nonsense")),
    "architecture_tag_of_a_kind": Case(
        f"{DIGITS} --src-arch vit_small_patch16_224.nonsense --tgt-arch @L16-H12",
        ("--src-arch", "nonsense", "augreg_in1k", "dino"),
    ),
    "architecture_without_kind": Case(f"{DIGITS} --model @L2-H2", ("--model @L2-H2", "add its name"), BOTH),
    "architecture_without_sizes": Case(
        f"{DIGITS} --src-arch resnet18 --tgt-arch @L4-H2", ("--src-arch resnet18", "resnet18", "conv1.weight")
    ),
    "architecture_of_tleg": Case(f"{DIGITS} --method tleg --model resnet18", ("--model resnet18", "expected a ViT")),
    "architecture_of_another_kind": Case(
        f"{DIGITS} {LETS} --des-arch test_vit@L2-H1 --input-size 32", ("--des-arch", "test_vit", "deit_…"), BOTH
    ),
    "architecture_of_another_patch": Case(
        f"{DIGITS} --src-arch test_vit@L2-H1 --tgt-arch @L4-H2 --input-size 40", ("--input-size 40", "patch size (16)")
    ),
    "timm_weights_of_a_name": Case(f"{PLAIN} --finetune timm", ("--finetune timm", "deit_nano_patch8_32_L2", "timm's")),
    "timm_weights_of_other_sizes": Case(
        f"{DIGITS} --src-arch test_vit@L2-H1 --src-path timm --tgt-arch @L4-H2", ("--src-path timm", "test_vit@L2-H1")
    ),
    "timm_has_no_weights": Case(
        f"{DIGITS} --model vit_base_patch16_xp_224 --finetune timm", ("--finetune", "no weights of vit_base_patch16_xp")
    ),
    "aux_net_sizes": Case(
        f"{DIGITS} --src-arch deit_nano_patch8_32_L8_H1 --tgt-arch deit_nano_patch8_32_L3_H2",
        ("--src-arch", "3 layers", "pairs of the 8"),
    ),
    # data
    "no_path": Case(f"{FOLDER} --data-set IMNET", ("--data-path", "IMNET")),
    "path": Case(f"{FOLDER} --data-set FOLDER --data-path FILES/no-data", ("--data-path", "no-data"), BOTH),
    "path_of_file": Case(f"{FOLDER} --data-set FMNIST --data-path FILES/text.txt", ("--data-path", "text.txt")),
    "layout": Case(f"{FOLDER} --data-set FOLDER --data-path FILES/no-val", ("--data-path", "no-val", "val/")),
    "classes": Case(
        f"{FOLDER} --data-set FOLDER --data-path FILES/differ",
        ("--data-path", "differ", "2 classes in train/", "3 in val/", "cow"),
        BOTH,
    ),
    "layout_of_torchvision": Case(
        f"{FOLDER} --data-set FOOD101 --data-path FILES/good", ("--data-path", "images and meta", "food-101/", "train/")
    ),
    "download": Case(
        f"{FOLDER} --data-set CARS --data-path FILES/good --download",
        ("--download", "CARS", "no longer", "FOOD101"),
        BOTH,
    ),
    "class_names": Case(
        f"{FOLDER} --data-set FOLDER --data-path FILES/renamed", ("--data-path", "renamed", "train/", "val/", "cow")
    ),
    "empty_class": Case(
        f"{FOLDER} --data-set FOLDER --data-path FILES/empty-train",
        ("--data-path", "empty-train", "bat"),
        BOTH,
    ),
    "empty_test_class": Case(
        f"{FOLDER} --data-set FOLDER --data-path FILES/empty-val", ("--data-path", "empty-val", "bat")
    ),
    "imagenet_classes": Case(
        f"{FOLDER} --data-set IMNET --data-path FILES/good", ("--data-path", "2 classes", "1000", "FOLDER")
    ),
    # learngenes
    "gene_missing": Case(f"{DESCEND} --load-gene FILES/no.pth", ("no.pth", "missing", "weights"), BOTH),
    "gene_directory": Case(f"{DESCEND} --load-gene FILES", ("is a directory", "weights")),
    "gene_empty": Case(f"{DESCEND} --load-gene FILES/empty.pth", ("empty.pth", "empty", "weights")),
    "gene_text": Case(f"{DESCEND} --load-gene FILES/text.txt", ("text.txt", "no file of weights")),
    "gene_cut": Case(f"{DESCEND} --load-gene FILES/lets_cut.pth", ("lets_cut.pth", "damaged"), BOTH),
    "gene_cut_tleg": Case(f"{DESCEND} --load-gene FILES/tleg_cut.pth", ("tleg_cut.pth", "damaged")),
    "gene_cut_own": Case(f"{DESCEND} --load-gene FILES/cut.safetensors", ("cut.safetensors", "damaged")),
    "gene_cut_header": Case(f"{DESCEND} --load-gene FILES/head.safetensors", ("head.safetensors", "damaged")),
    "gene_key_missing": Case(f"{DESCEND} --load-gene FILES/partial.pth", ("partial.pth", "__sm_0_norm1_bias")),
    "gene_nan": Case(f"{DESCEND} --load-gene FILES/nan.safetensors", ("nan.safetensors", "E", "not finite")),
    "gene_ema": Case(f"{DESCEND} {LETS} --gene-ema", ("lets.safetensors", "model_ema")),
    "gene_of_vit": Case(f"{DESCEND} --load-gene FILES/ten.pth", ("ten.pth", "LeTs", "TLEG")),
    "gene_head_dim": Case(
        f"{DESCEND} --load-gene FIXTURES/lets_learngene.pth", ("lets_learngene.pth", "width", "32", "head")
    ),
    "gene_code": Case(f"{DESCEND} --load-gene FILES/trap.pth", ("trap.pth", "refused", "open"), BOTH),
    "gene_code_legacy": Case(f"{DESCEND} --load-gene FILES/trap.tar", ("trap.tar", "refused", "open")),
    "gene_code_suffix": Case(f"{DESCEND} --load-gene FILES/trap.safetensors", ("trap.safetensors", "refused", "open")),
    "gene_code_pickle": Case(f"{DESCEND} --load-gene FILES/trap.pkl", ("trap.pkl", "weights")),
    # Des-Nets
    "tleg_mapping": Case(
        f"{DESCEND} --load-gene FILES/tleg.safetensors --mapping_layer 0,1,2,3 --mapping_layer_coeff 0,2,4,6",
        ("mapping_layer", "LeTs", "TLEG"),
        BOTH,
    ),
    "tleg_depth_select": Case(
        f"{DESCEND} --load-gene FILES/tleg.safetensors --depth-select even", ("depth_select", "LeTs", "TLEG")
    ),
    "tleg_width": Case(
        f"{DIGITS} --des-arch deit_nano_patch8_32_L4_H3 --load-gene FILES/tleg.safetensors",
        ("--des-arch", "3 heads", "up to 2 heads"),
    ),
    "depth_select": Case(f"{DESCEND} {LETS} --depth-select middle", ("'middle'", "default, even, first, last")),
    "depth_pairs": Case(f"{DESCEND} {LETS} --depth-select pairs:0,9", ("pairs:0,9", "numbers from 0 to")),
    "depth_twice": Case(
        f"{DESCEND} {LETS} --depth-select even --mapping_layer 0,1,2,3 --mapping_layer_coeff 0,2,4,6",
        ("depth_select even", "give one"),
    ),
    "skip_part": Case(f"{DESCEND} {LETS} --skip-init attn,head", ("--skip-init", "'head'", "attn,mlp,norm")),
    "init_alone": Case(f"{PLAIN} --init stacking", ("--init-path is missing",)),
    "init_path_alone": Case(f"{PLAIN} --init-path FILES/ten.pth", ("--init is missing",)),
    "init_and_gene": Case(f"{DESCEND} {LETS} --init stacking --init-path FILES/ten.pth", ("--load-gene", "choose one")),
    "init_smaller": Case(
        f"{DIGITS} --model deit_nano_patch8_32_L5_H2 --init weight_selection --init-path FILES/ten.pth",
        ("--init-path", "needs a larger ViT"),
    ),
    "init_width": Case(
        f"{DIGITS} --model deit_nano_patch8_32_L5_H1 --init stacking --init-path FILES/ten.pth",
        ("--init-path", "the widths differ: 64 and 32"),
    ),
    "init_code": Case(f"{PLAIN} --init stacking --init-path FILES/trap.pth", ("trap.pth", "refused", "open")),
    "mapping_unequal": Case(
        f"{DESCEND} {LETS} --mapping_layer 0,1,2,3 --mapping_layer_coeff 0,2,4",
        ("mapping_layer_coef", "3 entries", "needs 4"),
        BOTH,
    ),
    "mapping_length": Case(
        f"{DESCEND} {LETS} --mapping_layer 0,1,2,3,4 --mapping_layer_coeff 0,2,4,6,6",
        ("mapping_layer", "5 entries", "needs 4"),
    ),
    "mapping_range": Case(
        f"{DESCEND} {LETS} --mapping_layer 0,1,2,8 --mapping_layer_coeff 0,2,4,6", ("mapping_layer", "8", "0 to 7")
    ),
    "mapping_negative": Case(
        f"{DESCEND} {LETS} --mapping_layer 0,1,2,3 --mapping_layer_coeff 0,2,4,-1",
        ("mapping_layer_coef", "-1", "0 to 7"),
    ),
    "mapping_text": Case(
        f"{DESCEND} {LETS} --mapping_layer 0,one,2,3 --mapping_layer_coeff 0,2,4,6",
        ("--mapping-layer", "0,one,2,3", "whole numbers"),
        BOTH,
    ),
    "mapping_alone": Case(
        f"{DESCEND} {LETS} --mapping_layer 0,1,2,3", ("mapping_layer", "mapping_layer_coef", "both"), BOTH
    ),
    "mapping_coeff_alone": Case(
        f"{DESCEND} {LETS} --mapping_layer_coeff 0,2,4,6", ("mapping_layer", "mapping_layer_coef", "both")
    ),
    "mapping_without_gene": Case(f"{PLAIN} --mapping_layer 0,1", ("--mapping_layer", "--load-gene")),
    "width_without_gene": Case(f"{PLAIN} --width-select l1_top", ("--width_select", "--load-gene")),
    "rows_of_a_plain_vit": Case(f"{PLAIN} --layers-per-row 1", ("--layers-per-row", "--src-arch")),
    "full_width_of_a_des_net": Case(f"{DESCEND} {LETS} --full-width", ("--full-width", "--src-arch")),
    "freeze_nothing": Case(f"{AUX} --tgt-arch deit_nano_patch8_32_L8_H2 --freeze-src", ("--src-path", "--freeze-src")),
    "src_path_other_size": Case(
        f"{AUX} --tgt-arch deit_nano_patch8_32_L8_H2 --src-path FILES/ten.pth",
        ("--src-path", "ten.pth", "architecture"),
    ),
    "width": Case(
        f"{DIGITS} --des-arch deit_nano_patch8_32_L4_H4 {LETS}",
        ("--des-arch", "width 128", "widest", "64", "2 heads"),
        BOTH,
    ),
    "head_size": Case(
        f"{DIGITS} --des-arch deit_tiny_patch8_32_L4_H1 {LETS}", ("--des-arch", "64", "32", "heads"), BOTH
    ),
    # checkpoints
    "resume_missing": Case(f"{PLAIN} --resume FILES/no.pth", ("no.pth", "missing", "weights")),
    "resume_classes": Case(
        f"{PLAIN} --eval --resume FILES/five.pth", ("--resume", "five.pth", "5 classes", "10"), BOTH
    ),
    "resume_architecture": Case(
        f"{PLAIN} --resume FILES/deeper.pth", ("--resume", "deeper.pth", "architecture", "blocks.2."), BOTH
    ),
    "resume_text": Case(f"{PLAIN} --resume FILES/text.txt", ("text.txt", "no file of weights"), BOTH),
    "resume_list": Case(f"{PLAIN} --resume FILES/list.pth", ("list.pth", "list", "checkpoint")),
    "resume_other_dict": Case(f"{PLAIN} --resume FILES/epoch.pth", ("epoch.pth", "weights", "checkpoint")),
    "resume_model_is_number": Case(f"{PLAIN} --resume FILES/number.pth", ("number.pth", "weights", "checkpoint")),
    "resume_weights_alone": Case(
        f"{PLAIN} --resume FILES/ten.pth", ("--resume", "ten.pth", "optimizer", "--finetune"), BOTH
    ),
    "resume_bad_state": Case(f"{PLAIN} --resume FILES/state.pth", ("--resume", "state.pth", "--finetune")),
    "resume_code": Case(f"{PLAIN} --resume FILES/trap.pth", ("trap.pth", "refused", "open"), BOTH),
    "resume_code_legacy": Case(f"{PLAIN} --resume FILES/trap.tar", ("trap.tar", "refused", "open")),
    "resume_code_pickle": Case(f"{PLAIN} --resume FILES/trap.pkl", ("trap.pkl", "weights")),
    "finetune_architecture": Case(
        f"{PLAIN} --finetune FILES/deeper.pth", ("--finetune", "deeper.pth", "architecture", "blocks.2.")
    ),
    "finetune_model_is_number": Case(f"{PLAIN} --finetune FILES/number.pth", ("number.pth", "weights", "checkpoint")),
    "finetune_of_tleg": Case(
        f"{DIGITS} --model aux_deit_nano_patch8_32 --finetune FILES/ten.pth", ("--finetune", "ten.pth")
    ),
    "finetune_code": Case(f"{PLAIN} --finetune FILES/trap.pth", ("trap.pth", "refused", "open")),
    "finetune_code_legacy": Case(f"{PLAIN} --finetune FILES/trap.tar", ("trap.tar", "refused", "open")),
    "finetune_code_pickle": Case(f"{PLAIN} --finetune FILES/trap.pkl", ("trap.pkl", "weights")),
    "teacher_classes": Case(
        f"{TEACHER} --teacher-path FILES/five.pth", ("--teacher-path", "five.pth", "5 classes", "10"), BOTH
    ),
    "teacher_architecture": Case(
        f"{TEACHER} --teacher-path FILES/deeper.pth", ("--teacher-path", "deeper.pth", "architecture", "blocks.2.")
    ),
    "teacher_cache_of_other_images": Case(
        f"{TEACHER} --teacher-cache FILES/said --skip-bad-images", ("--teacher-cache", "--skip-bad-images")
    ),
    "shard_cache_of_nothing": Case(f"{PLAIN} --shard-cache FILES/shards", ("--shard-cache", "WDS")),
    "shard_cache_size": Case(f"{PLAIN} --shard-cache-gb 3", ("--shard-cache", "missing")),
    "teacher_without_path": Case(TEACHER, ("--teacher-path", "deit_nano_patch8_32_L2")),
    "teacher_code": Case(f"{TEACHER} --teacher-path FILES/trap.pth", ("trap.pth", "refused", "open"), BOTH),
    "teacher_code_legacy": Case(f"{TEACHER} --teacher-path FILES/trap.tar", ("trap.tar", "refused", "open")),
    "teacher_code_pickle": Case(f"{TEACHER} --teacher-path FILES/trap.pkl", ("trap.pkl", "weights")),
}
RUNS = [(name, processes) for name, case in CASES.items() for processes in case.processes]

# Started as users start them. "output" goes wrong on one process alone.
AS_USERS = {
    "option": {},
    "gene_code": {},
    "output": {"processes": 2},
    "teacher_classes": {"processes": 2, "launcher": "torch.distributed.launch"},
}

# Near misses that are right.
NO_ERRORS = {
    "odd_batch_to_evaluate": f"{PLAIN} --eval --batch-size 25",
    "odd_batch_without_mixup": f"{PLAIN} --epochs 0 --batch-size 25 --mixup 0 --cutmix 0",
    "large_batch_without_training": f"{PLAIN} --epochs 0 --batch-size 2000",
}
