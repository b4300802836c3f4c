"""Serving a checkpoint: an HTTP server and a terminal chat.

server       `xdlm-serve`: command line, socket, shutdown
app          OpenAI's HTTP API: routes and replies
requests     JSON to prompts and options of `generate`
fields       validation of a request's fields
prompts      prompts to ids, within the length limit
revisions    the same for /v1/revise
answers      ids of an answer, block by block, to text
drafts       the canvas after each step, for streams that ask for it
playground   the page that draws drafts as they come
engine       the queue and the thread that runs batches
chat         `xdlm-chat`: a conversation in the terminal, drawn live
"""
