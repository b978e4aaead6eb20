"""The Hugging Face hub: make the repository before training, upload the result after it."""

from pathlib import Path

from brisk.options import UserError, redact

NOT_UPLOADED = ["checkpoint-*", "checkpoint-*/**", "earlier-*/**", ".checkpoint-*", ".checkpoint-*/**",
                "checkpoints/**", "logs/**", "*.tmp"]  # fmt: skip


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
