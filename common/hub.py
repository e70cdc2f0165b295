"""The Hugging Face Hub: download learngenes and weights, upload trained models with a model card.

huggingface_hub is imported inside functions: it takes half a second, which local files do not need.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from common.errors import InputError, one_line

import yaml

TIMEOUT = 10.0  # seconds


def fetch_from_hub(address: str, on_hub: str) -> Path:
    """The path of ``hf-hub:owner/name[/file][@revision]`` in huggingface_hub's cache, downloaded if necessary.

    Args:
        on_hub: the file if the address does not name one.

    Raises:
        InputError: the repository, revision or file does not exist, or the Hub is unreachable.
    """
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    where, _, revision = address.removeprefix("hf-hub:").partition("@")
    owner, name, file = [*where.split("/", 2), "", ""][:3]
    if not (owner and name):
        raise InputError(f"{address} names no repository: expected hf-hub:owner/name[/file][@revision]")
    repo_id, file, revision, offline = f"{owner}/{name}", file or on_hub, revision or None, None
    try:
        # first, because a download of a missing repository, or without a network, retries for a long time
        HfApi().model_info(repo_id, revision=revision, timeout=TIMEOUT)
    except (HfHubHTTPError, ValueError) as error:
        raise InputError(f"{address} could not be downloaded: {one_line(error)}") from error
    except hub_errors() as error:  # offline
        offline = error
    try:
        return Path(hf_hub_download(repo_id, file, revision=revision, local_files_only=offline is not None))
    except LocalEntryNotFoundError as error:
        reason = one_line(offline or error)
        raise InputError(f"{address} is not in the local cache, and the Hub is unreachable: {reason}") from error
    except EntryNotFoundError as error:
        raise InputError(f"{address}: the repository has no {file}; …/{name}/FILE names another one") from error
    except hub_errors() as error:
        raise InputError(f"{address} could not be downloaded: {one_line(error)}") from error


def in_repository(address: str, file: str) -> str:
    """The address of another file of the repository and revision of an ``hf-hub:`` address."""
    where, _, revision = address.removeprefix("hf-hub:").partition("@")
    return f"hf-hub:{'/'.join([*where.split('/')[:2], file])}" + f"@{revision}" * bool(revision)


def hub_errors() -> tuple[type[Exception], ...]:
    """The exceptions of huggingface_hub that a user can resolve; its versions use different HTTP libraries."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, ValueError, RuntimeError, *HfHubHTTPError.__bases__)


def check_upload(repo_id: str) -> None:
    """Check write access before training: create the repository if it does not exist.

    Raises:
        InputError: the name is not ``owner/name``, the Hub is unreachable, or it rejects this machine's token.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise InputError(f"{repo_id} is not a repository name: expected OWNER/NAME") from error
    if "/" not in repo_id:
        raise InputError(f"{repo_id} has no owner: expected OWNER/NAME")
    try:
        with suppress(RepositoryNotFoundError):  # the only call with a time-out
            HfApi().model_info(repo_id, timeout=TIMEOUT)
        HfApi().create_repo(repo_id, exist_ok=True)
    except hub_errors() as error:
        raise InputError(f"{repo_id} cannot be written to, see `hf auth login`: {one_line(error)}") from error


def upload(folder: Path, files: Sequence[str], repo_id: str) -> str:
    """Upload ``files`` of a folder in one commit.

    Returns:
        The address of the commit.

    Raises:
        InputError: the upload failed; the folder is unchanged.
    """
    from huggingface_hub import HfApi

    message = "Upload the trained model"
    try:
        commit = HfApi().upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(files), commit_message=message
        )
    except hub_errors() as error:
        raise InputError(f"upload failed, {', '.join(files)} stay in {folder}: {one_line(error)}") from error
    return str(commit.commit_url)


def model_card(
    title: str,
    facts: Mapping[str, object],
    accuracy: Sequence[Mapping[str, float]],
    options: Mapping[str, object],
    usage: str,
) -> str:
    """The model card in Markdown: facts, accuracy, usage and training options.

    Args:
        facts: name → value, one line each.
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
