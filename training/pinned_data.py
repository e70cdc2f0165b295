"""The commit of a data set of the Hub: that of the checkpoint to resume, else the one that its revision is now.

A branch may change at any time. It is looked up once, by the main process and before the options are recorded, so that
all processes and splits read the same images, and a run that is continued goes on with them.
"""

from collections.abc import Mapping
from pathlib import Path

import utils
from common.download import fetch
from common.errors import InputError
from common.files import read_checkpoint
from common.hub_datasets import COMMIT, ON_HUB, is_on_hub, pinned
from pipeline.parquet_files import names_dataset
from training.build_data import shard_cache_of
from training.config import CHECKPOINT, Config, DataConfig
from utils import print_main


def is_pinnable(data: DataConfig) -> bool:
    """Whether the images are on the Hub; without --shard-cache a later check says that it is missing."""
    path = data.data_path or ""
    on_hub = names_dataset(path) if data.data_set == "HF" else data.data_set == "WDS" and is_on_hub(path)
    return bool(path and data.shard_cache and on_hub)


def pin_data(config: Config) -> Config:
    """A copy of ``config`` whose data set of the Hub has its commit, on the main process; see `share_findings`.

    Raises:
        InputError: there is no such data set or revision, or it is not what the checkpoint to resume was trained on.
    """
    data = config.data
    if not utils.is_main() or not is_pinnable(data):
        return config
    name, _, revision = data.data_path.partition("@")
    recorded = recorded_commit(config, name)
    if recorded and not revision:
        print_main(f"--data-path {name}: goes on with its commit {recorded}, as in --resume {config.runtime.resume}")
        return config.with_options(data_path=f"{name}@{recorded}")
    shard_cache_of(data).prepare()
    found = pinned(data.data_path, Path(data.shard_cache))
    if recorded and found != f"{name}@{recorded}":
        now = "" if COMMIT.fullmatch(revision) else f", now {found.partition('@')[2]},"
        raise InputError(
            f"--data-path {data.data_path}{now} is not what --resume {config.runtime.resume} was trained on: expected "
            f"{name}@{recorded}"
        )
    return config.with_options(data_path=found)


def recorded_commit(config: Config, name: str) -> str | None:
    """The commit of the data set ``name`` that the checkpoint to resume was trained on; None if it does not say it."""
    if not config.runtime.resume or config.runtime.eval:
        return None
    options = read_checkpoint(fetch(config.runtime.resume, on_hub=CHECKPOINT), mapped=True).get("args")
    path = options.get("data_path") if isinstance(options, Mapping) else None  # of another program: a Namespace
    theirs, _, commit = path.partition("@") if isinstance(path, str) else ("", "", "")
    same = theirs.removeprefix(ON_HUB) == name.removeprefix(ON_HUB)
    return commit if same and COMMIT.fullmatch(commit) else None
