"""The DiT of MDLM, UDLM, Duo and the paper's text models, in the format of its public checkpoints.

configuration_dit  sizes and noise, under the format's field names
layers_dit         embeddings, norm, and constants cached at inference
modeling_dit       the network, under the format's parameter names
"""
