"""Serving a checkpoint: an HTTP server and a terminal chat.

server       `xdlm-serve`: command line, socket, shutdown
app          OpenAI's HTTP API: routes and replies
requests     JSON to prompts and options of `generate`
fields       validation of a request's fields
prompts      prompts to ids, within the length limit
answers      ids of an answer, block by block, to text
engine       the queue and the thread that runs batches
chat         `xdlm-chat`: a conversation in the terminal, drawn live
"""
