"""Uploads to one repository of the Hugging Face Hub, one commit after another in the background."""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dstrain.core.log import get_logger
from dstrain.core.secrets import hidden_in_text

logger = get_logger(__name__)

LAST_CHECKPOINT = "last-checkpoint"


@dataclass(frozen=True)
class Upload:
    """Describes one commit.

    Attributes:
        message: the commit's message.
        files: path in the repository -> a file that nobody changes any more, or its content.
        replaces: folder of the repository whose other files go.
        token: instead of the publisher's.
        revision: branch, instead of the publisher's.
        held: what is let go once the upload is over, however it ended.
    """

    message: str
    files: Mapping[str, Path | bytes]
    replaces: str = ""
    token: str | None = None
    revision: str | None = None
    held: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)


class Publisher:
    """Makes the uploads of a run; used on the main rank alone, from any thread."""

    def __init__(
        self, name: str, *, token: str | None, private: bool | None, revision: str | None = None
    ) -> None:
        """Name the repository, and how it is written.

        Args:
            name: or owner/name.
            token: None takes that of the login.
            private: visibility of a new repository.
            revision: branch of uploads that name no other; None is main.
        """
        self._name, self._token, self._private = name, token, private
        self._revision = revision
        self.repo_id: str | None = None
        self._lock = threading.Lock()
        self._queue: deque[tuple[Upload, Future[Any]]] = deque()
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """Tell whether an upload is going on or waiting."""
        return self._thread is not None

    def create(self, *, token: str | None = None, private: bool | None = None) -> str:
        """Make the repository where it is not there yet; its id.

        Raises:
            Exception: of huggingface_hub, where the hub refuses or cannot be reached.
        """
        url = _api().create_repo(
            self._name,
            token=token or self._token,
            private=self._private if private is None else private,
            exist_ok=True,
        )
        self.repo_id = url.repo_id
        return url.repo_id

    def submit(self, upload: Upload) -> Future[Any]:
        """Upload after those before it; a failure is logged and kept in the result."""
        result: Future[Any] = Future()
        with self._lock:
            self._queue.append((upload, result))
            if self._thread is None:
                # Not a daemon: a script that ends waits for what is still on its way.
                self._thread = threading.Thread(target=self._work, name="hub")
                self._thread.start()
        return result

    def wait(self) -> None:
        """Until nothing is going on any more."""
        thread = self._thread
        if thread is not None:
            logger.info("waiting for the upload to %s", self._name)
            thread.join()

    def commit(self, upload: Upload) -> Any:
        """Upload now; huggingface_hub's ``CommitInfo``.

        Raises:
            Exception: of huggingface_hub, or from reading a file.
        """
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        with upload.held:
            token = upload.token or self._token
            repo_id = self.repo_id or self.create(token=token)
            operations: list[Any] = [
                CommitOperationDelete(path_in_repo=path)
                for path in self._others(repo_id, upload, token)
            ]
            operations += [
                CommitOperationAdd(path_in_repo=path, path_or_fileobj=content)
                for path, content in sorted(upload.files.items())
            ]
            return _api().create_commit(
                repo_id,
                operations,
                commit_message=upload.message,
                token=token,
                revision=upload.revision or self._revision,
            )

    def _others(self, repo_id: str, upload: Upload, token: str | None) -> list[str]:
        """Files of an earlier upload that would seem to belong to this one."""
        if not upload.replaces:
            return []
        revision = upload.revision or self._revision
        there = _api().list_repo_files(repo_id, token=token, revision=revision)
        inside = f"{upload.replaces}/"
        return [p for p in there if p.startswith(inside) and p not in upload.files]

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._thread = None
                    return
                upload, result = self._queue.popleft()
            try:
                result.set_result(self.commit(upload))
            except Exception as error:  # whatever goes wrong there is no reason to stop here
                logger.error(
                    "%r was not uploaded to %s: %s: %s",
                    upload.message,
                    self._name,
                    type(error).__name__,
                    hidden_in_text(str(error), known=[upload.token, self._token]),
                )
                result.set_exception(error)


def _api() -> Any:
    from huggingface_hub import HfApi

    return HfApi(endpoint=os.environ.get("HF_ENDPOINT"), library_name="dstrain")
