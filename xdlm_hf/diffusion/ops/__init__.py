"""Fast evaluation of the losses.

rows         sums over the vocabulary and the closed-form gradient, in blocks of rows
fused        output layer and loss together, in chunks of tokens
kernels      choice between a pass over rows and its Triton twin
triton_rows  the passes over rows as Triton kernels, for a GPU
"""
