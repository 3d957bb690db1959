"""Uploading a student's folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from diffdistill.config import SavingConfig
from diffdistill.errors import UserError, first_line
from diffdistill.families import Family, is_path, public_name

_REPLACED = ["*.safetensors", "*.safetensors.index.json"]
"""Files of an earlier upload that go where the new folder has none of their name: weights in other shards."""


def check_upload(saving: SavingConfig, entry: Family | None, source: str) -> None:
    """UserError where the student of the teacher `source` cannot be uploaded, before it is made."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    name = saving.push_to_hub
    if name is None:
        return
    try:
        validate_repo_id(name)
    except HFValidationError:
        name = ""
    if name.count("/") != 1 or is_path(name):
        raise UserError(f"push_to_hub: {saving.push_to_hub!r} is no OWNER/NAME of the hub, such as me/my-student")
    if saving.parts == "reference" and entry is not None and "/" not in public_name(source):
        raise UserError(
            f"parts: 'reference' leaves out what is in {source!r}, which nobody else has; give copy with --push-to-hub"
        )
    if constants.HF_HUB_OFFLINE:
        raise UserError("push_to_hub: HF_HUB_OFFLINE is set, which allows no upload; unset it")
    if get_token() is None:
        raise UserError("push_to_hub: there is no token of the hub here; run `hf auth login`, or set HF_TOKEN")


def upload(folder: Path, saving: SavingConfig) -> str | None:
    """Upload a finished folder, and return its address; None where none was asked for.

    The repository is made if it is not there. Weights of an earlier upload that the folder does not have are removed.
    Raises UserError, which says that the folder is safe and how to go on, for whatever the hub or the network refuses.
    """
    from huggingface_hub import HfApi

    if saving.push_to_hub is None:
        return None
    api = HfApi()
    try:
        made = api.create_repo(saving.push_to_hub, private=saving.hub_private, exist_ok=True)
        api.upload_folder(
            repo_id=made.repo_id,
            folder_path=folder,
            commit_message="A student made with diffdistill",
            delete_patterns=_REPLACED,
        )
    except Exception as error:  # the hub client raises a dozen unrelated types
        again = f"hf upload {saving.push_to_hub} {folder}" + (" --private" if saving.hub_private else "")
        raise UserError(
            f"push_to_hub: the student is whole in {folder}, but could not be uploaded ({_reason(error)}); "
            f"try again: {again}"
        ) from error
    return str(made)


def _reason(error: Exception) -> str:
    """What went wrong, for people who do not know HTTP's numbers."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    words = {401: "the token is not valid", 403: "the token may not write there", 404: "there is no such owner"}
    return words.get(status or 0) or first_line(error)
