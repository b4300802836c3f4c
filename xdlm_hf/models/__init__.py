"""Networks, a folder for each model family. In the order to read:

llada             LLaDA, in the format of its public checkpoints
dit               the DiT of MDLM, UDLM, Duo and XDLM, in the format of its public checkpoints
unet              the pixel U-Net of the CIFAR-10 models, diffusers' `UNet2DModel`
configs           the config of every family, registered with AutoConfig
registry          the network of every family, registered with Transformers' other Auto classes
format_config     base of the configs, and the refusal to copy a part of the code
configured_noise  noise that the config of a model states
attention         bidirectional attention with rotary positions
network_inputs    checks of the arguments of forward
output_layer      output layer that can compute a loss instead of logits
tensor_parallel   styles of sharding layers over processes
strict_loading    loading that refuses pickles, damaged files and weights that do not fit the config
"""
