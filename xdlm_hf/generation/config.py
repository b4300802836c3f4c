"""Options of diffusion generation, stored as generation_config.json. None means "not set" everywhere."""

from typing import Any

from transformers.generation import GenerationConfig
from transformers.utils import logging

from .options import ACCEPTED, OPTIONS, TABLE, markdown_table
from .resolution import check_options
from .spelling import compose, flatten

logger = logging.get_logger(__name__)


class XDLMGenerationConfig(GenerationConfig):
    """
    Options of [`XDLMGenerationMixin.generate`], stored as generation_config.json. Every option is `None`, "not set", by
    default; `generate` then applies the default named below.

    An option with several settings is a dict, `refinement={"policy": "threshold", "threshold": 0.9}`, or, if only the
    first setting is given, its value, `cache="prefix"`. Each setting is also accepted by the name in brackets, as a
    keyword and in a stored file; ReMDM's policies also as `remask_cap`, `remask_rescale` and `remask_confidence`.

    {table}

    Raises:
        ValueError: For an unknown option, a value outside its range, or options that do not go together.
    """

    OPTIONS = OPTIONS
    _METADATA = ("_commit_hash", "_from_model_config", "transformers_version")

    def __init__(self, **kwargs: Any):
        # The parent's __init__ is not called: it would set options of autoregressive decoding, ignored here.
        for name in self._METADATA:
            setattr(self, name, kwargs.pop(name, None))
        rows, labels = flatten({name: value for name, value in kwargs.items() if value is not None})
        check_options(rows, labels)
        for name, value in compose(rows).items():
            setattr(self, name, value)

    def given(self) -> dict[str, Any]:
        """The options that are set."""
        return {name: value for name, value in vars(self).items() if name in ACCEPTED and value is not None}

    def validate(self, **_: Any) -> None:
        """Raise ValueError for options that are invalid for every model; `generate` checks those of one model."""
        check_options(*flatten(self.given()))

    @staticmethod
    def _get_default_generation_params() -> dict[str, Any]:
        return {name: row.value for name, row in TABLE.items() if row.value is not None}

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> "XDLMGenerationConfig":
        """From a stored generation_config.json; options of autoregressive decoding are dropped with a warning."""
        foreign = sorted(name for name in config_dict if name not in ACCEPTED + cls._METADATA)
        # `max_length` is what an autoregressive model may generate at most; here it would be computed in every call.
        foreign += [name for name, row in TABLE.items() if not row.stored_for and config_dict.get(name) is not None]
        if isinstance(config_dict.get("use_cache"), bool):  # refers to the autoregressive cache
            foreign.append("use_cache")
        if named := [name for name in foreign if config_dict[name] is not None]:
            logger.warning(f"generation_config.json holds options that diffusion generation does not read: {named}.")
        return super().from_dict({k: v for k, v in config_dict.items() if k not in foreign}, **kwargs)

    @classmethod
    def from_model_config(cls, model_config: Any) -> "XDLMGenerationConfig":
        """An empty config: `generate` reads the model config when it runs."""
        return cls(_from_model_config=True)


XDLMGenerationConfig.__doc__ = (XDLMGenerationConfig.__doc__ or "").replace(
    "{table}", markdown_table().replace("\n", "\n    ")
)
