"""Checkpoints at work: the HTTP server and the terminal chat.

server       `xdlm-serve`: the command line, the port, the end
app          OpenAI's HTTP API: routes and replies
requests     from JSON to what `generate` is asked
fields       validation of a request's fields
prompts      prompts to ids, within the limits
answers      from ids, block by block, to text that can be sent
engine       the queue, and the thread that runs batches
chat         `xdlm-chat`: a conversation in the terminal, drawn live
"""

import transformers  # noqa: F401  registers the model types before any module here is loaded
