"""Networks, a folder each.

registry      their registration with Transformers' Auto classes
output_layer  an output layer that the fused loss can take the place of
llada         LLaDA, in the format of its public checkpoints
"""

import transformers  # noqa: F401  registers the model types before any module here is loaded
