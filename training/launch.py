"""A run from its command line: options, processes, downloads, and the errors of all processes reported once."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

import utils
from common.devices import has_float64
from common.download import fetch
from common.errors import InputError, error_context
from common.hub import in_repository
from pipeline.folders import download
from training.build_data import splits_needed
from training.build_model import Builder
from training.checkpoints import find_checkpoint
from training.checks import check, kind_of_run
from training.command_line import parse_options
from training.config import TAGGED, TIMM, Config, RuntimeConfig, option_name, resolve, tagged_name, weight_sources
from training.foreign_weights import fetch_tag
from training.outputs import push
from training.pinned_data import is_pinnable, pin_data
from training.preprocessing import with_input_size
from training.run import Run, describe
from training.setup import is_address, set_up
from utils import print_main

DOWNLOADING, SETTING_UP = timedelta(days=1), timedelta(hours=1)  # how much longer one process may take than another


@contextmanager
def launched(argv: Sequence[str]) -> Iterator[Config]:
    """Parse and check the command line, join the other processes, and download what the options name by address.

    Errors inside are printed once for all processes, and end them with status 2 if the user can correct them.
    """
    config, mistake = None, None
    try:
        config = parse_options(argv)
    except InputError as error:
        mistake = error  # the same on all processes, and reported once they are connected
    try:
        runtime = config.runtime if config else RuntimeConfig(dist_timeout=1)
        utils.init_distributed(timedelta(minutes=runtime.dist_timeout), runtime.device)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    with utils.failures_reported_once():
        with utils.errors_reported_once(patience=DOWNLOADING):
            if mistake:
                raise mistake
            config = prepare(config)
        yield share_findings(config)
        utils.shutdown_distributed()


def prepare(config: Config) -> Config:
    """Resolve and check the options, look for the checkpoint to resume, and download what is given by address.

    On the main process, a data set of the Hub then has its commit.

    Raises:
        InputError: options that do not fit each other, or something that cannot be downloaded.
    """
    config = resolve(with_input_size(config))
    check(config)
    config = config.with_options(resume=find_checkpoint(config))
    fetch_addresses(config)
    fetch_data(config)
    return pin_data(config)


def share_findings(config: Config) -> Config:
    """What only the main process looks for, on all processes: checkpoint, size of images, commit of the data."""
    found = config.runtime.resume, config.data.input_size, config.data.data_path
    resume, size, data_path = utils.broadcast_from_main(found)
    config = config.with_options(resume=resume, input_size=size)
    return config.with_options(data_path=data_path) if is_pinnable(config.data) else config  # folders may differ


def fetch_addresses(config: Config) -> None:
    """Download the weights that options name by address, those of timm, and what a repository says about them.

    Once per machine.
    """
    if utils.local_rank() != 0:
        return
    for option, (source, file) in weight_sources(config.model, config.teacher, config.runtime.resume).items():
        with error_context(option_name(option)):
            if is_address(source):
                fetch(source, on_hub=file)
            elif source == TIMM and option in TAGGED:
                fetch_tag(tagged_name(config.model, option))
            if source.startswith("hf-hub:") and option not in ("load_gene", "resume"):
                with suppress(InputError):  # not every repository has one
                    fetch(in_repository(source, "config.json"))  # it then lies beside the weights


def fetch_data(config: Config) -> None:
    """With --download: download the data set if it is missing, once per machine."""
    data = config.data
    if data.download and utils.local_rank() == 0:
        download(data.data_set, data.data_path, splits_needed(data, config.runtime.eval))


def start(config: Config, build: Builder) -> Run:
    """Build the run on all processes, after the first has downloaded what they need."""
    with utils.errors_reported_once(patience=SETTING_UP):
        run = set_up(config, build)
    if not (config.runtime.resume or config.runtime.eval):  # all start from one order of neurons, also the averages
        utils.broadcast_weights(run.model)
        if run.ema is not None:
            utils.broadcast_weights(run.ema.module)
    print_main(f"{kind_of_run(config.model)}: {describe(run.model)}, on {run.device}, {utils.world_size()} process(es)")
    if not has_float64(run.device):
        print_main(f"{run.device} has no float64: losses and accuracies are summed on the CPU, which takes longer")
    return run


def finish(run: Run, status: int) -> None:
    """Report files that could not be written, and upload to the Hub with --push-to-hub."""
    with utils.errors_reported_once(patience=DOWNLOADING):
        if status == 0:
            check_written(run)
        if run.config.output.push_to_hub and utils.is_main() and status == 0:
            push(run)


def check_written(run: Run) -> None:
    """Raises InputError if files of the last epoch could not be written."""
    if run.output.failed:
        what, why = next(iter(run.output.failed.items()))
        raise InputError(f"--output-dir {run.output_dir} lacks what was trained last: {what} ({why})")
