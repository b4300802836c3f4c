"""How the losses are computed fast.

rows         sums over the vocabulary and the closed-form gradient, a few rows at a time
fused        output layer and loss together, without the logits of whole rows
"""
