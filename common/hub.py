"""The Hugging Face Hub: learngenes and weights from it; trained models to it, with a card.

huggingface_hub is imported where it is used: half a second that local files need not wait for.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from common.errors import InputError, one_line

import yaml

SECONDS = 10.0  # without an answer, after which the Hub is given up


def from_hub(address: str, on_hub: str) -> Path:
    """The file of ``hf-hub:owner/name[/file][@revision]`` in huggingface_hub's cache, downloaded if it is not there.

    Args:
        on_hub: the file that is meant where the address names none.

    Raises:
        InputError: there is no such repository, revision or file, or the Hub cannot be reached.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    where, _, revision = address.removeprefix("hf-hub:").partition("@")
    owner, name, file = [*where.split("/", 2), "", ""][:3]
    if not (owner and name):
        raise InputError(f"{address} names no repository: expected hf-hub:owner/name[/file][@revision]")
    repo_id, file, revision, offline = f"{owner}/{name}", file or on_hub, revision or None, None
    try:
        # asked first: the download itself would try again and again where there is no such thing, or no network
        HfApi().model_info(repo_id, revision=revision, timeout=SECONDS)
    except (HfHubHTTPError, ValueError) as error:
        raise InputError(f"{address} could not be downloaded: {one_line(error)}") from error
    except hub_errors() as error:  # offline, or as good as that
        offline = error
    try:
        return Path(hf_hub_download(repo_id, file, revision=revision, local_files_only=offline is not None))
    except LocalEntryNotFoundError as error:
        reason = one_line(offline or error)
        raise InputError(f"{address} is not kept on this machine, and the Hub not reached: {reason}") from error
    except EntryNotFoundError as error:
        raise InputError(f"{address}: the repository has no {file}; …/{name}/FILE names another one") from error
    except hub_errors() as error:
        raise InputError(f"{address} could not be downloaded: {one_line(error)}") from error


def hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for what a user can put right; its versions use different HTTP libraries."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)


def check_upload(repo_id: str) -> None:
    """Make the repository if need be, before any long work, and with that see whether it may be written to.

    Raises:
        InputError: the name is not ``owner/name``, the Hub cannot be reached, or does not accept this machine's token.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise InputError(f"{repo_id} is no name of a repository: expected OWNER/NAME") from error
    if "/" not in repo_id:
        raise InputError(f"{repo_id} has no owner: expected OWNER/NAME")
    try:
        with suppress(RepositoryNotFoundError):  # the one question that takes a time-out
            HfApi().model_info(repo_id, timeout=SECONDS)
        HfApi().create_repo(repo_id, exist_ok=True)
    except hub_errors() as error:
        raise InputError(f"{repo_id} cannot be written to, see `hf auth login`: {one_line(error)}") from error


def upload(folder: Path, files: Sequence[str], repo_id: str) -> str:
    """Upload ``files`` of a folder in one commit, and return its address.

    Raises:
        InputError: the upload failed; the folder is as it was.
    """
    from huggingface_hub import HfApi

    message = "Upload what was trained"
    try:
        commit = HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(files), commit_message=message
        )
    except hub_errors() as error:
        raise InputError(f"not uploaded, {', '.join(files)} stay in {folder}: {one_line(error)}") from error
    return str(commit.commit_url)


def model_card(
    title: str,
    facts: Mapping[str, object],
    accuracy: Sequence[Mapping[str, float]],
    options: Mapping[str, object],
    usage: str,
) -> str:
    """The text of a card: what it is, where it comes from, how it was trained, what was measured, how to use it.

    Args:
        facts: name → value, each a line.
        accuracy: the lines of ``log.txt``; the first and the last are shown.
        options: of the run, as in ``args.yaml``.
        usage: Python code.
    """
    head = {"library_name": "timm", "pipeline_tag": "image-classification", "tags": ["learngene", "timm"]}
    columns = [name for name in ("test_acc1", "test_acc5", "ema_test_acc1") if name in accuracy[-1]]
    chosen = accuracy if len(accuracy) < 3 else (accuracy[0], accuracy[-1])
    rows = [["epochs trained", *(f"{name} (%)" for name in columns)], ["---"] * (1 + len(columns))]
    rows += [
        [str(line["epoch"] + 1), *(f"{line[name]:.2f}" if name in line else "" for name in columns)] for line in chosen
    ]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    lines = "\n".join(f"- **{name}**: {value}" for name, value in facts.items())
    return (
        f"---\n{yaml.safe_dump(head)}---\n\n# {title}\n\n{lines}\n\n## Accuracy\n\n{table}\n\n## Use\n\n"
        f"```python\n{usage}\n```\n\n## Recipe\n\n```yaml\n{yaml.safe_dump(dict(options))}```\n"
    )
