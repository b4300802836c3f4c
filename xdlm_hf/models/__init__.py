"""Networks, a folder each.

registry        their registration with Transformers' Auto classes
strict_loading  weights that belong to the config, or an error
output_layer    an output layer that the fused loss can take the place of
llada           LLaDA, in the format of its public checkpoints
"""

import transformers  # noqa: F401  registers the model types before any module here is loaded
