"""Generation: samplers, refinement policies, and the loop that runs the network for them. In the order to read:

generate     `model.generate()`
revise       `model.revise()`: edit a given text
loop         the denoising steps, and which rows are done
sampler      interface of samplers
confidence   sampler of Algorithm 1: low-confidence remasking with refinement
constrained  the same for answers of a language: JSON by a schema
json_schema  JSON Schema as an expression, with the keywords that are supported
pattern      the regular expressions of its `pattern`
automaton    deterministic automata over bytes
token_automaton  over the tokens of a tokenizer, and best paths
refinement   policies that revise committed tokens: where tokens are refined
ancestral    sampler by exact reverse diffusion (Eq. 11)
released     the authors' released samplers, token for token
canvas       state of a generation
layout       fixed, editable and masked positions of a batch
blocks       columns and steps of each block
spans        positions given as masks, columns or characters
network      logits of the positions that a step needs: cache, guidance, processors
cache        keys and values of all positions
graphs       passes at fixed shapes, captured as CUDA graphs
output       return value of `generate`, history and streaming
protocol     interface of models
ranks        the same draws in all processes of one model
options      the table of options
option_checks  checks of their values
spelling     conversion between the user's options and rows of the table
compatibility  Transformers' options and processors that assume decoding from left to right
resolution   one set of options from call, config and checkpoint
config       the options, stored as generation_config.json
"""
