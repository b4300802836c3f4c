"""Loading of weights that refuses pickles, damaged files, and weights that do not fit the config."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from .tensor_parallel import check_divisible


class StrictLoading:
    """Mixin; list it before `PreTrainedModel` in the bases of a model class.

    Attributes:
        tensor_parallel_sizes: Fields of the config that the number of processes must divide for tensor parallelism.
    """

    tensor_parallel_sizes: tuple[str, ...] = ()

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path | None,
        *model_args: Any,
        use_safetensors: bool | None = None,
        ignore_mismatched_sizes: bool = False,
        output_loading_info: bool = False,
        **kwargs: Any,
    ) -> PreTrainedModel:
        """Transformers' `from_pretrained`, with errors where it only warns.

        Transformers initialises missing tensors at random, ignores unknown ones, and reads pickles.

        Raises:
            ValueError: If the weights are pickles; if a safetensors file is damaged; if a tensor is missing, unknown
                to the model, or (unless `ignore_mismatched_sizes`) of another shape. The message names it.
        """
        source = pretrained_model_name_or_path
        _refuse_pickle(source, use_safetensors)
        try:
            model, info = super().from_pretrained(
                source,
                *model_args,
                use_safetensors=True,
                ignore_mismatched_sizes=True,  # they are returned in `info`, and refused below
                output_loading_info=True,
                **kwargs,
            )
        except SafetensorError as error:
            raise ValueError(
                f"{_damaged_file(source)} is not a complete safetensors file ({error}); copy or download it again."
            ) from error
        mismatched = set() if ignore_mismatched_sizes else info["mismatched_keys"]
        _refuse_foreign_tensors(source, info["missing_keys"], info["unexpected_keys"], mismatched)
        head, wte = model.get_output_embeddings(), model.get_input_embeddings()
        if head is not None and model.config.tie_word_embeddings and head.weight is not wte.weight:
            tying = model.config.attribute_map.get("tie_word_embeddings", "tie_word_embeddings")
            raise ValueError(
                f"{source}: {tying} is true, but the file holds an output layer that differs from the embedding; set "
                f"{tying} to false in config.json to keep both."
            )
        return (model, info) if output_loading_info else model

    @classmethod
    def maybe_distribute_model(cls, model: PreTrainedModel, distributed_config: Any, *args: Any) -> PreTrainedModel:
        """Called by `from_pretrained` before it reads weights.

        Raises:
            ValueError: If the number of processes does not divide `tensor_parallel_sizes`.
        """
        if distributed_config is not None and cls.tensor_parallel_sizes:
            check_divisible(model.config, cls.tensor_parallel_sizes, distributed_config.tp_size or 1)
        return super().maybe_distribute_model(model, distributed_config, *args)


def _refuse_pickle(source: str | Path | None, use_safetensors: bool | None) -> None:
    if use_safetensors is False:
        raise ValueError(
            "use_safetensors=False reads pickles, which run code when loaded and are refused; convert the weights to "
            "model.safetensors and remove the argument."
        )
    folder = Path(source) if source is not None else None
    if folder is None or not folder.is_dir() or any(folder.rglob("*.safetensors*")):
        return
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
    if pickles:
        raise ValueError(
            f"{source} holds only pickle weights ({', '.join(pickles)}), which run code when loaded and are refused; "
            "convert them to model.safetensors."
        )


def _damaged_file(source: str | Path | None) -> str:
    """The first safetensors file of a folder that cannot be opened, or the source itself if it is not a folder."""
    if source is not None and Path(source).is_dir():
        for path in sorted(Path(source).rglob("*.safetensors")):
            try:
                with safe_open(path, framework="pt"):
                    continue
            except SafetensorError:
                return str(path)
    return str(source)


def _refuse_foreign_tensors(
    source: str | Path | None, missing: set[str], unexpected: set[str], mismatched: set[tuple]
) -> None:
    problems = []
    if missing:
        problems.append(f"The checkpoint lacks {_some(missing)}.")
    if unexpected:
        problems.append(f"The model does not have {_some(unexpected)}.")
    if mismatched:
        shapes = {f"{name} {tuple(file)} instead of {tuple(model)}" for name, file, model in mismatched}
        problems.append(f"The checkpoint has {_some(shapes)}.")
    if problems:
        raise ValueError(
            f"{source} does not fit its config. {' '.join(problems)} Nothing was loaded; check that config.json "
            "belongs to these weights and that no file is missing."
        )


def _some(names: set[str]) -> str:
    first = ", ".join(sorted(names)[:4])
    return first if len(names) <= 4 else f"{first} and {len(names) - 4} more tensors"
