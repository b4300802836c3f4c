"""The pixel U-Net of the CIFAR-10 models: diffusers' `UNet2DModel` with a discretized logistic output.

configuration_unet  sizes, classes and noise
logistic_unet       the output layer
modeling_unet       the network: ids to logits
released_unet       parameter names of the released weights
"""
