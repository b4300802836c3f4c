"""LLaDA: the configuration and the network, under the names of the public checkpoints.

configuration_llada  config fields, k and the schedule
modeling_llada       the network
"""
