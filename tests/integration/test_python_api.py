"""Runs from Python, without a command line, and the dataclasses of the options."""

import dataclasses
import json

import main
import models
import training
from common.errors import InputError
from options import option_parser, place_or_none
from training.command_line import parse_options
from training.config import Config, named_values, options_in_effect, options_of, resolve, weight_sources

import pytest
import torch
from safetensors.torch import load_file
from timm.models import VisionTransformer
from torch import nn

DIGITS = training.DataConfig(data_set="DIGITS", train_images=256, batch_size=32, num_workers=0)
ONE_EPOCH = training.ScheduleConfig(epochs=1, warmup_epochs=0)
ON_CPU = training.RuntimeConfig(device="cpu")
VIT = training.ModelConfig(model="deit_nano_patch4_28_L2")
COMMAND = "--data-set DIGITS --train-images 256 --batch-size 32 --num-workers 0 --warmup-epochs 0 --device cpu"


def config_of(model: training.ModelConfig, folder: object = None, **more: object) -> Config:
    output = training.OutputConfig(output_dir=folder and str(folder))
    return Config(model=model, data=DIGITS, schedule=ONE_EPOCH, runtime=ON_CPU, output=output).with_options(**more)


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def test_a_run_from_python_is_that_of_the_command_line(tmp_path):
    result = training.train(config_of(VIT), training.build_plain_model)
    assert main.main(f"{COMMAND} --model {VIT.model} --epochs 1 --output-dir {tmp_path}".split()) == 0
    lines = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert (result.status, result.epochs) == (0, lines)
    assert isinstance(result.model, VisionTransformer)
    assert result.ema is not None
    written = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(tensor, written[name]) for name, tensor in result.model.state_dict().items())


def test_both_stages_from_python(tmp_path):
    aux = training.ModelConfig(src_arch="deit_nano_patch8_16_L2_H1", tgt_arch="deit_nano_patch8_16_L4_H2")
    result = training.train(config_of(aux, tmp_path), training.build_aux_net)
    assert isinstance(result.model, models.LeTs)
    des = training.ModelConfig(
        des_arch="deit_nano_patch8_16_L3", load_gene=str(tmp_path / "learngene.safetensors"), mapping_layer=(0, 1, 2)
    )
    with pytest.raises(InputError, match="mapping_layer_coeff"):
        training.evaluate(config_of(des), training.build_des_net)
    des = dataclasses.replace(des, mapping_layer=None)
    before = training.evaluate(config_of(des), training.build_des_net)
    trained = training.train(config_of(des), training.build_des_net)
    assert [line["epoch"] for line in trained.epochs] == [-1, 0]
    assert before == {name: trained.epochs[0][f"test_{name}"] for name in before}


def test_a_network_of_ones_own(tmp_path):
    def build(config: training.ModelConfig, input_size: int, num_classes: int, gene: None) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * input_size**2, num_classes))

    assert len(training.train(config_of(VIT), build).epochs) == 1


def test_combinations_are_checked_before_anything_is_built():
    def build(*_: object) -> nn.Module:
        raise AssertionError

    for config, message in (
        (config_of(training.ModelConfig()), "nothing to run"),
        (config_of(VIT, batch_size=31), "--batch-size 31 is odd"),
        (config_of(VIT, cutmix_minmax=(0.6, 0.2)), "--cutmix-minmax 0.6 0.2: expected MIN ≤ MAX"),
        (config_of(VIT, trans_init_noise=(0.1, 0.1)), "--trans-init-noise needs --src-arch and --tgt-arch"),
        (config_of(VIT, push_to_hub="a/b"), "--push-to-hub uploads .* --output-dir is missing"),
        (config_of(VIT, data_set="IMNET", cache_data=True), "--cache-data cannot hold --data-set IMNET"),
    ):
        with pytest.raises(InputError, match=message):
            training.train(config, build)


# ---------------------------------------------------------------------------------------------------------------------
# Dataclasses
# ---------------------------------------------------------------------------------------------------------------------


def test_every_option_has_a_field_of_its_name_and_default():
    options = vars(option_parser().parse_args([]))
    del options["config"]
    assert options_of(Config()) == options
    assert parse_options([]) == Config()


def test_fields_that_name_places_are_the_options_that_take_one():
    taking_a_path = {action.dest for action in option_parser()._actions if action.type is place_or_none} - {"config"}
    local = {name for name, _, is_local in named_values(Config()) if is_local}
    assert local == taking_a_path - {"resume"} | {"download", "shard_cache_gb"}
    everything = Config().with_options(**dict.fromkeys(taking_a_path, "file"))
    weights = weight_sources(everything.model, everything.teacher, everything.runtime.resume)
    assert weights.keys() == taking_a_path - {"data_path", "shard_cache", "teacher_cache", "output_dir"}


def test_resolving_twice_is_resolving_once():
    config = resolve(parse_options(["--model", "resnet18", "--data-set", "DIGITS"]))
    assert (config.data.input_size, config.optim.model_ema) == (32, True)
    assert config.runtime.device in ("cpu", "cuda")
    assert resolve(config) == config
    assert resolve(Config().with_options(model="deit_tiny_patch16_224_L3", eval=True)).optim.model_ema is False
    assert options_in_effect(config)["input_size"] == 32


def test_an_option_that_does_not_exist_is_an_error():
    with pytest.raises(TypeError, match="unknown options: learning_rate"):
        Config().with_options(learning_rate=1.0)
