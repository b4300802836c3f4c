"""Networks, a folder each.

registry        their registration with Transformers' Auto classes
strict_loading  weights that belong to the config, or an error
attention       bidirectional attention with rotary positions
network_inputs  checks of the arguments of forward
output_layer    an output layer that the fused loss can take the place of
llada           LLaDA, in the format of its public checkpoints
dit             the DiT of MDLM, UDLM, Duo and XDLM, in the format of its public checkpoints
"""

import transformers  # noqa: F401  registers the model types before any module here is loaded
