"""Fast evaluation of the losses.

rows         sums over the vocabulary and the closed-form gradient, in blocks of rows
fused        output layer and loss together, in chunks of tokens
"""
