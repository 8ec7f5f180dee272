"""Models on the Hugging Face Hub: put one there, and fetch one by its id."""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

from ucc_search.artifacts import ARCH, Artifact
from ucc_search.errors import ModelError

_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_hub_id(text: str) -> bool:
    """Whether a text can be `user/name`, with a revision after @ if there is one."""
    return _ID.fullmatch(text.partition("@")[0]) is not None


def fetch(hub_id: str) -> Path:
    """The folder of a model from the Hub, downloaded once; `user/name` or `user/name@revision`.

    Fetches the plan and the weights alone: nothing of the repository is executed or unpickled.

    Raises:
        ModelError: no such model, no network, or a repository without a saved model.
    """
    from huggingface_hub import snapshot_download

    repo_id, _, revision = hub_id.partition("@")
    try:
        found = snapshot_download(
            repo_id, revision=revision or None, allow_patterns=[ARCH, "model.safetensors"]
        )
    except Exception as error:  # the client raises its own, httpx's and the system's
        raise ModelError(
            f"{hub_id}: neither a folder here nor a model that could be fetched from the Hugging Face Hub ({_short(error)})"
        ) from None
    if not (Path(found) / ARCH).is_file():
        raise ModelError(f"{hub_id}: the repository has no {ARCH}, so it is no model of ucc-search")
    return Path(found)


def push(artifact: Artifact, repo_id: str, *, private: bool = False, plugins: Any = None) -> str:
    """Upload the model as safetensors with its card; the repository is made if need be.

    The token is the one `hf auth login` or HF_TOKEN left.

    Returns:
        The address of the commit.

    Raises:
        ModelError: `repo_id` is not of the form user/name, or the Hub refused.
    """
    if not is_hub_id(repo_id) or "@" in repo_id:
        raise ModelError(f"--repo-id {repo_id!r}: expected user/name")
    from huggingface_hub import HfApi

    from ucc_search.export import export_model

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        export_model(artifact, "safetensors", folder, plugins=plugins)
        api = HfApi()
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            message = f"{artifact.name}, compressed by ucc-search"
            done = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message)
        except Exception as error:
            raise ModelError(
                f"{repo_id}: the Hugging Face Hub did not take the model ({_short(error)}); log in with `hf auth login`, "
                "and check that you may write there"
            ) from None
    return str(done.commit_url)


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
