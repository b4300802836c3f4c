"""From noise to text: samplers, policies, and the loop that runs a network for them.

protocol     what a model must say of itself
generate     `model.generate()`
revise       `model.revise()`
options      the table of options
spelling     options as the user gives them, as rows of the table and back
resolution   one set of options from call, config and checkpoint
config       the options, stored as generation_config.json
layout       fixed, editable and masked positions of a batch
blocks       columns and steps of the blocks
output       what `generate` returns, and who watches it
sampler      the interface of samplers
confidence   low-confidence remasking with refinement (Algorithm 1)
ancestral    exact reverse diffusion (Eq. 11)
released     the authors' released samplers, token for token
refinement   policies that revise committed tokens
canvas       state of a generation
loop         the steps, and which rows are done
network      logits where a step needs them: cache, guidance, processors
cache        keys and values of a whole canvas
spans        positions of a text: masks, columns, characters
"""

import transformers  # noqa: F401  registers the model types before any module here is loaded
