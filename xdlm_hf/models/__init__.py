"""Networks, a folder for each model family. In the order to read:

llada           LLaDA, in the format of its public checkpoints
dit             the DiT of MDLM, UDLM, Duo and XDLM, in the format of its public checkpoints
registry        registration of the families with Transformers' Auto classes
attention       bidirectional attention with rotary positions
network_inputs  checks of the arguments of forward
output_layer    output layer that can compute a loss instead of logits
strict_loading  loading that refuses pickles, damaged files and weights that do not fit the config
"""

import transformers  # noqa: F401  registers the model types before any module here is loaded
