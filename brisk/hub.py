"""The Hugging Face hub: make the repository before training, upload the result after it; why a model cannot be had."""

import re
from pathlib import Path

from brisk.options import UserError, redact

NOT_UPLOADED = ["checkpoint-*", "checkpoint-*/**", "earlier-*/**", ".checkpoint-*", ".checkpoint-*/**",
                "checkpoints/**", "logs/**", "*.tmp"]  # fmt: skip


def why(error, source=None, limit=300):
    """Why something of the hub or of a folder cannot be loaded, in a clause.

    Args: `source`: folder or hub id; the clause ends with what to do about an id that cannot be reached; `limit`: the most
    characters of the library's own reason.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import LocalEntryNotFoundError

    text, cause = " ".join(str(error).split())[:limit], error
    while cause is not None and not isinstance(cause, LocalEntryNotFoundError):
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    if cause is not None:  # of which the libraries say that the repository lacks the file
        away = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else f"{constants.ENDPOINT} cannot be reached"
        text = f"its files are not all in the cache and {away}"
    is_id = source is not None and re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", source) and not Path(source).exists()
    if not is_id or (cause is None and not constants.HF_HUB_OFFLINE):
        return text
    return f"{text.rstrip('.')}; give a folder, or get it beforehand by `hf download {source}`."


def create_repository(output_dir, model_id, token):
    """Create (or find) the repository and return its id; UserError if the hub refuses or cannot be reached."""
    from huggingface_hub import create_repo

    name = model_id or Path(output_dir).resolve().name
    try:
        return create_repo(repo_id=name, exist_ok=True, token=token).repo_id
    except Exception as error:  # the client raises its own, httpx's and OSError
        reason = redact(" ".join(str(error).split())[:300], token)
        raise UserError(f"--push_to_hub: the repository '{name}' cannot be created: {reason}") from None


def upload(output_dir, repo_id, token, logging_dir):
    """Upload the output folder without checkpoints and logs; UserError if that fails (the folder stays)."""
    from huggingface_hub import upload_folder

    ignored = [*NOT_UPLOADED, f"{logging_dir}/**"]
    try:
        upload_folder(repo_id=repo_id, folder_path=output_dir, commit_message="Upload the trained model",
                      ignore_patterns=ignored, token=token)  # fmt: skip
    except Exception as error:
        reason = redact(" ".join(str(error).split())[:300], token)
        raise UserError(
            f"--push_to_hub: the upload to '{repo_id}' failed, the model is complete in {output_dir}: {reason}", 1
        ) from None
