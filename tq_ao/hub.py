"""Publishing a converted model: one commit to the Hub."""

import shlex
from collections.abc import Iterator
from pathlib import Path

from tq_ao.errors import HubError
from tq_ao.model_card import published


def push(
    folder: str | Path, repo_id: str, private: bool = False, token: str | None = None, message: str | None = None
) -> str:
    """Upload a folder to the Hub as one commit; the repository is created if there is none.

    What is published names itself: the card's example loads the full id, wherever the folder was made.

    Args:
        folder: a converted model; it is read, never changed.
        repo_id: "org/name", or "name" for a repository of the token's owner.
        private: visibility of a repository that is created; an existing one keeps its own.
        token: access token with write permission; None uses the one of `hf auth login` or HF_TOKEN.
        message: commit message.

    Returns:
        URL of the repository.

    Raises:
        HubError: no token, a refused token, no network, or an upload that broke off.  The Hub then has no commit of
            this folder (an empty repository may exist), and the folder is as it was.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise HubError(f"expected the folder of a converted model, got {folder} without config.json: convert first")
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.utils import DEFAULT_IGNORE_PATTERNS, filter_repo_objects

    retry = f"{folder} is complete; to retry: {upload_command(folder, repo_id, private)}"
    if not (token or get_token()):
        todo = "pass --token, or log in with `hf auth login`"
        raise HubError(f"not published: there is no access token ({todo}). {retry}")
    api = HfApi(token=token, library_name="tq_ao")
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        renamed = published(folder, url.repo_id)
        files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
        api.create_commit(  # upload_folder makes several commits of a large folder
            url.repo_id,
            [
                CommitOperationAdd(name, renamed.get(name, files[name]))
                for name in filter_repo_objects(files, ignore_patterns=DEFAULT_IGNORE_PATTERNS)
            ],
            commit_message=message or "Upload model with a packed TurboQuant KV cache",
        )
    except Exception as error:  # whatever it was, the user needs to know that the output is safe
        raise HubError(f"not published: {_cause(error, repo_id)}. {retry}") from error
    return str(url)


def upload_command(folder: str | Path, repo_id: str, private: bool) -> str:
    """What publishes a folder by hand."""
    return shlex.join(["hf", "upload", repo_id, str(folder), *(["--private"] if private else [])])


def check_token(token: str | None) -> None:
    """Raise ValueError if there is no access token, this one or that of a login, or the Hub says that it refuses it."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import HfHubHTTPError

    if not (token or get_token()):
        raise ValueError(
            "expected an access token with --push-to-hub, got none; pass --token, set HF_TOKEN, or log in with "
            "`hf auth login`"
        )
    try:
        HfApi(token=token or None).whoami()
    except HfHubHTTPError as error:
        if error.response.status_code == 401:
            raise ValueError(
                "expected an access token that the Hub accepts with --push-to-hub, got one that it refuses; pass a "
                "valid one with --token, or log in with `hf auth login`"
            ) from error
    except Exception:  # no answer now: publishing asks again, and says what went wrong
        pass


def _cause(error: BaseException, repo_id: str) -> str:
    """What went wrong and what to do about it, in a clause without line breaks."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

    chain = list(_chain(error))
    for link in chain:
        if isinstance(link, HFValidationError):
            return f"{repo_id!r} is not a repository name (expected 'org/name')"
        if isinstance(link, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set (unset it to publish)"
        if isinstance(link, HfHubHTTPError):
            status = link.response.status_code
            if status == 401:
                return "the Hub refused the access token (pass a valid one with --token, or `hf auth login`)"
            if status == 403:
                return f"this access token may not write to {repo_id} (it needs the write role there)"
            return f"the Hub answered {status} {_line(link.server_message or link)}"
    return f"the connection to the Hub failed ({type(chain[-1]).__name__}: {_line(chain[-1])})"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _line(text: object) -> str:
    lines = str(text).strip().splitlines()
    return lines[0][:200] if lines else "no reason given"
