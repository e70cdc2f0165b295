"""A run: its options, what it is built of, its loop, what it writes.

config = training.Config(model=training.ModelConfig(model="resnet18"), data=training.DataConfig(data_set="DIGITS"))
result = training.train(config, training.build_plain_model)
"""

from importlib import import_module

from common import torchvision_ops  # noqa: F401  before torchvision is imported

_EXPORTS = {  # imported when they are first used: a script that needs one part does not wait for all
    "training.api": ("Result", "evaluate", "train"),
    "training.build_model": ("build_aux_net", "build_des_net", "build_plain_model"),
    "training.config": (
        *("AugmentConfig", "Config", "DataConfig", "ModelConfig", "OptimConfig", "OutputConfig", "RuntimeConfig"),
        *("ScheduleConfig", "TeacherConfig"),
    ),
}
_MODULES = {name: module for module, names in _EXPORTS.items() for name in names}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
