"""Saving drafts in the format, and publishing them on the Hugging Face Hub."""

import os
from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedModel

from speculators.checkpoint.hub.upload import SAVED, check_upload, upload
from speculators.checkpoint.output.stamp import README, write_stamped
from speculators.families.card import model_card
from speculators.models.config import SpeculatorPretrainedConfig

__all__ = ["SavableDraft"]

UPLOAD_OPTIONS = {
    "commit_message": "message",
    "commit_description": "description",
    "private": "private",
    "token": "token",
    "revision": "revision",
    "create_pr": "create_pr",
}
"""transformers' names of options → those of ``checkpoint.upload``."""


class SavableDraft(PreTrainedModel):
    """A draft that is saved with a model card, and published by the rules of ``publish``."""

    config_class: ClassVar[type[SpeculatorPretrainedConfig]]  # type: ignore[misc]
    config: SpeculatorPretrainedConfig

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Save the draft as a directory in the format, with a model card (README.md).

        A README.md that a person wrote or edited is kept.

        Args:
            save_directory: the directory, created if needed.
            is_main_process: as for ``PreTrainedModel.save_pretrained``.
            state_dict: as for ``PreTrainedModel.save_pretrained``.
            push_to_hub: also upload the directory. The arguments of ``push_to_hub`` are then
                accepted too; ``repo_id`` defaults to the directory's name.
            **kwargs: as for ``PreTrainedModel.save_pretrained``: ``max_shard_size``, ...

        Raises:
            HubError: if it cannot be uploaded.

        """
        directory = Path(save_directory)
        options = {new: kwargs.pop(old) for old, new in UPLOAD_OPTIONS.items() if old in kwargs}
        repo_id = kwargs.pop("repo_id", directory.name)
        if push_to_hub:
            check_upload(repo_id, revision=options.get("revision"), token=options.get("token"))
        kwargs |= {"is_main_process": is_main_process, "state_dict": state_dict}
        self._save(directory, repo_id if push_to_hub else None, **kwargs)
        if push_to_hub and is_main_process:
            upload(directory, repo_id, files=SAVED, **options)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str = "50GB",
        tags: Collection[str] | str | None = None,
    ) -> str:
        """Upload the draft to the Hugging Face Hub in one commit, with a model card.

        Args:
            repo_id: ``organization/name``, or ``name`` for a repository of the token's owner; it
                is created if it does not exist.
            commit_message: the first line of the commit message.
            commit_description: the rest of the commit message.
            private: whether a new repository is private; the Hub's default if not given.
            token: an access token; the one that the Hub client is logged in with if not given.
            revision: the branch, created if it does not exist; ``main`` if not given.
            create_pr: open a pull request instead of committing to the branch.
            max_shard_size: the size limit of weight files, as for ``save_pretrained``.
            tags: for the model card, in addition to the default ones.

        Returns:
            The URL of the commit or pull request.

        Raises:
            HubError: if it cannot be uploaded, or the repository holds something other than a
                converted draft.

        """
        check_upload(repo_id, revision=revision, token=token)
        with TemporaryDirectory() as folder:
            self._save(Path(folder), repo_id, tags=tags, max_shard_size=max_shard_size)
            return upload(
                Path(folder),
                repo_id,
                message=commit_message,
                description=commit_description,
                private=private,
                token=token,
                revision=revision,
                create_pr=create_pr,
                files=SAVED,
            )

    def _save(
        self,
        directory: Path,
        name: str | None,
        *,
        tags: Collection[str] | str | None = None,
        is_main_process: bool = True,
        **kwargs: Any,
    ) -> None:
        super().save_pretrained(directory, is_main_process, **kwargs)
        if not is_main_process:
            return
        own = {
            key: parameter
            for key, parameter in self.named_parameters()
            if key not in (self._keys_to_ignore_on_save or ())
        }
        family = self.config_class.family
        config = self.config.checked()
        card = model_card(
            name,
            family,
            config,
            parameters=sum(parameter.numel() for parameter in own.values()),
            features=family.features_of(own),
            tags=[tags] if isinstance(tags, str) else tags or (),
        )
        write_stamped(directory / README, card)
