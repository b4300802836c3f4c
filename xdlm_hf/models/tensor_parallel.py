"""Tensor parallelism: styles of sharding that Transformers lacks, and the check that layers divide.

The `base_model_tp_plan` of a config says how `from_pretrained(..., tp_plan="auto")` divides a layer among the
processes. "colwise" gives each a part of the outputs, here whole heads or a part of the MLP's width; "rowwise" gives
each the matching part of the inputs and sums the results. Embedding, norms, modulation and output layer are whole in
every process: losses and samplers read the whole weight of the output layer.
"""

from collections.abc import Sequence
from math import gcd
from typing import Any

from torch import nn
from transformers import PreTrainedConfig
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, PackedColwiseParallel, TensorParallelLayer


class StyleOfModule(TensorParallelLayer):
    """The style that the module names in `tensor_parallel_style`, if it does.

    In a plan `*` stands for every number of a name, so `mlp.*` is every part of an MLP that is an `nn.Sequential`.
    """

    def validate_param(self, module: nn.Module, param: str, mesh: Any, parameter_name: str | None = None) -> None:
        _style_of(module).validate_param(module, param, mesh, parameter_name=parameter_name)

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        _style_of(module).shard_param(module, param, mesh)

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        return _style_of(module).install_forward(module, mesh)


def _style_of(module: nn.Module) -> TensorParallelLayer:
    style = getattr(module, "tensor_parallel_style", None)
    return TensorParallelLayer() if style is None else ALL_PARALLEL_STYLES[style]


# Queries, keys and values in one weight: each process gets its heads of all three.
ALL_PARALLEL_STYLES.register("packed_qkv", PackedColwiseParallel(split_factor=3))
ALL_PARALLEL_STYLES.register("style_of_module", StyleOfModule())


def check_divisible(config: PreTrainedConfig, fields: Sequence[str], processes: int) -> None:
    """Raise ValueError unless the number of processes divides these sizes of the config."""
    sizes = {field: getattr(config, field) for field in fields}
    if any(size % processes for size in sizes.values()):
        named = ", ".join(f"{field}={size}" for field, size in sizes.items())
        raise ValueError(
            f"tensor parallelism over {processes} processes does not divide {named}; the number of processes must "
            f"divide {gcd(*sizes.values())}."
        )
