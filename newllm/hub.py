"""Models of the Hugging Face hub by their ids: ``owner/name`` or, pinned, ``owner/name@revision``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from newllm.files import one_line

SECONDS = 5.0
"""How long the hub may take to answer the one question that it is asked."""

_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([\w.-][\w./-]*))?")
_MODEL_FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


class HubId(NamedTuple):
    """A repository and what it is pinned to: a commit, tag or branch, None for its newest."""

    repo: str
    revision: str | None


def hub_id(name: str) -> HubId | None:
    """What ``name`` names on the hub; None where it has not the form of an id."""
    match = _ID.fullmatch(name)
    return HubId(match[1], match[2]) if match else None


def model_folder(path: str | Path) -> Path:
    """The folder ``path``, or the local copy of the hub model of that id, fetched or renewed if it can be.

    The hub is asked once and given a few seconds: transformers itself would retry for a minute or two. Only
    safetensors, JSON and text are fetched: nothing that holds code or a pickle.

    Raises ``FileNotFoundError`` where there is neither, ``ValueError`` for a file.
    """
    folder = Path(path)
    if folder.is_file():
        raise ValueError(f"{path} must be a model folder or hub id, got a file")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise FileNotFoundError(f"the folder {path} holds no model (no config.json)")
    if folder.is_dir():
        return folder
    found = hub_id(str(path))
    if found is None:
        raise FileNotFoundError(
            f"there is no model folder {path} (a hub id has the form owner/name or owner/name@revision)"
        )
    return _fetched(found)


def pinned_name(folder: Path) -> str | None:
    """``owner/name@commit`` of a folder that is the hub's local copy of a model, None of any other."""
    kind, _, rest = folder.parent.parent.name.partition("--")
    if folder.parent.name != "snapshots" or kind != "models":
        return None
    return f"{rest.replace('--', '/')}@{folder.name}"


def _fetched(wanted: HubId) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (  # type: ignore[attr-defined] # HTTPError is of its HTTP client
        HTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    name = wanted.repo if wanted.revision is None else f"{wanted.repo}@{wanted.revision}"
    why = "the hub could not be reached"
    try:
        HfApi().model_info(wanted.repo, revision=wanted.revision, timeout=SECONDS)
        reached = True
    except RevisionNotFoundError:
        reached, why = False, "the hub's model has no such revision"
    except RepositoryNotFoundError:
        reached, why = False, "the hub has none of that name, or only a private one"
    except (HTTPError, OSError) as error:
        reached, why = False, f"{why} ({one_line(error)})"
    try:
        return Path(
            snapshot_download(
                wanted.repo,
                revision=wanted.revision,
                allow_patterns=_MODEL_FILES,
                local_files_only=not reached,
            )
        )
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{name} is neither a model folder nor in the local cache of hub models, and {why}"
        ) from error
    except HTTPError as error:
        raise ConnectionError(f"the hub model {name} could not be fetched: {one_line(error)}") from error
