"""Pinning of a Hub dataset to one commit, from the start of a run through all resumptions.

A branch of the Hub may move while a run is interrupted. The run therefore reads a commit, never a branch, and its
checkpoints store both, as {"commit": hash, "asked": name or None}. `commit` is None if the Hub could not be reached:
`datasets` then reads its cache, of whatever revision.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import RevisionNotFoundError

from .checkpoints import recorded_data

logger = logging.getLogger(__name__)


def pin_revision(dataset: str, asked: str | None = None, checkpoint: Path | None = None) -> dict[str, str | None]:
    """Commit of a dataset that a run is to read. One process calls it for all: a branch may move between two calls.

    Args:
        dataset: Name on the Hub, or a local folder, which has no revisions.
        asked: Branch, tag or commit; None for the Hub's default branch, on resuming for what the checkpoint names.
        checkpoint: Folder of the checkpoint that is resumed. If it holds no commit (it is old, or the Hub could not be
            reached), the revision is looked up as for a new run, by the name in the checkpoint.

    Returns:
        `commit` and `asked`, for the checkpoints; `revision_to_read` turns it into the argument of `load_dataset`.

    Raises:
        ValueError: If the dataset has no such revision, or `asked` is another one than the checkpoint's.
    """
    if os.path.isdir(dataset):
        if asked is not None:
            raise ValueError(f"dataset_revision={asked!r}: dataset {dataset!r} is a local folder, which has none.")
        return {"commit": None, "asked": None}
    recorded = _recorded(dataset, checkpoint)
    if recorded["commit"] is None:
        if checkpoint is not None:
            logger.warning("%s does not say which revision of %s it read.", checkpoint.name, dataset)
        asked = recorded["asked"] if asked is None else asked
        return {"commit": _commit(dataset, asked), "asked": asked}
    commit = recorded["commit"]
    if asked not in (None, commit, recorded["asked"]):
        named = _commit(dataset, asked)
        if named != commit:
            raise ValueError(
                f"dataset_revision={asked!r} of {dataset} is {named or 'unknown here'}, {checkpoint.name} has read "
                f"{commit}: documents would be seen twice or never. Leave dataset_revision out to read on, or start a "
                "new run from the checkpoint's weights (model_name_or_path)."
            )
    _commit(dataset, commit)  # raises if it is gone: `datasets` would silently read another one from its cache
    return dict(recorded)


def revision_to_read(revision: Mapping[str, str | None]) -> str | None:
    """Argument of `load_dataset` for a pinned revision: its commit, or the name asked for if none is known."""
    return revision["commit"] or revision["asked"]


def _recorded(dataset: str, checkpoint: Path | None) -> dict[str, Any]:
    """Revision stored in a checkpoint of this dataset; None for what is not stored."""
    source = recorded_data(checkpoint).get("source") if checkpoint is not None else None
    if not source or source.get("dataset", [None])[0] != dataset:  # another dataset, which resuming refuses later
        source = {}
    return source.get("revision") or {"commit": None, "asked": None}


def _commit(dataset: str, revision: str | None) -> str | None:
    try:
        return HfApi().dataset_info(dataset, revision=revision, timeout=100.0).sha
    except RevisionNotFoundError as error:
        raise ValueError(f"dataset {dataset!r} has no revision {revision!r} on the Hub.") from error
    # Offline, no connection, no permission, no such dataset: `datasets` may have it cached, or explains the error.
    # Connection errors have no common class.
    except Exception as error:
        logger.warning(
            "dataset %s is not pinned to a revision: the Hub did not say which commit %s is (%s: %s). A copy cached "
            "by datasets may be of any revision.",
            dataset,
            "its default branch" if revision is None else repr(revision),
            type(error).__name__,
            str(error).partition("\n")[0],
        )
        return None
