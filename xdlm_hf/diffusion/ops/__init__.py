"""Fast evaluation of the losses.

rows         sums over the vocabulary and the closed-form gradient, in blocks of rows
fused        output layer and loss together, in chunks of tokens
triton_rows  the passes over rows as kernels for a GPU; `kernels` chooses
"""
