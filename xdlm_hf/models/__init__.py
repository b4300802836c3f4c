"""Networks, a folder for each model family. In the order to read:

registry        registration of the families with Transformers' Auto classes
strict_loading  loading that refuses pickles, damaged files and weights that do not fit the config
attention       bidirectional attention with rotary positions
network_inputs  checks of the arguments of forward
output_layer    output layer that can compute a loss instead of logits
llada           LLaDA, in the format of its public checkpoints
dit             the DiT of MDLM, UDLM, Duo and XDLM, in the format of its public checkpoints
"""

import transformers  # noqa: F401  registers the model types before any module here is loaded
